"""Dialogues of random ids, as long as real ones: what the benchmarks of the GPU work on.

`lengths.json` has the tokens of observation and action at each turn of 12 dialogues that the
stand-in held with ScienceWorld (power-component, 30 turns), counted with Qwen2.5's vocabulary.
"""

import json
from pathlib import Path

from empo2 import Algorithm
from rollout import Episode, Job, Turn, past

LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text())
SYSTEM = 235  # tokens of ScienceWorld's system message
TIPS = 400  # of ten tips of 40
MESSAGE = 10  # control tokens, role and header of a turn


def total(lengths):
    """Tokens of a dialogue."""
    return SYSTEM + sum(observation + action + MESSAGE for observation, action in lengths)


TYPICAL = sum(map(total, LENGTHS)) // len(LENGTHS)  # tokens of a dialogue


def make_episode(policy, rng, number=0, context=None):
    """An episode with the lengths of a recorded dialogue; its actions are random, too.

    Tips are shown at every fourth turn, and two thirds of those are learnt off-policy (the default
    p and q). context: turns are left out, or observations lengthened, until it has so many tokens.
    """
    lengths = LENGTHS[number % len(LENGTHS)]
    longer = 0
    if context:
        while total(lengths) > context:
            lengths = lengths[:-1]
        longer = (context - total(lengths)) // len(lengths)
    system = message(policy, rng, "system", SYSTEM)
    episode = Episode(Job("", 0, number, 0), rng, number, "", system, policy.header)
    for t, (observation, action) in enumerate(lengths):
        ids = message(policy, rng, "user", observation + longer)
        turn = Turn("", ids, action_ids=[*some_ids(rng, action), policy.end_id])
        turn.past_ids = past(policy, turn)
        turn.logps = [-1.0] * len(turn.action_ids)
        turn.advantage = 1.0 - 2.0 * (number % 2)
        if (t + number) % 4 == 3:
            turn.shown_ids = message(policy, rng, "user", TIPS)
            turn.offpolicy = (t // 4 + number) % 3 > 0
        episode.turns.append(turn)
    return episode


def learnt_pairs(episode, s):
    """Its training pairs; their old log-probs are the sampler's, whatever the prompt."""
    pairs = list(Algorithm(s).training_pairs(episode))
    for turn, pair in zip(episode.turns, pairs, strict=True):
        pair.old_logps = turn.logps
        pair.advantages = [turn.advantage] * len(pair.action)
    return pairs


def message(policy, rng, role, n):
    """A message of n random ids."""
    empty = policy.message(role, "")
    return empty[:-2] + some_ids(rng, n) + empty[-2:]


def some_ids(rng, n):
    """Random ids that are no control tokens, of any vocabulary."""
    return rng.integers(100, 300, n).tolist()
