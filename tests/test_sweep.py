"""The sweep from the outside: what it starts, what survives a kill, what is refused and reported.

pytest tests/test_sweep.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
from conftest import ROOT

import train
from engine import paper, runs
from experiments import report, sweep

# Plays train.py: keeps its arguments, holds the run's lock, waits for the file GO, and evaluates.
FAKE = """
import fcntl, json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
argv = sys.argv[1:]
run_dir = pathlib.Path(argv[argv.index("--run-dir") + 1])
if run_dir.parts[-3] == "broken":
    sys.exit("train.py: a reason")
run_dir.mkdir(parents=True, exist_ok=True)
lock = open(run_dir / "lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("train.py: another process is at work", file=sys.stderr)
    sys.exit(2)
with open(run_dir / "starts", "a") as file:
    file.write(json.dumps(argv) + chr(10))
(run_dir / "settings.json").write_text(json.dumps({"iterations": 4}))
(run_dir / "checkpoint-0").mkdir(exist_ok=True)
end = time.time() + 60
try:
    while not pathlib.Path("GO").exists() and time.time() < end:
        time.sleep(0.02)
        print("EMPO²", file=sys.stderr)
except KeyboardInterrupt:
    (run_dir / "saved").touch()
    sys.exit(130)
figures = {"share_100": 0.5, "mean": 30.0, "mean_clipped": 40, "best_reached": 50}
tasks = {run_dir.parts[-3]: figures | {"share_minus_100": 0.1}}
line = {"iteration": 4, "score": 30.0, "training_episodes": 8, "tasks": tasks}
line |= {"seconds": 1, "seconds_training": 2}
(run_dir / "evals.jsonl").write_text(json.dumps(line) + chr(10))
"""
SHARED = ["--", "--env", "house", "--iterations", "4", "--eval-every", "2", "--memory-prob", "0.5"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder for sweeps of the fake, which ends at once if there is a file GO beside it."""
    (tmp_path / "fake.py").write_text(FAKE.replace('"GO"', repr(str(tmp_path / "GO"))))
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "fake.py")
    monkeypatch.setattr(report, "draw_curves", lambda *args: None)  # a second each
    return tmp_path / "out"


def command(out, *own, presets="grpo", shared=SHARED):
    options = f"--tasks radio --seeds 0 --presets {presets}"
    return ["--out", str(out), *options.split(), *own, *shared]


def start(out, argv, ignored=()):
    """The sweep of the fake in a process of its own, once its run has begun."""

    def ignore():
        for signum in ignored:
            signal.signal(signum, signal.SIG_IGN)

    code = "import sys; from experiments import sweep; sweep.TRAIN = sys.argv[1];"
    code += "sys.exit(sweep.main(sys.argv[2:]))"
    words = [sys.executable, "-c", code, str(sweep.TRAIN), *argv]
    process = subprocess.Popen(words, cwd=ROOT, preexec_fn=ignore)
    while not runs.checkpoints(out / "radio/grpo/0"):
        assert process.poll() is None, "the sweep ended too early"
        time.sleep(0.02)
    return process


def starts(out, name):
    return [json.loads(line) for line in (out / name / "starts").read_text().splitlines()]


def cells_of(results):
    return json.loads((results / "results.json").read_text())["tasks"]["radio"]


def test_a_named_experiment_says_how_long_it_takes(out, capsys, monkeypatch):
    """27 runs, two at a time, are 14 rounds."""
    monkeypatch.setattr(sweep, "start", mock.Mock(side_effect=KeyboardInterrupt))
    argv = ["laptop", "--minutes", "30", "--out", str(out)]
    assert sweep.main(argv) == 130
    assert "27 runs, 27 of them to do, 2 at a time: about 7.0 hours" in capsys.readouterr().out


def test_each_run_gets_its_preset_and_is_not_repeated(out, capsys):
    (out.parent / "GO").touch()
    assert sweep.main(command(out, "--jobs", "2", presets="grpo empo2")) == 0
    assert "2 runs, 2 of them to do" in capsys.readouterr().out
    for preset, memory_prob in (("grpo", 0.0), ("empo2", 0.5)):  # a preset overrides what is shared
        (given,) = starts(out, f"radio/{preset}/0")
        settings, _ = train.parse(given)
        assert given.count("--preset") == 1
        assert (settings.preset, settings.memory_prob) == (preset, memory_prob)
        assert (settings.tasks, settings.seed, settings.iterations) == (["radio"], 0, 4)
    assert sweep.main(command(out, "--seeds", "0", "1")) == 0  # one more; what was there stays
    assert "2 runs, 1 of them to do" in capsys.readouterr().out
    assert len(starts(out, "radio/grpo/0")) == len(starts(out, "radio/grpo/1")) == 1
    states = {name: [one["state"] for one in row.values()] for name, row in cells_of(out).items()}
    assert states == {"grpo": ["finished", "finished"], "empo2": ["finished", "missing"]}


def test_a_grid_is_a_cell_for_each_combination_beside_the_presets(out):
    """The grid overrides the preset; a / names no folder."""
    (out.parent / "GO").touch()
    argv = command(out, "--grid", "memory_prob=0.1,0.4", presets="grpo empo2")
    assert sweep.main([*argv[: -len(SHARED)], "--grid", "embedder=a/b", *SHARED]) == 0
    for preset in ("grpo", "empo2"):
        for value in (0.1, 0.4):
            name = f"{preset},memory_prob={value},embedder=a-b"
            settings, _ = train.parse(starts(out, f"radio/{name}/0")[0])
            found = settings.preset, settings.memory_prob, settings.embedder
            assert found == (preset, value, "a/b")
            assert cells_of(out)[name]["0"]["success"] == 0.5
            assert f"| {name} " in (out / "summary.md").read_text()
    assert len(cells_of(out)) == 4


def test_a_file_of_settings_also_one_elsewhere(out, monkeypatch):
    """It has no tasks: those of the environment; what may change on a resume is read again."""
    path = out.parent / "mine.yaml"
    content = "sweep: {seeds: [3], presets: [empo2], out: OUT}\n"
    content += "env: house\niterations: 4\neval_every: 2\nmax_tips: 3\nmicro_tokens: 4096\n"
    path.write_text(content.replace("OUT", str(out)))
    settings, _ = train.parse(["--config", str(path)])
    assert (settings.max_tips, settings.seed, settings.preset) == (3, 0, "empo2")
    run_dir = out / "fan" / "empo2" / "3"
    (run_dir / "checkpoint-0").mkdir(parents=True)
    (out.parent / "GO").touch()
    assert sweep.main([str(path)]) == 0
    resume = ["--resume", "--run-dir", str(run_dir)]
    assert starts(out, "fan/empo2/3") == [[*resume, "--micro-tokens", "4096"]]
    args, shared = sweep.parse([str(path), "--", "--max-tips", "5"])
    sweep.common_settings(args, shared)
    cells = sweep.make_cells(args, shared)
    assert set(cells) == {"fan/empo2/3", "radio/empo2/3"}
    assert train.parse(cells["radio/empo2/3"])[0].max_tips == 5


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_run_twice(out, capsys):
    """Its run goes on: the next sweep reports it as taken, and a later one finds it finished."""
    process = start(out, command(out))
    assert sweep.main(command(out)) == 2
    assert "another process is at work here" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert sweep.main(command(out)) == 1
    assert "exit code 2: train.py: another process" in (out / "summary.md").read_text()
    (out.parent / "GO").touch()
    while not report.finished(out / "radio/grpo/0"):
        time.sleep(0.02)
    assert sweep.main(command(out)) == 0
    assert len(starts(out, "radio/grpo/0")) == 1
    assert "failed" not in (out / "summary.md").read_text()


@pytest.mark.slow
def test_a_signal_that_is_ignored_at_the_start_does_not_stop_a_sweep(out):
    process = start(out, command(out), [signal.SIGHUP, signal.SIGINT])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    (out.parent / "GO").touch()
    assert process.wait(timeout=60) == 0


def stop_once_it_runs(run_dir, stop):
    """Send a signal to this process once the run has begun."""

    def wait():
        while not runs.checkpoints(run_dir):
            time.sleep(0.02)
        os.kill(os.getpid(), stop)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_lets_the_runs_save_and_the_same_command_continues(stop, out):
    before = {signum: signal.getsignal(signum) for signum in sweep.STOPS}
    try:
        stop_once_it_runs(out / "radio/grpo/0", stop)
        assert sweep.main(command(out)) == 130
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert (out / "radio/grpo/0/saved").exists()
    (out.parent / "GO").touch()
    lower = ["--micro-tokens", "2048"]  # what may change on a resume does
    assert sweep.main(command(out, shared=[*SHARED, *lower])) == 0
    resume = ["--resume", "--run-dir", str(out / "radio/grpo/0")]
    assert starts(out, "radio/grpo/0")[1] == [*resume, *lower]


@pytest.mark.slow
def test_in_the_background_of_a_script_it_stops_as_well(out):
    """There Ctrl-C is ignored, and so it is in the runs."""
    process = start(out, command(out), [signal.SIGINT])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert (out / "radio/grpo/0/saved").exists()


def test_a_failing_run_is_reported_and_the_others_go_on(out):
    (out.parent / "GO").touch()
    assert sweep.main(command(out, "--tasks", "broken", "radio")) == 1
    results = json.loads((out / "results.json").read_text())
    assert results["failed"] == {"broken/grpo/0": "exit code 1: train.py: a reason"}
    assert results["tasks"]["radio"]["grpo"]["0"]["success"] == 0.5


def test_bad_input_is_refused_in_one_line_before_anything_runs(out, capsys):
    path = out.parent / "bad.yaml"
    path.write_text("sweep: [0]\nenv: house\n")
    grid = ["--env", "house", "--eval-every", "2"]
    for argv, reason in (
        (command(out, presets="gpro"), "did you mean grpo"),
        (command(out, shared=[*SHARED, "--nonsense", "1"]), "unknown setting '--nonsense'"),
        (command(out, shared=[*SHARED, "--seed", "1"]), "--seed is the sweep's own"),
        (command(out, shared=[*SHARED, "--eval-every", "0"]), "add -- --eval-every 5"),
        (command(out, "--jobs", "0"), "--jobs is 0"),
        (command(out, "--sedes", "0"), "unrecognized arguments: --sedes 0"),
        (["--seeds", "1"], "a folder with --out"),
        (["laptpo"], "did you mean laptop"),
        (["none.yaml"], "none.yaml: is no YAML file of settings"),
        ([str(path)], "`sweep` must be a mapping"),
        (command(out, "--grid", "memory_prb=0.1"), "did you mean --memory-prob"),
        (command(out, "--grid", "memory_prob=0.1,x"), "invalid float value: 'x'"),
        (command(out, "--grid", "memory_prob=0.1,1.5"), "--memory-prob is 1.5"),
        (command(out, "--grid", "memory_prob=0.1,"), "invalid float value: ''"),
        (command(out, "--grid", "memory_prob"), "write each setting once"),
        (command(out, "--grid", "max_tips=1", "max-tips=2"), "write each setting once"),
        (command(out, "--grid", "run_dir=a,b"), "--run-dir is the sweep's own"),
        (command(out, "--grid", "eval_every=0,2", shared=["--", *grid]), "add -- --eval-every 5"),
    ):
        assert sweep.main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("sweep: ") and reason in error and error.count("\n") == 1
    assert not out.exists()
    (out.parent / "GO").touch()
    assert sweep.main(command(out)) == 0
    assert sweep.main(command(out, shared=[*SHARED, "--iterations", "5"])) == 2
    assert "iterations = 4, not 5" in capsys.readouterr().err


@pytest.mark.parametrize("path", (ROOT / "configs").glob("*.yaml"), ids=lambda path: path.stem)
def test_the_experiments_are_files_for_both_programs(path):
    model = ["--model", "m"]  # some have none without a GPU
    args, shared = sweep.parse([path.stem, "--", *model])
    common = sweep.common_settings(args, shared)
    settings, _ = train.parse(["--config", str(path), *model])
    assert settings.eval_every > 0 and sorted(settings.tasks) == sorted(args.tasks)
    assert {name: getattr(settings, name) for name in common.keys() - {"together", "tasks"}} == {
        name: common[name] for name in common.keys() - {"together", "tasks"}
    }
    assert str(args.out) == f"sweeps/{path.stem}"


def test_what_comes_later_counts_and_a_preset_before_what_is_shared():
    args, shared = sweep.parse(["laptop", "--seeds", "7", "--", "--iterations", "3"])
    assert (args.seeds, args.jobs, args.together) == ([7], 2, True)
    settings, _ = train.parse(sweep.make_cells(args, shared)["together/mode-turn/7"])
    assert settings.mode_level == "turn" and train.parse(shared)[0].mode_level == "episode"
    assert (settings.iterations, settings.tasks) == (3, ["fan", "radio"])
    assert sweep.parse(["paper"])[0].tasks == list(paper.TABLE_1)


@pytest.mark.slow
def test_a_sweep_of_real_runs(checkpoint, tmp_path):
    shared = "--env house --env-options rooms=1 step_limit=2 --group-size 2 --action-tokens 3"
    shared += " --tip-tokens 4 --variations 1 --lora-r 2 --iterations 4 --eval-every 1"
    shared += f" --eval-variations 1 --eval-episodes 2 --model {checkpoint}"
    argv = ["--out", str(tmp_path), "--tasks", "radio", "fan", "--together", "--presets", "empo2"]
    assert sweep.main([*argv, "--seeds", "0", "--", *shared.split()]) == 0
    folder = tmp_path / "together" / "empo2" / "0"
    cells = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert list(cells) == ["mean of 2 tasks", "radio", "fan"]
    assert [line["iteration"] for line in runs.records(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    for cell in (row["empo2"]["0"] for row in cells.values()):
        assert (cell["state"], cell["episodes"]) == ("finished", 8)
        assert [point["episodes"] for point in cell["curve"]] == [0, 2, 4, 6, 8]


# --- The report, of runs written by hand ---
def write_run(folder, task, scores, iterations=4):
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"iterations": iterations}))
    costs = {"seconds": 30, "seconds_training": 60}
    with open(folder / "evals.jsonl", "w") as evals, open(folder / "metrics.jsonl", "w") as metrics:
        for iteration, score in scores.items():
            figures = {"mean": score, "share_100": score / 100, "share_minus_100": score / 200}
            tasks = {task: figures | {"mean_clipped": score + 1, "best_reached": score + 2}}
            line = {"iteration": iteration, "training_episodes": 10 * iteration, "tasks": tasks}
            evals.write(json.dumps(line | costs) + "\n")
            line = {"iteration": iteration, "episodes": 8, "success": 0.25}
            metrics.write(json.dumps(line | {"seconds_update": 60 / len(scores)}) + "\n")


def write_report(out, model):
    names = ("together", "step_limit", "eval_variations", "eval_episodes", "eval_temperature")
    settings = {"env": "scienceworld", "model": model} | dict.fromkeys(names)
    content = {"tasks": ["find-plant"], "presets": ["grpo", "empo2"], "seeds": [0, 1]}
    run = {"command": "x", "environment": "scienceworld 1.2.3"}
    report.report(out, content | {"settings": settings, "failed": {}, "runs": [run]})
    return (out / "summary.md").read_text()


def entries(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_report(tmp_path):
    """Means are over the finished runs, of their last three evaluations, without iteration 0."""
    grpo = tmp_path / "find-plant" / "grpo"
    write_run(grpo / "0", "find-plant", {0: 96.0, 2: 20.0, 4: 40.0})
    write_run(grpo / "1", "find-plant", {0: 0.0, 1: 90.0, 2: 50.0, 3: 60.0, 4: 70.0})
    write_run(tmp_path / "find-plant/empo2/0", "find-plant", {0: 96.0, 2: 30.0})
    lost = {"iteration": 3, "training_episodes": 30, "seconds": 0, "seconds_training": 0}
    runs.append(tmp_path / "find-plant/empo2/0/evals.jsonl", [lost | {"tasks": {}}])
    text = write_report(tmp_path, "a/model")
    _, summary, beside = text.split("\n## ")
    grpo, empo2 = [entries(line) for line in summary.splitlines() if line[:5] in ("| grp", "| emp")]
    assert grpo[1:5] == ["0.300", "0.600", "0.450", "0.300"]
    assert grpo[5:9] == ["45.0", "46.0", "47.0", "0.23"], "the rest of the paper's five figures"
    assert grpo[9:] == ["3.0", "32", "8"], "minutes, episodes, solved"
    assert empo2[1:4] == ["0.300 (2 iterations)", "missing", "missing"]
    assert "Band: from the lowest to the highest" in text and "seeds 0, 1" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [entries(line) for line in beside.splitlines() if line.startswith("| ")]
    assert rows[0][:4] == ["task", "grpo", "empo2", "paper: base"]
    assert [row[0] for row in rows[2:]] == list(paper.TABLE_1)
    assert [
        "find-plant",
        "55.00",
        "missing",
        *map("{:.2f}".format, paper.TABLE_1["find-plant"]),
    ] in rows


def test_a_run_whose_evaluations_were_all_lost_is_not_finished(tmp_path):
    write_run(tmp_path / "find-plant/grpo/0", "another task", {4: 40.0})
    assert "| grpo | 1 iterations |" in re.sub(" +", " ", write_report(tmp_path, "m"))


def test_a_stand_in_does_not_stand_beside_the_paper(tmp_path):
    write_run(tmp_path / "find-plant/grpo/0", "find-plant", {4: 40.0})
    assert "paper" not in write_report(tmp_path, "standin/stages")


def test_a_table_has_means_over_what_is_there():
    columns = ["episodes", "mean"]
    rows = {"find-plant": [4, 10.0], "use-thermometer": [4, 30.0], "mine": [1, None]}
    lines = {entries(line)[0]: entries(line)[1:] for line in report.table(columns, rows)}
    assert list(lines)[2:] == [*paper.TABLE_1, "mine", "mean of 2 rows"]
    assert lines["mine"] == ["1", "missing"] + ["-"] * 5
    assert lines["mean of 2 rows"] == ["", "20.00", "-65.40", "8.00", "27.75", "26.90", "91.35"]
