"""Pack training pairs that share prompts into rows.

Infrastructure: skip it on a first reading.

A row is a tree of tokens in depth-first order: what the prompts of its pairs share is there once.
The descendants of token i stand at i + 1 ... ends[i] - 1, so token k is seen by token q exactly if
k <= q < ends[k], and each (prompt, action) pair is scored as if it stood alone.
"""

from dataclasses import dataclass, field

import torch

PASS = 400  # cost of a forward pass, in tokens: a guess that affects time only


@dataclass
class Row:
    """Tokens of some training pairs. All lists are [L]."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # in the pair's own sequence
    ends: list[int] = field(default_factory=list)  # where the descendants of a token end
    spans: list[tuple] = field(
        default_factory=list
    )  # (start, pair): ids[start:] begin with its action

    def is_sequence(self):
        """Does every token see all before it? Then attention needs no mask."""
        return all(end == len(self.ids) for end in self.ends)


def shared_length(a, b):
    """Length of the common prefix of two lists.

    >>> shared_length([1, 2, 3, 9], [1, 2, 3, 4, 5])
    3
    """
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


def pack(pairs):
    """One row of all the pairs, which have a `prompt` and an `action`: lists of ids.

    Two actions after the prompt 1 2, and one after 1 3:

    >>> from empo2 import Pair
    >>> row = pack([Pair([1, 2], [7, 8]), Pair([1, 2], [9]), Pair([1, 3], [9])])
    >>> row.ids, row.positions, row.ends
    ([1, 2, 7, 8, 2, 9, 3, 9], [0, 1, 2, 3, 1, 2, 1, 2], [8, 4, 4, 4, 6, 6, 8, 8])
    """
    row = Row()
    path = []  # index in the row of each token of the sequence that was packed last
    previous = []  # that sequence
    # In sorted order a sequence shares the most with the one before it.
    for pair in sorted(pairs, key=lambda pair: pair.prompt + pair.action):
        sequence = pair.prompt + pair.action
        # An action's tokens are its own, and so is the token before them, which predicts the first.
        kept = min(shared_length(previous, sequence), len(pair.prompt) - 1)
        for index in path[kept:]:
            row.ends[index] = len(row.ids)
        start = len(row.ids)
        new = sequence[kept:]
        row.ids += new
        row.positions += range(kept, len(sequence))
        row.ends += [0] * len(new)
        row.spans.append((len(row.ids) - len(pair.action), pair))
        path = path[:kept] + list(range(start, len(row.ids)))
        previous = sequence
    for index in path:
        row.ends[index] = len(row.ids)
    return row


def pack_rows(episodes, indexes, s, chosen):
    """Rows of some episodes' pairs. chosen: a turn's pair -> the pairs to be packed, a list."""
    packs = {}  # what goes into a row
    for index in indexes:
        for t, turn in enumerate(episodes[index].turns):
            key = index
            if s.pack == "group":
                key = episodes[index].job.group
            elif s.history:  # these prompts share little, and a row of one needs no mask
                key = (index, t)
            packs.setdefault(key, []).extend(chosen(turn.pair))
    return [pack(pairs) for pairs in packs.values() if pairs]


def visibility(ends):
    """Who sees whom: bool [B, L, L] (query, key) from ends [B, L].

    >>> visibility(torch.tensor([[5, 3, 3, 5, 5]])).int()[0]
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    query, key = index[None, :, None], index[None, None, :]
    return (key <= query) & (query < ends[:, None, :])


def groups(lengths, most_tokens=None):
    """What to compute together, padded to the longest -> lists of indexes, shorter ones first.

    Padding costs time, and so does each forward pass: as much as `PASS` tokens. Of all ways to cut
    the sorted lengths the cheapest is taken. A group has at most `most_tokens` padded tokens;
    longer ones stand alone; None = no limit.

    >>> groups([500, 10, 9, 510, 11])
    [[2, 1, 4], [0, 3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = [(0, 0)]  # for the first 0, 1, 2...: the least cost, and where the last group begins
    for end, index in enumerate(order, 1):
        ways = []
        for start in range(end):
            tokens = (end - start) * lengths[index]
            if start == end - 1 or most_tokens is None or tokens <= most_tokens:
                ways.append((best[start][0] + tokens + PASS, start))
        best.append(min(ways))
    cut = []
    end = len(order)
    while end:
        start = best[end][1]
        cut.append(order[start:end])
        end = start
    return cut[::-1]


def micro_batches(rows, most_tokens):
    """Rows of similar length together, at most `most_tokens` padded tokens each.

    A longer row stands alone; None = no limit. Those that need no mask of attention come first.
    """
    for is_sequence in (True, False):
        alike = [row for row in rows if row.is_sequence() == is_sequence]
        for group in groups([len(row.ids) for row in alike], most_tokens):
            yield [alike[i] for i in group]
