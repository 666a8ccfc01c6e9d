"""train.py from the outside: what a run leaves, what survives, what is refused.

pytest tests/test_train.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import empo2
import train

SMALL = [
    "--env",
    "house",
    "--tasks",
    "radio",
    "fan",
    "--env-options",
    "rooms=2",
    "step_limit=3",
    "--group-size",
    "3",
    "--tasks-per-iteration",
    "2",
    "--action-tokens",
    "4",
    "--tip-tokens",
    "8",
    "--memory-prob",
    "0.6",
    "--variations",
    "1",
    "--tip-threshold",
    "0",
    "--lora-r",
    "2",
]


def records(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def without_times(metrics):
    return [
        {k: v for k, v in m.items() if not k.startswith(("seconds_", "peak_"))} for m in metrics
    ]


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """An uninterrupted run of four iterations."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert (
        train.main([*SMALL, "--model", checkpoint, "--run-dir", str(run_dir), "--iterations", "4"])
        == 0
    )
    return run_dir


def test_a_run_leaves_what_the_readme_says(finished, checkpoint):
    metrics, episodes = records(finished / "metrics.jsonl"), records(finished / "episodes.jsonl")
    assert [m["iteration"] for m in metrics] == [0, 1, 2, 3] and len(episodes) == 4 * 6
    wanted = {
        "score",
        "intrinsic",
        "memory_turns",
        "tips_per_memory_turn",
        "offpolicy_turns",
        "zero_variance_groups",
        "ratio",
        "clipfrac",
        "masked_fraction",
        "entropy",
        "approx_kl",
        "grad_norm",
        "seconds_rollout",
        "seconds_tips",
        "seconds_update",
        "peak_memory_gb",
        "sampler_gap",
        "episodes_dropped",
    }
    assert wanted <= set(metrics[-1])
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in metrics[-1]), (
        "each metric stands in the README's glossary"
    )
    assert metrics[-1]["memory_turns"] > 0 and metrics[-1]["sampler_gap"] < 1e-4
    turn = episodes[-1]["turns"][0]
    assert set(turn) == {
        "observation",
        "tips",
        "tips_left_out",
        "action",
        "cut",
        "next",
        "reward",
        "intrinsic",
        "tokens",
        "mode",
        "update",
    }
    assert turn["cut"] == (turn["tokens"] == 4), "a random model seldom ends its action itself"
    last = [e for e in episodes if e["iteration"] == 3]
    assert sum(e["return"] for e in last) / 6 == pytest.approx(metrics[-1]["return"], abs=1e-3)
    assert sum(e["advantage"] for e in last) == pytest.approx(0, abs=1e-3) and any(
        e["advantage"] for e in last
    )
    assert {"checkpoint-3", "checkpoint-4", "settings.json"} <= {p.name for p in finished.iterdir()}
    assert not (finished / "checkpoint-2").exists(), "only the newest checkpoints are kept"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint), finished / "checkpoint-4"
    )
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_ctrl_c_finishes_the_iteration_and_saves(checkpoint, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *SMALL,
            "--model",
            checkpoint,
            "--run-dir",
            str(run_dir),
            "--iterations",
            "10000",
            "--save-every",
            "1000",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    done = len(records(run_dir / "metrics.jsonl"))
    assert (
        process.returncode == 0
        and (run_dir / f"checkpoint-{done}").exists()
        and "Ctrl-C: finishing" in err + out
    )


def refused(capsys, *argv):
    """Run with bad input: a non-zero exit and one line on stderr, which is returned."""
    assert train.main(list(argv)) not in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_refused_in_one_line(capsys, checkpoint, tmp_path, finished, monkeypatch):
    new = ["--model", checkpoint, "--run-dir", str(tmp_path / "new")]
    assert "unknown environment" in refused(capsys, *new, "--env", "nowhere")
    assert "did you mean" in refused(capsys, *new, "--env", "house", "--tasks", "radios")
    assert "unknown preset gpro; did you mean grpo?" in refused(capsys, *new, "--preset", "gpro")
    assert "must be positive" in refused(capsys, *new, "--eval-episodes", "0")
    assert "unknown option" in refused(
        capsys, *new, "--env", "house", "--tasks", "fan", "--env-options", "attics=2"
    )
    assert "name=value" in refused(capsys, *new, "--env", "house", "--env-options", "rooms")
    assert "must be positive" in refused(capsys, *new, "--tasks-per-iteration", "0")
    assert "must lie between 0 and 1" in refused(capsys, *new, "--memory-prob", "2")
    assert "has no room for even one turn" in refused(
        capsys,
        *SMALL,
        "--model",
        checkpoint,
        "--run-dir",
        str(tmp_path / "short"),
        "--context",
        "20",
    )
    assert "lower --context" in refused(capsys, *new, *SMALL, "--context", "100000")
    assert "tokenizer" in refused(
        capsys, *SMALL, "--model", str(tmp_path), "--run-dir", str(tmp_path / "new2")
    )
    assert "exists" in refused(capsys, *SMALL, "--model", checkpoint, "--run-dir", str(finished))
    assert "cannot change" in refused(capsys, "--resume", "--run-dir", str(finished), "--seed", "7")
    assert "preset cannot change" in refused(
        capsys, "--resume", "--run-dir", str(finished), "--preset", "grpo"
    )
    assert "nothing to resume" in refused(capsys, "--resume", "--run-dir", str(tmp_path / "never"))
    assert "unknown setting --memory-probs; did you mean --memory-prob?" in refused(
        capsys, "--memory-probs", "1"
    )
    assert "unknown setting --nonsense; see --help" in refused(capsys, "--nonsense", "1")
    accelerate.state.PartialState._reset_state()  # as in a new process
    assert "tensorboards" in refused(capsys, *new, "--report-to", "tensorboards")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert "pip install tensorboard" in refused(capsys, *SMALL, *new, "--report-to", "tensorboard")
    assert not (tmp_path / "new").exists(), "bad input leaves nothing behind"


def test_resume_from_the_first_checkpoint_repeats_nothing(
    finished, checkpoint, tmp_path, monkeypatch
):
    """A failure in iteration 2 with no checkpoint but the first: the logs are cut back to it."""
    run_dir, update, calls = tmp_path / "run", train.empo2.update, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError("the gradient norm is nan")
        return update(*args, **kwargs)

    monkeypatch.setattr(train.empo2, "update", failing)
    command = [
        *SMALL,
        "--model",
        checkpoint,
        "--run-dir",
        str(run_dir),
        "--iterations",
        "4",
        "--save-every",
        "10",
    ]
    assert train.main(command) == 2 and len(records(run_dir / "metrics.jsonl")) == 2
    assert "FloatingPointError" in (run_dir / "error.log").read_text()
    assert train.main(["--resume", "--run-dir", str(run_dir), "--micro-tokens", "4000"]) == 0
    assert [m["iteration"] for m in records(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
    assert json.loads((run_dir / "settings.json").read_text())["micro_tokens"] == 4000
    ours, theirs = (without_times(records(d / "metrics.jsonl")) for d in (run_dir, finished))
    assert [m["score"] for m in ours] == [m["score"] for m in theirs]


def test_a_run_can_be_made_longer_but_not_shorter(finished, tmp_path, capsys):
    assert "can only make it longer" in refused(
        capsys, "--resume", "--run-dir", str(finished), "--iterations", "2"
    )
    run_dir = tmp_path / "longer"
    shutil.copytree(finished, run_dir)
    assert train.main(["--resume", "--run-dir", str(run_dir), "--iterations", "5"]) == 0
    assert [m["iteration"] for m in records(run_dir / "metrics.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", empo2.PRESETS)
def test_a_preset_differs_in_what_it_names_and_the_command_line_goes_first(name, tmp_path):
    new = ["--run-dir", str(tmp_path / "new")]
    plain, ours = (vars(train.parse([*new, *given])[0]) for given in ([], ["--preset", name]))
    named = empo2.PRESETS[name]
    assert all(ours[k] == v for k, v in named.items())
    assert {k: v for k, v in ours.items() if v != plain[k]} == {
        k: v for k, v in named.items() if v != plain[k]
    } | ({"preset": name} if name != "empo2" else {})
    if "memory_prob" in named:
        s, _, _, notes = train.parse([*new, "--memory_prob=0.6", "--preset", name])
        assert s.memory_prob == 0.6 and any("memory_prob is not" in note for note in notes)
        as_sweep = train.parse([*new, "--preset", name, *(f"--{k}={v}" for k, v in named.items())])[
            3
        ]
        assert f"  memory_prob = {named['memory_prob']}" in as_sweep and not any(
            "is not" in note for note in as_sweep
        )


def test_metrics_reach_a_tracker_and_none_is_there_by_default(checkpoint, tmp_path, monkeypatch):
    """--report-to through accelerate, with a tracker in the place of tensorboard."""

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker, config, logged = "fake", True, None, {}, []

        def __init__(self, run_name, logging_dir):
            assert str(logging_dir) == str(tmp_path / "run")
            super().__init__()

        def store_init_configuration(self, values):
            self.config.update(values)

        def log(self, values, step, **_):
            self.logged.append((step, values))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "fake", Tracker)
    short = [
        *SMALL,
        "--model",
        checkpoint,
        "--iterations",
        "1",
        "--eval-every",
        "1",
        "--eval-episodes",
        "1",
    ]
    assert train.main([*short, "--run-dir", str(tmp_path / "none")]) == 0 and not Tracker.logged
    assert train.main([*short, "--run-dir", str(tmp_path / "run"), "--report-to", "fake"]) == 0
    assert Tracker.config["lora_r"] == 2 and Tracker.config["tasks"] == "['radio', 'fan']"
    assert [(step, "eval_success" in v, "approx_kl" in v) for step, v in Tracker.logged] == [
        (0, True, False),
        (0, False, True),
        (1, True, False),
    ]


def test_the_readmes_merged_checkpoint_is_the_adapters_policy(finished, checkpoint, tmp_path):
    """The README's lines, with other names; in fp32, plain transformers gives the log-probs of the adapter."""
    code = re.search(
        r"```python\n(.*?merge_and_unload.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    adapter, merged = finished / "checkpoint-4", tmp_path / "merged"
    for name, ours in {
        "Qwen/Qwen2.5-7B-Instruct": checkpoint,
        '"merged"': f'"{merged}"',
        "runs/scienceworld-power-component-0/checkpoint-200": adapter,
    }.items():
        assert name in code
        code = code.replace(name, str(ours))
    exec(code, {})
    ids = torch.randint(3, 300, (2, 40), generator=torch.manual_seed(0))
    policy = train.Policy.load(checkpoint, adapter=adapter)
    mask = (torch.arange(40) > 0).expand(2, -1)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert (
        type(plain).__name__ == "Qwen2ForCausalLM"
        and AutoTokenizer.from_pretrained(merged).chat_template
    )
    with torch.no_grad():
        logp = plain(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        assert torch.allclose(logp, policy.logprobs(ids, mask)[0][:, 1:], atol=1e-4)
        assert not torch.allclose(
            logp, policy.logprobs(ids, mask, reference=True)[0][:, 1:], atol=1e-4
        )


def test_reflexion_moves_no_weight(checkpoint, tmp_path, capsys):
    run_dir = tmp_path / "run"
    s = [
        *SMALL,
        "--model",
        checkpoint,
        "--run-dir",
        str(run_dir),
        "--iterations",
        "2",
        "--keep-checkpoints",
        "3",
    ]
    del s[s.index("--memory-prob") : s.index("--memory-prob") + 2]
    assert train.main([*s, "--preset", "reflexion"]) == 0
    assert "learning_rate = 0.0" in capsys.readouterr().out
    first, last = (
        (run_dir / f"checkpoint-{n}" / "adapter_model.safetensors").read_bytes() for n in (0, 2)
    )
    assert first == last
    metrics = records(run_dir / "metrics.jsonl")
    assert (
        [m["iteration"] for m in metrics] == [0, 1]
        and metrics[1]["memory_turns"] > 0
        and "score" in metrics[1]
    )
    assert train.main(["--resume", "--run-dir", str(run_dir), "--iterations", "3"]) == 0


def test_evaluations_disturb_nothing_and_survive_a_crash(finished, checkpoint, tmp_path):
    """The same metrics and weights as without them; after a crash the same evaluations as without it."""
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    made, make = [], train.envs.make
    train.envs.make = lambda *args, **kwargs: made.append(1) or make(*args, **kwargs)
    try:
        assert (
            train.main(
                [
                    *SMALL,
                    "--model",
                    checkpoint,
                    "--run-dir",
                    str(run_dir),
                    "--iterations",
                    "4",
                    "--eval-every",
                    "3",
                    "--eval-variations",
                    "3",
                    "--eval-episodes",
                    "2",
                ]
            )
            == 0
        )
    finally:
        train.envs.make = make
    assert len(made) == 6, "the simulators of training are used"
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert without_times(records(run_dir / name)) == without_times(records(finished / name))
    ours, theirs = (
        load_file(d / "checkpoint-4" / "adapter_model.safetensors") for d in (run_dir, finished)
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    evals = records(run_dir / "evals.jsonl")
    assert [e["iteration"] for e in evals] == [0, 3, 4] and [
        e["training_episodes"] for e in evals
    ] == [0, 18, 24]
    assert set(evals[0]["tasks"]) == {"radio", "fan"} and evals[0]["tasks"]["fan"]["episodes"] == 6
    assert evals[2]["score"] == sum(t["mean"] for t in evals[2]["tasks"].values()) / 2
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoint-4")  # stopped during the last evaluation but one
    text = (copy / "evals.jsonl").read_text()
    (copy / "evals.jsonl").write_text(text[: len(text) - 40])
    assert train.main(["--resume", "--run-dir", str(copy)]) == 0

    def timeless(path):
        return [
            {k: v for k, v in e.items() if not k.startswith("seconds")}
            for e in records(path / "evals.jsonl")
        ]

    assert timeless(copy) == timeless(run_dir)


def test_the_policy_is_left_as_it_was(checkpoint):
    s = empo2.Settings(
        env="house", tasks=["fan"], model=checkpoint, group_size=2, rollout_batch=2, action_tokens=4
    )
    policy = train.load_policy(s)
    simulators, pool = train.make_envs(s, "test")
    heard, sample = [], policy.sample
    policy.sample = lambda *args, **kwargs: (
        heard.append(policy.temperature) or sample(*args, **kwargs)
    )
    draws = [
        empo2.evaluate(policy, simulators, pool, 2, 0.4, s, 3, train.envs.EnvFault)[1]
        for _ in range(2)
    ]
    assert set(heard) == {0.4} and policy.temperature == 1.0 and not policy.cache.layers
    assert [[t.action for t in e.turns] for e in draws[0]] == [
        [t.action for t in e.turns] for e in draws[1]
    ]
    assert len(draws[0]) == 2 * len(pool) and not any(t.tips for e in draws[0] for t in e.turns)


def test_help_teaches():
    for script, text in {
        "train.py": "probability of prompting with tips",
        "eval.py": "--temperature",
    }.items():
        shown = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0 and text in shown.stdout and f"python {script}" in shown.stdout


def test_the_standin_plays_real_scienceworld_end_to_end(tmp_path):
    """The README's first command, shortened: two iterations on the real simulator with the shipped stand-in."""
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--env",
            "scienceworld",
            "--iterations",
            "2",
            "--step-limit",
            "8",
            "--variations",
            "1",
            "--memory-prob",
            "0.5",
            "--run-dir",
            str(run_dir),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics, episodes = records(run_dir / "metrics.jsonl"), records(run_dir / "episodes.jsonl")
    assert len(metrics) == 2 and len(episodes) == 16 and metrics[1]["memory_turns"] > 0
    answers = [t["next"] for e in episodes for t in e["turns"]]
    understood = sum("No known action" not in a for a in answers) / len(answers)
    assert understood > 0.5 and all(e["tip"] for e in episodes)
