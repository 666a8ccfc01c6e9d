"""The file of an evaluation: what it was made with, and whether another one may go on with it."""

import argparse
import json
import sys
from pathlib import Path

from engine import arguments, runs
from engine.tables import FIGURES

TRIALS = {"id": 1, "ood": 10}
# Settings that eval.py has an option of its own for
OWN = ("model", "tasks", "seed", "eval_temperature")
# Settings that change no number of an evaluation. All others are recorded.
NO_EFFECT = (
    "preset variations iterations gradient_checkpointing decode_graph lora_r lora_alpha group_size"
    " tasks_per_iteration rollout_batch memory_prob novelty_threshold intrinsic_coef offpolicy_prob"
    " denominator learning_rate lr_decay minibatch_episodes micro_tokens pack clip_low clip_high"
    " clip_c min_prob beta advantage_eps fixed_std max_grad_norm eval_every eval_variations"
    " eval_episodes run_dir resume save_every report_to verbose config"
).split()
# These may move: what is there is compared, by its checksum.
PLACES = ("model", "adapter")


def parse(argv, description):
    """The arguments. Raises ValueError with one line for those that do not fit together."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", type=Path, help="a run directory, or one of its checkpoint-N")
    add("--model", help="base model (hub id or folder) instead of a run; of a run: its new place")
    add("--protocol", default="id", choices=TRIALS, help="see above (default id)")
    add("--memory", action="store_true", help="id with the checkpoint's tips, at every turn")
    add("--tasks", nargs="+", help="task names [the run's]; ood must be given them")
    add("--split", default="test", choices=["train", "dev", "test"])
    add("--variations", type=int, default=20, help="first ones of the split (default 20)")
    add("--episodes", type=int, help="episodes per variation [4 with id, 1 with ood]")
    add("--temperature", type=float, default=0.4, help="0 = greedy (default 0.4)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file [RUN/eval-PROTOCOL-SPLIT-N.json, or ...-base.json]")
    argv = arguments.with_home(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.settings = argv[cut + 1 :]
    own = arguments.given(args.settings) & {*OWN}
    if own:
        raise ValueError(f"{', '.join(own)}: eval.py has its own option for it, before --")
    idle = arguments.given(args.settings) & ({*NO_EFFECT} - {"rollout_batch", "decode_graph"})
    if idle:
        print(f"no effect on an evaluation: {', '.join(sorted(idle))}", file=sys.stderr)
    if args.out and args.out.suffix == ".png":
        raise ValueError("--out names the JSON file; the picture stands beside it, as .png")
    if args.episodes is None:
        args.episodes = 4 if args.protocol == "id" else 1
    if not args.run and not args.model:
        raise ValueError("give a run directory or --model; see --help")
    if args.memory and (not args.run or args.protocol == "ood"):
        raise ValueError("--memory is for the tips of a run's checkpoint, with --protocol id")
    if args.protocol == "ood" and not args.tasks:
        raise ValueError("--protocol ood needs the new tasks: --tasks NAME ...")
    if args.seed < 0 or args.temperature < 0:
        raise ValueError("--temperature and --seed must not be negative")
    if args.variations < 1 or args.episodes < 1:
        raise ValueError("--variations and --episodes must be positive")
    return args


def find_checkpoint(path):
    """The newest checkpoint of a run directory, or the checkpoint that is named."""
    run_dir = path.parent if path.name.startswith("checkpoint-") else path
    saved = runs.checkpoints(run_dir)
    if not saved:
        raise ValueError(f"{path}: no run with a checkpoint here")
    if path != run_dir:
        if not path.exists():
            raise ValueError(f"{path}: absent; there are {', '.join(map(str, saved))}")
        return path
    return path / f"checkpoint-{saved[-1]}"


def out_file(args, adapter):
    """Where the result goes. Raises ValueError if there is no such folder."""
    folder, name = Path(), "base"
    if adapter:
        folder, name = adapter.parent, adapter.name.removeprefix("checkpoint-")
    memory_part = "-memory" if args.memory else ""
    out = args.out or folder / f"eval-{args.protocol}{memory_part}-{args.split}-{name}.json"
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent}")
    return out


def describe(args, s, adapter, env, checksums):
    """What the numbers were measured with, for people and to tell whether a file fits."""
    recorded = {k: v for k, v in vars(s).items() if k not in (*OWN, *NO_EFFECT)}
    shown = "off"
    if args.memory:
        shown = "tips of the checkpoint at every turn"
    if args.protocol == "ood":
        shown = "off in trial 0, then at every turn"
    return {
        "protocol": args.protocol,
        "environment": env.VERSION,
        "split": args.split,
        "variations": args.variations,
        "episodes_per_variation": args.episodes,
        "temperature": args.temperature,
        "memory": shown,
        "step_limits": {task: env.limit(task) for task in s.tasks},
        "adapter": str(adapter),
        "model": s.model,
        "tasks": s.tasks,
        "seed": args.seed,
        "settings": recorded,
        "checksums": checksums,
    }


def earlier_parts(path, protocol):
    """The parts in a file that an evaluation goes on with. Raises ValueError if it does not fit."""
    try:
        result = json.loads(path.read_text())
        parts = result["parts"]
        other = differing(protocol, result["protocol"])
        needed = {
            "task",
            "trial",
            "episodes",
            "turns",
            "memory_turns",
            "played",
            "admitted",
            *FIGURES,
        }
        whole = all(needed <= part.keys() for part in parts)
        if not whole or any("tips_led" not in e for part in parts for e in part["played"]):
            raise ValueError("a part is not whole")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} exists, and holds no evaluation or a damaged one; name another file with --out"
        ) from error
    if other:
        raise ValueError(
            f"{path} exists, of another evaluation (these differ: {', '.join(other)}); "
            "name another file with --out"
        )
    return parts


def differing(ours, theirs):
    """Names of what two protocols differ in."""
    names = []
    for name in {**ours, **theirs}.keys() - {*PLACES}:
        pair = ours.get(name, ...), theirs.get(name, ...)
        if all(isinstance(value, dict) for value in pair):
            names += [f"{name}.{inner}" for inner in differing(*pair)]
        elif pair[0] != pair[1]:
            names.append(name)
    return sorted(names)
