"""Several processes are one run: its numbers, one line when it fails, and nobody left waiting."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_train import SMALL, timeless, weights
from tqdm import tqdm

import train
from engine import processes, runs


def child(rank, count, port, hosted, argv, output, act):
    os.dup2(output.fileno(), 1)
    os.dup2(1, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(hosted)
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    act(rank)
    os._exit(train.main(argv))


def nothing(rank):
    pass


def no_patience(rank):
    processes.MEETING = timedelta(seconds=2)


def second_is_out_of_memory(rank):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        train.empo2.accumulate_gradient = full


@pytest.fixture(scope="module")
def server():
    """Imports everything once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")  # as train.py sets it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "test_processes"])
        yield context


class Launch:
    """`ranks` of `count` processes of train.py, with a store, as torchrun has one, or a port."""

    def __init__(self, server, argv, ranks, count, act=nothing, port=None):
        hosted = port is None
        if hosted:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port = self.store.port
        self.processes = []
        self.reader, output = server.Pipe(duplex=False)
        for rank in ranks:
            args = (rank, count, port, hosted, argv, output, act)
            self.processes.append(server.Process(target=child, args=args))
            self.processes[-1].start()
        output.close()

    def kill(self):
        for process in self.processes:
            process.kill()

    def end(self):
        """(exit codes, the lines that say why, all that was said); -9 if it takes minutes."""
        limit = threading.Timer(200, self.kill)
        limit.start()
        with open(self.reader.fileno(), closefd=False, errors="replace") as file:
            said = file.read()
        for process in self.processes:
            process.join()
        limit.cancel()
        lines = [x for x in said.splitlines() if x.startswith(("train.py: ", "stopped"))]
        return [process.exitcode for process in self.processes], lines, said


@pytest.fixture
def launch(server):
    def launch(argv, ranks=(0, 1), count=2, act=nothing, port=None):
        started.append(Launch(server, [str(word) for word in argv], ranks, count, act, port))
        return started[-1]

    started = []
    yield launch
    for launched in started:
        launched.kill()


def until_played(run_dir, launched):
    while not runs.records(run_dir / "metrics.jsonl"):
        assert launched.processes[0].is_alive()
        time.sleep(0.05)


# --- One run --------------------------------------------------------------------------------------
LEARN = [*SMALL, "--iterations", "3", "--learning-rate", "1e-4", "--rollout-batch", "2"]
LEARN += ["--eval-every", "3", "--eval-variations", "1", "--eval-episodes", "1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert train.main([*LEARN, "--run-dir", str(run_dir)]) == 0
    return run_dir


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_play_and_learn_what_one_does(count, alone, launch, tmp_path):
    """Also where some have no row in a step, and no episode in an evaluation."""
    run_dir = tmp_path / "run"
    codes, _, said = launch([*LEARN, "--run-dir", run_dir], range(count), count).end()
    assert codes == [0] * count, said
    assert said.count("iteration 3 of 3") == said.count("look at its episodes") == 1
    assert runs.records(run_dir / "episodes.jsonl") == runs.records(alone / "episodes.jsonl")
    for memory in ("tips.npz", "novelty.npz"):
        ours, theirs = (np.load(d / "checkpoint-3" / memory) for d in (run_dir, alone))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs, first = weights(run_dir, 3), weights(alone, 3), weights(alone, 0)
    moved = max((theirs[name] - first[name]).abs().max() for name in theirs)
    gap = max((theirs[name] - ours[name]).abs().max() for name in theirs)
    print(f"\n{count} processes: weights moved by {moved:.1e}, and differ by {gap:.1e}")
    assert gap < 1e-6 < 1e-4 < moved
    assert timeless(run_dir / "evals.jsonl") == timeless(alone / "evals.jsonl")
    metrics = [timeless(each / "metrics.jsonl") for each in (run_dir, alone)]
    for ours, theirs in zip(*metrics, strict=True):
        known = {name: value for name, value in theirs.items() if value is not None}
        assert ours.keys() == theirs.keys()
        assert {name: ours[name] for name in known} == pytest.approx(known, rel=1e-4, abs=2e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(launch, tmp_path):
    run_dir = tmp_path / "run"
    command = [*SMALL, "--run-dir", run_dir, "--iterations", 10000, "--save-every", 1000]
    launched = launch(command)
    until_played(run_dir, launched)
    os.kill(launched.processes[1].pid, signal.SIGTERM)
    codes, lines, said = launched.end()
    assert codes == [130, 130] and len(lines) == 1, said
    done = len(runs.records(run_dir / "metrics.jsonl"))
    assert runs.checkpoints(run_dir) == [0, done]


def test_a_process_that_fails_says_why_and_ends_the_others(launch, tmp_path):
    run_dir = tmp_path / "run"
    launched = launch([*SMALL, "--run-dir", run_dir], act=second_is_out_of_memory)
    codes, lines, said = launched.end()
    assert codes == [2, 1] and len(lines) == 1 and "--micro-tokens" in lines[0], said


# --- Bad input ------------------------------------------------------------------------------------
def test_what_cannot_run_is_one_line(launch, tmp_path, monkeypatch):
    new = [*SMALL, "--run-dir", tmp_path / "new"]
    codes, lines, said = launch([*new, "--group-size", 1], range(3), 3).end()
    assert 0 not in codes and len(lines) == 1 and "lower --num_processes" in lines[0], said
    codes, lines, said = launch([*new, "--context", 20]).end()
    assert 0 not in codes and len(lines) == 1 and "no room" in lines[0], said
    codes, lines, said = launch(new, [1], act=no_patience).end()
    assert codes == [2] and len(lines) == 1 and "did not meet" in lines[0], said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        codes, lines, said = launch(new, [0], port=taken.getsockname()[1]).end()
    assert codes == [2] and len(lines) == 1 and "another port" in lines[0], said
    typo = [sys.executable, ROOT / "train.py", "--envs", "house"]
    silent = subprocess.run(typo, env={**os.environ, "RANK": "1"}, capture_output=True)
    assert silent.returncode == 2 and not silent.stderr, "process 0 says it"
    left = [path.name for path in (tmp_path / "new").glob("*")]
    assert left in ([], ["error.log"])  # written where another process still held the directory
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--num_processes 2 at most"):
        processes.take_gpu()


@pytest.mark.slow
def test_torchrun(alone, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train.py", *LEARN, "--run-dir", run_dir]
    assert subprocess.run(command).returncode == 0
    assert runs.records(run_dir / "episodes.jsonl") == runs.records(alone / "episodes.jsonl")
