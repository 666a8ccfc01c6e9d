"""Packed rows against the pairs they are made of.     pytest tests/test_packing.py"""

import random
from types import SimpleNamespace

import pytest
import torch

from empo2 import Pair, collate
from engine.cache import DialogueCache
from engine.packing import PASS, Row, groups, micro_batches, pack, shared_length, visibility


def random_pairs(rng):
    """Dialogues that grow, branch, repeat and end anywhere: few ids, so that they share much."""
    pairs = []
    for _ in range(rng.randint(1, 8)):
        prompt = [1]
        if pairs and rng.random() < 0.8:
            earlier = rng.choice(pairs)
            whole = earlier.prompt + earlier.action
            prompt = whole[: rng.randint(1, len(whole))]  # now and then its very prompt
        prompt = prompt + rng.choices([1, 2, 3], k=rng.randint(0, 4))
        pairs.append(Pair(prompt, rng.choices([1, 2, 3], k=rng.randint(1, 3))))
    return pairs


@pytest.mark.parametrize("seed", range(100))
def test_every_action_token_sees_its_own_pair_and_nothing_else(seed):
    pairs = random_pairs(random.Random(seed))
    row = pack(pairs)
    visible = visibility(torch.tensor([row.ends]))[0]
    trained = set()
    for start, pair in row.spans:
        # The token before an action predicts its first one; the others predict the next.
        for k in range(len(pair.action) + 1):
            token = start - 1 + k
            seen = visible[token].nonzero()[:, 0].tolist()
            assert seen[-1] == token
            assert [row.ids[i] for i in seen] == pair.prompt + pair.action[:k]
            assert [row.positions[i] for i in seen] == list(range(len(seen)))
        trained.update(range(start, start + len(pair.action)))
    assert sorted(id(pair) for _, pair in row.spans) == sorted(map(id, pairs))
    assert len(trained) == sum(len(pair.action) for pair in pairs)  # each has tokens of its own


def test_what_is_shared_is_there_once():
    assert [shared_length(a, b) for a, b in (([1, 2], [1]), ([1], [1, 2]), ([2], [1]))] == [1, 1, 0]
    turns = [Pair([1, 2], [7, 9]), Pair([1, 2, 7, 9, 3], [8, 9])]
    row = pack(turns)
    assert row.ids == [1, 2, 7, 9, 3, 8, 9] and row.is_sequence()
    assert row.spans == [(2, turns[0]), (5, turns[1])]
    with_tips = Pair([1, 2, 7, 9, 3, 4], [8, 9])
    row = pack([with_tips, *turns])  # in any order
    assert row.ids == [1, 2, 7, 9, 3, 4, 8, 9, 3, 8, 9] and not row.is_sequence()
    assert row.ends == [11, 11, 11, 11, 8, 8, 8, 8, 11, 11, 11]
    twice = pack([turns[0], turns[0]])  # the same action, learnt twice
    assert (twice.ids, twice.positions) == ([1, 2, 7, 9, 2, 7, 9], [0, 1, 2, 3, 1, 2, 3])


def flat(length, is_sequence=True):
    ends = [length] * length
    if not is_sequence:
        ends[0] = 1
    return Row(list(range(length)), list(range(length)), ends)


def test_micro_batches_keep_to_the_budget():
    rows = [flat(n) for n in (5, 1, 9, 4, 2)] + [flat(3, is_sequence=False)]

    def lengths(most_tokens):
        return [[len(row.ids) for row in batch] for batch in micro_batches(rows, most_tokens)]

    assert lengths(None) == [[1, 2, 4, 5, 9], [3]]  # rows that branch come last
    assert lengths(8) == [[1, 2], [4], [5], [9], [3]]  # 4 + 4 is 8, but three would be 12
    assert lengths(10) == [[1, 2], [4, 5], [9], [3]]
    assert lengths(45) == [[1, 2, 4, 5, 9], [3]]
    assert list(micro_batches([], 8)) == []


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_the_cheapest_of_all(seed):
    """Against every way to cut eight sorted lengths: padded tokens, and PASS for each group."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 900) for _ in range(8)]
    most = rng.choice([None, 1000, 2500])
    ordered = sorted(lengths)
    costs = []
    for cuts in range(2**7):  # bit i: a group ends after the i-th
        ends = [i + 1 for i in range(7) if cuts >> i & 1] + [8]
        ways = [ordered[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if all(len(way) == 1 or most is None or len(way) * way[-1] <= most for way in ways):
            costs.append(sum(len(way) * way[-1] + PASS for way in ways))
    found = [[lengths[i] for i in group] for group in groups(lengths, most)]
    assert sum(found, []) == ordered
    assert sum(len(group) * group[-1] + PASS for group in found) == min(costs)


class NoModel:
    """Computes nothing."""

    device = "cpu"

    def __call__(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 1))


def test_prompts_of_like_lengths_are_computed_together():
    cache = DialogueCache()
    lengths = (10, 900, 11, 910, 905)
    cache.extend(NoModel(), [[n] * n for n in lengths], range(5))
    assert (cache.tokens_needed, cache.tokens_computed) == (sum(lengths), 2 * 11 + 3 * 910)


def test_the_literal_tensors_of_a_batch():
    branching = pack(
        [
            Pair([1, 2], [7, 8], [-1.0, -2.0], advantages=[0.5, 0.25]),
            Pair([1, 2], [9], advantages=[-1.0]),
        ]
    )
    batch = collate([branching, pack([Pair([3], [4], [-3.0], advantages=[2.0])])])
    assert batch.ids.tolist() == [[1, 2, 7, 8, 2, 9], [3, 4, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert batch.old_logps.tolist() == [[0, 0, -1, -2, 0, 0], [0, -3, 0, 0, 0, 0]]
    assert batch.advantages.tolist() == [[0, 0, 0.5, 0.25, 0, -1], [0, 2, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 1, 2], [0, 1, 0, 0, 0, 0]]
    own = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    own += [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert batch.visible[0].int().tolist() == own
    assert batch.visible.diagonal(dim1=1, dim2=2).all()  # padding, too, sees itself: no NaN
    plain = collate([pack([Pair([3], [4])]), flat(3)])
    assert plain.positions is None and plain.visible is None
