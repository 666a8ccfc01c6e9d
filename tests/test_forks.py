"""A fork is one file: how it is found, and docs/forks.md.     pytest tests/test_forks.py"""

import io
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT

import empo2
import envs
import eval as evaluation
import settings
import train
from engine import arguments, command, evaluations, plugins, runs

DOCUMENT = (ROOT / "docs" / "forks.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
WORLD = """
from worlds.house import House
class World(House):
    pass
"""
SMALL = """--env-options rooms=2 containers=2 parts=1 --tasks radio --step-limit 3 --variations 1
    --group-size 3 --tasks-per-iteration 1 --action-tokens 16 --tip-tokens 8 --lora-r 2
    --model standin/house --eval-every 0 --iterations 1""".split()


def test_a_preset_keeps_its_algorithm(tmp_path):
    fork = tmp_path / "fork.py"
    fork.write_text("from empo2 import Algorithm\nclass A(Algorithm): pass")
    asked = ["--preset", "gigpo", "--algorithm", str(fork)]
    with pytest.raises(ValueError, match=r"gigpo is GiGPO \(gigpo.py\), and .*fork.py is no sub"):
        arguments.parse(asked)
    fork = tmp_path / "other.py"
    fork.write_text("from algorithms.gigpo import GiGPO\nclass A(GiGPO):\n    preset = 'gigpo'")
    for asked in ([], ["--preset", "empo2-gigpo"]):
        s, _ = arguments.parse([*asked, "--algorithm", str(fork)])
        assert s.algorithm == str(fork)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """The document's example, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_idea.py").write_text(EXAMPLE)
    (tmp_path / "my_world.py").write_text(WORLD)
    return tmp_path / "my_idea.py"


# --- How it is found ------------------------------------------------------------------------------
HEAD = "import dataclasses\nfrom empo2 import Algorithm\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gsop", "", r"unknown algorithm 'gsop'; did you mean gspo or sdpo\?"),
        ("fork", "", "; there are: .*gspo.* path/to/file.py"),
        ("absent.py", "", "absent.py: there is no such file"),
        ("fork.py", "x = 1", "fork.py: needs one subclass of Algorithm; it has none"),
        ("fork.py", HEAD, "it has none"),  # an imported one does not count
        ("fork.py", f"{HEAD}class A(Algorithm): pass\nclass B(Algorithm): pass", "it has A, B"),
        (
            "fork.py",
            f"{HEAD}class A(Algorithm):\n  def admited(self, episodes): pass",
            r"admited overrides nothing; did you mean admitted\?",
        ),
        (
            "fork.py",
            f"{HEAD}@dataclasses.dataclass\nclass Own(Algorithm.Settings): pass\n"
            "class A(Algorithm): pass",
            "fork.py: write `Settings = Own` in the class, too",
        ),
        ("fork.py", "\nimport nowhere", "fork.py, line 2: ModuleNotFoundError: No module named"),
        ("fork.py", "x = 1\nif", "fork.py, line 2: SyntaxError: invalid syntax"),
        ("fork.py", "import json\njson.loads('')", "fork.py, line 2: JSONDecodeError"),
        ("fork.py", f"{HEAD}class A(Algorithm): preset = 'gpro'", "unknown preset 'gpro'; did you"),
        (
            "fork.py",
            f"{HEAD}class S(Algorithm.Settings):\n  w: int = 1\nclass A(Algorithm): Settings = S",
            "fork.py: its Settings must be a @dataclass, and a subclass of settings.Settings",
        ),
        (
            "fork.py",
            f"{HEAD}@dataclasses.dataclass\nclass S: pass\nclass A(Algorithm): Settings = S",
            "fork.py: its Settings must be a @dataclass",
        ),
    ],
)
def test_what_is_no_fork_is_refused_in_one_line(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fork.py").write_text(content)
    for _ in range(2):  # what has failed is not half there
        with pytest.raises(ValueError, match=message) as caught:
            arguments.parse(["--algorithm", name])
        assert "\n" not in str(caught.value)


def test_a_name_is_a_file_of_algorithms():
    for file in (ROOT / "algorithms").glob("*.py"):
        cls = arguments.algorithm_class(file.stem)
        assert issubclass(cls, empo2.Algorithm) and cls.__module__ == f"algorithms.{file.stem}"
    assert arguments.algorithm_class("empo2") is empo2.Algorithm


def test_its_settings_are_flags(fork, capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--algorithm", "my_idea.py", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--loss-weight LOSS_WEIGHT weight of episodes below their group's mean" in shown
    s, _ = arguments.parse(["--algorithm", "my_idea.py", "--loss-weight", "0.25"])
    assert s.loss_weight == 0.25 and s.algorithm == str(fork)  # a resume may start elsewhere
    assert arguments.algorithm_class(s.algorithm)(s).s is s
    with pytest.raises(ValueError, match="--loss-wieght'; did you mean --loss-weight"):
        arguments.parse(["--algorithm", "my_idea.py", "--loss-wieght", "1"])
    with pytest.raises(ValueError, match="unknown setting '--loss-weight'"):
        arguments.parse(["--loss-weight", "1"])


def test_its_preset_comes_with_it_and_is_said(tmp_path):
    grpo = [f"preset grpo: {name} = {value}" for name, value in settings.GRPO.items()]
    s, notes = arguments.parse(["--algorithm", "gspo"])
    assert (s.preset, s.memory_prob, s.clip_high) == ("grpo", 0.0, 4e-4) and notes == grpo
    s, notes = arguments.parse(["--algorithm", "gspo", "--memory-prob", "0.5"])
    assert s.memory_prob == 0.5 and notes == grpo[1:]
    s, notes = arguments.parse(["--algorithm", "gspo", "--preset", "empo2"])
    assert (s.preset, s.memory_prob, notes) == ("empo2", 0.25, [])
    s, _ = arguments.parse(["--preset", "empo2-gigpo", "--step-weight", "2"])
    assert (s.algorithm, s.memory_prob, s.step_weight) == ("gigpo", 0.25, 2.0)
    (tmp_path / "mine.yaml").write_text("algorithm: gspo\nmemory_prob: 0.7\nclip_high: 0.1\n")
    s, notes = arguments.parse(["--config", str(tmp_path / "mine.yaml")])
    assert (s.algorithm, s.preset, s.memory_prob, s.clip_high) == ("gspo", "grpo", 0.0, 0.1)
    assert notes == grpo


def test_a_config_can_leave_a_setting_to_the_default_but_not_to_another_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run_dir: null\nvariations:\nlora_r: 4\n")
    s, _ = arguments.parse(["--config", str(path)])
    assert (s.run_dir, s.variations, s.lora_r) == (None, None, 4)
    path.write_text("config: base.yaml\nlora_r: 4\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: cannot name another config$"):
        arguments.parse(["--config", str(path)])


def test_what_a_config_says_counts_on_resume_as_if_it_were_given(tmp_path, monkeypatch):
    """An edited `iterations` makes the run longer; what cannot change is refused."""
    seen = []

    def open_run(s, notes, names, stack):
        seen.append(names)
        raise ValueError("seen")

    monkeypatch.setattr(runs, "open_run", open_run)
    (tmp_path / "mine.yaml").write_text("env: house\niterations: 20\nsweep: {seeds: [0]}\n")
    run = ["--resume", "--run-dir", str(tmp_path / "run")]
    assert train.main([*run, "--config", str(tmp_path / "mine.yaml")]) == 2
    assert seen == [{"resume", "run_dir", "config", "env", "iterations"}]


def test_a_switch_that_is_turned_off_cannot_change_on_resume(tmp_path, monkeypatch):
    @dataclass
    class Own(settings.Settings):
        cut: bool = True

    monkeypatch.setattr(runs, "newest_checkpoint", lambda run_dir: (Own(), 1))
    monkeypatch.setattr(runs, "changed_sources", lambda folder: {})
    with pytest.raises(ValueError, match="own settings; cut cannot change"):
        runs.continue_run(tmp_path, Own(cut=False), {"resume", "no_cut"})  # --no-cut


@pytest.mark.parametrize("number", [np.float32(2), np.int64(2), torch.tensor(2.0)])
def test_what_it_counts_may_be_a_number_of_any_kind(number, tmp_path):
    (tmp_path / "log").touch()
    runs.append(tmp_path / "log", [{"iteration": 0, "own": number}])
    assert runs.records(tmp_path / "log") == [{"iteration": 0, "own": 2}]


def test_a_base_model_is_evaluated_with_the_settings_of_the_algorithm():
    words = "--model m --tasks radio -- --env house --algorithm gigpo".split()
    s, *_ = evaluation.run_settings(evaluations.parse(words, ""))
    assert (s.algorithm, s.step_weight) == ("gigpo", 1.0)


def test_a_world_is_a_file(fork, capsys):
    s, _ = arguments.parse(["--env", "my_world.py", "--env-options", "rooms=3"])
    assert s.env == str(fork.parent / "my_world.py")
    env = envs.from_settings(s)
    assert type(env).__name__ == "World" and "radio" in env.tasks()
    with pytest.raises(ValueError, match="no_world.py: there is no such file"):
        envs.make("no_world.py")
    with pytest.raises(ValueError, match="my_idea.py: needs one subclass of Env; it has none"):
        envs.make("my_idea.py")
    with pytest.raises(SystemExit):
        command.refuse(["--env", "my_world.py", "--tasks", "raido"], "", envs.make)
    assert "unknown task 'raido'; did you mean radio?" in capsys.readouterr().err


# --- A run with it --------------------------------------------------------------------------------
def test_the_example_of_the_document_runs_and_a_changed_file_is_noticed(fork, capsys, monkeypatch):
    """It learns, and what it records goes on only if told."""
    run = ["--run-dir", "run"]
    mine = ["--algorithm", "my_idea.py", "--env", "my_world.py"]
    assert train.main([*mine, *SMALL, "--loss-weight", "0", *run]) == 0
    capsys.readouterr()
    (metrics,) = runs.records(fork.parent / "run" / "metrics.jsonl")
    turns = [t for e in runs.records(fork.parent / "run" / "episodes.jsonl") for t in e["turns"]]
    assert metrics["optimizer_steps"] == 1 and {t["advantage"] > 0 for t in turns} == {True, False}
    assert min(t["advantage"] for t in turns) == 0  # the weight has reached it

    def resume(*words):
        monkeypatch.setattr(plugins, "checksums", {})  # as in a new process
        code = train.main(["--resume", *run, *words])
        return code, capsys.readouterr().err

    def evaluate():
        monkeypatch.setattr(plugins, "checksums", {})
        evaluation.run_settings(evaluations.parse(["run", "--temperature", "0.4"], ""))
        return capsys.readouterr().err

    assert resume()[0] == 0 and evaluate() == ""
    for option, file in (("algorithm", fork), ("env", fork.parent / "my_world.py")):
        file.write_text(file.read_text() + "\n# another thought\n")
        assert f"{file} has changed since the checkpoint; it is used as it is\n" == evaluate()
        code, said = resume("--iterations", "2")
        assert code == 2 and said == (
            f"train.py: {file} has changed since the checkpoint; "
            f"--{option} {file} goes on with the new one\n"
        )
        number = 2 if option == "algorithm" else 3
        code, _ = resume("--iterations", str(number), f"--{option}", file.name)
        assert code == 0 and resume()[0] == 0  # it is the run's own file now
    code, said = resume("--algorithm", "gspo")
    assert code == 2 and "algorithm cannot change" in said
    assert len(runs.records(fork.parent / "run" / "metrics.jsonl")) == 3


def test_an_error_of_a_fork_names_its_line(fork, capsys):
    fork.write_text(
        f"{HEAD}class A(Algorithm):\n  def collect(self, draw, play):\n    return 1 / 0\n"
    )
    assert (
        train.main(["--algorithm", "my_idea.py", "--env", "house", *SMALL, "--run-dir", "r"]) == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"train.py: ZeroDivisionError: division by zero ({fork}, line 5)"
    assert "Traceback" in (fork.parent / "r" / "error.log").read_text()


def test_a_world_in_a_file_is_played_by_hand(fork):
    command = [sys.executable, ROOT / "envs.py", "--env", "my_world.py", "--task", "radio"]
    done = subprocess.run(command, input="look around\n", capture_output=True, text=True)
    assert "[score 0] > " in done.stdout and not done.stderr


# --- The document ---------------------------------------------------------------------------------
def code_lines(path):
    """Lines that are not blank, comment or docstring."""
    lines = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        blank = token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
        blank |= token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        docstring = token.type == tokenize.STRING and previous != tokenize.OP
        if not blank and not (docstring and token.string.startswith('"""')):
            lines |= {*range(token.start[0], token.end[0] + 1)}
        previous = token.type
    return len(lines)


def test_the_document_names_every_method_and_every_example():
    methods = [name for name in vars(empo2.Algorithm) if name.islower() and name[0] != "_"]
    documented = re.findall(r"^\| `(\w+)\(", DOCUMENT, re.MULTILINE)
    assert sorted(documented) == sorted(set(methods) - {"preset", "needs_anchors", "needs_logps"})
    for file in (ROOT / "algorithms").glob("*.py"):
        (row,) = re.findall(rf"^\| `{file.name}` \|.*$", DOCUMENT, re.MULTILINE)
        assert row.split(" | ")[3] == str(code_lines(file)), row
    assert len([word for word in DOCUMENT.split() if word.strip("|-—")]) <= 1000
