"""Credit within the rollout mode, beside GRPO's within the group.

EMPO² compares all episodes of a group with each other, those with tips and those without:

    A_i = (R_i - mean R) / σ            over the group

Tips can raise the return so much that σ is the distance of the two modes. What distinguishes two
episodes with tips, say 100 points from 83, then hardly shows: both are far above the mean and are
reinforced, as if they were equally good. Here the episodes of a group that share a mode are
compared with each other, too:

    A_i = A_i(group) + ω · A_i(mode)    ω = `mode_weight`

The first term carries what tips bring over to the policy without them. The second one keeps
apart what is better and what is worse within a mode. docs/mixed_groups.md has the measurement.

 1. The mode of an episode: was any of its turns shown tips? With `mode_level="turn"` nearly all
    episodes of a group have some, and the two terms are nearly the same.
"""

from dataclasses import dataclass

import settings
from empo2 import Algorithm, group_advantages
from settings import setting


@dataclass
class Settings(settings.Settings):
    """EMPO²'s, and the weight of the second term."""

    mode_weight: float = setting(1.0, "omega: weight of the advantage within the mode")


class ModeCredit(Algorithm):
    """Overrides the advantages."""

    Settings = Settings

    def advantages(self, episodes):
        """A(group) + ω · A(mode), the same for all turns of an episode."""
        s = self.s
        returns = [self.episode_return(episode) for episode in episodes]
        numbers = {}
        modes = [numbers.setdefault(mode(episode), len(numbers)) for episode in episodes]
        of_modes = group_advantages(returns, modes, s.advantage_eps, s.fixed_std).tolist()
        return [
            [a + s.mode_weight * of_mode for a in of_turns]
            for of_turns, of_mode in zip(super().advantages(episodes), of_modes, strict=True)
        ]


def mode(episode):
    """What an episode is compared with: its group, and whether it was shown tips. [1]"""
    return episode.job.group, any(turn.shown_ids for turn in episode.turns)
