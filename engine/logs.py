"""What a run shows and records of an iteration: progress, metrics, transcripts, trackers."""

import resource
import sys
import time
import uuid

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from tqdm import tqdm

from engine import processes
from engine.errors import UNKNOWN, unknown


def rollout_metrics(episodes, lost, learner):
    """Metrics of the rollout; lost: episodes. docs/metrics.md explains them."""
    turns = [turn for episode in episodes for turn in episode.turns]
    with_tips = [turn for turn in turns if turn.shown]
    scores = [episode.score for episode in episodes]
    with_memory = []
    without_memory = []
    for episode in episodes:
        shown = any(turn.shown for turn in episode.turns)
        group = with_memory if shown else without_memory
        group.append(episode.score)
    return {
        "score": float(np.mean(scores)),
        "score_best": max(scores),
        "score_std": float(np.std(scores)),
        "success": float(np.mean([score == 100 for score in scores])),
        "score_with_memory": float(np.mean(with_memory)) if with_memory else None,
        "score_without_memory": float(np.mean(without_memory)) if without_memory else None,
        "intrinsic": sum(turn.novelty for turn in turns) / len(episodes),
        "episodes": len(episodes),
        "episodes_dropped": lost,
        "turns": len(turns),
        "context_full": sum(episode.ended == "context full" for episode in episodes),
        "memory_turns": len(with_tips),
        "tips_shown": sum(len(turn.shown) for turn in turns),
        "tips_left_out": sum(turn.tips_left_out for turn in turns),
        "actions_cut": sum(turn.action_cut for turn in turns),
        "tips_cut": sum(episode.tip_cut for episode in episodes),
        "memory_size": len(learner.tip_memory),
        "distinct_states": len(learner.novelty),
        "offpolicy_turns": sum(turn.offpolicy for turn in with_tips),
        "onpolicy_memory_turns": sum(not turn.offpolicy for turn in with_tips),
    }


def with_own(metrics, own):
    """The metrics and those of an algorithm. Raises ValueError if a name is taken."""
    taken = sorted(own.keys() & metrics.keys())
    if taken:
        raise ValueError(f"Algorithm.metrics: {', '.join(taken)} is a metric already")
    return metrics | own


def transcript(iteration, episode, episode_return):
    """A readable record of an episode."""
    turns = []
    for turn in episode.turns:
        turns.append(
            {
                "observation": turn.observation,
                "tips": turn.shown,
                "tips_left_out": turn.tips_left_out,
                "written": turn.written,
                "action": turn.action,
                "action_cut": turn.action_cut,
                "next_observation": turn.next_observation,
                "reward": turn.reward,
                "novelty": round(turn.novelty, 4),
                "advantage": round(turn.advantage, 4),
                "tokens": len(turn.action_ids),
                "mode": "memory" if turn.shown else "plain",
                "update": "off-policy" if turn.offpolicy else "on-policy",
            }
        )
    return {
        "iteration": iteration,
        **episode.job._asdict(),
        "score": episode.score,
        "return": round(episode_return, 4),
        "ended": episode.ended,
        "tip": episode.tip,
        "tip_cut": episode.tip_cut,
        "task_text": episode.task_text,
        "turns": turns,
    }


class Display:
    """Progress bar and trackers of a run. Says once why three iterations taught nothing."""

    def __init__(self, s, start, trackers):
        self.s = s
        self.trackers = trackers
        self.shown = {"score": None, "best": None, "tips shown": 0}
        self.idle = 0  # iterations in a row that taught nothing
        self.bar = tqdm(
            total=s.iterations,
            initial=start,
            dynamic_ncols=True,
            disable=processes.rank > 0 or None,  # None: where the output is no terminal
            bar_format="{desc} {n}/{total} [{elapsed}<{remaining}]{postfix}",
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def evaluation(self, result):
        """Show a line of evals.jsonl."""
        for name in ("score", "success"):
            self.trackers.log({f"eval_{name}": result[name]}, step=result["iteration"])
        self.shown["eval"] = f"{result['score']:.1f}, {result['success']:.0%} solved"
        self.bar.set_postfix(self.shown)

    def iteration(self, episodes, metrics):
        """Show a line of metrics.jsonl."""
        known = {name: value for name, value in metrics.items() if value is not None}
        self.trackers.log(known, step=metrics["iteration"])
        if self.idle < 3:
            self.idle = self.idle + 1 if metrics.get("zero_variance_groups") == 1 else 0
            if self.idle == 3 and processes.rank == 0:
                reason = why_idle(episodes, self.s)
                tqdm.write(f"3 iterations taught nothing: {reason}", file=sys.stderr)
        self.shown["score"] = f"{metrics['score']:.1f}"
        self.shown["best"] = f"{metrics['score_best']:.0f}"
        self.shown["tips shown"] = metrics["tips_shown"]
        self.bar.update()
        self.bar.set_postfix(self.shown)
        if self.bar.disable and processes.rank == 0:
            done = f"iteration {metrics['iteration'] + 1} of {self.s.iterations}"
            print(f"{done}: {self.shown}", file=sys.stderr)


def why_idle(episodes, s):
    """Why no episode of an iteration has an advantage."""
    answers = [turn.next_observation for episode in episodes for turn in episode.turns]
    if s.group_size == 1:
        return "--group-size 1 leaves no episode to compare with"
    if all(answer == UNKNOWN for answer in answers):
        return f"none of the last {len(answers)} actions was understood; look at what is written"
    scores = sorted({f"{episode.score:g}" for episode in episodes})
    return f"in every group all episodes returned the same (the last scores: {', '.join(scores)})"


class Clock:
    """Seconds spent in each phase; called with (phase, text), it shows both in the progress bar."""

    def __init__(self, bar):
        self.bar = bar
        self.seconds = {}
        self.phase = ""
        self.since = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, phase, text=""):
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0) + now - self.since
        self.phase = phase
        self.since = now
        self.bar.set_description(f"{phase} {text}".strip())

    def metrics(self):
        """Seconds by phase, and the peak of memory."""
        self("")
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = {f"seconds_{phase}": round(t, 2) for phase, t in self.seconds.items()}
        return {**seconds, "peak_memory_gb": round(peak / 1e9, 3)}


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
