"""Compare presets, and values of settings, over tasks and seeds: runs of train.py, and a report.

  python -m experiments.sweep stages  # a file of configs/, or path/to/mine.yaml
  python -m experiments.sweep laptop --seeds 7 --presets empo2  # what comes later counts
  python -m experiments.sweep stages --presets empo2 --grid memory_prob=0.1,0.4 max_tips=1,4
  python -m experiments.sweep --out sweeps/mine --tasks find-plant find-animal -- --eval-every 5

A file has settings of train.py for all runs, and under `sweep` the options of this program. What
follows -- are settings for all runs, too. A preset overrides both, since it is what is compared;
the values of --grid override the preset. The same command continues a sweep that was interrupted,
without repeating what is finished. OUT holds
  TASK/PRESET/SEED    the run of each cell, its output in SEED.log (TASK = together with --together;
                      with --grid PRESET is, for instance, empo2,memory_prob=0.4)
  sweep.json          the sweep's settings, cells and failures, and what it was run with
  summary.md, curves.png, results.json    the report, written anew whenever a run has ended
"""

import argparse
import dataclasses
import itertools
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
from engine import runs
from engine.arguments import Parser, as_words, read_config, with_home
from engine.command import STOPS, handle
from engine.errors import unknown
from experiments import report
from settings import PRESETS

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
OWN = ("config", "tasks", "preset", "seed", "run_dir", "resume")  # what no setting of all runs is


# --- The cells ---
def setting(word):
    """The setting that a word of a command line names: lora_r for --lora-r and for --lora_r=2."""
    return word.removeprefix("--").split("=")[0].replace("-", "_")


def select(words, wanted):
    """The settings of a command line, with their values, that are `wanted` by their name."""
    names = itertools.accumulate(words, lambda name, word: word if word.startswith("--") else name)
    return [word for word, name in zip(words, names, strict=True) if wanted(setting(name))]


def make_variants(presets, grid):
    """{name: words of a command line}: each preset with each combination of the grid's values.

    >>> make_variants(["grpo"], ["max_tips=1,4"])["grpo,max_tips=4"]
    ['--preset', 'grpo', '--max-tips', '4']
    """
    axes = {}
    for entry in grid:
        name, _, values = entry.partition("=")
        name = setting(name)
        if not values or name in axes:
            raise ValueError(f"--grid {entry}: write each setting once, as {name}=VALUE,VALUE")
        axes[name] = [(name, value) for value in values.split(",")]
    variants = {}
    for preset, *chosen in itertools.product(presets, *axes.values()):
        name = ",".join([preset, *(f"{name}={value}" for name, value in chosen)])
        words = ["--preset", preset, *as_words(dict(chosen))]
        variants[name.replace("/", "-")] = words  # it names a folder
    return variants


def make_cells(args, shared):
    """{TASK/PRESET/SEED: the arguments of train.py}."""
    groups = {"together": args.tasks} if args.together else {task: [task] for task in args.tasks}
    cells = {}
    for seed, (folder, tasks) in itertools.product(args.seeds, groups.items()):
        for variant, words in args.variants.items():
            name = f"{folder}/{variant}/{seed}"
            preset = PRESETS[words[1]]
            # train.py lets what is given go before the preset
            argv = select(shared, lambda name, preset=preset: name not in preset)
            own = ["--seed", str(seed), "--tasks", *tasks, "--run-dir", str(args.out / name)]
            cells[name] = [*argv, *words, *own]
    return cells


def start(run_dir, argv, env):
    """Start or continue a run in a process of its own."""
    if runs.checkpoints(run_dir):
        may_change = select(argv, lambda name: name in runs.RESUMABLE)
        argv = ["--resume", "--run-dir", str(run_dir), *may_change]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.log", "ab") as log:
        command = [sys.executable, str(TRAIN), *argv]
        return subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through the sweep
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
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
        said += f": about {hours:.1f} hours, at {minutes:g} minutes a run"
    print(said, flush=True)


def run_cells(out, cells, args, failed, save):
    """Run what is not finished; `failed` gets {name: why}, `save` is called after each cell."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}  # the log shall end with what was said last
    if args.jobs > 1 and not torch.cuda.is_available():
        env.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
    waiting = [name for name in cells if not report.finished(out / name)]
    announce(cells, waiting, args.jobs, args.minutes)
    for name in cells:
        failed.pop(name, None)
    running = {}
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="runs", dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                name = waiting.pop(0)
                running[name] = start(out / name, cells[name], env)
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                process = running.pop(name)
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
    """(arguments, settings of train.py for all runs). Raises ValueError with one line."""
    parser = Parser(
        prog="python -m experiments.sweep",
        usage="%(prog)s [EXPERIMENT] [options] [-- settings of train.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder of the sweep [sweeps/EXPERIMENT]")
    add("--tasks", nargs="+", help="a run for each [the environment's choice]")
    add("--presets", nargs="+", default=["grpo", "empo2"], help=", ".join(PRESETS))
    add("--grid", nargs="+", action="extend", default=[], help="NAME=VALUE,VALUE of a setting")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    add("--together", action="store_true", help="train all tasks in one run")
    add("--minutes", type=float, help="of a run, to say how long all of them take")
    argv = with_home(argv)
    own, shared = [], []
    if argv and not argv[0].startswith("-"):
        own, shared = experiment(argv.pop(0))
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args([*own, *argv[:cut]])
    if not args.out:
        raise ValueError("name an experiment of configs/, or a folder with --out")
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; it must be positive")
    for preset in args.presets:
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
    args.variants = make_variants(args.presets, args.grid)
    return args, shared + argv[cut + 1 :]


def experiment(name):
    """(options of the sweep, settings of train.py) of a file of configs/, or of any file."""
    path = Path(name)
    if path.suffix != ".yaml":
        path = ROOT / "configs" / f"{name}.yaml"
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        if name not in known:
            raise unknown("experiment", name, [*known, "path/to/mine.yaml"])
    content = read_config(path)
    own = content.pop("sweep", {})
    if not isinstance(own, dict):
        raise ValueError(f"{path}: `sweep` must be a mapping of options, such as seeds: [0, 1]")
    options = {"out": f"sweeps/{path.stem}", **own}
    if "tasks" in content:
        options["tasks"] = content.pop("tasks")
    return as_words(options), as_words(content)


def common_settings(args, shared):
    """What all cells have in common, as train.py reads it; bad input is refused here."""
    for word in itertools.chain(shared, *(words[2:] for words in args.variants.values())):
        if word.startswith("--") and setting(word) in OWN:
            raise ValueError(f"{word} is the sweep's own; see --help for what it offers instead")
    args.tasks = args.tasks or train.parse(shared)[0].tasks  # the environment's own choice
    for argv in make_cells(args, shared).values():
        if not train.parse(argv)[0].eval_every:
            raise ValueError("a sweep compares tip-free evaluations; add -- --eval-every 5")
    whole = [*shared, "--tasks", *args.tasks, "--preset", "empo2"]
    common = dataclasses.asdict(train.parse(whole)[0]) | {"together": args.together}
    common = {k: v for k, v in common.items() if k not in (*OWN, *runs.RESUMABLE)}
    return common | ({"tasks": sorted(args.tasks)} if args.together else {})


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
    settings = common_settings(args, shared)
    cells = make_cells(args, shared)
    path = args.out / "sweep.json"
    with runs.locked(args.out):
        old = {}
        if any(args.out.glob("*/*/*/settings.json")):
            old = json.loads(path.read_text())
            check_same(args.out, old, settings)
        content = {"settings": settings, "failed": old.get("failed", {})}
        asked = {"tasks": args.tasks, "presets": list(args.variants), "seeds": args.seeds}
        for name, values in asked.items():  # what was asked for before stays in the report
            content[name] = list(dict.fromkeys(old.get(name, []) + values))
        run = surroundings(argv, settings)
        content["runs"] = [*(one for one in old.get("runs", []) if one != run), run]

        def save():
            runs.write_json(path, content)
            report.report(args.out, content)

        runs.write_json(path, content)
        try:
            run_cells(args.out, cells, args, content["failed"], save)
        finally:
            save()
    return sum(name in content["failed"] for name in cells)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    handle(STOPS, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    try:
        args, shared = parse(argv)
        failed = sweep(args, shared, argv)
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
