"""sweep.py from the outside: what it leaves, what survives a kill, what is refused, what is reported.

pytest tests/test_sweep.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import empo2
import report
import sweep

SMALL = [
    "--env",
    "house",
    "--env-options",
    "rooms=1",
    "step_limit=2",
    "--group-size",
    "2",
    "--tasks-per-iteration",
    "1",
    "--action-tokens",
    "3",
    "--tip-tokens",
    "4",
    "--variations",
    "1",
    "--lora-r",
    "2",
    "--eval-every",
    "2",
    "--eval-variations",
    "1",
    "--eval-episodes",
    "2",
]


def arguments(out, checkpoint, *own, iterations=4):
    return [
        "--out",
        str(out),
        *own,
        "--",
        *SMALL,
        "--model",
        checkpoint,
        "--iterations",
        str(iterations),
    ]


def processes_in(folder):
    """Command lines of living processes that name the folder (Linux)."""
    found = []
    for process in os.listdir("/proc"):
        try:
            command = open(f"/proc/{process}/cmdline").read() if process.isdigit() else ""
        except OSError:  # it has just ended
            continue
        found += [command] if "train.py" in command and str(folder) in command else []
    return found


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "the sweep ended too early"
        time.sleep(0.02)


def gone(folder, seconds=5):
    end = time.time() + seconds
    while processes_in(folder) and time.time() < end:
        time.sleep(0.05)
    return not processes_in(folder)


@pytest.fixture(scope="module")
def swept(checkpoint, tmp_path_factory):
    """Two presets x two seeds, killed with -9 when a cell was finished, then continued: (folder, what was there)."""
    out = tmp_path_factory.mktemp("sweeps") / "one"
    command = arguments(
        out,
        checkpoint,
        "--tasks",
        "radio",
        "--presets",
        "grpo",
        "empo2",
        "--seeds",
        "0",
        "1",
        "--jobs",
        "2",
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *command], stderr=subprocess.DEVNULL
    )

    def finished():
        return [p for p in out.glob("*/*/*") if p.is_dir() and report.progress_of(p)[2]]

    wait_for(finished, process)
    process.kill()
    process.wait()
    assert gone(out), "no run outlives its sweep"
    before = {p: (p / "metrics.jsonl").stat().st_mtime_ns for p in finished()}
    assert 1 <= len(before) < 4
    assert sweep.main(command) == 0
    return out, before, command


def test_a_killed_sweep_is_continued_without_repeating_what_is_finished(swept):
    out, before, _ = swept
    assert all((p / "metrics.jsonl").stat().st_mtime_ns == then for p, then in before.items())
    cells = [out / "radio" / preset / seed for preset in ("grpo", "empo2") for seed in "01"]
    for cell in cells:
        assert [m["iteration"] for m in report.records(cell / "metrics.jsonl")] == [0, 1, 2, 3]
        assert [e["iteration"] for e in report.records(cell / "evals.jsonl")] == [0, 2, 4]
        s = json.loads((cell / "settings.json").read_text())
        assert (s["preset"], s["seed"], s["tasks"]) == (cell.parent.name, int(cell.name), ["radio"])
        assert s["memory_prob"] == empo2.PRESETS[cell.parent.name].get("memory_prob", 0.25)


def test_the_report(swept):
    out, _, command = swept
    results = json.loads((out / "results.json").read_text())
    cell = results["tasks"]["radio"]["grpo"]["1"]
    evals = report.records(out / "radio" / "grpo" / "1" / "evals.jsonl")
    assert cell["success"] == pytest.approx(sum(e["success"] for e in evals) / 3)
    assert (
        cell["state"] == "finished"
        and cell["episodes"] == 8
        and [p["episodes"] for p in cell["curve"]] == [0, 4, 8]
    )
    run = results["runs"][-1]
    assert run["command"].startswith("python sweep.py --out") and {"torch", "hardware"} <= set(run)
    summary = (out / "summary.md").read_text()
    assert "| preset | seed 0 | seed 1 | mean |" in summary and "missing" not in summary
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_more_seeds_other_settings_and_nonsense(swept, checkpoint, capsys):
    out, _, command = swept

    def refused(*argv):
        assert sweep.main(list(argv)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("sweep.py: ")
        return lines[0]

    assert "iterations = 4 (now 5)" in refused(*command[:-1], "5")
    assert "did you mean grpo" in refused(
        *command[:2], "--presets", "gpro", *command[command.index("--") :]
    )
    assert "unknown setting --nonsense" in refused(*command, "--nonsense", "1")
    assert "the sweep's own" in refused(*command, "--seed", "1")
    assert "add -- --eval-every" in refused(*command, "--eval-every", "0")
    assert "--out" in refused("--seeds", "1")
    assert "unknown experiment" in refused("desktop")
    assert "no sweep here" in refused("--out", str(out / "none"), "--report")


def test_a_missing_cell_is_shown_as_missing(swept, tmp_path, capsys):
    shutil.copytree(swept[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "radio" / "grpo" / "1")
    assert sweep.main(["--out", str(tmp_path / "copy"), "--report"]) == 0
    assert f"{tmp_path / 'copy'}/summary.md" in capsys.readouterr().out
    summary = (tmp_path / "copy" / "summary.md").read_text()
    row = next(line for line in summary.splitlines() if line.startswith("| grpo"))
    assert (
        row.split("|")[3].strip() == "missing"
        and row.count("missing") == 1
        and "(1 of 2 seeds)" in row
    )


def test_a_failing_cell_is_reported_and_the_rest_goes_on(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = arguments(
        out,
        checkpoint,
        "--tasks",
        "radios",
        "radio",
        "--presets",
        "reflexion",
        "--seeds",
        "0",
        "--jobs",
        "2",
        iterations=1,
    )
    assert sweep.main(command) == 1
    summary = (out / "summary.md").read_text()
    assert (
        "- radios/reflexion/0 failed with exit code 2: train.py: unknown task 'radios'; did you mean"
        in summary
    )
    assert (
        report.progress_of(out / "radio" / "reflexion" / "0")[2] and "## mean of 2 tasks" in summary
    )


def test_ctrl_c_lets_the_runs_save(checkpoint, tmp_path):
    """All tasks in one run, stopped long before its end."""
    out = tmp_path / "out"
    command = arguments(
        out,
        checkpoint,
        "--tasks",
        "radio",
        "fan",
        "--together",
        "--presets",
        "empo2",
        "--seeds",
        "0",
        iterations=10000,
    ) + ["--save-every", "1000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *command], stderr=subprocess.DEVNULL
    )
    run_dir = out / "together" / "empo2" / "0"
    wait_for(lambda: report.records(run_dir / "metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and gone(out)
    done = len(report.records(run_dir / "metrics.jsonl"))
    assert (run_dir / f"checkpoint-{done}").exists() and done < 10000
    assert f"({done} of 10000)" in (out / "summary.md").read_text()
    assert json.loads((run_dir / "settings.json").read_text())["tasks"] == ["radio", "fan"]


def test_a_named_experiment_can_be_overridden():
    args, extra = sweep.split_command(["scienceworld", "--seeds", "7", "--", "--iterations", "3"])
    assert (
        args.seeds == [7]
        and args.presets == ["grpo", "empo2"]
        and str(args.out) == "sweeps/scienceworld"
    )
    assert extra[-2:] == ["--iterations", "3"] and "--eval-every" in extra


def test_scienceworld_scores_stand_beside_the_papers(tmp_path):
    """All rows of Table 1 in its order; the last evaluation of finished runs, missing where there is none."""
    run_dir = tmp_path / "find-plant" / "grpo" / "0"
    run_dir.mkdir(parents=True)
    (run_dir / "settings.json").write_text(json.dumps({"iterations": 2}))
    (run_dir / "evals.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "iteration": i,
                    "training_episodes": i,
                    "seconds": 1,
                    "tasks": {"find-plant": {"share_100": 0, "mean": score}},
                }
            )
            + "\n"
            for i, score in ((0, -50.0), (2, 30.0))
        )
    )
    (run_dir / "metrics.jsonl").write_text(json.dumps({"episodes": 4, "success": 0.0}) + "\n")
    settings = {
        "together": False,
        "env": "scienceworld",
        "step_limit": None,
        "eval_variations": 20,
        "eval_episodes": 4,
        "eval_temperature": 0.4,
    }
    report.report(
        tmp_path,
        {
            "tasks": ["find-plant"],
            "presets": ["grpo", "empo2"],
            "seeds": [0],
            "settings": settings,
            "runs": [{"command": "x", "environment": "scienceworld 1.2.3"}],
            "failed": {},
        },
    )
    summary = (tmp_path / "summary.md").read_text()
    lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in summary.split("Table 1")[1].splitlines()
        if line.startswith("|")
    ]
    assert lines[0][:4] == ["task", "grpo", "empo2", "paper: base"] and [
        r[0] for r in lines[2:]
    ] == list(report.PAPER)
    rows = {line[0]: line[1:] for line in lines}
    assert rows["find-plant"] == ["30.00", "missing", "-47.10", "15.10", "23.00", "46.20", "100.00"]
    assert rows["find-animal"][:2] == ["missing", "missing"]
    assert (
        "step limits: the paper's" in summary
        and "scienceworld 1.2.3" in summary
        and "seeds: 0" in summary
    )
