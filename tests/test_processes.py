"""Several processes are one run: its numbers, one line when it fails, and it goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_faults import fork_server, nothing
from test_train import SMALL, start, timeless, weights

import train
from engine import processes, runs


def no_patience(rank):
    processes.MEETING = timedelta(seconds=2)


def second_is_out_of_memory(rank):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        train.empo2.accumulate_gradient = full


@pytest.fixture(scope="module")
def server():
    with fork_server() as launch:
        yield launch


@pytest.fixture
def launch(server):
    """`ranks` of `count` processes of train.py, with a store, as torchrun has one, or a port.

    Returns the processes and a function that waits for them -> (exit codes, the lines that say why,
    all that was said).
    """
    stores = []

    def launch(argv, run_dir, ranks=(0, 1), count=2, act=nothing, port=None):
        hosted = port is None
        if hosted:
            stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            port = stores[-1].port
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared["TORCHELASTIC_USE_AGENT_STORE"] = hosted
        ours = []
        for rank in ranks:
            environment = {"RANK": rank, "LOCAL_RANK": rank} | shared
            environment = {name: str(value) for name, value in environment.items()}
            ours.append(server(argv, run_dir, 0, act, rank, **environment))

        def end():
            codes, said = zip(*[end() for _, end in ours], strict=True)
            lines = "".join(said).splitlines()
            return codes, [x for x in lines if x.startswith(("train.py: ", "stopped"))], said

        return [process for process, _ in ours], end

    return launch


# --- One run --------------------------------------------------------------------------------------
LEARN = ["--iterations", "3", "--learning-rate", "1e-4", "--rollout-batch", "2"]
LEARN += ["--eval-every", "3", "--eval-variations", "1", "--eval-episodes", "1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert start(run_dir, *LEARN) == 0
    return run_dir


def test_several_processes_play_and_learn_what_one_does(alone, launch, tmp_path):
    """Also where some have no row in a step, and no episode in an evaluation: two for three."""
    codes, _, said = launch([*SMALL, *LEARN], tmp_path, range(3), 3)[1]()
    assert codes == (0, 0, 0), said
    assert [text.count(" 3/3 ") for text in said] == [2, 0, 0]
    assert [text.count("look at its episodes") for text in said] == [1, 0, 0]
    assert runs.records(tmp_path / "episodes.jsonl") == runs.records(alone / "episodes.jsonl")
    for memory in ("tips.npz", "novelty.npz"):
        ours, theirs = (np.load(d / "checkpoint-3" / memory) for d in (tmp_path, alone))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs, first = weights(tmp_path, 3), weights(alone, 3), weights(alone, 0)
    moved = max((theirs[name] - first[name]).abs().max() for name in theirs)
    gap = max((theirs[name] - ours[name]).abs().max() for name in theirs)
    assert gap < 1e-6 < 1e-4 < moved, f"weights moved by {moved:.1e}, and differ by {gap:.1e}"
    assert timeless(tmp_path / "evals.jsonl") == timeless(alone / "evals.jsonl")
    metrics = [timeless(each / "metrics.jsonl") for each in (tmp_path, alone)]
    for ours, theirs in zip(*metrics, strict=True):
        known = {name: value for name, value in theirs.items() if value is not None}
        assert ours.keys() == theirs.keys()
        assert {name: ours[name] for name in known} == pytest.approx(known, rel=1e-4, abs=2e-5)


def test_a_signal_stops_all_after_the_same_iteration_and_a_lost_one_is_said(launch, tmp_path):
    """To one process; the run goes on. Of the other it is said, once, how to go on."""
    new = [*SMALL, "--iterations", 10000, "--save-every", 1000]
    done = 0
    for argv, stop in ((new, signal.SIGTERM), (["--resume"], signal.SIGKILL)):
        both, end = launch(argv, tmp_path)
        while len(runs.records(tmp_path / "metrics.jsonl")) <= done:
            assert all(process.is_alive() for process in both)
            time.sleep(0.05)
        os.kill(both[1].pid, stop)
        codes, lines, said = end()
        assert len(lines) == 1 and "0x" not in "".join(said), said
        if stop == signal.SIGTERM:
            assert codes == (130, 130) and lines[0].endswith("continues")
            done = len(runs.records(tmp_path / "metrics.jsonl"))
            assert runs.checkpoints(tmp_path) == [0, done]
    assert codes == (2, -signal.SIGKILL)
    assert lines == ["train.py: another process was lost; the same launch with --resume continues"]
    assert start(tmp_path, "--resume", "--save-every", 1, "--iterations", done + 1) == 0
    played = [m["iteration"] for m in runs.records(tmp_path / "metrics.jsonl")]
    assert played == list(range(done + 1))


# --- One line -------------------------------------------------------------------------------------
def test_a_process_that_fails_says_why_and_the_other_ends(launch, tmp_path):
    codes, lines, said = launch(SMALL, tmp_path, act=second_is_out_of_memory)[1]()
    assert codes == (2, 1) and len(lines) == 1 and "--micro-tokens" in lines[0], said


def test_what_cannot_run_is_one_line(launch, tmp_path, monkeypatch):
    new = tmp_path / "new"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for wanted, *launched in (
            ("lower --num_processes", [*SMALL, "--group-size", 1], new, range(3), 3),
            ("no room", [*SMALL, "--context", 20], new),
            ("did not meet", SMALL, new, [1], 2, no_patience),
            ("another port", SMALL, new, [0], 2, nothing, taken.getsockname()[1]),
        ):
            codes, lines, said = launch(*launched)[1]()
            assert 0 not in codes and len(lines) == 1 and wanted in lines[0], said
    typo = [sys.executable, ROOT / "train.py", "--envs", "house"]
    silent = subprocess.run(typo, env={**os.environ, "RANK": "1"}, capture_output=True)
    assert silent.returncode == 2 and not silent.stderr, "process 0 says it"
    left = [path.name for path in new.glob("*")]
    assert left in ([], ["error.log"])  # written where another process still held the directory
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--num_processes 2 at most"):
        processes.take_gpu()


@pytest.mark.slow
def test_torchrun(alone, tmp_path):
    """It plays the same. If one process is killed it ends the other, and the run goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train.py", "--run-dir", tmp_path]
    assert subprocess.run([*command, *SMALL, *LEARN]).returncode == 0
    assert runs.records(tmp_path / "episodes.jsonl") == runs.records(alone / "episodes.jsonl")
    launcher = subprocess.Popen([*command, "--resume", "--iterations", "10000"])
    while len(runs.records(tmp_path / "metrics.jsonl")) < 5:
        assert launcher.poll() is None
        time.sleep(0.05)
    children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], text=True)
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    assert launcher.wait(120)
    done = runs.checkpoints(tmp_path)[-1]
    assert start(tmp_path, "--resume", "--iterations", done + 1) == 0
