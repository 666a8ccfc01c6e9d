"""train.py from the outside: what a run leaves, what survives, what is refused."""

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
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import envs
import eval as evaluation
import settings
import train
from engine import command, logs, runs
from engine.errors import UNKNOWN
from experiments import sweep, view
from policy import Policy
from settings import PRESETS
from worlds.house import House

SMALL = """
    --env house --tasks radio fan --env-options rooms=2 step_limit=4 --variations 1 --lora-r 2
    --group-size 3 --tasks-per-iteration 2 --action-tokens 16 --tip-tokens 10 --memory-prob 0.6
    --tip-threshold 0 --model standin --minibatch-episodes 2 --eval-every 0
""".split()


def timeless(path):
    """The lines of a log without what depends on the clock."""
    lines = runs.records(path)
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "peak_"))} for line in lines
    ]


STANDIN = ROOT / "standin" / "house"


def weights(run_dir, iteration):
    return load_file(run_dir / f"checkpoint-{iteration}" / "adapter_model.safetensors")


def assert_same_run(ours, theirs, iterations):
    for log in runs.LOGS:
        assert timeless(ours / log) == timeless(theirs / log), log
    a, b = weights(ours, iterations), weights(theirs, iterations)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of four iterations."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    command = [*SMALL, "--run-dir", str(run_dir), "--iterations", "4"]
    assert train.main(command) == 0
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
    assert runs.checkpoints(finished) == [3, 4], "only the newest are kept"
    base = AutoModelForCausalLM.from_pretrained(STANDIN)
    model = PeftModel.from_pretrained(base, finished / "checkpoint-4")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_how_many_play_side_by_side_changes_nothing(lanes, tmp_path):
    """The same draws, tips shown and rewards; weights equal but for rounding."""
    small = ["--group-size", "8", "--iterations", "2"]
    for name, batch in (("a", lanes), ("b", 5)):
        command = [*SMALL, *small, "--run-dir", str(tmp_path / name), "--rollout-batch", str(batch)]
        assert train.main(command) == 0
    told = [runs.records(tmp_path / name / "episodes.jsonl") for name in "ab"]
    assert any(turn["tips"] for e in told[0] for turn in e["turns"])
    assert told[0] == told[1]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_finishes_the_iteration_and_saves(stop, tmp_path):
    run_dir = tmp_path / "a run"
    command = [*SMALL, "--run-dir", str(run_dir), "--iterations", "10000"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *command, "--save-every", "1000"],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not runs.records(run_dir / "metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.01)
    second = subprocess.run(
        [sys.executable, ROOT / "train.py", "--resume", "--run-dir", run_dir],
        capture_output=True,
        text=True,
    )
    assert second.returncode == 2 and "another process" in second.stderr
    process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    done = len(runs.records(run_dir / "metrics.jsonl"))
    assert process.returncode == 130 and (run_dir / f"checkpoint-{done}").exists(), said
    assert f"train.py --resume --run-dir '{run_dir}' continues" in said.splitlines()[-1]


@pytest.mark.parametrize("stop", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_a_signal_that_is_ignored_at_the_start_stops_nothing(stop, tmp_path):
    """nohup ignores SIGHUP, and a script's & SIGINT; here it comes all the time."""
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *SMALL, "--run-dir", run_dir, "--iterations", "2"],
        preexec_fn=lambda: signal.signal(stop, signal.SIG_IGN),
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        process.send_signal(stop)
        time.sleep(0.01)
    said = process.stdout.read()
    assert process.returncode == 0 and "Finishing" not in said, said
    assert len(runs.records(run_dir / "metrics.jsonl")) == 2


def test_a_second_ctrl_c_in_a_java_call_ends_quietly(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", "--env", "scienceworld", "--model", "standin"]
    process = subprocess.Popen(
        [*command, "--eval-every", "0", "--iterations", "50", "--run-dir", run_dir],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (run_dir / "checkpoint-0").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # the houses are being built
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert "--resume" in said.splitlines()[-1]


def refused(capsys, *argv):
    """Run with bad input: a non-zero exit and one line on stderr, which is returned."""
    capsys.readouterr()
    assert train.main([str(word) for word in argv]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train.py:")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_refused_in_one_line(capsys, tmp_path, finished, monkeypatch):
    new = ["--run-dir", tmp_path / "new"]
    short = [*SMALL, *new]
    assert "unknown environment" in refused(capsys, *new, "--env", "nowhere")
    assert "did you mean radio?" in refused(capsys, *new, "--env", "house", "--tasks", "radios")
    assert "did you mean grpo or gigpo?" in refused(capsys, *new, "--preset", "gpro")
    assert "unknown option" in refused(capsys, *short, "--env-options", "attics=2")
    assert "name=value" in refused(capsys, *short, "--env-options", "rooms")
    assert "be positive" in refused(capsys, *new, "--eval-episodes", "0")
    assert "use --pack episode" in refused(capsys, *new, "--pack", "group", "--history", "2")
    assert "between 0 and 1" in refused(capsys, *new, "--memory-prob", "2")
    assert "not be negative" in refused(capsys, *new, "--beta", "-1")
    assert "no room for even one turn" in refused(capsys, *short, "--context", "20")
    long_tip = ["--context", "1000", "--tip-tokens", "990"]
    assert "no room to ask for a tip after radio (" in refused(capsys, *short, *long_tip)
    assert "lower --context" in refused(capsys, *short, "--context", "100000")
    assert "tokenizer" in refused(capsys, *SMALL, "--model", tmp_path, "--run-dir", tmp_path / "x")
    assert "no stand-in for webshop" in refused(capsys, *new, "--env", "webshop")
    assert "exists" in refused(capsys, *SMALL, "--run-dir", finished)
    assert "cannot change" in refused(capsys, "--resume", "--run-dir", finished, "--seed", "7")
    assert "invalid float value" in refused(capsys, *new, "--learning-rate", "abc")
    assert "no such folder" in refused(capsys, *SMALL, "--model", "no/such", *new[2:])
    longer = refused(capsys, "--resume", "--run-dir", finished, "--iterations", "2")
    assert "can only make it longer" in longer
    assert "nothing to resume" in refused(capsys, "--resume", "--run-dir", tmp_path / "never")
    assert "did you mean --memory-prob " in refused(capsys, "--memory-probs", "1")
    accelerate.state.PartialState._reset_state()  # as in a new process
    assert "did you mean tensorboard?" in refused(capsys, *new, "--report-to", "tensorboards")
    assert "there are: aim, comet_ml" in refused(capsys, *new, "--report-to", "all")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert "pip install" in refused(capsys, *short, "--report-to", "tensorboard")
    monkeypatch.setattr(House, "DEFAULT_TASKS", [])
    assert "name the tasks" in refused(capsys, "--env", "house", "--model", "standin", *new)
    monkeypatch.setattr(House, "variation_count", lambda env, task: 1)
    assert "has no train variations" in refused(capsys, *short)
    assert not (tmp_path / "new").exists(), "bad input leaves nothing behind"


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.empo2, "update", full)
    run_dir = tmp_path / "a run"
    assert train.main([*SMALL, "--run-dir", str(run_dir)]) == 1
    error = capsys.readouterr().err
    assert "--micro-tokens" in error and "--rollout-batch" in error
    assert f"train.py --resume --run-dir '{run_dir}'\n" in error
    assert runs.checkpoints(run_dir) == [0]


def test_a_typo_is_refused_before_torch_is_loaded():
    for typo in (["--envs", "house"], ["--env", "house", "--tasks", "radios"], ["--seed", "x"]):
        command = [sys.executable, "-X", "importtime", ROOT / "train.py", *typo]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "train.py: " in done.stderr.splitlines()[-1]
        assert "| torch\n" not in done.stderr and "| settings\n" in done.stderr


def test_the_first_minutes(tmp_path):
    """A line per iteration where there is no terminal; at the end before -> after, view, go on."""
    run_dir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *SMALL[:-2], "--run-dir", run_dir]
    command += ["--iterations", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    progress = done.stderr.splitlines()
    assert all(line.startswith("iteration ") for line in progress), "and no warning"
    assert len(progress) == 2 and "tips shown" in progress[1] and "\r" not in done.stderr
    before_after, look, go_on = done.stdout.splitlines()[-3:]
    assert "->" in before_after and "not to be compared" in before_after
    assert view.main([look.split()[-1]]) == 0
    assert train.main(go_on.split("train.py ")[1].split()) == 0
    assert len(runs.records(run_dir / "metrics.jsonl")) == 4


def test_two_starts_at_the_same_moment(tmp_path):
    """One of them plays, the other is told; the logs are of one run."""
    run_dir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *SMALL, "--run-dir", run_dir]
    command += ["--iterations", "2"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert sum("another process" in text or "exists; --resume" in text for text in said) == 1
    assert [m["iteration"] for m in runs.records(run_dir / "metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize(
    "place", [[], ["--dtype", "bfloat16", "--gradient-checkpointing"]], ids=["fp32", "as-on-a-gpu"]
)
def test_a_run_that_failed_or_ended_goes_on_as_if_it_had_not(place, tmp_path, monkeypatch):
    """A failure in iteration 2 with no checkpoint but the first: the logs are cut back to it."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    small = [*SMALL, *place]
    assert train.main([*small, "--run-dir", str(whole), "--iterations", "4"]) == 0
    update = train.empo2.update
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("the gradient is not finite")
        return update(*args, **kwargs)

    monkeypatch.setattr(train.empo2, "update", failing)
    command = [*small, "--run-dir", str(run_dir), "--iterations", "3"]
    assert train.main([*command, "--save-every", "10"]) == 2
    assert len(runs.records(run_dir / "metrics.jsonl")) == 2
    assert "FloatingPointError" in (run_dir / "error.log").read_text()
    assert train.main(["--resume", "--run-dir", str(run_dir)]) == 0
    assert train.main(["--resume", "--run-dir", str(run_dir), "--iterations", "4"]) == 0
    assert_same_run(run_dir, whole, 4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_differs_in_what_it_names(name, tmp_path):
    new = ["--run-dir", str(tmp_path / "new")]
    plain = vars(train.parse(new)[0])
    ours = vars(train.parse([*new, "--preset", name])[0])
    expected = {**plain, **PRESETS[name], "preset": name}
    assert ours == expected


def test_a_setting_given_goes_before_the_preset():
    s, notes = train.parse(["--memory_prob=0.6", "--preset", "grpo"])
    assert s.memory_prob == 0.6 and s.intrinsic_coef == 0
    assert any("intrinsic_coef" in note for note in notes)
    assert not any("memory_prob" in note for note in notes)


def test_metrics_reach_a_tracker(tmp_path, monkeypatch):
    """--report-to through accelerate, with a tracker in the place of tensorboard."""

    class Tracker(GeneralTracker):
        name = "fake"
        requires_logging_directory = True
        tracker = None
        logged = []

        def __init__(self, run_name, logging_dir):
            super().__init__()

        def store_init_configuration(self, values):
            assert values["lora_r"] == 2

        def log(self, values, step, **_):
            self.logged.append((step, sorted(values)))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "fake", Tracker)
    short = [*SMALL, "--iterations", "1", "--eval-every", "1"]
    short += ["--eval-episodes", "1"]
    assert train.main([*short, "--run-dir", str(tmp_path / "none")]) == 0 and not Tracker.logged
    run_dir = ["--run-dir", str(tmp_path / "run"), "--report-to", "fake"]
    assert train.main([*short, *run_dir]) == 0
    steps = [(step, "approx_kl" in names) for step, names in Tracker.logged]
    assert (0, True) in steps and (0, ["eval_score"]) in Tracker.logged
    assert (1, ["eval_success"]) in Tracker.logged


def test_a_resume_goes_on_with_its_wandb_run(tmp_path, monkeypatch):
    """With a module in the place of wandb."""
    opened, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append(step)

        def finish(self):
            pass

    def init(**options):
        opened.append(options)
        return Run()

    fake = SimpleNamespace(init=init, config=SimpleNamespace(update=lambda *_, **__: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    there = [accelerate.utils.LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: there)
    for name in "ab":
        new = ["--run-dir", str(tmp_path / name), "--report-to", "wandb"]
        assert train.main([*SMALL, *new, "--iterations", "1"]) == 0
    assert train.main(["--resume", "--run-dir", str(tmp_path / "a"), "--iterations", "2"]) == 0
    a, b, again = opened
    assert a == again and a["id"] != b["id"] and a["resume"] == "allow"
    assert a["dir"] == str(tmp_path / "a") and logged == [0, 0, 1]


def test_it_says_once_why_three_iterations_taught_nothing(tmp_path, capsys):
    """And reports the reason that there is."""
    command = [*SMALL, "--run-dir", str(tmp_path / "run"), "--iterations", "4"]
    assert train.main([*command, "--group-size", "1", "--beta", "0.1"]) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if "taught nothing" in x]
    said = "3 iterations taught nothing: --group-size 1 leaves no episode to compare with"
    assert lines == [said]
    flat, useful = {"zero_variance_groups": 1.0}, {"zero_variance_groups": 0.5}
    s, bare = train.parse([])[0], {"iteration": 0, "score": 0, "score_best": 0, "tips_shown": 0}
    idle = logs.Display(s, 0, SimpleNamespace(log=lambda *_, **__: None)).iteration
    heard, unheard = (
        SimpleNamespace(score=score, turns=[SimpleNamespace(next_observation=text)])
        for score, text in ((50, "a hall"), (0, UNKNOWN))
    )
    for metrics in (flat, flat, useful, flat, flat, {}, flat, flat):
        idle([heard], bare | metrics)
    assert "taught" not in capsys.readouterr().err
    for metrics in (flat, useful, flat, flat, flat):
        idle([heard, unheard], bare | metrics)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("all episodes returned the same (the last scores: 0, 50)")
    assert logs.why_idle([unheard] * 2, s).startswith("none of the last 2 actions was understood")


def test_the_commands_at_the_end_work_from_anywhere(finished, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "a run"
    shutil.copytree(finished, run_dir)
    s, _ = runs.read_checkpoint(run_dir / "checkpoint-4")
    for cwd in (ROOT, tmp_path):
        monkeypatch.chdir(cwd)
        command.summarise(s, Path(os.path.relpath(run_dir)))
        look, go_on = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
        assert (cwd == ROOT) == look.startswith("python experiments/view.py ")
        for more in ("", " --tips"):
            words = f"{shlex.quote(sys.executable)} {look.removeprefix('python ')}{more}"
            done = subprocess.run(words, shell=True, capture_output=True, text=True)
            end = " in 2 memories of " if more else "2 of 24 episodes; "
            assert done.returncode == 0 and end in done.stdout.splitlines()[-1], done.stderr
        python, script, *argv = shlex.split(go_on)
        assert Path(script).resolve() == ROOT / "train.py"
        s_again, _ = train.parse(argv)
        assert s_again.resume and Path(s_again.run_dir).samefile(run_dir)


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


def test_a_path_from_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    s, _ = settings.parse(["--run-dir=~/x", "--model", "~/m", "--env-options", "data=~/d"])
    assert (s.run_dir, s.model, s.env_options) == ("/home/me/x", "/home/me/m", ["data=/home/me/d"])
    args = evaluation.parse(["--model=~/m", "--out=~/o", "--", "--embedder=~/e"])
    assert (args.model, str(args.out)) == ("/home/me/m", "/home/me/o")
    assert args.settings == ["--embedder=/home/me/e"]
    args, shared = sweep.parse(["laptop", "--out=~/s", "--", "--model=~/m"])
    assert str(args.out) == "/home/me/s" and shared[-1] == "--model=/home/me/m"
    assert settings.with_home(["a~/x", "x=y=z"]) == ["a~/x", "x=y=z"]


def test_without_fcntl_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SystemExit, match="Linux or macOS is needed; on Windows use WSL"):
        runpy.run_path(str(ROOT / "engine/runs.py"))


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
    place, run_dir = tmp_path / "model", tmp_path / "run"
    shutil.copytree(STANDIN, place)
    command = [*SMALL, "--model", str(place), "--run-dir", str(run_dir), "--iterations", "1"]
    assert train.main(command) == 0
    assert train.main([*command, "--run-dir", str(tmp_path / "whole"), "--iterations", "2"]) == 0
    moved = place.rename(tmp_path / "a new place")
    tuned = model_like(moved, tmp_path / "tuned", layer="model.layers.0.self_attn.v_proj")
    other = shutil.copytree(moved, tmp_path / "other")
    (other / "chat_template.jinja").write_text((moved / "chat_template.jinja").read_text() + "{##}")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for program in (train, evaluation):
        argv = ["--resume", "--run-dir", run_dir, "--iterations", 2]
        if program is evaluation:
            argv = [run_dir, "--variations", 1]

        def said(*model, program=program, argv=argv):
            capsys.readouterr()
            assert program.main([str(word) for word in (*argv, *model)]) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
            return line

        assert f"{place}: there is no such folder" in said()
        assert "if the model has moved, give its new place with --model" in said()
        assert f"{tuned} is another model than the run was trained on" in said("--model", tuned)
        assert "its weights differ" in said("--model", tuned)
        wider = said("--model", checkpoint)
        assert f"the adapter does not fit {checkpoint}" in wider and "with --model" in wider
        wanted = f"{other}: its tokenizer is not the one that the run was trained with"
        assert wanted in said("--model", other)
    (run_dir / "error.log").unlink()
    assert before == {path: path.read_bytes() for path in before}, "nothing was touched"
    run_dir = run_dir.rename(tmp_path / "elsewhere")
    argv = ["--resume", "--run-dir", str(run_dir), "--iterations", "2"]
    assert train.main([*argv, "--model", str(moved)]) == 0
    assert_same_run(run_dir, tmp_path / "whole", 2)
    assert runs.read_checkpoint(run_dir / "checkpoint-2")[0].model == str(moved)
    config = json.loads((run_dir / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved), "for others who load it with peft"
    assert train.main([*argv, "--dtype", "bfloat16"]) == 0, "the new place is kept"
    moved.rename(place)
    argv = [str(run_dir), "--variations", "1", "--model", str(place)]
    assert evaluation.main(argv) == 0
    assert f"model {place}" in capsys.readouterr().out


def test_reflexion_moves_no_weight(tmp_path):
    run_dir = tmp_path / "run"
    small = [word for word in SMALL if word not in ("--memory-prob", "0.6")]
    command = [*small, "--run-dir", str(run_dir), "--preset", "reflexion"]
    assert train.main([*command, "--iterations", "2", "--save-every", "2"]) == 0
    first, last = weights(run_dir, 0), weights(run_dir, 2)
    assert all(torch.equal(first[name], last[name]) for name in first)
    metrics = runs.records(run_dir / "metrics.jsonl")
    assert metrics[1]["memory_turns"] == metrics[1]["turns"] and "loss" not in metrics[1]


def test_evaluations_disturb_nothing_and_survive_a_crash(finished, tmp_path):
    """The same metrics and weights as without; after a crash the same evaluations."""
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    command = [*SMALL, "--run-dir", str(run_dir), "--iterations", "4"]
    command += ["--eval-every", "3", "--eval-variations", "3", "--eval-episodes", "2"]
    assert train.main(command) == 0
    for log in ("metrics.jsonl", "episodes.jsonl"):
        assert timeless(run_dir / log) == timeless(finished / log)
    evals = runs.records(run_dir / "evals.jsonl")
    assert [e["iteration"] for e in evals] == [0, 3, 4]
    assert [e["training_episodes"] for e in evals] == [0, 18, 24]
    assert set(evals[0]["tasks"]) == {"radio", "fan"}
    assert evals[0]["tasks"]["fan"]["episodes"] == 6
    assert evals[2]["score"] == sum(t["mean"] for t in evals[2]["tasks"].values()) / 2
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoint-4")  # stopped during the last evaluation but one
    text = (copy / "evals.jsonl").read_text()
    (copy / "evals.jsonl").write_text(text[: len(text) - 40])
    assert train.main(["--resume", "--run-dir", str(copy)]) == 0
    assert_same_run(copy, run_dir, 4)
    assert train.main(["--resume", "--run-dir", str(run_dir), "--iterations", "5"]) == 0
    evals = runs.records(run_dir / "evals.jsonl")
    assert [e["iteration"] for e in evals] == [0, 3, 4, 5], "none is lost where a run goes on"


def test_the_standin_plays_real_scienceworld_end_to_end(tmp_path):
    """The README's first command, shortened: two iterations on the real simulator."""
    run_dir = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", "--env", "scienceworld", "--iterations", "2"]
    command += ["--step-limit", "8", "--variations", "1", "--memory-prob", "0.5"]
    done = subprocess.run(
        [*command, "--run-dir", run_dir],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = runs.records(run_dir / "metrics.jsonl")
    episodes = runs.records(run_dir / "episodes.jsonl")
    assert len(metrics) == 2 and len(episodes) == 16 and metrics[1]["memory_turns"] > 0
    answers = [turn["next_observation"] for e in episodes for turn in e["turns"]]
    understood = sum("No known action" not in answer for answer in answers) / len(answers)
    assert understood > 0.5 and all(e["tip"] for e in episodes)
    assert json.loads((run_dir / "settings.json").read_text())["tasks"] == ["power-component"]
