"""Credit among the episodes with tips, beside GRPO's among all of a group.

EMPO² compares all episodes of a group with each other, those with tips and those without:

    A_i = (R_i - mean R) / σ            over the group

Tips can raise the return so much that σ is the distance of the two modes. What distinguishes two
episodes with tips, say 100 points from 83, then hardly shows: both are far above the mean and are
reinforced, as if they were equally good. Here the episodes of a group that were shown tips are
compared with each other, too:

    A_i = A_i(group) + ω · A_i(those with tips)     ω = `mode_weight`; second term: only with tips

The first term carries what tips bring over to the policy without them. The second one tells apart
what is better and what is worse with tips. docs/mixed_groups.md has the measurement.

 1. An episode had tips if any of its turns was shown some. With `mode_level="turn"` those are
    nearly all of a group, and the two terms are nearly the same.
 2. Episodes without tips have no second term. Among themselves they are GRPO's group, and may be
    caught as GRPO is. (Tried: docs/mixed_groups.md.)
"""

from dataclasses import dataclass

import settings
from empo2 import Algorithm, group_advantages
from settings import setting


@dataclass
class Settings(settings.Settings):
    """EMPO²'s, and the weight of the second term."""

    mode_weight: float = setting(1.0, "omega: weight of the advantage among those with tips")


class ModeCredit(Algorithm):
    """Overrides the advantages."""

    Settings = Settings

    def advantages(self, episodes):
        """A(group), and for episodes with tips ω · A(those with tips); the same for all turns."""
        s = self.s
        advantages = super().advantages(episodes)
        with_tips = [i for i, episode in enumerate(episodes) if had_tips(episode)]  # [2]
        returns = [self.episode_return(episodes[i]) for i in with_tips]
        groups = [episodes[i].job.group for i in with_tips]
        among_them = group_advantages(returns, groups, s.advantage_eps, s.fixed_std).tolist()
        for i, advantage in zip(with_tips, among_them, strict=True):
            advantages[i] = [a + s.mode_weight * advantage for a in advantages[i]]
        return advantages


def had_tips(episode):
    """Was any turn shown tips? [1]"""
    return any(turn.shown_ids for turn in episode.turns)
