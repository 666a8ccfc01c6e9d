"""EMPO² on the stages of a plant's life with a memory whose tips tell nothing: its content counts.

Every tip keeps its form, its score and its place in the order, but the stages that it names are
exchanged for words drawn from the list, the same for the same tip.

  python -m experiments.shuffled_tips RUN_DIR --seed 0    the run of `sweep stages`; more settings
                                                          of train.py may follow
"""

import random
import shlex
import sys

import memory
import train
from experiments.sweep import EXPERIMENTS
from standin.make_stages import FACT, STAGES, TASK


class ShuffledTips(memory.TipMemory):
    """Stores what the tips might as well have said."""

    def add(self, key, text, score, slot):
        draw = random.Random(text)
        said = FACT.sub(lambda fact: f"{fact[1]} {draw.choice(STAGES)}", text)
        super().add(key, said, score, slot)


if __name__ == "__main__":
    memory.TipMemory = ShuffledTips
    _, _, settings = EXPERIMENTS["stages"].partition("--\n")
    run_dir, *more = sys.argv[1:]
    train.main([*shlex.split(settings), "--tasks", TASK, "--run-dir", run_dir, *more])
