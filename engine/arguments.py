"""The parser of the command line, made from the settings. Importing it does not load torch."""

import argparse
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from engine.errors import first_line, unknown
from engine.plugins import find_class
from settings import PRESETS, Settings


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and every default that is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Bad input is a ValueError of one line."""

    def error(self, message):
        raise ValueError(message)


def parse(argv, description=None):
    """(settings, lines about the preset). Explicit flags override the preset, that the --config.

    Raises ValueError with one line for bad input.
    """
    argv = with_home(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "algorithm"):  # these decide what there is to be set
        first.add_argument(f"--{name}", nargs="?")
    named, _ = first.parse_known_args(argv)
    words = []
    if named.config:
        words = config_words(named.config)
        first.parse_known_args([*words, *argv], named)
    preset = named.preset or of_algorithm(named.algorithm or "empo2")[1]
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    own = PRESETS[preset].get("algorithm")
    if own and named.algorithm:
        cls = algorithm_class(own)
        if not issubclass(algorithm_class(named.algorithm), cls):
            raise ValueError(
                f"--preset {preset} is {cls.__name__} ({own}.py), and the class of --algorithm "
                f"{named.algorithm} is no subclass of it"
            )
    chosen = {"preset": preset}
    notes = []
    for name, value in PRESETS[preset].items():
        if name not in given(argv):
            chosen[name] = value
            notes.append(f"preset {preset}: {name} = {value}")
    algorithm = chosen.get("algorithm") or named.algorithm or "empo2"
    cls, _ = of_algorithm(algorithm)
    if algorithm.endswith(".py"):
        chosen["algorithm"] = str(Path(algorithm).resolve())  # a resume may be started elsewhere
    parser = Parser(cls, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    for action in parser._actions:  # one spelling is shown, both are understood
        action.option_strings = [flag for flag in action.option_strings if "_" not in flag]
    s, rest = parser.parse_args_into_dataclasses(
        [*words, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        flags = [flag for flag in parser._option_string_actions if "_" not in flag]
        raise unknown("setting", rest[0], flags)
    if s.env.endswith(".py"):
        chosen["env"] = str(Path(s.env).resolve())
    return replace(s, **chosen), notes


def demonstration(s, argv):
    """The command line of configs/stages.yaml, with the words of `argv`; None if these do not fit.

    Its model has learnt one task of ScienceWorld's form, not its solution.
    """
    config = Path(__file__).parent.parent / "configs" / "stages.yaml"
    shown = read_config(config)
    asked = (s.model, s.tasks)  # who gives both gets just these
    fits = asked in ((None, []), (None, shown["tasks"]), (shown["model"], []))
    if s.env != shown["env"] or s.config or s.resume or not fits:
        return None
    credit = []
    if not given(argv) & {"preset", "algorithm"}:
        credit = ["--preset", "empo2-modes"]
    return ["--config", str(config), *credit, *argv]


def algorithm_class(name):
    """`empo2.Algorithm` or its subclass, by the name or path that --algorithm takes."""
    base = importlib.import_module("empo2").Algorithm  # only now: it loads torch
    return base if name == "empo2" else find_class(name, base, "algorithms")


def of_algorithm(name):
    """(the class of its settings, its preset); nothing slow is imported for EMPO² itself."""
    if name == "empo2":
        return Settings, "empo2"
    algorithm = algorithm_class(name)
    own = algorithm.Settings
    defined = vars(sys.modules[algorithm.__module__]).values()
    unused = [c for c in defined if isinstance(c, type) and issubclass(c, Settings) and c != own]
    if any(cls.__module__ == algorithm.__module__ for cls in unused):
        raise ValueError(f"{name}: write `Settings = {unused[0].__name__}` in the class, too")
    if not issubclass(own, Settings) or "__dataclass_fields__" not in vars(own):
        raise ValueError(
            f"{name}: its Settings must be a @dataclass, and a subclass of settings.Settings"
        )
    return own, algorithm.preset


def read_config(path):
    """The mapping in a YAML file of settings. Raises ValueError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return dict(content.items())
    except (OSError, yaml.YAMLError, AttributeError, UnicodeError) as error:
        raise ValueError(
            f"--config {path}: is no YAML file of settings ({first_line(error)})"
        ) from error


def config_words(path):
    """The settings in a YAML file, as words of a command line, but for `sweep`."""
    content = read_config(path)
    content.pop("sweep", None)
    if "config" in content:
        raise ValueError(f"--config {path}: cannot name another config")
    return with_home(as_words(content))


def as_words(mapping):
    """Settings as words of a command line; null is the default.

    >>> as_words({"lora_r": 4, "tasks": ["fan", "radio"], "load_in_4bit": True})
    ['--lora-r', '4', '--tasks', 'fan', 'radio', '--load-in-4bit']
    """
    words = []
    for name, value in mapping.items():
        if value is None:
            continue
        words.append(f"--{name}".replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def with_home(argv):
    """The words of a command line with ~ replaced: a shell leaves it in --run-dir=~/x."""
    parts = [word.partition("=") for word in argv]
    return ["".join(map(os.path.expanduser, part)) for part in parts]


def given(argv):
    """Names of the settings that a command line gives."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}
