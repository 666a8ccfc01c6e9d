"""The paper's evaluations, of a run's checkpoint or of a base model. No weight is changed.

  python eval.py runs/scienceworld-power-component-0                      # Table 1: its last checkpoint, its tasks
  python eval.py runs/scienceworld-power-component-0 --memory --split train --variations 5  # with its tips
  python eval.py runs/scienceworld-power-component-0 --protocol ood --tasks chemistry-mix-paint-secondary-color
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant      # a base model
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant --protocol ood    # and as Reflexion

id    each task once, without memory (§5): first 20 test variations x 4 episodes, temperature 0.4
ood   each task ten times (§6.1): trial 0 without memory, trials 1-9 with tips at every turn, from a memory that is
      empty at first; after each trial the policy writes its tips as in training, at the training temperature. The
      paper does not say how much a trial is: here the first 20 test variations, an episode of each.

Both with the step limits of the run, or else of envs.py (the paper's). The same command continues what was stopped:
a finished task (id) or trial (ood) is written at once and not repeated, and each has its own seed.

Prints a table, beside the paper's numbers, draws a picture, and writes all episodes' scores and tips as JSON. Five
figures come from the same episodes, because the literature reports different ones: the raw mean (the paper's), the
mean with negative scores as 0, the mean of the best score reached during the episode, the share of episodes at 100,
and the share that ended at -100.
"""

import argparse
import dataclasses
import json
import os
import sys
import zlib
from itertools import accumulate
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import empo2
import envs
import memory
import report
import runs
from settings import Settings

FIGURES = ("mean", "mean_clipped", "best_reached", "share_100", "share_minus_100")


def figures(episodes):
    """The five figures of a list of episodes (scores -100...100).

    >>> from empo2 import Episode, Turn
    >>> won, lost = (Episode("", 0, 0, [], [], "", score=s) for s in (100, -100))
    >>> won.turns, lost.turns = ([Turn([], [], [], [], {}, r) for r in rs] for rs in ([40, 60], [30, -130]))
    >>> figures([won, lost])
    {'mean': 0.0, 'mean_clipped': 50.0, 'best_reached': 65.0, 'share_100': 0.5, 'share_minus_100': 0.5}
    """
    scores = np.array([e.score for e in episodes], float)
    best = [max(accumulate((t.reward for t in e.turns), initial=0.0)) for e in episodes]
    values = (
        scores.mean(),
        scores.clip(0).mean(),
        np.mean(best),
        (scores == 100).mean(),
        (scores == -100).mean(),
    )
    return {name: round(float(value), 4) for name, value in zip(FIGURES, values)}


def evaluate(
    policy,
    envs,
    pool,
    episodes,
    temperature,
    s,
    seed,
    env_fault,
    progress=lambda phase, text: None,
    memory=None,
    embed=list,
):  # without a memory it is asked for nothing
    """Play `episodes` of each (task, variation) of the pool without learning; with a memory, its tips are shown at
    every turn, and nothing is added to it.

    Returns ({task: figures, episodes, variations}, all episodes, number dropped). Draws from torch's global
    generator, which it seeds; temperature and cache of the policy are put back.
    """
    jobs = [(task, v, group) for group, (task, v) in enumerate(pool) for _ in range(episodes)]
    training_temperature, policy.temperature = policy.temperature, temperature
    for _ in range(5):  # once, unless the simulators lose every single episode
        torch.manual_seed(seed)
        waves = empo2.rollout(
            policy,
            envs,
            jobs,
            memory,
            None,
            embed,
            replace(s, memory_prob=float(memory is not None)),
            np.random.default_rng(seed),
            env_fault,
            progress,
        )
        played = [episode for wave in waves for episode in wave]
        if played:
            break
    policy.temperature = training_temperature
    policy.forget()
    table = {}
    for task in dict.fromkeys(task for task, _ in pool):
        mine = [e for e in played if e.task == task]
        if mine:
            table[task] = figures(mine) | {
                "episodes": len(mine),
                "variations": sum(t == task for t, _ in pool),
            }
    if not table:
        raise RuntimeError(
            "all episodes of the evaluation were lost to simulator faults five times in a row"
        )
    return table, played, len(jobs) - len(played)


TRIALS = {"id": 1, "ood": 10}


def run_parts(args, s, adapter, parts, save):
    """Play what is missing of the parts, a list of trials of tasks; `save` is called after each."""
    policy = runs.load_policy(s, adapter)
    embed = memory.embedder(s.embedder)
    simulators, pool = runs.make_envs(
        dataclasses.replace(
            s, variations=args.variations, tasks_per_iteration=None, group_size=args.episodes
        ),
        args.split,
    )
    tips = memory.TipMemory(s.memory_capacity, s.tip_threshold, s.tips, s.tip_rank)
    if args.memory:
        tips.load(adapter / "tips.npz")
        asked = {
            empo2.memory_slot(empo2.Episode(*pair, 0, [], [], ""), s.memory_scope) for pair in pool
        }
        if not asked <= tips.slots.keys():  # what is called "with memory" shall have one
            raise ValueError(
                f"--memory: the run has tips in {len(asked & tips.slots.keys())} of these {len(asked)} "
                f"memories (one per {s.memory_scope}); take what it was trained on, --split train "
                f"--variations {s.variations}, train longer, or with --memory-scope task"
            )
    done = {(part["task"], part["trial"]): part for part in parts}
    with tqdm(desc="evaluating", bar_format="{desc} {elapsed}") as bar:
        for task in s.tasks:
            if args.protocol == "ood":
                tips.slots = {}  # each task is met with an empty memory
            for trial in range(TRIALS[args.protocol]):
                part = done.get((task, trial))
                if not part:
                    part = play(
                        policy,
                        simulators,
                        [pair for pair in pool if pair[0] == task],
                        trial,
                        tips,
                        embed,
                        args,
                        s,
                        lambda phase, text: bar.set_description(f"{task}, trial {trial}: {text}"),
                    )
                    parts.append(part)
                    save()
                # Also after a stop: the memory follows from what is written.
                for tip, key in zip(part["tips"], embed([tip["state"] for tip in part["tips"]])):
                    tips.add(key, tip["text"], tip["score"], tip["slot"])


def play(policy, simulators, pool, trial, tips, embed, args, s, progress):
    """One trial of one task -> its row, its episodes and (ood) the tips that were written after it."""
    task = pool[0][0]
    seed = int(np.random.default_rng([args.seed, zlib.crc32(task.encode()), trial]).integers(2**62))
    table, played, dropped = evaluate(
        policy,
        simulators,
        pool,
        args.episodes,
        args.temperature,
        s,
        seed,
        envs.EnvFault,
        progress,
        tips if args.memory or trial else None,
        embed,
    )
    if args.protocol == "ood":
        for first in range(0, len(played), len(simulators)):
            batch = played[first : first + len(simulators)]
            for row, episode in enumerate(
                batch
            ):  # its place in the policy's cache, which was emptied
                episode.row = row
            empo2.write_tips(policy, batch, memory.TipMemory(), embed, s, progress)
    return {
        "task": task,
        "trial": trial,
        **table[task],
        "episodes_dropped": dropped,
        "turns": sum(len(e.turns) for e in played),
        "memory_turns": sum(bool(turn.tips) for e in played for turn in e.turns),
        "tips": [
            {
                "state": empo2.memory_text(e, e.turns[-1].texts["next"], s.memory_key),
                "text": e.tip,
                "score": e.score,
                "slot": empo2.memory_slot(e, s.memory_scope),
            }
            for e in played
            if e.tip
        ],
        "played": [
            {"variation": e.variation, "score": e.score, "turns": len(e.turns), "ended": e.ended}
            for e in played
        ],
    }


def show(protocol, parts, picture):
    """Print the protocol and the table, and draw the picture; ood has a row for every trial."""
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))
    columns = ("episodes", "turns", "memory_turns", *FIGURES)
    ood = protocol["protocol"] == "ood"
    print(
        *report.table(
            columns,
            {
                f"{part['task']}, trial {part['trial']}" if ood else part["task"]: [
                    part[c] for c in columns
                ]
                for part in parts
            },
        ),
        sep="\n",
    )
    (report.draw_trials if ood else report.draw_scores)(picture, parts)
    if ood:
        for task in sorted(report.PAPER_OOD.keys() & set(protocol["tasks"])):
            trained_on, ours, grpo = report.PAPER_OOD[task]
            print(
                f"the paper's best trial of {task}, trained on {trained_on}: EMPO² {ours}, GRPO {grpo}"
            )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="a run directory, or one of its checkpoint-N")
    parser.add_argument(
        "--model", help="evaluate this base model (hub id or folder) instead of a run"
    )
    parser.add_argument("--protocol", default="id", choices=TRIALS, help="see above (default id)")
    parser.add_argument(
        "--memory", action="store_true", help="id with the checkpoint's tips, at every turn"
    )
    parser.add_argument("--env", help="environment [the run's, or scienceworld]")
    parser.add_argument(
        "--tasks",
        nargs="+",
        help="task names [the run's, or power-component]; ood must be given them",
    )
    parser.add_argument("--split", default="test", choices=["train", "dev", "test"])
    parser.add_argument(
        "--variations", type=int, default=20, help="first variations of the split (default 20)"
    )
    parser.add_argument(
        "--episodes", type=int, help="episodes per variation [4 with id, 1 with ood]"
    )
    parser.add_argument("--temperature", type=float, default=0.4, help="0 = greedy (default 0.4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", help="JSON file [RUN/eval-PROTOCOL-SPLIT-N.json, or eval-PROTOCOL-SPLIT-base.json]"
    )
    args = parser.parse_args(argv)
    args.episodes = args.episodes or {"id": 4, "ood": 1}[args.protocol]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if bool(args.run) == bool(args.model):
            raise ValueError("give either a run directory or --model; see --help")
        if args.memory and (args.model or args.protocol == "ood"):
            raise ValueError("--memory is for the tips of a run's checkpoint, with --protocol id")
        if args.protocol == "ood" and not args.tasks:
            raise ValueError("--protocol ood needs the new tasks: --tasks NAME ...")
        if args.temperature < 0 or args.seed < 0 or args.variations < 1 or args.episodes < 1:
            raise ValueError(
                "--temperature and --seed must not be negative, --variations and --episodes be positive"
            )
        s, adapter, name, folder = Settings(), None, "base", Path()
        if args.run:
            path = Path(args.run)
            folder = path if (path / "settings.json").exists() else path.parent
            if not (folder / "settings.json").exists() or not runs.checkpoints(folder):
                raise ValueError(f"{path}: no run with a checkpoint here")
            s = runs.read_settings(folder)
            adapter = (
                path if path != folder else folder / f"checkpoint-{runs.checkpoints(folder)[-1]}"
            )
            runs.verify(adapter, s)
            name = adapter.name.split("-")[-1]
        given = {"model": args.model, "env": args.env, "tasks": args.tasks}
        s = dataclasses.replace(s, seed=args.seed, **{k: v for k, v in given.items() if v})
        s, _ = runs.hardware_defaults(dataclasses.replace(s, tasks=list(dict.fromkeys(s.tasks))))
        env = envs.make(s.env, **runs.env_options(s))
        protocol = {
            "protocol": args.protocol,
            "environment": env.VERSION,
            "env_options": s.env_options,
            "tasks": s.tasks,
            "split": args.split,
            "variations": args.variations,
            "episodes_per_variation": args.episodes,
            "temperature": args.temperature,
            "memory": "off in trial 0, then at every turn"
            if args.protocol == "ood"
            else "tips of the checkpoint at every turn"
            if args.memory
            else "off",
            "step_limits": {
                task: env.step_limit or env.STEP_LIMITS.get(task, 30) for task in s.tasks
            },
            "seed": args.seed,
            "model": s.model,
            "adapter": str(adapter),
            "shots": s.shots,
            "action_correction": s.action_correction,
        }
        kind = f"{args.protocol}{'-memory' if args.memory else ''}-{args.split}"
        out = Path(args.out) if args.out else folder / f"eval-{kind}-{name}.json"
        if not out.parent.is_dir():
            raise ValueError(f"--out: there is no folder {out.parent}")
        result = (
            json.loads(out.read_text()) if out.exists() else {"protocol": protocol, "parts": []}
        )
        changed = [k for k in protocol if result.get("protocol", {}).get(k) != protocol[k]]
        if changed:
            raise ValueError(
                f"{out} exists, with other arguments ({', '.join(changed)}); name another file with --out"
            )

        def save():
            out.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
            os.replace(out.with_suffix(".tmp"), out)

        if len(result["parts"]) < len(s.tasks) * TRIALS[args.protocol]:
            run_parts(args, s, adapter, result["parts"], save)
        show(protocol, result["parts"], out.with_suffix(".png"))
    except KeyboardInterrupt:
        print("\neval.py: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
