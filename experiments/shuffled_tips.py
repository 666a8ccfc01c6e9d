"""EMPO² on the stages of a plant's life with a memory whose tips tell nothing: its content counts.

Every tip keeps its form, its score and its place in the order, but the stages that it names are
exchanged for words drawn from the list, the same for the same tip. The rest is as in the experiment
"stages" of sweep.py.

  python -m experiments.shuffled_tips runs/shuffled-0 --seed 0
"""

import argparse
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


def main():
    """One run."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="folder of the run")
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    memory.TipMemory = ShuffledTips
    _, _, settings = EXPERIMENTS["stages"].partition("--\n")
    own = ["--tasks", TASK, "--run-dir", args.run_dir, "--seed", args.seed]
    return train.main([*shlex.split(settings), *own])


if __name__ == "__main__":
    sys.exit(main())
