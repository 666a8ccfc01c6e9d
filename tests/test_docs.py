"""Every written command is at least understood; every example in a docstring is true."""

import argparse
import doctest
import importlib
import re
import shlex

import pytest
from conftest import ROOT

import envs
import train
from engine import evaluations, hardware, play
from experiments import sweep

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")]
DOCUMENTS += [*ROOT.glob("standin/*.md")]
FOLDERS = (".", "algorithms", "engine", "experiments", "standin", "worlds")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
MADE_A_RECORD = "python -m experiments.shuffled_tips sweeps/shuffled-0 --seed 0"  # with older code


def commands():
    """(where, command) of all lines and code spans that begin with `python`."""
    for path in DOCUMENTS + SOURCES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = re.findall(r"`(python [^`\n]+)`", text)
        spans += re.findall(r"^ *(python (?:-m )?[\w./]+(?: [^\n#]*)?)$", text, re.MULTILINE)
        for command in sorted({span.partition("  ")[0] for span in spans} - {MADE_A_RECORD}):
            yield path.relative_to(ROOT).as_posix(), command


class Parsed(Exception):
    """The arguments were understood."""


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    """{name: where it is} of the files that README.md and docs/forks.md let one save."""
    folder, found = tmp_path_factory.mktemp("fork"), {}
    for document in ("README.md", "docs/forks.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for name, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL):
            (folder / name).write_text(code)
            found[name] = str(folder / name)
    return found


def understand(command, monkeypatch, pasted):
    words = [pasted.get(word, word) for word in shlex.split(command)[1:]]
    if words[0] == "-m":
        words = words[1:]
    with_a_gpu = hardware.find_device()._replace(gigabytes=80.0)
    monkeypatch.setattr(hardware, "find_device", lambda: with_a_gpu)
    name, argv = words[0].removesuffix(".py").replace("/", "."), words[1:]
    if name in ("pytest", "venv"):
        return
    if argv == ["--help"]:
        with pytest.raises(SystemExit):
            train.parse(argv)
    elif name == "train":
        s, _ = train.parse(argv)
        if not s.resume:
            tasks = envs.from_settings(s).tasks() if s.env == "house" else s.tasks
            assert set(s.tasks) <= set(tasks)
    elif name == "eval":
        evaluations.parse(argv, "")
    elif name == "experiments.sweep":
        sweep.common_settings(*sweep.parse(argv))
    else:
        parse = argparse.ArgumentParser.parse_args

        def stop(self, args=None, namespace=None):
            parse(self, argv, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            if name == "envs":
                play.main(envs.make, envs.parse_options, envs.ENVS)
            importlib.import_module(name).main()


@pytest.mark.parametrize("where, command", commands())
def test_every_written_command_is_understood(where, command, monkeypatch, pasted):
    understand(command, monkeypatch, pasted)


def test_a_wrong_command_would_be_noticed(monkeypatch, pasted):
    for wrong in ("python train.py --env house --tasks power-component", "python eval.py"):
        with pytest.raises((ValueError, AssertionError)):
            understand(wrong, monkeypatch, pasted)


EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_are_true(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
