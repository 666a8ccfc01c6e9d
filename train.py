"""EMPO² training: `python train.py --env scienceworld`. The loop in `train` is Algorithm 1.

A run leaves in its directory (default runs/ENV-TASK-SEED, or runs/ENV-TASK-PRESET-SEED):
  settings.json     every setting, with the defaults that the hardware decided
  metrics.jsonl     one line per iteration (docs/metrics.md)
  evals.jsonl       one line per tip-free evaluation on the test variations (--eval-every)
  episodes.jsonl    every episode, readable: observations, tips, actions, modes, rewards, its tip
  checkpoint-N/     the state at the top of iteration N: the LoRA adapter (loads with peft),
                    optimizer.pt, tips.npz, novelty.npz, state.json
  nonfinite-N/      if iteration N met a gradient that is not finite: what reproduces it
  wandb-id, wandb/  with --report-to wandb: the id of its run there, and what wandb keeps

  python train.py --env scienceworld --tasks find-plant find-animal --iterations 100
  python train.py --env scienceworld --preset grpo --eval-every 10
  python train.py --env house --env-options rooms=2
  python train.py --resume --run-dir runs/scienceworld-power-component-0
  accelerate launch --num_processes 2 train.py --env scienceworld  # on two GPUs: docs/runs.md

On --resume --iterations may grow, and --rollout-batch, --micro-tokens, --dtype, --load-in-4bit,
--gradient-checkpointing, --decode-graph, --save-every, --keep-checkpoints and --report-to may
change. --model may name another place of the same model; its weights are compared.
"""

import os
import sys

import settings

if __name__ == "__main__":  # a typo is said before what takes seconds to load
    settings.refuse(sys.argv[1:], __doc__)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a lost process is a page of C++

import dataclasses
import shlex
import signal
import time
import traceback
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import empo2
import eval as evaluation
import memory
import rollout
from algorithms import gigpo
from engine import hardware, logs, processes, runs
from envs import EnvFault, unknown


def iterate(iteration, learner, envs, pool, embed, s, clock):
    """One iteration of Algorithm 1 -> (episodes, metrics)."""
    # Each iteration has its own seed: a resumed run draws what the other would have drawn.
    rng = np.random.default_rng([s.seed, iteration, 0])
    jobs = draw_jobs(pool, s, rng)
    episodes = explore(learner, envs, jobs, embed, s, rng, clock)
    rollout.give_intrinsic_rewards(episodes, learner.novelty, embed, s)
    rollout.store_tips(episodes, learner.tip_memory, embed, s)
    metrics = {}
    if s.learning_rate:
        estimator = gigpo.gigpo_advantages if s.step_weight else empo2.grpo_advantages
        metrics = empo2.update(
            learner.policy, learner.optimizer, episodes, s, rng, clock, estimator
        )
    if s.step_weight:
        metrics["shared_states"] = gigpo.shared_states(episodes)
    return episodes, logs.rollout_metrics(episodes, len(jobs), learner) | metrics


def train(s, run_dir, start=None):
    """Run the iterations from checkpoint `start` on (None: a new run) -> how many are done."""
    trackers = make_trackers(s, run_dir)
    learner = runs.make_learner(s, None if start is None else run_dir / f"checkpoint-{start}")
    envs, pool, eval_pool = make_envs(learner.policy, s)
    embed = memory.embedder(s.embedder)
    again = processes.from_first(runs.was_evaluated, run_dir, start)
    runs.open_logs(run_dir, start)
    runs.write_json(run_dir / "settings.json", dataclasses.asdict(s))
    interrupted = finish_on_interrupt()
    shown = {"score": None, "best": None, "tips shown": 0}
    idle = logs.Idle()
    with tqdm(
        total=s.iterations,
        initial=start or 0,
        dynamic_ncols=True,
        disable=processes.rank > 0 or None,  # None: where the output is no terminal
        bar_format="{desc} {n}/{total} [{elapsed}<{remaining}]{postfix}",
    ) as bar:
        for iteration in range(start or 0, s.iterations + 1):
            stopping = bool(processes.gather(interrupted))  # asked once: what stops is saved
            stop = iteration == s.iterations or stopping
            due = iteration == s.iterations or (again and iteration == start)
            due = s.eval_every and (due or iteration % s.eval_every == 0)
            if iteration % s.save_every == 0 or stop or due:
                runs.save_checkpoint(run_dir, iteration, learner, s)
            if due and not stopping:
                result = log_evaluation(iteration, learner, envs, eval_pool, s, run_dir, bar)
                trackers.log({"eval_score": result["score"]}, step=iteration)
                trackers.log({"eval_success": result["success"]}, step=iteration)
                shown["eval"] = f"{result['score']:.1f}, {result['success']:.0%} solved"
                bar.set_postfix(shown)
            if stop:
                break
            clock = logs.Clock(bar)
            try:
                episodes, metrics = iterate(iteration, learner, envs, pool, embed, s, clock)
            except empo2.NotFinite as error:
                found = (run_dir, iteration, learner.policy, error)
                error.args = processes.from_first(keep_evidence, *found)
                raise
            metrics = {"iteration": iteration, **metrics, **clock.metrics()}
            learner.episodes += len(episodes)
            learner.seconds += sum(clock.seconds.values())
            runs.append(run_dir / "metrics.jsonl", [metrics])
            transcripts = [logs.transcript(iteration, e, s.intrinsic_coef) for e in episodes]
            runs.append(run_dir / "episodes.jsonl", transcripts)
            trackers.log({k: v for k, v in metrics.items() if v is not None}, step=iteration)
            idle(episodes, metrics, s)
            shown["score"] = f"{metrics['score']:.1f}"
            shown["best"] = f"{metrics['score_best']:.0f}"
            shown["tips shown"] = metrics["tips_shown"]
            bar.update()
            bar.set_postfix(shown)
            if bar.disable and processes.rank == 0:
                print(f"iteration {iteration + 1} of {s.iterations}: {shown}", file=sys.stderr)
    processes.end()
    trackers.end_training()
    return iteration


def draw_jobs(pool, s, rng):
    """B tasks, N episodes of each; every task of the pool once before any comes again."""
    order = []
    while len(order) < s.tasks_per_iteration:
        order += rng.permutation(len(pool)).tolist()
    jobs = []
    for group, index in enumerate(order[: s.tasks_per_iteration]):
        for member in range(s.group_size):
            jobs.append(rollout.Job(*pool[index], group, member))
    return jobs


def explore(learner, envs, jobs, embed, s, rng, clock):
    """Roll out, and let tips be written while the keys and values of the dialogues are at hand.

    Once, unless simulator faults lose all the episodes.
    """
    policy = learner.policy
    for _ in range(5):
        episodes = []
        for wave in rollout.rollout(
            policy, envs, jobs, learner.tip_memory, embed, s, rng, EnvFault, clock
        ):
            if s.memory_prob:
                rollout.write_tips(policy, wave, s, clock)
            episodes += wave
        episodes = rollout.gather(episodes)
        if episodes:
            return episodes
    raise RuntimeError("all episodes were lost to simulator faults five times in a row")


# --- Setting up -----------------------------------------------------------------------------------
def make_envs(policy, s):
    """(one environment per lane, what is trained on, what is evaluated on).

    A prompt that is too long for the context shows here, not in the night.
    """
    env = runs.make_env(s)
    pool = runs.task_pool(env, s.tasks, "train", s.variations)
    eval_pool = []
    if s.eval_every:
        eval_pool = runs.task_pool(env, s.tasks, "test", s.eval_variations)
    for task, variation in pool + eval_pool:
        job = rollout.Job(task, variation, 0, 0)
        playing = rollout.begin(policy, env, job, None, 0, rollout.load(env, job, EnvFault))
        rollout.open_turn(policy, playing, [], s)
        if s.memory_prob:
            request_alone = dataclasses.replace(playing.episode, turns=[], score=-100)
            rollout.tip_prompt(policy, request_alone, s.context - s.tip_tokens)
    played = processes.share(range(s.tasks_per_iteration * s.group_size))
    lanes = min(s.rollout_batch, len(played))
    return [env] + [runs.make_env(s) for _ in range(lanes - 1)], pool, eval_pool


def make_trackers(s, run_dir):
    """accelerate's trackers: none without --report-to."""
    if s.report_to and s.report_to not in LOGGER_TYPE_TO_CLASS:
        raise unknown("tracker", s.report_to, LOGGER_TYPE_TO_CLASS)
    trackers = Accelerator(project_dir=run_dir)
    trackers.log_with = filter_trackers(s.report_to, run_dir)
    if s.report_to and not trackers.log_with:
        raise ValueError(f"--report-to {s.report_to}: not installed; pip install {s.report_to}")
    config = {}
    for name, value in vars(s).items():
        config[name] = value if isinstance(value, (int, float)) else str(value)
    if processes.rank == 0:
        options = {"wandb": wandb_run(run_dir)} if s.report_to == "wandb" else {}
        trackers.init_trackers("empo2", config, options)
    return trackers


def wandb_run(run_dir):
    """Options of `wandb.init`: the run's own id, so that a resume goes on with it; its folder."""
    path = run_dir / "wandb-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return {"id": path.read_text(), "resume": "allow", "dir": str(run_dir)}


# --- The record -----------------------------------------------------------------------------------
def log_evaluation(iteration, learner, envs, pool, s, run_dir, bar):
    """Evaluate tip-free and add a line to evals.jsonl; it has its own seed, also after a resume."""
    since = time.perf_counter()
    rng = np.random.default_rng([s.seed, iteration, 1])

    def progress(phase, text=""):
        bar.set_description(f"evaluation {text}")

    played = evaluation.evaluate(
        learner.policy, envs, pool, s.eval_episodes, s, rng, progress=progress
    )
    tasks = evaluation.table(played)
    result = {
        "iteration": iteration,
        "score": float(np.mean([row["mean"] for row in tasks.values()])),
        "success": float(np.mean([row["share_100"] for row in tasks.values()])),
        "tasks": tasks,
        "episodes_dropped": len(pool) * s.eval_episodes - len(played),
        "training_episodes": learner.episodes,
        "seconds_training": round(learner.seconds, 2),
        "seconds": round(time.perf_counter() - since, 2),
    }
    runs.append(run_dir / "evals.jsonl", [result])
    if learner.best[0] is None or result["score"] >= learner.best[0]:
        learner.best = (result["score"], iteration)
    return result


def keep_evidence(run_dir, iteration, policy, error):
    """What reproduces a gradient that is not finite: the adapter, and the pairs of the step.

    s, _ = runs.read_checkpoint(run_dir / "checkpoint-N")
    policy = runs.load_policy(s, run_dir / "nonfinite-N")
    saved = json.loads((run_dir / "nonfinite-N" / "pairs.json").read_text())
    rows = [empo2.pack([empo2.Pair(**pair)]) for pair in saved]
    empo2.accumulate_gradient(policy, rows, s, 1)
    """
    folder = run_dir / f"nonfinite-{iteration}"
    error.args = (f"iteration {iteration}: {error}; what reproduces it is in {folder}",)
    folder.mkdir(exist_ok=True)
    policy.save(folder)
    runs.write_json(folder / "pairs.json", [dataclasses.asdict(pair) for pair in error.pairs])
    return error.args


@processes.only_first
def summarise(s, run_dir):
    """Say what a finished run leads to: did it learn, where to look, how to go on."""
    evals = runs.records(run_dir / "evals.jsonl")
    if evals:
        before, after = evals[0], evals[-1]
        print(
            f"tip-free score {before['score']:.1f} -> {after['score']:.1f}, "
            f"solved {before['success']:.0%} -> {after['success']:.0%}, "
            f"after {after['training_episodes']} episodes"
            + (" (not to be compared with the paper's)" if settings.is_standin(s.model) else "")
        )
    print("look at its episodes:", command("experiments/view.py", run_dir))
    print("go on:", resume_command(run_dir), "--iterations", 2 * s.iterations)


# --- Command line ---------------------------------------------------------------------------------
def command(script, *words):
    """A command line that works from the working directory."""
    path = Path(__file__).resolve().parent / script
    shorter = min(str(path), os.path.relpath(path), key=len)
    return shlex.join(["python", shorter, *map(str, words)])


def resume_command(run_dir):
    """The command that goes on with a run."""
    return command("train.py", "--resume", "--run-dir", run_dir)


def parse(argv):
    """(settings, what was decided), as `settings.parse`, with what the hardware decides."""
    s, notes = settings.parse(argv, __doc__)
    s, reasons = hardware.defaults(s)
    if reasons:
        notes += ["decided by the hardware:", *reasons]
    return s, notes


def continue_run(run_dir, s, names):
    """(the run's own settings, its newest checkpoint); `names` are those given on --resume."""
    saved, start = runs.newest_checkpoint(run_dir)
    free = {name: getattr(s, name) for name in names & {"iterations", "model", *runs.RESUMABLE}}
    for name in names - {"resume", "run_dir", *free}:
        if getattr(s, name) != getattr(saved, name):
            raise ValueError(
                f"--resume continues with the run's own settings; {name} cannot change"
            )
    if free.get("iterations", start) < start:
        raise ValueError(
            f"{run_dir} has {start} iterations already; --iterations can only make it longer"
        )
    return dataclasses.replace(saved, resume=True, run_dir=str(run_dir), **free), start


def open_run(s, notes, names, held):
    """Hold the run's directory -> (settings, the checkpoint to go on from or None)."""
    run_dir = Path(s.run_dir)
    if s.resume and not run_dir.is_dir():
        raise ValueError(f"{run_dir} does not exist; nothing to resume")
    held.enter_context(runs.locked(run_dir))
    start = None
    if s.resume:
        s, start = continue_run(run_dir, s, names)
    elif runs.checkpoints(run_dir) or runs.records(run_dir / "metrics.jsonl"):
        raise ValueError(f"{run_dir} exists; --resume continues it, --run-dir takes another")
    else:
        print(*notes, sep="\n")
    episodes = s.tasks_per_iteration * s.group_size
    if processes.count > episodes:
        raise ValueError(
            f"{processes.count} processes, but {episodes} episodes an iteration; lower "
            "--num_processes, or raise --group-size or --tasks-per-iteration"
        )
    return s, start


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopNow(BaseException):
    """Not KeyboardInterrupt: py4j's handling of that one is broken."""


def stop_now(signum, frame):
    raise StopNow


def finish_on_interrupt():
    """A list that fills on a signal of STOPS: the iteration can finish; a second one stops now."""
    received = []

    def handler(signum, frame):
        if received:
            raise StopNow
        received.append(signum)
        if processes.rank == 0:
            tqdm.write(
                "Finishing this iteration, then saving. Ctrl-C again stops now and loses it."
            )

    settings.handle(STOPS, handler)
    return received


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    settings.handle(STOPS, stop_now)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run_dir = None
    try:
        processes.start()
        s, notes = parse(argv)
        run_dir = Path(s.run_dir)
        resume = shlex.join(["--resume", "--run-dir", str(run_dir)])
        processes.watch(f"the same launch with {resume} continues")
        with ExitStack() as held:
            s, start = processes.from_first(open_run, s, notes, settings.given(argv), held)
            done = train(s, run_dir, start)
        if done < s.iterations:
            raise StopNow
        summarise(s, run_dir)
    except StopNow:
        if run_dir and run_dir.is_dir() and runs.checkpoints(run_dir):
            processes.say(f"\nstopped; {resume_command(run_dir)} continues")
        else:
            processes.say("\nstopped before anything was saved")
        return 130
    except torch.OutOfMemoryError:
        processes.say(
            "train.py: out of GPU memory; lower --micro-tokens (update) or --rollout-batch "
            f"(rollout), or use --load-in-4bit, then: {resume_command(run_dir)}",
            sys.stderr,
        )
        return 1
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        said = processes.say(f"train.py: {error}", sys.stderr)
        with suppress(OSError):  # for what nobody foresaw; the disk may be full
            if said and run_dir and run_dir.exists():
                (run_dir / "error.log").write_text(traceback.format_exc())
        return 2
    finally:
        settings.handle([signal.SIGINT], signal.default_int_handler)
        settings.handle([signal.SIGTERM, signal.SIGHUP], signal.SIG_DFL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
