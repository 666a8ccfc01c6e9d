"""eval.py from the outside: the two protocols, what survives a kill, the tables; and the five figures.

pytest tests/test_eval.py
"""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import empo2
import eval as evaluation
import report
import sweep
import train

TASKS = ["radio", "fan", "heater", "clock", "printer", "red light bulb"]


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """A finished run of one iteration whose memory is kept per task."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert (
        train.main(
            [
                "--env",
                "house",
                "--tasks",
                "radio",
                "fan",
                "--env-options",
                "rooms=2",
                "step_limit=3",
                "--group-size",
                "2",
                "--tasks-per-iteration",
                "2",
                "--action-tokens",
                "4",
                "--tip-tokens",
                "8",
                "--memory-prob",
                "0.6",
                "--lora-r",
                "2",
                "--tip-threshold",
                "0",
                "--memory-scope",
                "task",
                "--iterations",
                "1",
                "--model",
                checkpoint,
                "--run-dir",
                str(run_dir),
            ]
        )
        == 0
    )
    return run_dir


def evaluate(*argv):
    assert evaluation.main([str(a) for a in argv]) == 0
    return json.loads(open(argv[argv.index("--out") + 1]).read())


def test_evaluation_of_a_run_and_of_a_base_model(run, checkpoint, tmp_path, capsys):
    result = evaluate(run, "--variations", 2, "--out", tmp_path / "run.json")
    assert [(p["task"], p["episodes"], p["memory_turns"]) for p in result["parts"]] == [
        ("radio", 8, 0),
        ("fan", 8, 0),
    ]
    protocol = result["protocol"]
    assert protocol["adapter"].endswith("checkpoint-1") and protocol["environment"] == "house 2"
    assert protocol["step_limits"] == {"radio": 3, "fan": 3} and protocol["memory"] == "off"
    printed = capsys.readouterr().out
    assert (
        all(name in printed for name in empo2.FIGURES)
        and "paper" not in printed
        and "seed 0" in printed
    )
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    base = evaluate(
        "--model",
        checkpoint,
        "--env",
        "house",
        "--tasks",
        "fan",
        "--variations",
        1,
        "--out",
        tmp_path / "base.json",
    )
    assert base["protocol"]["adapter"] == "None" and base["protocol"]["step_limits"] == {"fan": 12}
    assert (
        evaluation.main([str(run), "--variations", "1"]) == 0
        and (run / "eval-id-test-1.json").exists()
    )


def test_bad_input_is_refused_in_one_line(run, checkpoint, tmp_path, capsys):
    out = tmp_path / "out.json"
    evaluate(run, "--variations", 1, "--out", out)
    capsys.readouterr()

    def refused(*argv):
        assert evaluation.main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert (
            lines[-1].startswith("eval.py: ")
            and sum(line.startswith("eval.py") for line in lines) == 1
        )
        return lines[-1]

    assert "other arguments (variations, seed)" in refused(
        run, "--variations", 2, "--seed", 1, "--out", out
    )
    assert "other arguments" in refused("--model", checkpoint, "--out", out)
    assert "no run with a checkpoint" in refused(tmp_path)
    assert "no folder" in refused(run, "--out", tmp_path / "no" / "x.json")
    assert "needs the new tasks" in refused(run, "--protocol", "ood")
    assert "--memory is for" in refused("--model", checkpoint, "--memory")
    assert "did you mean" in refused(run, "--tasks", "radios", "--out", tmp_path / "new.json")
    assert "be positive" in refused(run, "--variations", "-1", "--out", tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_the_memory_of_a_checkpoint_is_shown_at_every_turn(run, tmp_path, capsys):
    """No weight, no tip and no file of the run changes; without a tip for these variations it is refused."""
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoint-1").iterdir()}
    on = evaluate(run, "--memory", "--variations", 2, "--out", tmp_path / "on.json")
    assert on["protocol"]["memory"] == "tips of the checkpoint at every turn"
    assert all(0 < p["memory_turns"] == p["turns"] and not p["tips"] for p in on["parts"])
    assert before == {p: p.stat().st_mtime_ns for p in (run / "checkpoint-1").iterdir()}
    assert (
        evaluation.main(
            [str(run), "--memory", "--tasks", "clock", "--out", str(tmp_path / "clock.json")]
        )
        == 2
    )
    assert "the run has tips in 0 of these 1 memories (one per task)" in capsys.readouterr().err


def test_ood_fills_a_memory_and_moves_no_weight(run, tmp_path, monkeypatch, capsys):
    policies, load = [], train.load_policy
    monkeypatch.setattr(train, "load_policy", lambda *a: policies.append(load(*a)) or policies[-1])
    result = evaluate(
        run,
        "--protocol",
        "ood",
        "--tasks",
        "clock",
        "printer",
        "--variations",
        3,
        "--out",
        tmp_path / "ood.json",
    )
    parts = result["parts"]
    assert [(p["task"], p["trial"]) for p in parts] == [
        (t, n) for t in ("clock", "printer") for n in range(10)
    ]
    assert all((p["memory_turns"] == 0) == (p["trial"] == 0) and p["episodes"] == 3 for p in parts)
    assert all(p["memory_turns"] == p["turns"] for p in parts if p["trial"]) and all(
        p["tips"] for p in parts
    )
    assert {tip["slot"] for p in parts for tip in p["tips"]} == {"clock", "printer"}
    trained = load_file(run / "checkpoint-1" / "adapter_model.safetensors")
    ours = {
        n.replace(".default", ""): p for n, p in policies[0].model.named_parameters() if "lora" in n
    }
    assert trained.keys() == ours.keys() and all(
        torch.equal(trained[name], ours[name]) for name in trained
    )
    printed = capsys.readouterr().out
    assert all(
        f"| {task}, trial {trial} " in printed
        for task in ("clock", "printer")
        for trial in range(10)
    )
    assert (tmp_path / "ood.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("protocol", ["id", "ood"])
def test_a_killed_evaluation_is_continued(run, tmp_path, protocol, monkeypatch):
    """kill -9 when some parts are written, then the same command: nothing is repeated, the same numbers come out."""
    tasks = TASKS if protocol == "id" else TASKS[2:4]
    command = [str(run), "--protocol", protocol, "--tasks", *tasks, "--variations", "4", "--out"]
    whole = evaluate(*command, tmp_path / "whole.json")
    out = tmp_path / "killed.json"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *command, str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not out.exists() or len(json.loads(out.read_text())["parts"]) < (
        2 if protocol == "id" else 13
    ):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    written = json.loads(out.read_text())["parts"]
    assert 0 < len(written) < len(whole["parts"])
    calls, play = [], evaluation.play
    monkeypatch.setattr(evaluation, "play", lambda *a: calls.append(1) or play(*a))
    assert evaluate(*command, out) == whole
    assert len(calls) == len(whole["parts"]) - len(written)
    monkeypatch.setattr(
        train, "load_policy", None
    )  # all is there: the table, and nothing is loaded
    assert evaluate(*command, out) == whole


def follow_the_solution(monkeypatch):
    """Put a player that replays the environment's own solution in the place of `policy.sample`."""
    load, make, simulators = train.load_policy, train.make_envs, []

    def make_envs(*args):
        made = make(*args)
        simulators[:] = made[0]
        return made

    def load_policy(*args):
        policy = load(*args)

        def sample(contexts, max_tokens, rows):
            actions = [simulators[row].gold_path()[simulators[row]._steps] for row in rows]
            return [[*policy.encode(action), policy.end_id] for action in actions], [[0.0]] * len(
                rows
            )

        policy.sample = sample
        return policy

    monkeypatch.setattr(train, "make_envs", make_envs)
    monkeypatch.setattr(train, "load_policy", load_policy)


SOLVED = {
    "mean": 100,
    "mean_clipped": 100,
    "best_reached": 100,
    "share_100": 1,
    "share_minus_100": 0,
}


def test_a_player_that_knows_the_solutions_gets_100(checkpoint, tmp_path, monkeypatch):
    follow_the_solution(monkeypatch)
    result = evaluate(
        "--model", checkpoint, "--env", "house", "--tasks", *TASKS, "--out", tmp_path / "house.json"
    )
    assert [{f: p[f] for f in SOLVED} for p in result["parts"]] == [SOLVED] * 6
    assert all(p["variations"] == 20 and p["episodes"] == 80 for p in result["parts"])


def test_a_player_that_knows_the_solutions_gets_100_in_scienceworld(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """Also the table: the paper's rows in its order beside its numbers, what was not evaluated is missing."""
    follow_the_solution(monkeypatch)
    tasks = ["find-plant", "find-animal", "power-component"]
    result = evaluate(
        "--model",
        checkpoint,
        "--tasks",
        *tasks,
        "--variations",
        1,
        "--episodes",
        1,
        "--out",
        tmp_path / "science.json",
    )
    assert [{f: p[f] for f in SOLVED} for p in result["parts"]] == [SOLVED] * 3
    printed = capsys.readouterr().out.splitlines()
    assert "environment scienceworld 1.2.3" in printed[0] and "'find-plant': 30" in printed[0]
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in printed
        if "|" in line
    }
    assert [name for name in rows if name in report.PAPER] == list(report.PAPER)
    assert rows["find-plant"][:3] == ["1", str(result["parts"][0]["turns"]), "0"]
    assert rows["find-plant"][3:8] == ["100.00", "100.00", "100.00", "1.00", "0.00"]
    assert rows["find-plant"][8:] == ["-47.10", "15.10", "23.00", "46.20", "100.00"]
    assert rows["chemistry-mix"][:8] == ["missing"] * 8 and rows["chemistry-mix"][-1] == "42.70"
    assert rows["mean of 3 rows"][3] == "100.00" and rows["mean of 3 rows"][-1] == "98.10"


def test_the_papers_numbers():
    """Their means are those of the paper; the sweep takes exactly its tasks, and the README names all presets."""
    means = [sum(column) / 18 for column in zip(*report.PAPER.values())]
    assert (
        means == pytest.approx([-61.4, 17.1, 33.8, 33.2, 75.9], abs=0.06)
        and len(report.PAPER) == 18
    )
    args, extra = sweep.split_command(["paper"])
    assert args.tasks == list(report.PAPER) and args.presets == ["grpo", "empo2"]
    assert sweep.settings_of(args, extra)["eval_variations"] == 20
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in empo2.PRESETS)
    assert set(report.PAPER_OOD) < set(report.PAPER)
    assert {trained for trained, _, _ in report.PAPER_OOD.values()} < set(report.PAPER)


def test_the_five_figures():
    """A solved episode, one cut off by the step limit below its best, a wrong focus, and one that never scored."""

    def episode(ended, *rewards):
        turns = [empo2.Turn([], [], [], [], {}, reward) for reward in rewards]
        return empo2.Episode("", 0, 0, [], [], "", turns, score=sum(rewards), ended=ended)

    episodes = [
        episode("completed", 25, 0, 75),
        episode("step limit", 60, -20),
        episode("completed", 50, -150),
        episode("step limit", 0, 0),
    ]
    assert empo2.figures(episodes) == {
        "mean": 10.0,
        "mean_clipped": 35.0,
        "best_reached": 52.5,
        "share_100": 0.25,
        "share_minus_100": 0.25,
    }
