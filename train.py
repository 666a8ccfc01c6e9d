"""EMPO² training: `python train.py --env scienceworld`. `iterate` is one iteration of Algorithm 1.

Without a GPU that command shows the method with a small stand-in (configs/stages.yaml) in minutes.

A run leaves in its directory (default runs/ENV-TASK-SEED, with algorithm and preset if given):
  settings.json     every setting, with the defaults that the hardware decided
  metrics.jsonl     one line per iteration (docs/metrics.md)
  evals.jsonl       one line per tip-free evaluation on the test variations (--eval-every)
  curve.png         the curves of both, drawn again after each evaluation and at the end
  episodes.jsonl    every episode, readable: observations, tips, actions, modes, rewards, its tip
  checkpoint-N/     the state at the top of iteration N: the LoRA adapter (loads with peft),
                    optimizer.pt, tips.npz, novelty.npz, state.json
  wandb-id, wandb/  with --report-to wandb: the id of its run there, and what wandb keeps

  python train.py --env scienceworld --tasks find-plant find-animal --iterations 100
  python train.py --env scienceworld --preset grpo --eval-every 10
  python train.py --env house --env-options rooms=2
  python train.py --env scienceworld --algorithm my_idea.py  # docs/forks.md
  python train.py --config configs/stages.yaml
  python train.py --resume --run-dir runs/scienceworld-power-component-0
  accelerate launch --num_processes 2 train.py --env scienceworld  # on two GPUs: docs/runs.md

When resuming, --iterations may be raised (with --lr-decay the rate then rises again), and
--rollout-batch, --micro-tokens, --dtype, --load-in-4bit, --gradient-checkpointing, --decode-graph,
--save-every and --report-to may change. --model may name another place of the same model; its
weights are compared. If you have edited the file of --algorithm or --env, give it again to resume
with the edited version.
"""

import sys

import envs
from engine import arguments, command

if __name__ == "__main__":  # report typos before slow imports
    command.refuse(sys.argv[1:], __doc__, envs.make)

import dataclasses
import itertools
import time

import numpy as np
import torch

import empo2
import eval as evaluation
import memory
import rollout
from engine import hardware, logs, processes, runs
from engine.metrics import rollout_metrics, transcript, with_own
from policy import Policy, load_policy


@dataclasses.dataclass
class Learner:
    """All that learns or remembers: what a checkpoint holds."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    tip_memory: memory.TipMemory
    novelty: memory.NoveltyStore
    episodes: int = 0  # played in training so far
    seconds: float = 0.0  # of training so far
    best: tuple = (None, None)  # score and iteration of the best evaluation; ties: the later one


def iterate(iteration, learner, algorithm, worlds, pool, embed, clock):
    """One iteration of Algorithm 1 -> (episodes, metrics)."""
    s = algorithm.s
    algorithm.iteration = iteration
    # A seed for each iteration: a resumed run draws what an uninterrupted one would have drawn.
    rng = np.random.default_rng([s.seed, iteration, 0])
    lost = []  # how many of the jobs

    def play(jobs):
        played = explore(learner, worlds, jobs, embed, algorithm, rng, clock)
        learner.episodes += len(played)
        lost.append(len(jobs) - len(played))
        return played

    episodes = algorithm.collect(job_drawer(pool, s, rng), play)
    if not episodes:
        name = type(algorithm).__name__
        raise ValueError(f"{name}.collect returned no episodes; return those of the last `play`")
    rollout.give_intrinsic_rewards(episodes, learner.novelty, embed, algorithm)
    rollout.store_tips(episodes, learner.tip_memory, embed, algorithm)
    metrics = {}
    if s.learning_rate:
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(s, iteration)
        metrics = empo2.update(learner.policy, learner.optimizer, episodes, algorithm, rng, clock)
    metrics |= {"iteration": iteration, **rollout_metrics(episodes, sum(lost), learner)}
    return episodes, with_own(metrics, algorithm.metrics(episodes))


def learning_rate(s, iteration):
    """Constant, but over the last `lr_decay` of the iterations it falls linearly towards 0.

    >>> s, _ = arguments.parse("--learning-rate 0.6 --iterations 9 --lr-decay 0.33".split())
    >>> [round(learning_rate(s, iteration), 2) for iteration in (0, 6, 7, 8)]
    [0.6, 0.6, 0.4, 0.2]
    """
    if not s.lr_decay:
        return s.learning_rate
    left = 1 - iteration / s.iterations
    return s.learning_rate * min(1, left / s.lr_decay)


def explore(learner, worlds, jobs, embed, algorithm, rng, clock):
    """Roll out, and let tips be written while the keys and values of the dialogues are at hand.

    Repeated, up to five times, if simulator faults lose all the episodes.
    """
    policy = learner.policy
    for _ in range(5):
        episodes = []
        for batch in rollout.rollout(
            policy, worlds, jobs, learner.tip_memory, embed, algorithm, rng, envs.EnvFault, clock
        ):
            if algorithm.s.memory_prob:
                rollout.write_tips(policy, batch, algorithm.s, clock)
            episodes += batch
        episodes = rollout.gather(episodes)
        if episodes:
            return episodes
    raise RuntimeError("all episodes were lost to simulator faults five times in a row")


def job_drawer(pool, s, rng):
    """A function: n -> the jobs of n further groups, N = `group_size` episodes of a task each.

    Every task of the pool comes once before any comes again.
    """
    order = []
    numbers = itertools.count()

    def draw(count):
        jobs = []
        for group in itertools.islice(numbers, count):
            if not order:
                order.extend(rng.permutation(len(pool)).tolist())
            task, variation = pool[order.pop(0)]
            jobs += [rollout.Job(task, variation, group, n) for n in range(s.group_size)]
        return jobs

    return draw


def train(s, run_dir, start=None):
    """Run the iterations from checkpoint `start` on (None: a new run) -> how many are done."""
    trackers = logs.make_trackers(s, run_dir)
    algorithm = arguments.algorithm_class(s.algorithm)(s)
    learner = make_learner(algorithm, None if start is None else run_dir / f"checkpoint-{start}")
    worlds, pool, eval_pool = make_envs(learner.policy, algorithm)
    embed = memory.embedder(s.embedder)
    again = processes.from_first(runs.was_evaluated, run_dir, start)
    runs.open_logs(run_dir, start)
    runs.write_json(run_dir / "settings.json", dataclasses.asdict(s))
    interrupted = command.finish_on_interrupt()
    with logs.Display(s, start or 0, trackers) as display:
        for iteration in range(start or 0, s.iterations + 1):
            stopping = bool(processes.gather(interrupted))  # read once: saving and stopping agree
            stop = iteration == s.iterations or stopping
            due = iteration == s.iterations or (again and iteration == start)
            due = s.eval_every and (due or iteration % s.eval_every == 0)
            if iteration % s.save_every == 0 or stop or due:
                runs.save_checkpoint(run_dir, iteration, learner, s)
            if due and not stopping:
                result = evaluate(iteration, learner, algorithm, worlds, eval_pool, display)
                runs.append(run_dir / "evals.jsonl", [result])
                display.evaluation(result)
            if stop:
                break
            clock = logs.Clock(display.bar)
            episodes, metrics = iterate(iteration, learner, algorithm, worlds, pool, embed, clock)
            metrics |= clock.metrics()
            learner.seconds += sum(clock.seconds.values())
            runs.append(run_dir / "metrics.jsonl", [metrics])
            transcripts = [
                transcript(iteration, episode, algorithm.episode_return(episode))
                for episode in episodes
            ]
            runs.append(run_dir / "episodes.jsonl", transcripts)
            display.iteration(episodes, metrics)
    trackers.end_training()
    return iteration


def evaluate(iteration, learner, algorithm, worlds, pool, display):
    """A tip-free evaluation, a line of evals.jsonl; it has its own seed, also after a resume."""
    s = algorithm.s
    since = time.perf_counter()
    rng = np.random.default_rng([s.seed, iteration, 1])

    def progress(phase, text=""):
        display.bar.set_description_str(f"; evaluation {text}")

    played = evaluation.evaluate(
        learner.policy, worlds, pool, s.eval_episodes, algorithm, rng, progress
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
    if learner.best[0] is None or result["score"] >= learner.best[0]:
        learner.best = (result["score"], iteration)
    return result


# --- Setting up -----------------------------------------------------------------------------------
def make_learner(algorithm, checkpoint=None):
    """A new learner, or that of a checkpoint folder."""
    s = algorithm.s
    policy = load_policy(s, checkpoint)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=s.learning_rate, weight_decay=0.0)
    tip_memory = memory.TipMemory(s.memory_capacity, algorithm.order_tips)
    learner = Learner(policy, optimizer, tip_memory, memory.NoveltyStore(s.novelty_threshold))
    if checkpoint:
        runs.load_checkpoint(checkpoint, learner, s)
    return learner


def make_envs(policy, algorithm):
    """(an environment per parallel episode, what is trained on, what is evaluated on).

    A prompt that is too long for the context fails at start-up.
    """
    s = algorithm.s
    env = envs.from_settings(s)
    pool = envs.task_pool(env, s.tasks, "train", s.variations)
    eval_pool = []
    if s.eval_every:
        eval_pool = envs.task_pool(env, s.tasks, "test", s.eval_variations)
    for task, variation in pool + eval_pool:
        job = rollout.Job(task, variation, 0, 0)
        opening = rollout.reset_env(env, job, envs.EnvFault)
        playing = rollout.start_episode(policy, env, job, None, 0, opening)
        rollout.open_turn(policy, playing, [], algorithm)
        if s.memory_prob:
            request_alone = dataclasses.replace(playing.episode, turns=[], score=-100)
            rollout.tip_prompt(policy, request_alone, s.context - s.tip_tokens)
    played = processes.share(range(s.tasks_per_iteration * s.group_size))
    parallel = min(s.rollout_batch, len(played))
    return [env] + [envs.from_settings(s) for _ in range(parallel - 1)], pool, eval_pool


def parse(argv):
    """(settings, lines that a new run prints), with what the hardware decides."""
    said = []
    s, notes = arguments.parse(argv, __doc__)
    place = hardware.find_device()
    shown = arguments.demonstration(s, argv)
    if shown and not place.gigabytes and (s.model or not place.fault):
        s, notes = arguments.parse(shown, __doc__)
        plain = " (the paper's method: --preset empo2)" if s.preset == "empo2-modes" else ""
        said.append(
            f"no GPU: the demonstration configs/stages.yaml, preset {s.preset}{plain}; "
            "with a GPU: Qwen2.5-7B on power-component"
        )
    s, reasons = hardware.defaults(s, envs.default_tasks(s))
    if s.verbose:
        said += [*notes, *reasons]
    elif place.gigabytes:  # a licence, a card without bfloat16, what the card decides of any model
        names = ("model", "dtype", "load_in_4bit")
        said += [line for line in reasons if line.split()[0] in names]
    return s, said


def main(argv=None):
    """Exit code: 0, 1 out of GPU memory, 2 refused, 130 stopped."""
    return command.run(sys.argv[1:] if argv is None else argv, parse, train)


if __name__ == "__main__":
    sys.exit(main())
