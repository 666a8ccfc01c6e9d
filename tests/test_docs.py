"""Every written command is at least understood; every example in a docstring is true."""

import argparse
import doctest
import importlib
import re
import shlex

import pytest
from conftest import ROOT

import eval as evaluation
import train
from engine import runs
from experiments import sweep

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")]
DOCUMENTS += [*ROOT.glob("standin/*.md")]
SOURCES = [
    path
    for folder in (".", "worlds", "experiments", "standin")
    for path in (ROOT / folder).glob("*.py")
]


def commands():
    """(where, command) of all lines and code spans that begin with `python`."""
    for path in DOCUMENTS + SOURCES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = re.findall(r"`(python [^`\n]+)`", text)
        spans += re.findall(r"^ *(python (?:-m )?[\w./]+(?: [^\n#]*)?)$", text, re.MULTILINE)
        for command in sorted({span.partition("  ")[0] for span in spans}):
            yield path.relative_to(ROOT).as_posix(), command


class Parsed(Exception):
    """The arguments were understood."""


def understand(command, monkeypatch):
    words = shlex.split(command)[1:]
    if words[0] == "-m":
        words = words[1:]
    name, argv = words[0].removesuffix(".py").replace("/", "."), words[1:]
    if name in ("pytest", "venv"):
        return
    if argv == ["--help"]:
        with pytest.raises(SystemExit):
            train.parse(argv)
    elif name == "train":
        s, _ = train.parse(argv)
        if not s.resume:
            tasks = runs.make_env(s).tasks() if s.env == "house" else s.tasks
            assert set(s.tasks) <= set(tasks)
    elif name == "eval":
        evaluation.parse(argv)
    elif name == "experiments.sweep":
        args, settings = sweep.parse(argv)
        if not args.report:
            args.tasks = args.tasks or train.parse(settings)[0].tasks
            sweep.common_settings(args, settings)
    else:
        parse = argparse.ArgumentParser.parse_args

        def stop(self, args=None, namespace=None):
            parse(self, argv, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            importlib.import_module(name).main()


@pytest.mark.parametrize("where, command", commands())
def test_every_written_command_is_understood(where, command, monkeypatch):
    understand(command, monkeypatch)


def test_a_wrong_command_would_be_noticed(monkeypatch):
    for wrong in ("python train.py --env house --tasks power-component", "python eval.py"):
        with pytest.raises((ValueError, AssertionError)):
            understand(wrong, monkeypatch)


@pytest.mark.parametrize(
    "name",
    [
        "empo2",
        "settings",
        "rollout",
        "rows",
        "memory",
        "policy",
        "envs",
        "worlds.scienceworld",
    ],
)
def test_the_examples_in_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
