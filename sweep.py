"""Compare presets over tasks and seeds: a run of train.py per cell (task x preset x seed), a table and a picture.

  python sweep.py laptop                                    # a named experiment, see EXPERIMENTS
  python sweep.py laptop --seeds 7 --presets empo2          # with other choices: what comes later counts
  python sweep.py --out sweeps/mine --presets grpo empo2 --seeds 0 1 2 --tasks find-plant find-animal --jobs 2 \\
                  -- --iterations 50 --eval-every 5         # what follows -- goes to train.py
  python sweep.py --out sweeps/mine --report                # only the report, also while the sweep is running

The same command continues a sweep that was interrupted; finished cells are not repeated. OUT holds
  TASK/PRESET/SEED      the run of each cell (TASK = together with --together), its output in SEED.log beside it
  sweep.json            what the sweep is: its settings, cells, failures, and what it was run with
  summary.md, curves.png, results.json    the report; tip-free success is the mean of a run's last three evaluations
What a preset sets goes before the settings after --, since it is what is compared.
"""

import argparse
import ctypes
import dataclasses
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import empo2
import envs
import train
from report import PAPER, progress_of, report

ROOT, LIBC = Path(__file__).parent, ctypes.CDLL(None)
EXPERIMENTS = {
    # GRPO, EMPO² and what becomes of it without each of its parts, in a house where nothing is found by luck
    "laptop": [
        "--tasks",
        "fan",
        "radio",
        "--together",
        "--seeds",
        "0",
        "1",
        "2",
        "--jobs",
        "2",
        "--presets",
        "grpo",
        "empo2",
        "no-offpolicy",
        "no-onpolicy-tips",
        "no-intrinsic",
        "mode-turn",
        "mode-batch",
        "denominator-tips",
        "no-mask",
        "--",
        "--env",
        "house",
        "--step-limit",
        "7",
        "--env-options",
        "rooms=12",
        "containers=6",
        "parts=1",
        "partial_credit=false",
        "--variations",
        "32",
        "--tasks-per-iteration",
        "4",
        "--iterations",
        "60",
        "--memory-prob",
        "0.5",
        "--mode-level",
        "episode",
        "--memory-key",
        "task",
        "--memory-scope",
        "task",
        "--tips",
        "4",
        "--min-prob",
        "0.001",
        "--beta",
        "0.1",
        "--advantage-eps",
        "10",
        "--learning-rate",
        "1e-3",
        "--max-grad-norm",
        "0.1",
        "--minibatch-episodes",
        "8",
        "--micro-tokens",
        "4096",
        "--lora-r",
        "32",
        "--lora-alpha",
        "64",
        "--action-tokens",
        "16",
        "--tip-tokens",
        "40",
        "--save-every",
        "10",
        "--eval-every",
        "6",
        "--eval-variations",
        "32",
        "--eval-episodes",
        "1",
        "--eval-temperature",
        "0",
    ],
    # The same comparison with the stand-in on real ScienceWorld
    "scienceworld": [
        "--tasks",
        "power-component",
        "find-plant",
        "test-conductivity",
        "--presets",
        "grpo",
        "empo2",
        "--seeds",
        "0",
        "--jobs",
        "2",
        "--",
        "--iterations",
        "10",
        "--eval-every",
        "5",
        "--eval-variations",
        "4",
        "--eval-episodes",
        "2",
    ],
    # Table 1 of the paper, a run for each of its tasks: for a GPU
    "paper": [
        "--tasks",
        *PAPER,
        "--presets",
        "grpo",
        "empo2",
        "--seeds",
        "0",
        "--",
        "--env",
        "scienceworld",
        "--iterations",
        "200",
        "--eval-every",
        "50",
    ],
}


# --- The cells --------------------------------------------------------------------------------------------------
def start_cell(run_dir, tasks, preset, seed, extra, env, lock):
    """Start or continue the run of a cell in a process of its own."""
    if not train.checkpoints(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), "--run-dir", str(run_dir)]
    command += (
        ["--resume"]
        if run_dir.exists()
        else [
            *extra,
            "--tasks",
            *tasks,
            "--preset",
            preset,
            "--seed",
            str(seed),
            *(f"--{name}={value}" for name, value in empo2.PRESETS[preset].items()),
        ]
    )
    # No orphan even if the sweep is killed by -9 (1 = PR_SET_PDEATHSIG); elsewhere the lock that it holds tells of it.
    die_with_the_sweep = (
        (lambda: LIBC.prctl(1, signal.SIGKILL)) if sys.platform == "linux" else None
    )
    with open(
        f"{run_dir}.log", "ab"
    ) as log:  # its own session: Ctrl-C reaches it once, through the sweep
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            pass_fds=[lock.fileno()],
            start_new_session=True,
            preexec_fn=die_with_the_sweep,
        )


def run_cells(cells, extra, jobs, lock, failed, save):
    """Run what is not finished of the cells {name: (run_dir, tasks, preset, seed)}; `failed` gets {name: why}."""
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    env = os.environ | {"PYTHONUNBUFFERED": "1"}  # the log shall end with what was said last
    env = threads | env if jobs > 1 and not torch.cuda.is_available() else env
    waiting = [name for name, (run_dir, *_) in cells.items() if not progress_of(run_dir)[2]]
    running = {}
    with tqdm(
        total=len(cells), initial=len(cells) - len(waiting), desc="cells", dynamic_ncols=True
    ) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    failed.pop(name, None)
                    running[name] = start_cell(*cells[name], extra, env, lock)
                for name in [
                    name for name, process in running.items() if process.poll() is not None
                ]:
                    code, run_dir = running.pop(name).returncode, cells[name][0]
                    if not progress_of(run_dir)[2]:
                        said = re.split(
                            r"[\r\n]+", Path(f"{run_dir}.log").read_text(errors="replace").strip()
                        )[-1]
                        failed[name] = f"exit code {code}: {said}"
                        tqdm.write(f"{name} failed with {failed[name]}")
                    save()
                    bar.update()
                evals = {name: progress_of(cells[name][0])[1] for name in running}
                now = ", ".join(
                    f"{name} {e[-1]['success']:.0%}" if e else name for name, e in evals.items()
                )
                now = f"{len(running)} running: {now}"
                if now != bar.postfix:
                    bar.set_postfix_str(now)
                time.sleep(0.2)
        except KeyboardInterrupt:
            tqdm.write(
                "Ctrl-C: the running cells finish their iteration and save. Again to stop now."
            )
            for process in running.values():
                process.send_signal(signal.SIGINT)
            for process in running.values():
                process.wait()
            raise
        finally:
            for process in running.values():
                process.kill()
                process.wait()


# --- Command line -----------------------------------------------------------------------------------------------
def surroundings(argv):
    """What the cells were run with; the commit ends in + if the files differ from it."""
    git = (
        subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
        )
        if shutil.which("git")
        else None
    )
    cpu = re.search(
        r"model name\s*: (.*)",
        Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "",
    )
    hardware = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else (f"{cpu[1] if cpu else 'CPU'}, {os.cpu_count()} cores")
    )
    return {
        "command": shlex.join(["python", "sweep.py", *argv]),
        **({"commit": git.stdout.strip()} if git and git.returncode == 0 else {}),
        "torch": torch.__version__,
        "hardware": hardware,
    }


def split_command(argv):
    """(parsed arguments, what goes to train.py); those of a named experiment come first, so that later ones count."""
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    if named and named[0] not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {named[0]}; there are: {', '.join(EXPERIMENTS)}")
    own, extra = ["--out", f"sweeps/{named[0]}"] if named else [], []
    for part in (EXPERIMENTS[named[0]] if named else [], argv[len(named) :]):
        cut = part.index("--") if "--" in part else len(part)
        own, extra = own + part[:cut], extra + part[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python sweep.py [EXPERIMENT] [options] [-- settings of train.py]",
    )
    parser.add_argument("--out", type=Path, help="folder of the sweep [sweeps/EXPERIMENT]")
    parser.add_argument(
        "--tasks", nargs="+", default=empo2.Settings().tasks, help="a run for each task"
    )
    parser.add_argument(
        "--presets", nargs="+", default=["grpo", "empo2"], help=f"of: {', '.join(empo2.PRESETS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    parser.add_argument("--together", action="store_true", help="train all tasks in one run")
    parser.add_argument(
        "--report", action="store_true", help="run nothing, write the report of what is there"
    )
    args = parser.parse_args(own)
    if not args.out:
        raise ValueError(f"name a folder with --out, or an experiment: {', '.join(EXPERIMENTS)}")
    return args, extra


def settings_of(args, extra):
    """What all cells share, as train.py reads it; bad input is refused here, before anything is started."""
    for preset in args.presets:
        empo2.Settings(preset=preset)
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; it must be positive")
    own = train.names(extra) & {"tasks", "preset", "seed", "run_dir", "resume"}
    if own:
        raise ValueError(f"--{min(own)} stands after --, but is the sweep's own; see --help")
    s = dataclasses.asdict(
        train.parse([*extra, "--tasks", *args.tasks, "--run-dir", str(args.out / "no such run")])[0]
    )
    if not s["eval_every"]:
        raise ValueError("a sweep compares tip-free evaluations; add -- --eval-every 5")
    return {
        k: v
        for k, v in s.items()
        if k not in ("preset", "seed", "run_dir", "resume", *train.RESUMABLE)
    } | {"tasks": sorted(args.tasks) if args.together else None, "together": args.together}


def take_lock(out, seconds=5):
    """The open lock file of the folder; the runs of a sweep that was just killed need a moment to go."""
    lock, end = open(out / "sweep.lock", "w"), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > end:
                raise ValueError(
                    f"{out}: another sweep, or a run that it left, is at work here"
                ) from None
            time.sleep(0.1)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    try:
        args, extra = split_command(argv)
        path = args.out / "sweep.json"
        if args.report and not path.exists():
            raise ValueError(f"{args.out}: no sweep here")
        old = json.loads(path.read_text()) if path.exists() else {}
        if args.report:
            report(args.out, old)
            print(f"see {args.out}/summary.md and curves.png")
            return 0
        settings = settings_of(args, extra)
        if not any(args.out.glob("*/*/*/settings.json")):
            old = {}
        changed = [k for k in settings if old and settings[k] != old["settings"].get(k)]
        if changed:
            raise ValueError(
                f"{args.out} was run with other settings; use another --out, or as before "
                + ", ".join(f"{k} = {old['settings'].get(k)} (now {settings[k]})" for k in changed)
            )
        args.out.mkdir(parents=True, exist_ok=True)
        lock = take_lock(args.out)
        sweep = {"settings": settings, "failed": old.get("failed", {}), "runs": old.get("runs", [])}
        for name in ("tasks", "presets", "seeds"):  # what was asked for before stays in the report
            sweep[name] = list(dict.fromkeys(old.get(name, []) + getattr(args, name)))
        sweep["runs"] += [
            run
            for run in [surroundings(argv) | {"environment": envs.ENVS[settings["env"]].VERSION}]
            if run not in sweep["runs"]
        ]

        def save():
            path.with_suffix(".tmp").write_text(json.dumps(sweep, indent=1))
            os.replace(path.with_suffix(".tmp"), path)

        save()
        groups = (
            {"together": args.tasks} if args.together else {task: [task] for task in args.tasks}
        )
        cells = {
            f"{home}/{p}/{seed}": (args.out / home / p / str(seed), tasks, p, seed)
            for seed in args.seeds
            for home, tasks in groups.items()
            for p in args.presets
        }
        try:
            run_cells(cells, extra, args.jobs, lock, sweep["failed"], save)
        finally:
            save()
            report(args.out, sweep)
    except KeyboardInterrupt:
        print("sweep.py: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    failed = sum(name in sweep["failed"] for name in cells)
    print(
        f"{len(cells) - failed} of {len(cells)} cells are finished; see {args.out}/summary.md and curves.png"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
