"""Tip-free evaluation (§5): temperature 0.4, no memory, first 20 test variations x 4 episodes, the step limits of the run or else of envs.py.

  python eval.py runs/scienceworld-power-component-0                # a run: its last checkpoint, its tasks
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant   # a base model

Prints a table and writes it with all episodes' scores as JSON. Five figures come from the same episodes, because the
literature reports different ones: the raw mean (the paper's), the mean with negative scores as 0, the mean of the best
score reached during the episode, the share of episodes at 100, and the share that ended at -100.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import empo2
import envs
import train


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run directory, or one of its checkpoint-N")
    parser.add_argument("--model", help="evaluate this base model (hub id or folder) instead of a run")
    parser.add_argument("--env", help="environment [the run's, or scienceworld]")
    parser.add_argument("--tasks", nargs="+", help="task names [the run's, or power-component]")
    parser.add_argument("--split", default="test", choices=["train", "dev", "test"])
    parser.add_argument("--variations", type=int, default=20, help="first variations of the split (default 20)")
    parser.add_argument("--episodes", type=int, default=4, help="episodes per variation (default 4)")
    parser.add_argument("--temperature", type=float, default=0.4, help="0 = greedy (default 0.4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file [RUN/eval-SPLIT-N.json, or eval-base.json]; must not exist")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if bool(args.run) == bool(args.model):
            raise ValueError("give either a run directory or --model; see --help")
        s, adapter, name = empo2.Settings(), None, "base"
        if args.run:
            path = Path(args.run)
            run_dir = path if (path / "settings.json").exists() else path.parent
            if not (run_dir / "settings.json").exists() or not train.checkpoints(run_dir):
                raise ValueError(f"{path}: no run with a checkpoint here")
            s = empo2.Settings(**json.loads((run_dir / "settings.json").read_text()))
            adapter = path if path != run_dir else run_dir / f"checkpoint-{train.checkpoints(run_dir)[-1]}"
            name = adapter.name.split("-")[-1]
        given = {"model": args.model, "env": args.env, "tasks": args.tasks}
        s = dataclasses.replace(s, seed=args.seed, **{k: v for k, v in given.items() if v})
        s, _ = train.hardware_defaults(s)
        out = Path(args.out) if args.out else (
            run_dir / f"eval-{args.split}-{name}.json" if args.run else Path("eval-base.json"))
        if out.exists():
            raise ValueError(f"{out} exists; name another with --out")
        if not out.parent.is_dir() or args.temperature < 0:
            raise ValueError(f"--out: there is no folder {out.parent}" if args.temperature >= 0 else
                             f"--temperature is {args.temperature}; it must not be negative")
        policy = train.load_policy(s, adapter)
        simulators, pool = train.make_envs(dataclasses.replace(
            s, variations=args.variations, tasks_per_iteration=None, group_size=args.episodes), args.split)
        with tqdm(desc="evaluating", bar_format="{desc} {elapsed}") as bar:
            table, played, dropped = empo2.evaluate(
                policy, simulators, pool, args.episodes, args.temperature, s, s.seed, envs.EnvFault,
                lambda phase, text: bar.set_description(f"evaluating {text}"))
    except KeyboardInterrupt:
        print("\neval.py: stopped; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    protocol = {"environment": envs.make(s.env).VERSION, "split": args.split, "temperature": args.temperature,
                "memory": "off", "step_limit": s.step_limit or "the environment's", "seed": args.seed,
                "episodes_per_variation": args.episodes, "model": s.model, "adapter": str(adapter),
                "shots": s.shots, "action_correction": s.action_correction, "episodes_dropped": dropped}
    out.write_text(json.dumps({"protocol": protocol, "tasks": table, "episodes": [
        {"task": e.task, "variation": e.variation, "score": e.score, "turns": len(e.turns), "ended": e.ended}
        for e in played]}, indent=1))
    print(", ".join(f"{k} {v}" for k, v in protocol.items()))
    print(f"{'task':52}{'var.':>5}{'epis.':>6}" + "".join(f"{f:>17}" for f in empo2.FIGURES))
    for task, row in table.items():
        print(f"{task:52}{row['variations']:5}{row['episodes']:6}" + "".join(f"{row[f]:17.2f}" for f in empo2.FIGURES))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
