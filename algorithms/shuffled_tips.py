"""EMPO² on the stages of a plant's life with a memory whose tips tell nothing: its content counts.

Every tip keeps its form, its score and its place in the order, but the stages that it names are
exchanged for words drawn from the list, the same for the same tip.

  python train.py --config configs/stages.yaml --algorithm shuffled_tips
"""

import dataclasses
import random

from empo2 import Algorithm
from standin.make_stages import FACT, STAGES


class ShuffledTips(Algorithm):
    """Overrides what enters the memory; the transcripts keep what was written."""

    def admitted(self, episodes):
        """The same episodes, with what their tips might as well have said."""
        return [dataclasses.replace(episode, tip=shuffled(episode.tip)) for episode in episodes]


def shuffled(tip):
    """The tip with other stages, the same ones for the same tip.

    >>> shuffled("Score 33: first seed, second unknown.")
    'Score 33: first tadpole, second unknown.'
    """
    draw = random.Random(tip)
    return FACT.sub(lambda fact: f"{fact[1]} {draw.choice(STAGES)}", tip)
