"""GSPO: one ratio and one clip per answer (Group Sequence Policy Optimization, arXiv 2507.18071).

Theirs (Eq. 5 and 7), for G answers y_i to a question, with GRPO's advantage A_i:

    1/G Σ_i min(s_i A_i, clip(s_i) A_i),    s_i = (π_θ(y_i | x) / π_old(y_i | x))^(1/|y_i|)

Ours, for the n actions a_t of an optimiser step, whatever their length:

    1/n Σ_t min(s_t A_t, clip(s_t) A_t),    s_t = exp(the mean of log π_θ - log π_old over a_t)

 1. An answer is an action (a turn), with the advantage of its episode: s_t is what Eq. 2 of EMPO²
    calls ρ, but for the root. An episode with more turns weighs more, as in Eq. 2.
 2. The clip range is theirs, 3e-4 and 4e-4, chosen for long answers. The mean of few tokens varies
    more: see `clipfrac`.
 3. The dual clip (`clip_c`) stays; with `--min-prob` the mask stays per token.
"""

from dataclasses import dataclass

import settings
from empo2 import Algorithm
from settings import setting


@dataclass
class Settings(settings.Settings):
    """The clip range of GSPO. [2]"""

    clip_low: float = setting(3e-4, "ratio clip 1 - clip_low")
    clip_high: float = setting(4e-4, "ratio clip 1 + clip_high")


class GSPO(Algorithm):
    """Overrides the ratio, and the weight of an action."""

    Settings = Settings
    preset = "grpo"

    def logratio(self, batch, logp):
        """log s [B, L], the same for all tokens of an action. [1]"""
        return batch.action_mean(super().logratio(batch, logp))

    def loss(self, batch, logp):
        """The tokens of an action share its loss."""
        losses, metrics = super().loss(batch, logp)
        return losses / batch.action_length(), metrics

    def normaliser(self, pairs):
        """The number of actions."""
        return len(pairs)
