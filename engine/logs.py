"""What a run records of an iteration: metrics, transcripts, seconds."""

import resource
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from empo2 import intrinsic_return
from engine import processes
from envs import UNKNOWN


def rollout_metrics(episodes, jobs, learner):
    """What is known after playing so many jobs; docs/metrics.md says what each name means."""
    turns = [turn for episode in episodes for turn in episode.turns]
    with_tips = [turn for turn in turns if turn.tips]
    scores = [episode.score for episode in episodes]
    with_memory = []
    without_memory = []
    for episode in episodes:
        shown = any(turn.tips for turn in episode.turns)
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
        "episodes_dropped": jobs - len(episodes),
        "turns": len(turns),
        "context_full": sum(episode.ended == "context full" for episode in episodes),
        "memory_turns": len(with_tips),
        "tips_shown": sum(len(turn.tips) for turn in turns),
        "tips_left_out": sum(turn.tips_left_out for turn in turns),
        "actions_cut": sum(turn.action_cut for turn in turns),
        "tips_cut": sum(episode.tip_cut for episode in episodes),
        "memory_size": len(learner.tip_memory),
        "distinct_states": len(learner.novelty),
        "offpolicy_turns": sum(turn.offpolicy for turn in with_tips),
        "onpolicy_memory_turns": sum(not turn.offpolicy for turn in with_tips),
    }


def transcript(iteration, episode, intrinsic_coef):
    """An episode for people."""
    turns = []
    for turn in episode.turns:
        turns.append(
            {
                "observation": turn.observation,
                "tips": turn.tips,
                "tips_left_out": turn.tips_left_out,
                "written": turn.written,
                "action": turn.action,
                "action_cut": turn.action_cut,
                "next_observation": turn.next_observation,
                "reward": turn.reward,
                "novelty": round(turn.novelty, 4),
                "advantage": round(turn.advantage, 4),
                "tokens": len(turn.action_ids),
                "mode": "memory" if turn.tips else "plain",
                "update": "off-policy" if turn.offpolicy else "on-policy",
            }
        )
    return {
        "iteration": iteration,
        **episode.job._asdict(),
        "score": episode.score,
        "return": round(intrinsic_return(episode, intrinsic_coef), 4),
        "ended": episode.ended,
        "tip": episode.tip,
        "tip_cut": episode.tip_cut,
        "task_text": episode.task_text,
        "turns": turns,
    }


class Idle:
    """Called after each iteration; says once why three in a row taught nothing."""

    count = 0  # such iterations in a row

    def __call__(self, episodes, metrics, s):
        if self.count == 3:
            return
        self.count = self.count + 1 if metrics.get("zero_variance_groups") == 1 else 0
        if self.count == 3 and processes.rank == 0:
            tqdm.write(f"3 iterations taught nothing: {why_idle(episodes, s)}", file=sys.stderr)


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
