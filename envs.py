"""Text environments: an observation comes in, one line of text goes out.

The contract is gymnasium's, with text on both sides:

    env = make("house")                             # or "scienceworld", "webshop"
    task = env.tasks()[0]
    variation = env.variations(task, "train")[0]    # "train", "dev" or "test"
    observation, info = env.reset(task, variation)  # info: task, prompt (system message), score
    observation, reward, terminated, truncated, info = env.step("look around")
                                                    # info: score, action (what was really sent)

Scores are integers up to 100 (ScienceWorld: -100...100). A reward is the change of the score, so
the rewards of an episode sum to its final score. `terminated` means solved or failed for good,
`truncated` that the step limit was reached. EnvFault means that the simulator died or hangs: drop
that episode (it is not a score of 0) and go on with reset(), which builds a new simulator.

A new environment is a subclass of Env in a file of its own: `--env path/to/my_world.py` plays it
(worlds/house.py is the example). Two threads may call two environments at once only if
these differ in `worker`.
To play: python envs.py --help
"""

import abc
import importlib
import inspect
import json
import sys
from typing import ClassVar

from engine import play
from engine.errors import UNKNOWN, unknown
from engine.plugins import find_class, is_file

# Imported only when asked for: the house needs no Java.
ENVS = {
    "scienceworld": "worlds.scienceworld:ScienceWorld",
    "house": "worlds.house:House",
    "webshop": "worlds.webshop.env:WebShop",
}


class EnvFault(RuntimeError):
    """The simulator died or hung. The episode is lost; the next reset() starts afresh."""


def encodable(text: str) -> str:
    """Half a surrogate pair reaches neither Java nor a tokenizer: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


class Env(abc.ABC):
    """What all environments share: checks, action clean-up, step limit, rewards.

    One object plays one episode at a time; make as many objects as there are parallel episodes.
    `task` and `variation` tell which; `steps` were played, for `score` points so far.
    `env_index` is its number among these objects, set by who plays them.

    step_limit  actions per episode, at least 1; None: the environment's own, see limit()
    """

    VERSION = ""  # name and version of the simulator, to be recorded with every result
    DEFAULT_TASKS: ClassVar[list[str]] = []  # what is played when no task is named
    DEFAULT_STEP_LIMIT = 30
    STEP_LIMITS: ClassVar[dict[str, int]] = {}  # of single tasks, where it is not the default
    env_index = 0
    worker = 0  # environments of different workers may be called at the same time, in threads

    def __init__(self, step_limit: int | None = None):
        if step_limit is not None and step_limit < 1:
            raise ValueError(f"step_limit must be at least 1, not {step_limit}")
        self.step_limit = step_limit
        self._running = False

    # A subclass fills in these six.
    @abc.abstractmethod
    def tasks(self) -> list[str]:
        """The names of all tasks."""

    @abc.abstractmethod
    def variation_count(self, task: str) -> int:
        """How many variations the task has."""

    @abc.abstractmethod
    def start(self, task: str, variation: int) -> tuple[str, str, str]:
        """Start an episode -> (first observation, task text, prompt)."""

    @abc.abstractmethod
    def act(self, action: str) -> tuple[str, int, bool, str]:
        """Play one action -> (observation, score so far, is it over?, the action really played)."""

    @abc.abstractmethod
    def valid_actions(self) -> list[str]:
        """Actions that make sense now, sorted. Slow in ScienceWorld (20-100 ms)."""

    @abc.abstractmethod
    def gold_path(self) -> list[str]:
        """A solution of this task and variation, from the start. The episode is not disturbed."""

    # The rest is the same for all; `anchor` may be overridden.
    def anchor(self) -> str:
        """Names the state that the next action is taken in, for credit per step (GiGPO).

        Asking changes nothing, not even what the simulator will draw. The default is the last
        observation of an action that was understood: override it where that is not the whole state.
        """
        return self._understood

    def limit(self, task: str) -> int:
        """The step limit in force for the task."""
        return self.step_limit or self.STEP_LIMITS.get(task, self.DEFAULT_STEP_LIMIT)

    def variations(self, task: str, split: str) -> list[int]:
        """Its variations in "train" (first half), "dev" (next quarter) or "test" (the rest)."""
        n = self._count(task)
        a, b = n // 4 * 2, n // 4 * 3  # ScienceWorld's rounding
        splits = {"train": range(a), "dev": range(a, b), "test": range(b, n)}
        if split not in splits:
            raise unknown("split", split, splits)
        return list(splits[split])

    def reset(self, task: str, variation: int) -> tuple[str, dict]:
        """Start an episode -> (observation, info with task, prompt, score).

        ValueError for an unknown task or variation, EnvFault when the simulator is lost.
        """
        last = self._count(task) - 1
        if variation not in range(last + 1):
            raise ValueError(f"unknown variation {variation!r} of {task}; there are: 0 to {last}")
        self._running = False
        self.task, self.variation = task, int(variation)
        observation, text, prompt = map(encodable, self.start(task, self.variation))
        self._understood = observation
        self.steps, self.score = 0, 0
        self._running = True
        return observation, {"task": text, "prompt": prompt, "score": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Play any text -> (observation, reward, terminated, truncated, info with score, action).

        RuntimeError when no episode is running, EnvFault when the simulator is lost.
        """
        if not self._running:
            raise RuntimeError("no episode is running: call reset()")
        self._running = False  # stays so if the simulator fails below
        action = " ".join(encodable(action).split())  # one line
        observation, score, terminated, action = self.act(action)
        observation = encodable(observation)
        if observation != UNKNOWN:
            self._understood = observation
        self.steps += 1
        reward = float(score - self.score)
        self.score = score
        truncated = self.steps >= self.limit(self.task) and not terminated
        self._running = not terminated and not truncated
        info = {"score": score, "action": action}
        return observation, reward, terminated, truncated, info

    def _count(self, task: str) -> int:
        if task not in self.tasks():
            raise unknown("task", task, self.tasks())
        return self.variation_count(task)


def env_class(name: str) -> type[Env]:
    """A class of ENVS, or that of a file. ValueError; RuntimeError if a package is missing."""
    if is_file(name):
        return find_class(name, Env, "worlds")
    if name not in ENVS:
        raise unknown("environment", name, ENVS)
    module, class_name = ENVS[name].split(":")
    try:
        return getattr(importlib.import_module(module), class_name)
    except ModuleNotFoundError as error:
        message = f"{name} needs the package {error.name}: install the requirements"
        raise RuntimeError(message) from error


def make(name: str, **options) -> Env:
    """Build an environment by its name in ENVS or its file. The options are those of its class.

    ValueError for an unknown name, an unknown option or an impossible value.
    """
    cls = env_class(name)
    known = inspect.signature(cls).parameters
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
    return cls(**options)


def parse_options(pairs: list[str]) -> dict:
    """Options as they are typed; numbers, true and false are no text. ValueError without a =.

    >>> parse_options(["rooms=2", "partial_credit=False", "data=Folder"])
    {'rooms': 2, 'partial_credit': False, 'data': 'Folder'}
    """
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env-options {pair}: write name=value")
        try:
            options[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            options[name] = value
    return options


def from_settings(s) -> Env:
    """An environment as the settings want it."""
    options = parse_options(s.env_options)
    if s.step_limit:
        options["step_limit"] = s.step_limit
    return make(s.env, **options)


def default_tasks(s) -> list[str]:
    """What is played when the settings name no task: the environment's own choice, else all."""
    return env_class(s.env).DEFAULT_TASKS or from_settings(s).tasks()


def task_pool(env: Env, tasks, split: str, variations: int) -> list[tuple[str, int]]:
    """[(task, variation)]: the first variations of a split, of each task.

    ValueError where there is nothing to play.
    """
    if not tasks:
        raise ValueError("name the tasks: --tasks NAME ...")
    pool = []
    for task in tasks:
        chosen = env.variations(task, split)[:variations]
        if not chosen:
            raise ValueError(f"{task} has no {split} variations")
        pool += [(task, variation) for variation in chosen]
    return pool


if __name__ == "__main__":
    import envs  # a world's file imports this module by its name

    sys.exit(play.main(envs.make, envs.parse_options, envs.ENVS))
