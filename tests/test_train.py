"""train.py from the outside: what a run leaves, what it goes on from, what is refused."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import accelerate.tracking
import numpy as np
import pytest
import torch
from conftest import AS_ON_A_GPU, ROOT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import empo2
import envs
import eval as evaluation
import settings
import train
from engine import arguments, command, evaluations, hardware, logs, processes, runs, tables
from engine.errors import UNKNOWN
from experiments import report, sweep
from policy import Policy
from settings import PRESETS

SMALL = """
    --env house --tasks radio fan --env-options rooms=2 step_limit=4 --variations 1 --lora-r 2
    --group-size 3 --tasks-per-iteration 2 --action-tokens 16 --tip-tokens 10 --memory-prob 0.6
    --tip-threshold 0 --model standin/house --minibatch-episodes 2 --eval-every 0
""".split()
STANDIN = ROOT / "standin" / "house"


def timeless(path):
    """The lines of a log without what depends on the clock."""
    lines = runs.records(path)
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "peak_"))} for line in lines
    ]


def weights(run_dir, iteration):
    return load_file(run_dir / f"checkpoint-{iteration}" / "adapter_model.safetensors")


def assert_same_run(ours, theirs, iterations):
    for log in runs.LOGS:
        assert timeless(ours / log) == timeless(theirs / log), log
    a, b = weights(ours, iterations), weights(theirs, iterations)
    assert all(torch.equal(a[name], b[name]) for name in b)


def start(run_dir, *words):
    """Exit code of a small run, or of one that goes on."""
    small = [] if "--resume" in words else SMALL
    return train.main([*small, "--run-dir", str(run_dir), *map(str, words)])


EVALS = ["--eval-variations", 2, "--eval-episodes", 1]
WHOLE = ["--eval-every", 3, *EVALS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of four iterations."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert start(run_dir, *WHOLE, "--iterations", 4) == 0
    return run_dir


def test_a_run_leaves_what_is_promised(finished):
    metrics = runs.records(finished / "metrics.jsonl")
    episodes = runs.records(finished / "episodes.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2, 3] and len(episodes) == 4 * 6
    glossary = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in glossary for m in metrics for name in m)
    assert all(m["optimizer_steps"] for m in metrics), "there is something to learn from"
    assert metrics[-1]["memory_turns"] > 0 and metrics[-1]["sampler_gap"] < 1e-4
    last = [e for e in episodes if e["iteration"] == 3]
    assert sum(e["return"] for e in last) / 6 == pytest.approx(metrics[3]["return"], abs=1e-3)
    advantages = [e["turns"][0]["advantage"] for e in last]
    assert sum(advantages) == pytest.approx(0, abs=1e-3) and any(advantages)
    evals = runs.records(finished / "evals.jsonl")
    assert [e["iteration"] for e in evals] == [0, 3, 4]
    assert [e["training_episodes"] for e in evals] == [0, 18, 24]
    played = {task: row["episodes"] for task, row in evals[0]["tasks"].items()}
    assert played == {"radio": 2, "fan": 2}
    assert evals[2]["score"] == sum(t["mean"] for t in evals[2]["tasks"].values()) / 2
    assert set(runs.checkpoints(finished)) - {0} == {3, 4}, "only the newest, and the best one"
    base = AutoModelForCausalLM.from_pretrained(STANDIN)
    model = PeftModel.from_pretrained(base, finished / "checkpoint-4")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_learning_rate_falls_at_the_end(finished, tmp_path):
    assert start(tmp_path, "--iterations", 2, "--lr-decay", 1, "--learning-rate", 1e-3) == 0
    for folder, rate in ((finished / "checkpoint-4", 1e-3), (tmp_path / "checkpoint-2", 5e-4)):
        (group,) = torch.load(folder / "optimizer.pt")["param_groups"]
        assert group["lr"] == rate


def test_neither_waves_nor_evaluations_change_what_is_played(finished, tmp_path):
    """The same draws, tips shown and rewards; weights equal but for rounding."""
    assert start(tmp_path, "--iterations", 2, "--rollout-batch", 4) == 0
    ours, theirs = (runs.records(path / "episodes.jsonl") for path in (tmp_path, finished))
    assert any(turn["tips"] for e in ours for turn in e["turns"])
    assert ours == theirs[:12]


AS_THERE = ["--dtype", AS_ON_A_GPU["dtype"], "--gradient-checkpointing"]


@pytest.mark.parametrize("place", [[], pytest.param(AS_THERE, marks=pytest.mark.slow)])
def test_a_run_that_failed_or_ended_goes_on_as_if_it_had_not(
    place, finished, tmp_path, monkeypatch
):
    """A failure in iteration 2 with no checkpoint but the first: the logs are cut back to it."""
    whole, run_dir = finished, tmp_path / "run"
    if place:
        whole = tmp_path / "whole"
        assert start(whole, *WHOLE, *place, "--iterations", 4) == 0
    update = empo2.update
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("the gradient is not finite")
        return update(*args, **kwargs)

    monkeypatch.setattr(empo2, "update", failing)
    assert start(run_dir, *WHOLE, *place, "--iterations", 3, "--save-every", 10) == 2
    assert len(runs.records(run_dir / "metrics.jsonl")) == 2 and runs.checkpoints(run_dir) == [0]
    assert "FloatingPointError" in (run_dir / "error.log").read_text()
    assert start(run_dir, "--resume") == 0
    assert start(run_dir, "--resume", "--iterations", 4) == 0
    assert_same_run(run_dir, whole, 4)
    if not place:  # stopped during the evaluation
        shutil.rmtree(run_dir / "checkpoint-4")
        text = (run_dir / "evals.jsonl").read_text()
        (run_dir / "evals.jsonl").write_text(text[:-40])
        assert start(run_dir, "--resume", "--iterations", 4) == 0
        assert_same_run(run_dir, whole, 4)
        assert start(run_dir, "--resume", "--iterations", 5) == 0
        evals = runs.records(run_dir / "evals.jsonl")
        assert [e["iteration"] for e in evals] == [0, 3, 4, 5], "none is lost"


def test_reflexion_moves_no_weight(tmp_path):
    small = [word for word in SMALL if word not in ("--memory-prob", "0.6")]
    small += ["--run-dir", str(tmp_path), "--preset", "reflexion", "--save-every", "2"]
    assert train.main([*small, "--iterations", "2"]) == 0
    first, last = weights(tmp_path, 0), weights(tmp_path, 2)
    assert all(torch.equal(first[name], last[name]) for name in first)
    metrics = runs.records(tmp_path / "metrics.jsonl")
    assert metrics[1]["memory_turns"] == metrics[1]["turns"] and "loss" not in metrics[1]


def test_a_new_learner_is_what_the_settings_say(checkpoint):
    wanted = {"memory_capacity": 3, "novelty_threshold": 0.7, "learning_rate": 1e-4, "max_tips": 2}
    s = settings.Settings(model=checkpoint, tip_rank="similarity", **wanted)
    learner = train.make_learner(empo2.Algorithm(s))
    (group,) = learner.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0)
    assert group["params"] == learner.policy.trainable()
    assert (learner.tip_memory.capacity, learner.novelty.threshold) == (3, 0.7)
    slot = SimpleNamespace(scores=[1, 2, 3], totals=[1, 2, 3], trials=[1, 1, 1], texts="abc")
    similar = np.array([0.9, 0.8, 0.7])
    assert [*learner.tip_memory.order(slot, similar)] == [0, 1], "the algorithm's"


def test_every_task_comes_once_before_any_comes_again():
    """And groups have numbers of their own, whatever they are drawn for."""
    pool, s = [("fan", n) for n in range(5)], settings.Settings(group_size=2)
    draw = train.job_drawer(pool, s, np.random.default_rng(0))
    jobs = [*draw(2), *draw(1), *draw(0), *draw(4)]
    assert [(job.group, job.member) for job in jobs] == [(g, m) for g in range(7) for m in (0, 1)]
    played = [(job.task, job.variation) for job in jobs]
    assert played[::2] == played[1::2] and sorted(played[:10:2]) == pool
    rng = np.random.default_rng(0)
    assert [v for _, v in played[::2]] == [*rng.permutation(5), *rng.permutation(5)[:2]]


# --- What is refused ------------------------------------------------------------------------------
def refused(capsys, *argv):
    """Run with bad input: a non-zero exit and one line on stderr, which is returned."""
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train.py:")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_refused_in_one_line(capsys, tmp_path, finished, monkeypatch):
    new = ["--run-dir", tmp_path / "new"]
    short, go_on = [*SMALL, *new], ["--resume", "--run-dir", finished]
    for said, *words in (
        ("unknown environment", *new, "--env", "nowhere"),
        ("did you mean radio?", *new, "--env", "house", "--tasks", "radios"),
        ("did you mean grpo or gigpo?", *new, "--preset", "gpro"),
        ("did you mean gigpo", *new, "--algorithm", "gigp"),
        ("unknown option", *short, "--env-options", "attics=2"),
        ("name=value", *short, "--env-options", "rooms"),
        ("be positive", *new, "--eval-episodes", "0"),
        ("use --pack episode", *new, "--pack", "group", "--history", "2"),
        ("between 0 and 1", *new, "--memory-prob", "2"),
        ("not be negative", *new, "--beta", "-1"),
        ("no room for even one turn", *short, "--context", "20"),
        ("no room to ask for a tip after radio (", *short, "--context", 1000, "--tip-tokens", 990),
        ("lower --context", *short, "--context", "100000"),
        ("tokenizer", *SMALL, "--model", tmp_path, "--run-dir", tmp_path / "x"),
        ("needs a --model", *new, "--env", "webshop"),
        ("exists", *SMALL, "--run-dir", finished),
        ("cannot change", *go_on, "--seed", "7"),
        ("can only make it longer", *go_on, "--iterations", "2"),
        ("nothing to resume", "--resume", "--run-dir", tmp_path / "never"),
        ("invalid float value", *new, "--learning-rate", "abc"),
        ("no such folder", *SMALL, "--model", "no/such", *new),
        ("did you mean --memory-prob ", "--memory-probs", "1"),
        ("unknown setting", *new, "--step-weight", 1),  # GiGPO's own
        ("/proc/", *SMALL, "--run-dir", "/proc/run"),
    ):
        assert said in refused(capsys, *words), words
    accelerate.state.PartialState._reset_state()  # as in a new process
    assert "did you mean tensorboard?" in refused(capsys, *short, "--report-to", "tensorboards")
    assert "there are: aim, comet_ml" in refused(capsys, *short, "--report-to", "all")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert "pip install" in refused(capsys, *short, "--report-to", "tensorboard")
    assert not (tmp_path / "new").exists(), "bad input leaves nothing behind"


def test_a_typo_is_refused_before_torch_is_loaded(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("memory_probs: 1")
    typos = [["--envs", "house"], ["--env", "house", "--tasks", "radios"], ["--seed", "x"]]
    typos += [["--preset", "grop"], ["--config", str(bad)]]
    code = """if 1:
        import json, runpy, sys
        for typo in json.loads(sys.argv.pop()):
            sys.argv[1:] = typo
            try:
                runpy.run_path("train.py", run_name="__main__")
            except SystemExit as end:
                print(end.code, "settings" in sys.modules, "torch" in sys.modules)
    """
    argv = [sys.executable, "-c", code, json.dumps(typos)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["2 True False"] * 5, done.stderr
    assert all(line.startswith("train.py: ") for line in done.stderr.splitlines())


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(empo2, "update", full)
    run_dir = tmp_path / "a run"
    assert start(run_dir) == 1
    error = capsys.readouterr().err
    assert "--micro-tokens" in error and "--rollout-batch" in error
    assert f"train.py --resume --run-dir '{run_dir}'\n" in error
    assert runs.checkpoints(run_dir) == [0]


def test_without_fcntl_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SystemExit, match="Linux or macOS is needed; on Windows use WSL"):
        runpy.run_path(str(ROOT / "engine/runs.py"))


# --- Settings -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_differs_in_what_it_names(name):
    plain = vars(arguments.parse([])[0])
    ours = vars(arguments.parse(["--preset", name])[0])
    own = {"step_weight": 1.0, "discount": 0.95} if "gigpo" in name else {}
    own = {"mode_weight": 1.0} if "modes" in name else own
    assert ours == {**plain, **PRESETS[name], **own, "preset": name}


def test_flags_go_before_the_preset_and_that_before_the_file(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(
        "env: house\ntasks: [radio, fan]\nenv-options: rooms=2\npreset: grpo\nmodel: ~/m\n"
        "learning_rate: 1.0e-4\nload_in_4bit: false\nmemory_prob: 0.4\ngroup_size: 3\nbeta: 0.1\n"
    )
    argv = ["--config", str(file), "--group_size=4", "--intrinsic-coef", "0.5"]
    s, notes = arguments.parse(argv)
    assert (s.env, s.tasks, s.env_options) == ("house", ["radio", "fan"], ["rooms=2"])
    assert (s.learning_rate, s.load_in_4bit, s.beta) == (1e-4, False, 0.1)
    assert s.model == os.path.expanduser("~/m")
    assert (s.preset, s.memory_prob, s.min_prob) == ("grpo", 0, 0), "the preset's"
    assert (s.group_size, s.intrinsic_coef) == (4, 0.5), "the flags'"
    assert notes == ["preset grpo: memory_prob = 0.0", "preset grpo: min_prob = 0.0"]
    assert arguments.parse([*argv, "--preset", "no-mask"])[0].memory_prob == 0.4
    file.write_text("algorithm: gigpo\nstep_weight: 2\n")
    s, _ = arguments.parse(["--config", str(file)])
    assert (s.algorithm, s.preset, s.step_weight, s.memory_prob) == ("gigpo", "gigpo", 2, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_probs: 1", "unknown setting '--memory-probs'; did you mean --memory-prob "),
        ("step_weight: 1", "unknown setting '--step-weight'"),  # GiGPO's own
        ("1: 2", "unknown setting '--1'"),
        ("group_size: many", "argument --group-size: invalid int value: 'many'"),
        ("memory_prob: 2", "--memory-prob is 2.0; it must lie between 0 and 1"),
        ("preset: grop", "unknown preset 'grop'; did you mean grpo"),
        ("algorithm: gigp", "unknown algorithm 'gigp'; did you mean gigpo"),
        ("env: nowhere", "unknown environment 'nowhere'"),
        ("- env", "is no YAML file of settings"),
        ("", "is no YAML file of settings"),
        ("env: [", "is no YAML file of settings"),
        (b"\xff", "is no YAML file of settings"),
        (None, "is no YAML file of settings ([Errno 2] No such file"),
    ],
)
def test_a_wrong_config_is_one_line(text, said, tmp_path, capsys):
    file = tmp_path / "some.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capsys, "--config", file, "--run-dir", tmp_path / "new")
    assert said in line and ("no YAML" not in said or str(file) in line)


def test_a_path_from_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    s, _ = arguments.parse(["--run-dir=~/x", "--model", "~/m", "--env-options", "data=~/d"])
    assert (s.run_dir, s.model, s.env_options) == ("/home/me/x", "/home/me/m", ["data=/home/me/d"])
    args = evaluations.parse(["--model=~/m", "--out=~/o", "--", "--embedder=~/e"], "")
    assert (args.model, str(args.out)) == ("/home/me/m", "/home/me/o")
    assert args.settings == ["--embedder=/home/me/e"]
    args, shared = sweep.parse(["laptop", "--out=~/s", "--", "--model=~/m"])
    assert str(args.out) == "/home/me/s" and shared[-1] == "--model=/home/me/m"
    assert arguments.with_home(["a~/x", "x=y=z"]) == ["a~/x", "x=y=z"]


# --- What is shown and tracked --------------------------------------------------------------------
def test_the_first_minutes(tmp_path):
    """Without a terminal aligned lines; at the end before -> after, picture, view, go on."""
    config = tmp_path / "small.yaml"
    config.write_text("iterations: 2")
    argv = [sys.executable, ROOT / "train.py", *SMALL[:-2], "--config", config]
    env = os.environ | {"MPLBACKEND": "nonsense"}
    argv += ["--run-dir", tmp_path / "r"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    head, *progress = done.stderr.splitlines()
    assert head.split("  ") == [*logs.COLUMNS] and "\r" not in done.stderr
    assert {len(line) for line in progress} == {len(head)}, "aligned, and no warning"
    assert [line.split()[0] for line in progress] == ["0/2", "1/2", "2/2", "2/2"]
    (score, solved, _), (_, without, tips, _) = (line.split()[1:] for line in progress[:2])
    (first, *_), (metrics, _) = (
        runs.records(tmp_path / "r" / log) for log in ("evals.jsonl", "metrics.jsonl")
    )
    assert (score, solved) == (f"{first['score']:.1f}", f"{first['success']:.0%}")
    assert (without, int(tips)) == (f"{metrics['score_without_memory']:.1f}", 0)
    what, before_after, picture, *_ = done.stdout.splitlines()
    run_dir = tmp_path / "r"
    assert what == f"house: radio, fan; standin/house; empo2, seed 0; no GPU; in {run_dir}"
    assert "->" in before_after and "not to be compared" in before_after
    assert picture == f"picture: {run_dir / 'curve.png'}"
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "r" / "settings.json").read_text())["config"] == str(config)


def test_the_commands_at_the_end_work_from_anywhere(finished, tmp_path, monkeypatch, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "a run")
    s, _ = runs.read_checkpoint(run_dir / "checkpoint-4")
    for cwd in (ROOT, tmp_path):
        monkeypatch.chdir(cwd)
        command.summarise(s, Path(os.path.relpath(run_dir)))
        said = capsys.readouterr().out.splitlines()
        _, _, look, go_on = (line.partition(": ")[2] for line in said)
        assert (cwd == ROOT) == look.startswith("python experiments/view.py ")
        words = f"{shlex.quote(sys.executable)} {look.removeprefix('python ')}"
        done = subprocess.run(words, shell=True, capture_output=True, text=True)
        assert done.returncode == 0 and "2 of 24 episodes; " in done.stdout, done.stderr
        _, script, *argv = shlex.split(go_on)
        assert Path(script).resolve() == ROOT / "train.py"
        s_again, _ = train.parse(argv)
        assert s_again.resume and s_again.iterations == 8
        assert Path(s_again.run_dir).samefile(run_dir)


@pytest.mark.parametrize(
    "command, method",
    [
        ("", "mode_credit empo2-modes"),
        ("--env scienceworld --tasks identify-life-stages-2 --seed 3", "mode_credit empo2-modes"),
        ("--model standin/stages --preset empo2", "empo2 empo2"),
        ("--preset grpo --iterations 36", "empo2 grpo"),
        ("--algorithm gspo", "gspo grpo"),
    ],
)
def test_without_a_gpu_the_main_command_is_the_demonstration(command, method, monkeypatch):
    s, said = train.parse(command.split())
    stages = arguments.read_config(ROOT / "configs" / "stages.yaml")
    assert f"{s.algorithm} {s.preset}" == method and s.model == "standin/stages"
    for name in stages.keys() - {"sweep", *PRESETS[s.preset]}:
        assert getattr(s, name) == type(getattr(s, name))(stages[name])
    assert len(said) == 1 and "no GPU" in said[0] and f"preset {s.preset}" in said[0]
    with_gpu = hardware.find_device()._replace(gigabytes=80.0)
    monkeypatch.setattr(hardware, "find_device", lambda: with_gpu)
    s, said = train.parse([])
    assert (s.model, s.tasks) == ("Qwen/Qwen2.5-7B-Instruct", ["power-component"])
    assert s.algorithm == "empo2"
    assert [line.split()[0] for line in said] == ["model", "dtype", "load_in_4bit"]


@pytest.mark.parametrize(
    "command", ["--tasks power-component", "--env webshop", "--config configs/paper.yaml"]
)
def test_without_a_gpu_other_things_need_a_model(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="no GPU: .* needs a --model: smollm2"):
        train.parse(command.split())
    s, said = train.parse([*command.split(), "--model", "smollm2"])
    assert s.model == "smollm2" and s.config != "configs/stages.yaml" and not said


def test_a_terminal_without_utf_8(monkeypatch):
    for print_help in (
        lambda: command.refuse(["--help"], train.__doc__, envs.make),
        lambda: evaluation.main(["--help"]),
        lambda: sweep.main(["--help"]),
    ):
        handler = signal.getsignal(signal.SIGINT)
        ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", ascii_only)
        with pytest.raises(SystemExit) as end:
            print_help()
        signal.signal(signal.SIGINT, handler)
        print("EMPO²")
        ascii_only.flush()
        said = ascii_only.buffer.getvalue()
        assert end.value.code == 0 and b"usage" in said and said.endswith(b"EMPO\\xb2\n")


def test_the_bar_fits_80_columns(monkeypatch):
    """Of a long run on a GPU; other processes than the first show and draw nothing."""
    terminal = io.StringIO()
    terminal.isatty, terminal.fileno = lambda: True, lambda: 2
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: (80, 25))
    monkeypatch.setattr(logs, "draw_runs", lambda *args: terminal.write("drawn"))
    s = settings.Settings(run_dir="x", iterations=200)
    result = {"iteration": 100, "score": -38.2, "success": 0.25, "seconds": 1}
    metrics = {"iteration": 100, "tips_shown": 2500, "seconds_update": 9}
    metrics |= {"score_with_memory": -45.5, "score_without_memory": -0.2}
    for rank in (1, 0):
        assert not terminal.getvalue()
        monkeypatch.setattr(processes, "rank", rank)
        display = logs.Display(s, 100, SimpleNamespace(log=lambda *_, **__: None))
        if rank == 0:
            display.bar.start_t -= 2400  # seconds an iteration
        display.evaluation(result)
        display.iteration([], metrics)
        logs.Clock(display.bar)("update", "step 1 of 4")
        display.bar.refresh()
    before, drawn, last = terminal.getvalue().partition("drawn")
    shown = "tip-free -38 (25%), with tips -46, without 0, 2500 tips"
    whole = f"101/200, 66:00:00 left, {shown}; update step 1 of 4"
    assert drawn and last.split("\r")[-1] == whole[:79] and "solved" not in before


def drawn_by(monkeypatch):
    """A list that gets each figure with curves of runs."""
    figures, new = [], tables.new_figure
    monkeypatch.setattr(
        tables, "new_figure", lambda *size: figures.append(new(*size)) or figures[-1]
    )
    return figures


def test_the_picture_is_whole_after_ctrl_c_and_a_resume(tmp_path, monkeypatch, capsys):
    """Drawn at each evaluation and at the end: what the logs hold."""
    update, figures = empo2.update, drawn_by(monkeypatch)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(empo2, "update", interrupted)
        assert start(tmp_path, *EVALS, "--eval-every", 2, "--iterations", 3) == 130
    capsys.readouterr()
    assert start(tmp_path, "--resume", "--verbose") == 0
    said = capsys.readouterr().out.splitlines()[0]
    what = "house: radio, fan; standin/house; empo2, seed 0; no GPU"
    assert said == f"{what}; from iteration 1; in {tmp_path}"
    assert len(figures) == 4, "evaluation, stop, evaluation, end"
    curves = [[line.get_xydata().T.tolist() for p in f.axes for line in p.lines] for f in figures]
    assert [len(evals[0]) for evals, *_ in curves] == [1, 1, 2, 3]
    evals, metrics = (runs.records(tmp_path / f"{log}.jsonl") for log in ("evals", "metrics"))

    def curve(lines, name):
        known = [line for line in lines if line[name] is not None]
        return [[float(line[key]) for line in known] for key in ("iteration", name)]

    tips = [curve(metrics, f"score_{kind}_memory") for kind in ("with", "without")]
    assert curves[-1][:3] == [curve(evals, "score"), *tips] and tips[0][0]
    assert curves[-1][-1] == curve(evals, "success")
    assert figures[-1].get_suptitle() == "house: radio, fan; standin/house; empo2, seed 0"
    assert figures[0].axes[0].get_xlim()[1] > 3, "how much is to come is seen"


@pytest.mark.parametrize("fault", ["no matplotlib", "a folder has the name"])
def test_a_picture_that_cannot_be_drawn_is_one_line(fault, tmp_path, monkeypatch, capsys):
    if fault == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        (tmp_path / "curve.png").mkdir()
    assert start(tmp_path, *EVALS, "--eval-every", 1, "--iterations", 1) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "curve.png" in line]
    assert len(said) == 1 and "is not drawn, the run goes on without it: " in said[0]


def test_runs_in_one_picture(finished, tmp_path, monkeypatch, capsys):
    figures, out = drawn_by(monkeypatch), tmp_path / "all.png"
    other = shutil.copytree(finished, tmp_path / "other")
    words = json.loads((other / "settings.json").read_text())
    (other / "settings.json").write_text(json.dumps(words | {"preset": "grpo", "iterations": 9}))
    argv = [str(finished), str(other), "--out", str(out)]
    assert report.main(argv) == report.main(argv) == 0, "its own picture is overwritten"
    row = capsys.readouterr().out.splitlines()[3]
    first, *_, last = runs.records(other / "evals.jsonl")
    seconds = runs.records(finished / "metrics.jsonl")
    minutes = report.minutes(seconds, [])
    assert minutes == pytest.approx(last["seconds_training"] / 60, abs=0.01)
    for cell in (
        str(other),
        "grpo, seed 0",
        f"{first['score']:.1f} -> {last['score']:.1f}",
        f"{first['success']:.0%} -> {last['success']:.0%}",
        "4",
    ):
        assert f"| {cell} " in row
    texts = [text.get_text() for text in figures[0].legends[0].texts]
    assert texts == [*tables.STYLES, "empo2, seed 0", "grpo, seed 0"]
    assert figures[0].get_suptitle() == "house: radio, fan; standin/house"
    out.write_bytes(b"a photograph")
    for said, *bad in (
        (f"{out} exists, another picture", *argv),
        ("settings.json", str(tmp_path), "--out", str(tmp_path / "new.png")),
        ("must end in .png", str(finished), "--out", "x.pdf"),
    ):
        assert report.main(bad) == 2
        assert said in capsys.readouterr().err
    assert out.read_bytes() == b"a photograph"


def test_it_says_once_why_three_iterations_taught_nothing(tmp_path, capsys):
    """And reports the reason that there is."""
    few = ["--iterations", 4, "--group-size", 1, "--beta", 0.1]
    assert start(tmp_path, *few, "--preset", "no-mask", "--verbose") == 0
    said = "3 iterations taught nothing: --group-size 1 leaves no episode to compare with"
    output = capsys.readouterr()
    assert output.err.splitlines().count(said) == 1
    assert "preset no-mask: min_prob = 0.0\n" in output.out, "--verbose"
    assert "  dtype = float32  (no GPU: exact)\n" in output.out
    s, trackers = train.parse(SMALL)[0], SimpleNamespace(log=lambda *_, **__: None)
    heard, unheard = (
        SimpleNamespace(score=score, turns=[SimpleNamespace(next_observation=text)])
        for score, text in ((50, "a hall"), (0, UNKNOWN))
    )

    def said_of(episodes, shares, success=0.5):
        display = logs.Display(s, 0, trackers)
        shown = {"iteration": 0, "tips_shown": 0, "success": success}
        shown |= {"score_with_memory": None, "score_without_memory": 0}
        for share in shares:
            display.iteration(episodes, shown | {"zero_variance_groups": share})
        return [x for x in capsys.readouterr().err.splitlines() if "taught nothing" in x]

    assert not said_of([heard], (1, 1, 0.5, 1, 1, None, 1, 1))
    assert not said_of([heard], (1, 1, 1, 1), success=1)
    (line,) = said_of([heard, unheard], (1, 0.5, 1, 1, 1, 1, 1, 1))
    assert line.endswith("all episodes returned the same (the last scores: 0, 50)")
    assert logs.why_idle([unheard] * 2, s).startswith("none of the last 2 actions was understood")


def test_metrics_reach_a_tracker_and_a_resume_goes_on_with_its_run(tmp_path, monkeypatch):
    """With a module in the place of wandb."""
    opened, logged, config = [], [], {}

    def init(**options):
        opened.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((step, sorted(values))), finish=lambda: None
        )

    told = SimpleNamespace(update=lambda values, **_: config.update(values))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, config=told))
    there = [accelerate.utils.LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: there)
    assert logs.make_trackers(settings.Settings(), tmp_path).trackers == []
    short = ["--report-to", "wandb", "--iterations", 1, "--eval-every", 1, "--eval-episodes", 1]
    for name in "ab":
        assert start(tmp_path / name, *short) == 0
    assert config["lora_r"] == 2 and config["tasks"] == "['radio', 'fan']"
    steps = [(step, "approx_kl" in names) for step, names in logged]
    assert (0, True) in steps and (0, ["eval_score"]) in logged and (1, ["eval_success"]) in logged
    logged.clear()
    assert start(tmp_path / "a", "--resume", "--iterations", 2) == 0
    assert {step for step, _ in logged} == {1, 2}
    a, b, again = opened
    assert a == again and a["id"] != b["id"] and a["resume"] == "allow"
    assert a["dir"] == str(tmp_path / "a")


# --- The base model -------------------------------------------------------------------------------
def test_the_merged_checkpoint_of_the_docs_is_the_adapters_policy(finished, tmp_path):
    """The lines of docs/runs.md, with other names; plain transformers gives the same log-probs."""
    text = (ROOT / "docs" / "runs.md").read_text()
    code = re.search(r"```python\n(.*?merge_and_unload.*?)```", text, re.DOTALL)[1]
    adapter, merged = finished / "checkpoint-4", tmp_path / "merged"
    for name, ours in {
        "Qwen/Qwen2.5-7B-Instruct": STANDIN,
        '"merged"': f'"{merged}"',
        "runs/scienceworld-power-component-0/checkpoint-200": adapter,
    }.items():
        assert name in code
        code = code.replace(name, str(ours))
    exec(code, {})
    ids = torch.randint(3, 300, (2, 40), generator=torch.manual_seed(0))
    mask = (torch.arange(40) > 0).expand(2, -1)
    policy = Policy.load(str(STANDIN), adapter=adapter)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(ids).logits[:, :-1].log_softmax(-1)
        logp = logits.gather(2, ids[:, 1:, None])[..., 0]
        assert torch.allclose(logp, policy.logprobs(ids, mask, 1.0)[0][:, 1:], atol=1e-4)
        reference, _ = policy.logprobs(ids, mask, 1.0, reference=True)
        assert not torch.allclose(logp, reference[:, 1:], atol=1e-4)


def model_like(folder, out, layer=None, shards="5GB"):
    """A copy in float32; of one linear layer the weights may be other ones, by a hundredth."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if layer:
        weight = model.get_submodule(layer).weight.data
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.manual_seed(0))
    shutil.copytree(folder, out, ignore=lambda *_: ["model.safetensors"])
    model.save_pretrained(out, max_shard_size=shards)
    return str(out)


@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_the_checksum_of_a_base_model_is_of_its_weights_only(base, finished, checkpoint, tmp_path):
    """However it is stored and loaded, and whatever the adapter; a layer tuned a bit is another."""
    folder, adapter = checkpoint, None
    if base == "bfloat16":
        folder, adapter = str(STANDIN), finished / "checkpoint-4"
    ours = Policy.load(folder).base_checksum
    again = model_like(folder, tmp_path / "again", shards="300KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    tuned = model_like(folder, tmp_path / "tuned", layer="model.layers.1.mlp.down_proj")
    half = {"dtype": "bfloat16"}
    for options in ({}, half, {"load_in_4bit": True}, {"load_in_4bit": True, **half}):
        same = Policy.load(again, adapter=adapter, **options)
        assert same.base_checksum == ours, options
        assert Policy.load(tuned, **options).base_checksum != ours, options


def test_the_base_model_may_move_and_no_other_takes_its_place(checkpoint, tmp_path, capsys):
    place, run_dir = shutil.copytree(STANDIN, tmp_path / "model"), tmp_path / "run"
    for path, iterations in ((run_dir, 1), (tmp_path / "whole", 2)):
        assert start(path, "--model", place, "--iterations", iterations) == 0
    moved = place.rename(tmp_path / "a new place")
    tuned = model_like(moved, tmp_path / "tuned", layer="model.layers.0.self_attn.v_proj")
    other = shutil.copytree(moved, tmp_path / "other")
    (other / "chat_template.jinja").write_text((moved / "chat_template.jinja").read_text() + "{##}")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    go_on = ["--resume", "--run-dir", run_dir, "--iterations", 2]
    for program, argv in ((train, go_on), (evaluation, [run_dir, "--variations", 1])):
        for said, *model in (
            (f"{place}: there is no such folder",),
            ("if the model has moved, give its new place with --model",),
            (f"{tuned} is another model than the run was trained on (its weights differ)", tuned),
            (f"the adapter does not fit {checkpoint}", checkpoint),
            (f"{other}: its tokenizer is not the one that the run was trained with", other),
        ):
            capsys.readouterr()
            words = [*argv, "--model", *model] if model else argv
            assert program.main([str(word) for word in words]) == 2
            assert said in capsys.readouterr().err.strip().splitlines()[-1]
    (run_dir / "error.log").unlink()
    assert before == {path: path.read_bytes() for path in before}, "nothing was touched"
    run_dir = run_dir.rename(tmp_path / "elsewhere")
    go_on = ["--resume", "--iterations", 2]
    assert start(run_dir, *go_on, "--model", moved) == 0
    assert_same_run(run_dir, tmp_path / "whole", 2)
    assert runs.read_checkpoint(run_dir / "checkpoint-2")[0].model == str(moved)
    config = json.loads((run_dir / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved), "for others who load it with peft"
    assert start(run_dir, *go_on, "--dtype", "bfloat16") == 0, "the new place is kept"
    moved.rename(place)
    assert evaluation.main([str(run_dir), "--variations", "1", "--model", str(place)]) == 0
    assert f"model {place}" in capsys.readouterr().out


@pytest.mark.slow
def test_real_scienceworld_end_to_end(tmp_path):
    """An experiment, shortened: two iterations on the real simulator."""
    argv = ["--config", ROOT / "configs/stages.yaml", "--run-dir", tmp_path / "run"]
    argv += ["--iterations", "2", "--variations", "1", "--tasks-per-iteration", "1"]
    argv += ["--eval-variations", "1", "--eval-episodes", "1"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *argv], capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics, episodes, _ = (runs.records(tmp_path / "run" / log) for log in runs.LOGS)
    assert len(metrics) == 2 and len(episodes) == 16 and metrics[1]["memory_turns"] > 0
    answers = [turn["next_observation"] for e in episodes for turn in e["turns"]]
    understood = sum(UNKNOWN not in answer for answer in answers) / len(answers)
    assert understood > 0.5 and all(e["tip"] for e in episodes)
