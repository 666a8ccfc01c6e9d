"""The paper's evaluations, of a run's checkpoint or of a base model. No weight is changed.

  python eval.py runs/scienceworld-power-component-0
  python eval.py runs/scienceworld-power-component-0 --memory --split train --variations 5
  python eval.py runs/scienceworld-power-component-0 --protocol ood --tasks find-plant
  python eval.py runs/scienceworld-power-component-0 --model NEW_PLACE_OF_ITS_BASE_MODEL
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant --protocol ood
  python eval.py --model Qwen/Qwen2.5-7B-Instruct --tasks find-plant -- --env-options shots=2

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

import copy
import dataclasses
import functools
import sys
import zlib
from itertools import accumulate

import numpy as np
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import envs
import memory
import rollout
import settings
from engine import arguments, evaluations, hardware, runs
from engine.evaluations import TRIALS
from engine.tables import FIGURES, show
from policy import load_policy
from rollout import no_progress


# --- Evaluation (§5) ------------------------------------------------------------------------------
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
    policy,
    worlds,
    pool,
    episodes,
    algorithm,
    rng,
    progress=no_progress,
    tips=None,
    embed=None,
    write=False,
):
    """Play `episodes` of each (task, variation) of the pool, without learning -> the episodes.

    At s.eval_temperature; tip-free, or with the memory `tips` at every turn, which needs `embed`.
    write: each episode's tip is written, at the training temperature; no memory is changed.
    """
    s = algorithm.s
    jobs = []
    for group, (task, variation) in enumerate(pool):
        jobs += [rollout.Job(task, variation, group, member) for member in range(episodes)]
    playing = copy.copy(algorithm)
    playing.s = copy.copy(s)  # not `replace`: its check refuses a temperature of 0, greedy
    playing.s.temperature = s.eval_temperature
    playing.memory_mode = lambda rng: rng.random() < (tips is not None)  # whatever training does
    playing.shown_tips = list
    for _ in range(5):  # once, unless the simulators lose every single episode
        played = []
        for batch in rollout.rollout(
            policy, worlds, jobs, tips, embed, playing, rng, envs.EnvFault, progress
        ):
            if write:
                rollout.write_tips(policy, batch, s, progress)
            played += batch
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
def run_parts(args, algorithm, adapter, load, env, pool, parts, save):
    """Play what is missing of the parts, a list of trials of tasks; `save` is called after each."""
    s = algorithm.s
    embed = memory.embedder(s.embedder)
    parallel = min(s.rollout_batch, len(pool) * args.episodes)
    worlds = [env] + [envs.from_settings(s) for _ in range(parallel - 1)]
    tips = memory.TipMemory(s.memory_capacity, algorithm.order_tips)
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
                    part = play(
                        policy, worlds, own_pool, trial, shown, embed, args, algorithm, progress
                    )
                    parts.append(part)
                    save()
                if args.protocol == "ood":  # also after a stop: it follows from what is written
                    remember(part, tips, embed)


def remember(part, tips, embed):
    """What `rollout.store_tips` does with episodes, of those in the file."""
    for episode in part["played"]:
        tips.judge(episode["tips_led"], episode["score"], episode["slot"])
    keys = embed([tip["state"] for tip in part["admitted"]])
    for tip, key in zip(part["admitted"], keys, strict=True):
        tips.add(key, tip["tip"], tip["score"], tip["slot"])


def require_tips(tips, pool, s):
    """What is called "with memory" shall have one. Raises ValueError."""
    asked = {rollout.memory_slot(rollout.Job(*pair, 0, 0), s.memory_scope) for pair in pool}
    if not asked <= tips.slots.keys():
        raise ValueError(
            f"--memory: the run has tips in {len(asked & tips.slots.keys())} of these {len(asked)} "
            f"memories (one per {s.memory_scope}); take what it was trained on, --split train "
            f"--variations {s.variations}, train longer, or with --memory-scope task"
        )


def play(policy, worlds, pool, trial, shown, embed, args, algorithm, progress):
    """One trial of one task -> its row and its episodes."""
    s = algorithm.s
    task = pool[0][0]
    rng = np.random.default_rng([args.seed, zlib.crc32(task.encode()), trial])
    write = args.protocol == "ood"
    played = evaluate(
        policy, worlds, pool, args.episodes, algorithm, rng, progress, shown, embed, write
    )
    turns = [turn for episode in played for turn in episode.turns]
    return {
        "task": task,
        "trial": trial,
        **table(played)[task],
        "episodes_dropped": len(pool) * args.episodes - len(played),
        "turns": len(turns),
        "memory_turns": sum(bool(turn.shown) for turn in turns),
        "played": [
            {
                "variation": episode.job.variation,
                "score": episode.score,
                "turns": len(episode.turns),
                "ended": episode.ended,
                "tips_led": sorted(rollout.leading(episode)),
                "tip": episode.tip,
                "slot": rollout.memory_slot(episode.job, s.memory_scope),
            }
            for episode in played
        ],
        "admitted": [
            {
                "tip": episode.tip,
                "score": episode.score,
                "state": rollout.memory_text(
                    episode, episode.turns[-1].next_observation, s.memory_key
                ),
                "slot": rollout.memory_slot(episode.job, s.memory_scope),
            }
            for episode in algorithm.admitted([episode for episode in played if episode.tip])
        ],
    }


# --- Command line ---------------------------------------------------------------------------------
def run(args):
    """Evaluate, or go on with it. Returns the file that holds the result."""
    s, adapter, state = run_settings(args)
    algorithm = arguments.algorithm_class(s.algorithm)(s)
    out = evaluations.out_file(args, adapter)
    env = envs.from_settings(s)
    pool = envs.task_pool(env, s.tasks, args.split, args.variations)

    @functools.cache
    def load():
        policy = load_policy(s, adapter)
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
    checksums |= runs.sources(s)
    protocol = evaluations.describe(args, s, adapter, env, checksums)
    parts = evaluations.earlier_parts(out, protocol) if out.exists() else []

    def save():
        runs.write_json(out, {"protocol": protocol, "parts": parts})

    if len(parts) < len(s.tasks) * TRIALS[args.protocol]:
        run_parts(args, algorithm, adapter, load, env, pool, parts, save)
    show(protocol, parts, out.with_suffix(".png"))
    return out


def run_settings(args):
    """(settings, the checkpoint to evaluate, its state); None for both of a base model."""
    s, adapter, state = settings.Settings(), None, None
    if args.run:
        adapter = evaluations.find_checkpoint(args.run)
        s, state = runs.read_checkpoint(adapter)
        for file in runs.changed_sources(adapter).values():
            print(f"{file} has changed since the checkpoint; it is used as it is", file=sys.stderr)
    changed = {"rollout_batch": None, "decode_graph": None}  # as this machine can
    other, _ = arguments.parse(["--algorithm", s.algorithm, *args.settings])
    for option in arguments.given(args.settings):
        changed[option] = getattr(other, option)
    for option in ("model", "tasks"):
        if getattr(args, option) is not None:
            changed[option] = getattr(args, option)
    changed |= {"seed": args.seed, "eval_temperature": args.temperature}
    known = {name: value for name, value in vars(s).items() if hasattr(other, name)}
    s = dataclasses.replace(other, **known | changed)  # of the class that its algorithm needs
    s, _ = hardware.defaults(s, envs.default_tasks(s))
    return s, adapter, state


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(f"written to {run(evaluations.parse(argv, __doc__))}")
    except KeyboardInterrupt:
        print("\neval.py: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
