"""Evaluate π_old where the update needs it. [2] of empo2.py

`score`: rows -> [(pair, log-probs of its action)] under the current weights.
"""

from engine import processes
from engine.packing import pack_rows


def by_pair(rows, logp):
    """[(pair, log-probs of its action)] of a micro-batch, from logp [B, L]."""
    scored = []
    for row, values in zip(rows, logp.tolist(), strict=True):
        for start, pair in row.spans:
            scored.append((pair, values[start : start + len(pair.action)]))
    return scored


def score_pairs(episodes, s, score):
    """Give each pair its old log-probs, under its own prompt; so, too, its `second`."""

    def missing(pair):
        return [p for p in (pair, pair.second) if p and p.old_logps is None]

    pairs = [pair for e in episodes for turn in e.turns for pair in missing(turn.pair)]
    numbers = {id(pair): number for number, pair in enumerate(pairs)}
    rows = processes.share(pack_rows(episodes, range(len(episodes)), s, missing))
    scored = [(numbers[id(pair)], logps) for pair, logps in score(rows)]
    for number, logps in processes.gather(scored):
        pairs[number].old_logps = logps


def score_later_steps(steps, score):
    """The same for what all steps but the first learn from; in that one π_θ still is π_old."""
    rows = [row for rows, _ in steps[1:] for row in rows]
    rows = [row for row in rows if any(pair.old_logps is None for _, pair in row.spans)]
    for pair, logps in score(rows):
        pair.old_logps = pair.old_logps or logps
