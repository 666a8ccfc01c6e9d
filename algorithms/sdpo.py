"""SDPO: the policy with tips teaches the policy without (Self-Distillation, arXiv 2601.20802).

Theirs: the policy answers x with y ~ π_θ(· | x); it is its own teacher once it has read feedback f:

    min  Σ_t KL( π_θ(· | x, y_<t) ‖ sg π_θ(· | x, f, y_<t) ),    whose gradient is that of
    advantages    A_t = log π_θ(y_t | x, f, y_<t) - log π_θ(y_t | x, y_<t)

Ours, for each token a_k of an action that was sampled without tips although some were retrieved:

    A_k = log π_old(a_k | s, u, tips, a_<k) - log π_old(a_k | s, u, a_<k)

 1. The feedback is the tips of earlier episodes. (Theirs: on the same answer, or a solution that
    another one of its group found.) A turn without any has A = 0.
 2. Only the sampled token is compared, an unbiased estimate. (Theirs: also the most likely ones,
    weighted by their probabilities.)
 3. The teacher is π_old of this iteration. (Theirs: its weights may be a moving average.)
 4. The ratio, its clip and the low-probability mask are those of Eq. 2. No reward is in A: scores
    act through the order of the tips alone. `offpolicy_prob` and `intrinsic_coef` have no effect.
"""

from dataclasses import dataclass

import numpy as np

import settings
from empo2 import Algorithm, Pair
from settings import setting


@dataclass
class Settings(settings.Settings):
    """Looking tips up disturbs no rollout here, so every turn may have some."""

    memory_prob: float = setting(1.0, "p: probability that a turn is taught by tips")


class SDPO(Algorithm):
    """Overrides what the sampled prompt shows, the training pairs and the advantages."""

    Settings = Settings
    needs_logps = True

    def shown_tips(self, retrieved):
        """None."""
        return []

    def training_pairs(self, episode):
        """Both prompts are tip-free; a `second` one with the retrieved tips is the teacher's."""
        for t, turn in enumerate(episode.turns):
            pair = Pair(episode.prompt(t), turn.action_ids, sampled_logps=turn.logps)
            if turn.retrieved:
                pair.second = Pair(episode.prompt(t, turn.retrieved_ids), turn.action_ids)
            yield pair

    def advantages(self, episodes):
        """A list per turn, of one number per token; 0 without a teacher. [1]"""
        return [[of_tokens(turn.pair) for turn in episode.turns] for episode in episodes]

    def metrics(self, episodes):
        """taught_turns: how many had a teacher. teacher_kl: KL(π_old ‖ teacher) per token there."""
        pairs = [turn.pair for e in episodes for turn in e.turns if turn.pair and turn.retrieved]
        gains = [gain for pair in pairs for gain in of_tokens(pair)]
        return {"taught_turns": len(pairs), "teacher_kl": -float(np.mean(gains)) if gains else None}


def of_tokens(pair):
    """A of each token of an action."""
    if not pair.second:
        return [0.0] * len(pair.action)
    return np.subtract(pair.second.old_logps, pair.old_logps).tolist()
