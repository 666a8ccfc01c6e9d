"""The paper's evaluations, of a run's checkpoint or of a base model. No weight is changed.

  python eval.py runs/scienceworld-power-component-0
  python eval.py runs/scienceworld-power-component-0 --memory --split train --variations 5
  python eval.py runs/scienceworld-power-component-0 --protocol ood --tasks find-plant
  python eval.py runs/scienceworld-power-component-0 --model NEW_PLACE_OF_ITS_BASE_MODEL
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant --protocol ood
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant -- --shots 2

id    each task once, without memory (§5): first 20 test variations x 4 episodes, temperature 0.4
ood   each task ten times (§6.1): trial 0 without memory, trials 1-9 with tips at every turn, from a
      memory that is empty at first; after each trial the policy writes its tips. The paper does not
      say how much a trial is: here the first 20 test variations, an episode of each. With a base
      model this is Reflexion.

What follows -- are settings of train.py, where they shall be other than the run's: --env,
--rollout-batch, --load-in-4bit. The step limits are those of the run, or else the environment's.
The same command continues what was stopped: a finished task (id) or trial (ood) is written at once
and not repeated. A file made with other settings, weights or tips is refused.

Prints a table, beside the paper's numbers, draws a picture, and writes all scores and tips as JSON.
Five figures come from the same episodes, because the literature reports different ones: the raw
mean (the paper's), the mean with negative scores as 0, the mean of the best score reached during
the episode, the share of episodes at 100, and the share that ended at -100.
"""

import argparse
import copy
import dataclasses
import functools
import json
import sys
import zlib
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import memory
import rollout
import settings
from engine import hardware, runs
from envs import EnvFault
from experiments import paper, report
from rollout import no_progress

TRIALS = {"id": 1, "ood": 10}
# Settings that eval.py has an option of its own for
OWN = ("model", "tasks", "seed", "eval_temperature")
# Settings that change no number of an evaluation. All others are recorded.
NO_EFFECT = (
    "preset variations iterations gradient_checkpointing decode_graph lora_r lora_alpha group_size"
    " tasks_per_iteration rollout_batch memory_prob novelty_threshold intrinsic_coef offpolicy_prob"
    " denominator learning_rate minibatch_episodes micro_tokens pack clip_low clip_high clip_c"
    " min_prob beta advantage_eps fixed_std max_grad_norm step_weight discount invalid_penalty"
    " eval_every eval_variations eval_episodes run_dir resume save_every keep_checkpoints report_to"
).split()
# These may move: what is there is compared, by its checksum.
PLACES = ("model", "adapter")


# --- Evaluation (§5) ------------------------------------------------------------------------------
FIGURES = ("mean", "mean_clipped", "best_reached", "share_100", "share_minus_100")


def figures(episodes):
    """The five figures of a list of episodes (scores -100...100)."""
    scores = np.array([episode.score for episode in episodes], float)
    best = []
    for episode in episodes:
        rewards = [turn.reward for turn in episode.turns]
        best.append(max(accumulate(rewards, initial=0.0)))
    values = (
        scores.mean(),
        scores.clip(0).mean(),
        np.mean(best),
        (scores == 100).mean(),
        (scores == -100).mean(),
    )
    return {name: round(float(value), 4) for name, value in zip(FIGURES, values, strict=True)}


def evaluate(
    policy, envs, pool, episodes, s, rng, progress=no_progress, tips=None, embed=None, write=False
):
    """Play `episodes` of each (task, variation) of the pool, without learning -> the episodes.

    At s.eval_temperature; tip-free, or with the memory `tips` at every turn, which needs `embed`.
    write: each episode's tip is written, at the training temperature; no memory is changed.
    """
    jobs = []
    for group, (task, variation) in enumerate(pool):
        jobs += [rollout.Job(task, variation, group, member) for member in range(episodes)]
    playing = copy.copy(s)  # not `replace`: its check refuses a temperature of 0, greedy
    playing.temperature = s.eval_temperature
    playing.memory_prob = 0.0 if tips is None else 1.0
    for _ in range(5):  # once, unless the simulators lose every single episode
        played = []
        waves = rollout.rollout(policy, envs, jobs, tips, embed, playing, rng, EnvFault, progress)
        for wave in waves:
            if write:
                rollout.write_tips(policy, wave, s, progress)
            played += wave
        played = rollout.gather(played)
        if played:
            return played
    raise RuntimeError("all episodes were lost to simulator faults five times in a row")


def table(played):
    """{task: figures, and how many episodes and variations they are of}."""
    rows = {}
    for task in dict.fromkeys(episode.job.task for episode in played):
        mine = [episode for episode in played if episode.job.task == task]
        variations = {episode.job.variation for episode in mine}
        rows[task] = {**figures(mine), "episodes": len(mine), "variations": len(variations)}
    return rows


# --- The protocols --------------------------------------------------------------------------------
def run_parts(args, s, adapter, load, env, pool, parts, save):
    """Play what is missing of the parts, a list of trials of tasks; `save` is called after each."""
    embed = memory.embedder(s.embedder)
    lanes = min(s.rollout_batch, len(pool) * args.episodes)
    envs = [env] + [runs.make_env(s) for _ in range(lanes - 1)]
    tips = runs.make_memory(s)
    if args.memory:
        tips.load(adapter / "tips.npz")
        require_tips(tips, pool, s)
    policy = load()
    done = {(part["task"], part["trial"]): part for part in parts}
    with tqdm(desc="evaluating", bar_format="{desc} {elapsed}") as bar:
        for task in s.tasks:
            own_pool = [pair for pair in pool if pair[0] == task]
            if args.protocol == "ood":
                tips.slots = {}  # each task is met with an empty memory
            for trial in range(TRIALS[args.protocol]):
                part = done.get((task, trial))
                if part is None:

                    def progress(phase, text="", of=f"{task}, trial {trial}"):
                        bar.set_description(f"{of}: {phase} {text}")

                    shown = tips if args.memory or trial else None
                    part = play(policy, envs, own_pool, trial, shown, embed, args, s, progress)
                    parts.append(part)
                    save()
                if args.protocol == "ood":  # also after a stop: it follows from what is written
                    remember(part["played"], tips, embed)


def remember(played, tips, embed):
    """What `rollout.store_tips` does with episodes, of those in the file."""
    for episode in played:
        tips.judge(episode["tips_shown"], episode["score"], episode["slot"])
    writers = [episode for episode in played if episode["tip"]]
    keys = embed([episode["state"] for episode in writers])
    for episode, key in zip(writers, keys, strict=True):
        tips.add(key, episode["tip"], episode["score"], episode["slot"])


def require_tips(tips, pool, s):
    """What is called "with memory" shall have one. Raises ValueError."""
    asked = {rollout.memory_slot(rollout.Job(*pair, 0, 0), s.memory_scope) for pair in pool}
    if not asked <= tips.slots.keys():
        raise ValueError(
            f"--memory: the run has tips in {len(asked & tips.slots.keys())} of these {len(asked)} "
            f"memories (one per {s.memory_scope}); take what it was trained on, --split train "
            f"--variations {s.variations}, train longer, or with --memory-scope task"
        )


def play(policy, envs, pool, trial, shown, embed, args, s, progress):
    """One trial of one task -> its row and its episodes."""
    task = pool[0][0]
    rng = np.random.default_rng([args.seed, zlib.crc32(task.encode()), trial])
    write = args.protocol == "ood"
    played = evaluate(
        policy, envs, pool, args.episodes, s, rng, progress, tips=shown, embed=embed, write=write
    )
    turns = [turn for episode in played for turn in episode.turns]
    return {
        "task": task,
        "trial": trial,
        **table(played)[task],
        "episodes_dropped": len(pool) * args.episodes - len(played),
        "turns": len(turns),
        "memory_turns": sum(bool(turn.tips) for turn in turns),
        "played": [
            {
                "variation": episode.job.variation,
                "score": episode.score,
                "turns": len(episode.turns),
                "ended": episode.ended,
                "tips_shown": sorted({tip for turn in episode.turns for tip in turn.tips}),
                "tip": episode.tip,
                "state": rollout.memory_text(
                    episode, episode.turns[-1].next_observation, s.memory_key
                ),
                "slot": rollout.memory_slot(episode.job, s.memory_scope),
            }
            for episode in played
        ],
    }


def show(protocol, parts, picture):
    """Print the protocol and the table, and draw the picture; ood has a row for every trial."""
    told = {k: v for k, v in protocol.items() if k not in ("checksums", "settings")}
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    default = vars(settings.Settings())
    changed = {k: v for k, v in protocol["settings"].items() if v != default[k]}
    words = ", ".join(f"{name} {value}" for name, value in changed.items())
    print(f"settings other than the defaults: {words}")
    if settings.is_standin(protocol["model"]):  # its numbers do not stand beside the paper's
        parts = [{**part, "task": f"{part['task']} (stand-in)"} for part in parts]
    columns = ("episodes", "turns", "memory_turns", *FIGURES)
    ood = protocol["protocol"] == "ood"
    rows = {}
    for part in parts:
        name = f"{part['task']}, trial {part['trial']}" if ood else part["task"]
        rows[name] = [part[column] for column in columns]
    print(*report.table(columns, rows), sep="\n")
    if not ood:
        report.draw_scores(picture, parts)
        for part in parts:
            if part["task"] == "webshop":
                print(*webshop_table(part, protocol["environment"]), sep="\n")
        return
    report.draw_trials(picture, parts)
    for task, (trained_on, ours, grpo) in paper.OOD.items():
        if task in protocol["tasks"]:
            print(
                f"the paper's best trial of {task}, trained on {trained_on}: "
                f"EMPO² {ours}, GRPO {grpo}"
            )


def webshop_table(part, version):
    """Score and success in percent, beside the paper's if the data are the official full set."""
    rows = {f"here: {version}": (part["mean"], 100 * part["share_100"])}
    remark = "The paper's scores are of the full set: these compare to none of them."
    if version.endswith("the full set"):
        rows |= {f"paper: {name}": row for name, row in paper.WEBSHOP.items()}
        remark = "The paper's rows are of a 7B model."
    return ["", *report.table(("score", "success %"), rows), remark]


# --- Command line ---------------------------------------------------------------------------------
def parse(argv):
    """The arguments. Raises ValueError with one line for those that do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    argv = settings.with_home(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.settings = argv[cut + 1 :]
    own = settings.given(args.settings) & {*OWN}
    if own:
        raise ValueError(f"{', '.join(own)}: eval.py has its own option for it, before --")
    idle = settings.given(args.settings) & ({*NO_EFFECT} - {"rollout_batch", "decode_graph"})
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
        needed = {"task", "trial", "episodes", "turns", "memory_turns", "played", *FIGURES}
        if not all(needed <= part.keys() for part in parts):
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


def run(args):
    """Evaluate, or go on with it. Returns the file that holds the result."""
    s = settings.Settings()
    adapter = None
    state = None
    name = "base"
    folder = Path()
    if args.run:
        adapter = find_checkpoint(args.run)
        s, state = runs.read_checkpoint(adapter)
        name = adapter.name.removeprefix("checkpoint-")
        folder = adapter.parent
    changed = {"rollout_batch": None, "decode_graph": None}  # as this machine can
    other, _ = settings.parse(args.settings)
    for option in settings.given(args.settings):
        changed[option] = getattr(other, option)
    for option in ("model", "tasks"):
        if getattr(args, option) is not None:
            changed[option] = getattr(args, option)
    changed |= {"seed": args.seed, "eval_temperature": args.temperature}
    s, _ = hardware.defaults(dataclasses.replace(s, **changed))
    memory_part = "-memory" if args.memory else ""
    out = args.out or folder / f"eval-{args.protocol}{memory_part}-{args.split}-{name}.json"
    if not out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {out.parent}")
    env = runs.make_env(s)
    pool = runs.task_pool(env, s.tasks, args.split, args.variations)

    @functools.cache
    def load():
        policy = runs.load_policy(s, adapter)
        if adapter:
            runs.require_same_model(state, policy, s)
        return policy

    if adapter:
        checksums = {name: state[name] for name in ("weights", "tokenizer")}
        files = ["adapter_model.safetensors", "adapter_config.json"]
        files += ["tips.npz"] if args.memory else []
        checksums |= {file: runs.sha256(adapter / file) for file in files}
    else:  # what a folder holds now is known once it is loaded
        checksums = {"weights": load().base_checksum, "tokenizer": load().fingerprint()}
    protocol = describe(args, s, adapter, env, checksums)
    parts = earlier_parts(out, protocol) if out.exists() else []

    def save():
        runs.write_json(out, {"protocol": protocol, "parts": parts})

    if len(parts) < len(s.tasks) * TRIALS[args.protocol]:
        run_parts(args, s, adapter, load, env, pool, parts, save)
    show(protocol, parts, out.with_suffix(".png"))
    return out


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(f"written to {run(parse(argv))}")
    except KeyboardInterrupt:
        print("\neval.py: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
