"""Compare presets over tasks and seeds: a run of train.py for each, then a table and a picture.

  python -m experiments.sweep stages  # or laptop, credit, scienceworld, smollm2, paper, webshop
  python -m experiments.sweep laptop --seeds 7 --presets empo2  # what comes later counts
  python -m experiments.sweep --out sweeps/mine --tasks find-plant find-animal -- --eval-every 5
  python -m experiments.sweep --out sweeps/mine --report  # only the report, also meanwhile

What follows -- are settings of train.py for all runs; where a preset sets the same, the preset's
value counts, since it is what is compared. The same command continues a sweep that was interrupted,
without repeating what is finished. OUT holds
  TASK/PRESET/SEED    the run of each cell, its output in SEED.log (TASK = together with --together)
  sweep.json          the sweep's settings, cells and failures, and what it was run with
  summary.md, curves.png, results.json    the report
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import envs
import train
from engine import paper, runs
from engine.command import STOPS, handle
from experiments import report
from settings import PRESETS, with_home

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
HOUSE = """
    --env house --variations 32 --tasks-per-iteration 4
    --memory-prob 0.5 --mode-level episode --memory-key task --memory-scope task --max-tips 4
    --min-prob 0.001 --beta 0.1 --advantage-eps 10
    --learning-rate 1e-3 --max-grad-norm 0.1 --minibatch-episodes 8 --micro-tokens 4096
    --lora-r 32 --lora-alpha 64 --action-tokens 16 --tip-tokens 40
    --save-every 10 --eval-every 6
    --eval-variations 32 --eval-episodes 1 --eval-temperature 0
"""
EXPERIMENTS = {
    # GRPO, EMPO² and what becomes of it without each of its parts, where nothing is found by luck
    "laptop": f"""
        --tasks fan radio --together --seeds 0 1 2 --jobs 2
        --presets grpo empo2 no-offpolicy no-onpolicy-tips no-intrinsic
            mode-turn mode-batch denominator-tips no-mask
        -- {HOUSE}
        --step-limit 7 --env-options rooms=12 containers=6 parts=1 partial_credit=false
        --iterations 60
    """,
    # Where exploration comes from, and how credit is given, where luck and partial credit help
    "credit": f"""
        --tasks fan radio --together --seeds 0 1 2 --jobs 2
        --presets grpo gigpo-std empo2 empo2-gigpo
        -- {HOUSE}
        --step-limit 12 --env-options rooms=12 containers=6 parts=1 partial_credit=true
        --iterations 36
    """,
    # The same comparison with the stand-in on real ScienceWorld
    "scienceworld": """
        --tasks power-component find-plant test-conductivity
        --presets grpo empo2 --seeds 0 --jobs 2
        --
        --iterations 10 --eval-every 5 --eval-variations 4 --eval-episodes 2
    """,
    # Where blind luck is nil on real ScienceWorld, and the policy follows and writes tips
    "stages": """
        --tasks identify-life-stages-2 --seeds 0 1 2
        --presets grpo empo2 no-offpolicy
        --
        --env scienceworld --env-options thoughts=true --model standin/stages --step-limit 5
        --variations 3 --tasks-per-iteration 3 --iterations 36
        --memory-prob 0.5 --mode-level episode --memory-key task --memory-scope task --max-tips 4
        --beta 0.1 --advantage-eps 10
        --learning-rate 5e-4 --max-grad-norm 0.1 --minibatch-episodes 24 --micro-tokens 4096
        --lora-r 32 --lora-alpha 64 --action-tokens 16 --tip-tokens 40
        --save-every 10 --eval-every 6
        --eval-variations 4 --eval-episodes 4
    """,
    # The same task for a real language model after its warm start (standin/smollm2.py)
    "smollm2": """
        --tasks identify-life-stages-2 --seeds 0 1 2
        --presets grpo empo2
        --
        --env scienceworld --env-options thoughts=true --model smollm2-stages --step-limit 5
        --variations 2 --tasks-per-iteration 2 --iterations 24
        --memory-prob 0.5 --mode-level episode --memory-key task --memory-scope task --max-tips 2
        --advantage-eps 10 --pack group
        --learning-rate 5e-4 --max-grad-norm 0.1 --minibatch-episodes 8 --micro-tokens 2048
        --action-tokens 32 --tip-tokens 40
        --save-every 4 --eval-every 4
        --eval-variations 4 --eval-episodes 4
    """,
    # Table 1 of the paper, a run for each of its tasks: for a GPU
    "paper": f"""
        --tasks {" ".join(paper.TABLE_1)}
        --presets grpo empo2 --seeds 0
        --
        --env scienceworld --iterations 200 --eval-every 50
    """,
    # WebShop with the paper's settings, for a GPU; its own data by -- --env-options data=FOLDER.
    # A goal is hardly met twice, so the memory is one for all goals.
    "webshop": """
        --tasks webshop --presets grpo gigpo gigpo-std empo2 empo2-gigpo --seeds 0
        --
        --env webshop --variations 12000 --memory-scope task --iterations 150
        --step-limit 15 --history 2 --action-tokens 512
        --beta 0.01 --minibatch-episodes 64
        --eval-every 50 --eval-variations 500 --eval-episodes 1
    """,
}
# Minutes of a run beside another, on two cores of a shared Intel Xeon (results/)
MINUTES = {"laptop": 11, "credit": 13, "scienceworld": 6, "stages": 10, "smollm2": 40}


# --- The cells ---
def setting(word):
    """The setting that a word of a command line names: lora_r for --lora-r and for --lora_r=2."""
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def select(words, wanted):
    """The settings of a command line, with their values, that are `wanted` by their name."""
    kept = []
    keep = True
    for word in words:
        if word.startswith("--"):
            keep = wanted(setting(word))
        if keep:
            kept.append(word)
    return kept


def make_cells(args, shared):
    """{TASK/PRESET/SEED: the arguments of train.py}."""
    groups = {task: [task] for task in args.tasks}
    if args.together:
        groups = {"together": args.tasks}
    cells = {}
    for seed in args.seeds:
        for folder, tasks in groups.items():
            for preset in args.presets:
                name = f"{folder}/{preset}/{seed}"
                # train.py lets what is given go before the preset
                own = ["--preset", preset, "--seed", str(seed), "--tasks", *tasks]
                argv = select(shared, lambda name, preset=preset: name not in PRESETS[preset])
                cells[name] = [*argv, *own, "--run-dir", str(args.out / name)]
    return cells


def start(run_dir, argv, env):
    """Start or continue a run in a process of its own."""
    if runs.checkpoints(run_dir):
        may_change = select(argv, lambda name: name in runs.RESUMABLE)
        argv = ["--resume", "--run-dir", str(run_dir), *may_change]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,  # Ctrl-C reaches it once, through the sweep
        )


def last_words(log):
    """The error in a run's log, also if a run that a killed sweep left goes on writing there."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines[-20:] if line.startswith("train.py: ")]
    return (errors or lines or ["no output"])[-1]


def announce(cells, waiting, jobs, minutes):
    """Say what is about to run, and how long that takes if `minutes` of a run are known."""
    said = f"{len(cells)} runs, {len(waiting)} of them to do, {jobs} at a time"
    if minutes:
        hours = math.ceil(len(waiting) / jobs) * minutes / 60
        said += f": about {hours:.1f} hours, at {minutes} minutes a run, two cores of an Intel Xeon"
    print(said, flush=True)


def so_far(name, run_dir):
    """A running cell and its newest tip-free score, for the progress bar."""
    evals = runs.records(run_dir / "evals.jsonl")
    if not evals:
        return name
    return f"{name}: {evals[-1]['score']:.1f} at {evals[-1]['iteration']}"


def run_cells(out, cells, args, failed, save):
    """Run what is not finished; `failed` gets {name: why}, `save` is called after each cell."""
    jobs = args.jobs
    env = os.environ | {"PYTHONUNBUFFERED": "1"}  # the log shall end with what was said last
    if jobs > 1 and not torch.cuda.is_available():
        env.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    waiting = [name for name in cells if not report.finished(out / name)]
    announce(cells, waiting, jobs, MINUTES.get(args.experiment))
    for name in cells:
        failed.pop(name, None)
    running = {}
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="runs", dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = start(out / name, cells[name], env)
            time.sleep(0.2)
            status = ", ".join(so_far(name, out / name) for name in running)
            if status != bar.postfix:
                bar.set_postfix_str(status)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if not report.finished(out / name):
                    said = last_words(out / f"{name}.log")
                    failed[name] = f"exit code {process.returncode}: {said}"
                    tqdm.write(f"{name} failed with {failed[name]}")
                save()
                bar.update()
    except KeyboardInterrupt:
        tqdm.write("Ctrl-C: the runs finish their iteration and save. Again to stop now.")
        for process in running.values():
            process.terminate()  # which is not ignored where the sweep runs in the background
        for process in running.values():
            process.wait()
        raise
    finally:
        bar.close()
        for process in running.values():
            process.kill()
            process.wait()


# --- Command line ---
def parse(argv):
    """(arguments, settings of train.py); a named experiment's come first, as later ones count."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        usage="%(prog)s [EXPERIMENT] [options] [-- settings of train.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder of the sweep [sweeps/EXPERIMENT]")
    parser.add_argument("--tasks", nargs="+", help="a run for each [the environment's choice]")
    parser.add_argument("--presets", nargs="+", default=["grpo", "empo2"], help=", ".join(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    parser.add_argument("--together", action="store_true", help="train all tasks in one run")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    own, shared = [], []
    argv = with_home(argv)
    parts = [argv]
    experiment = None
    if argv and not argv[0].startswith("-"):
        experiment = argv[0]
        if experiment not in EXPERIMENTS:
            raise envs.unknown("experiment", experiment, EXPERIMENTS)
        own = ["--out", f"sweeps/{experiment}"]
        parts = [shlex.split(EXPERIMENTS[experiment]), argv[1:]]
    for part in parts:
        cut = part.index("--") if "--" in part else len(part)
        own += part[:cut]
        shared += part[cut + 1 :]
    args = parser.parse_args(own)
    args.experiment = experiment
    if not args.out:
        raise ValueError(f"name an experiment ({', '.join(EXPERIMENTS)}), or a folder with --out")
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; it must be positive")
    for preset in args.presets:
        if preset not in PRESETS:
            raise envs.unknown("preset", preset, PRESETS)
    return args, shared


def common_settings(args, shared):
    """What all cells have in common, as train.py reads it; bad input is refused here."""
    own = {"tasks", "preset", "seed", "run_dir", "resume"}
    for word in shared:
        if word.startswith("--") and setting(word) in own:
            raise ValueError(f"{word} stands after --, but is the sweep's own; see --help")
    settings, _ = train.parse([*shared, "--tasks", *args.tasks])
    if not settings.eval_every:
        raise ValueError("a sweep compares tip-free evaluations; add -- --eval-every 5")
    common = dataclasses.asdict(settings) | {"together": args.together}
    for name in (*own, *runs.RESUMABLE):
        del common[name]
    if args.together:
        common["tasks"] = sorted(args.tasks)
    return common


def surroundings(argv, settings):
    """What the runs are made with; the commit ends in + if the files differ from it."""
    hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    env = envs.make(settings["env"], **envs.parse_options(settings["env_options"]))
    found = {
        "command": shlex.join(["python", "-m", "experiments.sweep", *argv]),
        "environment": env.VERSION,
        "torch": torch.__version__,
        "hardware": hardware,
    }
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
        found["commit"] = git.stdout.strip() or "unknown"
    return found


def check_same(out, old, settings):
    """ValueError if the runs in a folder were made with other settings."""
    for name, value in settings.items():
        before = old["settings"].get(name)
        if value != before:
            raise ValueError(
                f"{out} was run with {name} = {before}, not {value}; take that, or another --out"
            )


def sweep(args, shared, argv):
    """Run the cells that are not finished, and write the report. Returns how many cells failed."""
    args.tasks = args.tasks or train.parse(shared)[0].tasks  # the environment's own choice
    settings = common_settings(args, shared)
    cells = make_cells(args, shared)
    path = args.out / "sweep.json"
    with runs.locked(args.out):
        old = {}
        if any(args.out.glob("*/*/*/settings.json")):
            old = json.loads(path.read_text())
            check_same(args.out, old, settings)
        content = {"settings": settings, "failed": old.get("failed", {})}
        for name in ("tasks", "presets", "seeds"):  # what was asked for before stays in the report
            content[name] = list(dict.fromkeys(old.get(name, []) + getattr(args, name)))
        run = surroundings(argv, settings)
        content["runs"] = [*(one for one in old.get("runs", []) if one != run), run]

        def save():
            path.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
            os.replace(path.with_suffix(".tmp"), path)

        save()
        try:
            run_cells(args.out, cells, args, content["failed"], save)
        finally:
            save()
            report.report(args.out, content)
    return sum(name in content["failed"] for name in cells)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    handle(STOPS, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    failed = 0
    try:
        args, shared = parse(argv)
        path = args.out / "sweep.json"
        if not args.report:
            failed = sweep(args, shared, argv)
        elif path.exists():
            report.report(args.out, json.loads(path.read_text()))
        else:
            raise ValueError(f"{args.out}: no sweep here")
    except KeyboardInterrupt:
        print("sweep: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    print(f"{failed} runs failed; see {args.out}/summary.md and curves.png")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
