"""What a run records of an iteration: metrics (docs/metrics.md) and transcripts."""

from collections import Counter

import numpy as np

from engine import processes


def rollout_metrics(episodes, lost, learner):
    """Metrics of the rollout. lost: how many episodes the simulator lost."""
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


def sampler_gaps(episodes):
    """|log-prob of the trainer - that of the sampler| of every token that has both."""
    pairs = [turn.pair for episode in episodes for turn in episode.turns]
    known = [(p.old_logps, p.sampled_logps) for p in pairs if p.old_logps and p.sampled_logps]
    gaps = [np.abs(np.subtract(*logps)) for logps in known]
    return processes.gather(np.concatenate(gaps).tolist() if gaps else [])


def update_metrics(parts, norms, episodes):
    """Metrics of an update. parts: sums of the loss's metrics by micro-batch."""
    gaps = sampler_gaps(episodes)
    sums = Counter()
    for part in processes.gather(parts):
        sums.update(part)
    tokens = sums.pop("tokens", 0)
    groups = {episode.job.group for episode in episodes}
    moved = {e.job.group for e in episodes if any(any(t.pair.advantages) for t in e.turns)}
    return {name: total / tokens for name, total in sorted(sums.items())} | {
        "grad_norm": float(np.mean(norms)) if norms else 0.0,
        "optimizer_steps": len(norms),
        "sampler_gap": max(gaps, default=None),
        "sampler_gap_mean": float(np.mean(gaps)) if gaps else None,
        "zero_variance_groups": 1 - len(moved) / len(groups),
    }
