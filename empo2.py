"""EMPO²: Exploratory Memory-Augmented On- and Off-Policy Optimization (arXiv 2602.23008).

The method is two calls: `rollout` explores (§4.1, rollout.py), `update` learns (§2 and §4.2, here):
advantages, update modes, training pairs, the hybrid loss. train.py has the loop.

Where the paper is silent, contradicts itself, or its authors' code does something else, this is
what we do; a comment `# (n)` marks each place in the code. "Paper" is the text of the sections,
"Alg. 1" its appendix, whose p and q are the *complements* of the text's. Named settings select the
other reading.

 1. The rollout mode is drawn at each turn (§4.2). `mode_level`: once per `episode`, or once per
    `batch` (Alg. 1, authors). The update mode of memory turns is drawn at the same level.
 2. An off-policy ratio divides by π_old(a | s, u), without tips (§4.2, Alg. 1), evaluated before
    the update. `denominator="tips"` divides by the sampled π_old(a | s, u, tips) (Table 3,
    authors); the ratio then starts near 0 on exactly those tokens that the tip decided.
 3. The low-probability mask is per token, under π_θ, in every mode (authors: off by default; drops
    whole turns, by their old log-probs). Eq. 2 masks the policy term; the KL term is not masked.
    The k3 estimate of KL is one on tokens that π_θ could have drawn, hence not on off-policy ones,
    where a single token can outweigh the rest; β is 0 by default.
 4. The intrinsic reward is 1/n over a store of distinct states, in every rollout, and part of the
    return (authors: 1/(retrieved tips + 1), in memory rollouts only, and it never reaches the
    advantage). States are compared by observation alone, without the task text, within their
    memory slot. What counts as met before is what was met before this iteration, and earlier in
    the same episode, so equal episodes of a group get equal rewards.
 5. Retrieved tips: similarity >= 0.5, then the 10 best by score (authors). `tip_rank=similarity`
    takes the most similar ones (paper). Of equals the one that served better goes first: the mean
    score of the episodes that wrote it or were shown it. Else a false tip, once written after a
    good episode, would lead the rest for ever. Then the newer one.
 6. Memory key and query: task text and current observation; a tip is stored under the last state
    of its episode. `memory_key="task"`: task text alone. (Authors: the prompt's beginning, cut by
    a 256-token encoder.) With the task text in the key nearly all states of a task are similar
    enough, so in effect the ten best tips of the slot are shown.
 7. One memory per task variation, 1,000 tips each, oldest dropped, exact duplicates ignored
    (authors). `memory_scope`: one per `task`, or one for `all` (the paper's single buffer M).
 8. One tip per episode, with its final score (paper; authors: one per action, all the same text).
 9. Tips belong to the turn they were retrieved for and are not in the history of later turns
    (authors: every past tip stays). A tip-free prompt is *built* without tips, never stripped.
10. An action is sent as written. `action_correction`: the valid action that shares the most words
    (authors).
11. No solved examples in the prompt. `shots=2` shows solved development variations (paper: two).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from engine import processes
from engine.packing import collate, micro_batches, pack
from rollout import no_progress


# --- Advantages (§2) and update modes (§4.2) ------------------------------------------------------
def intrinsic_return(episode, coef):
    """R = Σ_t (r_t + c · r_int,t), §4.1."""
    return sum(turn.reward + coef * turn.novelty for turn in episode.turns)


def group_advantages(returns, group_ids, eps=1e-6, fixed_std=0.0):
    """A = (R - mean R) / (std R + eps) over the episodes of one task (§2), std with 1/n.

    returns [N], group_ids [N] -> advantages [N], float32. A group whose returns are all equal (up
    to rounding), and a group of one, gets exactly zero. fixed_std, if not 0, is divided by instead.

    >>> group_advantages(torch.tensor([1., 3., 7., 7.]), torch.tensor([0, 0, 1, 1]), eps=0.)
    tensor([-1.,  1.,  0.,  0.])
    """
    returns = torch.as_tensor(returns, dtype=torch.float64)
    group_ids = torch.as_tensor(group_ids)
    advantages = torch.zeros_like(returns)
    for group in group_ids.unique():
        member = group_ids == group
        r = returns[member]
        # Sums of fractions leave a residue; divided by a tiny std it would become a full advantage.
        if r.max() - r.min() > 1e-6 * max(1.0, r.abs().max()):
            std = fixed_std if fixed_std else r.std(correction=0) + eps
            advantages[member] = (r - r.mean()) / std
    return advantages.float()


def grpo_advantages(episodes, s):
    """The default advantage estimator: one advantage for all turns of an episode (§2).

    **Put your own beside it** and hand it to `update`: (episodes, settings) -> a list per episode
    with an advantage per turn.
    """
    returns = [intrinsic_return(episode, s.intrinsic_coef) for episode in episodes]
    groups = [episode.job.group for episode in episodes]
    advantages = group_advantages(returns, groups, s.advantage_eps, s.fixed_std).tolist()
    return [[a] * len(episode.turns) for a, episode in zip(advantages, episodes, strict=True)]


def draw_update_modes(episodes, s, rng):
    """Memory turns are updated off-policy, without their tips, with probability q (§4.2; 1)."""
    batch_mode = rng.random() < s.offpolicy_prob
    for episode in episodes:
        mode = batch_mode
        if s.mode_level == "episode":
            mode = episode.rng.random() < s.offpolicy_prob
        for turn in episode.turns:
            if turn.tip_ids:
                if s.mode_level == "turn":
                    mode = episode.rng.random() < s.offpolicy_prob
                turn.offpolicy = mode


# --- Training pairs: the seam for a new algorithm -------------------------------------------------
@dataclass
class Pair:
    """What learning sees of a turn."""

    prompt: list[int]  # what the numerator π_θ(a | prompt) is conditioned on
    action: list[int]
    advantage: float
    old_logps: list[float] | None = None  # of the action; None = to be recomputed under `prompt`
    sampled_logps: list[float] | None = None  # if it was sampled with `prompt`: for `sampler_gap`


def training_pairs(episode, s) -> Iterator[Pair]:
    """What is learnt from an episode: a prompt, an action, old log-probs and an advantage per turn.

    | turn               | numerator           | denominator (behaviour)                          |
    | without memory     | π_θ(a | s, u)       | π_old(a | s, u)                                  |
    | memory, on-policy  | π_θ(a | s, u, tips) | π_old(a | s, u, tips)                            |
    | memory, off-policy | π_θ(a | s, u)       | π_old(a | s, u), or sampled with tips (2)        |
    """
    for t, turn in enumerate(episode.turns):
        pair = Pair(episode.prompt(t, not turn.offpolicy), turn.action_ids, turn.advantage)
        if not turn.offpolicy:
            pair.sampled_logps = turn.logps
        elif s.denominator == "tips":  # (2)
            pair.old_logps = turn.logps
        yield pair


# --- Loss (Eq. 2) ---------------------------------------------------------------------------------
def hybrid_loss(logp, old_logp, advantages, mask, s, ref_logp=None, num_tokens=None):
    """Minus Eq. 2, with dual clip and the k3 estimate of KL(π_θ || π_ref).

    logp, old_logp, advantages, ref_logp: [B, L] float; mask: [B, L] bool, True on action tokens;
    values outside the mask are ignored. s: settings (clip_low, clip_high, clip_c, min_prob, beta).
    num_tokens: action tokens of the whole optimiser step (default: of this call), so that the
    split into micro-batches cannot change the gradient.
    Returns (loss, metrics); the metrics are sums over the action tokens.

    >>> from settings import Settings
    >>> one = torch.ones(1, 1)  # π_θ / π_old = 2, clipped at 1.3
    >>> loss, _ = hybrid_loss((.8 * one).log(), (.4 * one).log(), one, one.bool(), Settings())
    >>> round(loss.item(), 6)
    -1.3
    """
    if num_tokens is None:
        num_tokens = int(mask.sum())
    keep = mask & (logp.detach().exp() >= s.min_prob)  # (3): a constant, no gradient through it
    logratio = torch.where(keep, logp - old_logp, 0.0)  # before exp: a masked one may not overflow
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    bounded = torch.maximum(surrogate, s.clip_c * advantages)
    surrogate = torch.where(advantages < 0, bounded, surrogate)
    objective = torch.where(keep, surrogate, 0.0).sum()
    with torch.no_grad():
        logratio = torch.where(mask, logp - old_logp, 0.0)
        ratio = logratio.exp()
        above = (ratio > 1 + s.clip_high) & (advantages > 0)
        below = (ratio < 1 - s.clip_low) & (advantages < 0)
        metrics = {
            "ratio": torch.where(mask, ratio, 0.0).sum().item(),
            "approx_kl": (ratio - 1 - logratio).sum().item(),
            "clipfrac": ((above | below) & keep).sum().item(),
            "masked_fraction": (mask & ~keep).sum().item(),
        }
    if ref_logp is not None:
        log_ref_ratio = torch.where(mask, ref_logp - logp, 0.0)
        kl = (log_ref_ratio.exp() - 1 - log_ref_ratio).sum()  # k3 (Schulman), gradient included
        objective = objective - s.beta * kl
        metrics["kl_ref"] = kl.item()
    loss = -objective / num_tokens
    metrics["loss"] = loss.item() * num_tokens
    return loss, metrics


# --- Update (Alg. 1, lines of the policy update) --------------------------------------------------
class NotFinite(FloatingPointError):
    """A gradient that is not finite. `pairs` are those of its optimiser step."""

    def __init__(self, pairs):
        super().__init__(
            "the gradient is not finite; start another run with a lower --learning-rate or with "
            "the low-probability mask (--min-prob 0.0067)"
        )
        self.pairs = pairs


def update(
    policy,
    optimizer,
    episodes,
    s,
    rng,
    progress=no_progress,
    advantage_estimator=grpo_advantages,
):
    """One pass over the episodes, `minibatch_episodes` per optimiser step.

    Returns metrics; those of the loss are means over the action tokens that were learnt from.
    Raises NotFinite before that step's weights are touched.
    """
    policy.forget()  # the rollout's keys and values: the weights are about to change
    draw_update_modes(episodes, s, rng)
    estimated = advantage_estimator(episodes, s)
    for episode, advantages in zip(episodes, estimated, strict=True):
        for turn, advantage in zip(episode.turns, advantages, strict=True):
            turn.advantage = advantage
    steps = optimiser_steps(episodes, s, rng)
    progress("update", "old log-probs")
    gaps = recompute_old_logps(policy, [row for rows, _ in steps for row in rows], s)
    parts = []
    norms = []
    for number, (rows, num_tokens) in enumerate(steps, 1):
        progress("update", f"step {number} of {len(steps)}")
        optimizer.zero_grad()
        for batch in micro_batches(rows, s.micro_tokens):
            parts.append(accumulate_gradient(policy, batch, s, num_tokens))
        processes.add_gradients(policy.trainable())
        try:
            norm = torch.nn.utils.clip_grad_norm_(
                policy.trainable(), s.max_grad_norm, error_if_nonfinite=True
            )
        except RuntimeError as error:
            pairs = [pair for row in rows for _, pair in row.spans]
            raise NotFinite(processes.gather(pairs)) from error
        optimizer.step()
        norms.append(norm.item())
    sums = Counter()
    for part in processes.gather(parts):
        sums.update(part)
    metrics = {name: total / sums["tokens"] for name, total in sorted(sums.items())}
    metrics.pop("tokens", None)
    returns = [intrinsic_return(episode, s.intrinsic_coef) for episode in episodes]
    groups = {episode.job.group for episode in episodes}
    moved = {e.job.group for e in episodes if any(turn.advantage for turn in e.turns)}
    return metrics | {
        "grad_norm": float(np.mean(norms)) if norms else 0.0,
        "optimizer_steps": len(norms),
        "sampler_gap": max(gaps, default=None),
        "sampler_gap_mean": float(np.mean(gaps)) if gaps else None,
        "return": float(np.mean(returns)),
        "zero_variance_groups": 1 - len(moved) / len(groups),
    }


def optimiser_steps(episodes, s, rng):
    """[(rows, num_tokens)] of each step, in random order of the episodes.

    num_tokens counts all action tokens of the step. A zero advantage has no gradient, so without a
    KL term its forward pass is spared.
    """
    order = rng.permutation(len(episodes))
    steps = []
    for first in range(0, len(episodes), s.minibatch_episodes):
        packs = {}  # what goes into a row
        num_tokens = 0
        for index in order[first : first + s.minibatch_episodes]:
            for t, pair in enumerate(training_pairs(episodes[index], s)):
                num_tokens += len(pair.action)
                key = index
                if s.pack == "group":
                    key = episodes[index].job.group
                elif s.history:  # these prompts share little, and a row of one needs no mask
                    key = (index, t)
                if pair.advantage or s.beta:
                    packs.setdefault(key, []).append(pair)
        if packs:
            rows = [pack(pairs) for pairs in packs.values()]
            steps.append((processes.share(rows), num_tokens))
    return steps


def recompute_old_logps(policy, rows, s):
    """π_old under each pair's own prompt, in the trainer's arithmetic, before the first step (2).

    Returns the differences to the sampler's log-probs of the same prompts.
    """
    gaps = []
    with torch.no_grad():
        for batch in micro_batches(rows, s.micro_tokens):
            logp, _ = score_tokens(policy, collate(batch, policy.device), s)
            for row, values in zip(batch, logp.tolist(), strict=True):
                for start, pair in row.spans:
                    own = values[start : start + len(pair.action)]
                    if pair.sampled_logps:
                        gaps += np.abs(np.subtract(own, pair.sampled_logps)).tolist()
                    if pair.old_logps is None:
                        pair.old_logps = own
    return processes.gather(gaps)


def score_tokens(policy, batch, s, reference=False):
    """Log-probs and entropies [B, L] of the action tokens of a batch (0 elsewhere)."""
    return policy.logprobs(
        batch.ids, batch.mask, s.temperature, batch.positions, batch.visible, reference
    )


def accumulate_gradient(policy, rows, s, num_tokens):
    """Add the gradient of a micro-batch to the adapter's. Returns sums over its action tokens."""
    batch = collate(rows, policy.device)
    logp, entropy = score_tokens(policy, batch, s)
    ref_logp = None
    if s.beta:
        with torch.no_grad():
            ref_logp, _ = score_tokens(policy, batch, s, reference=True)
    loss, sums = hybrid_loss(
        logp, batch.old_logps, batch.advantages, batch.mask, s, ref_logp, num_tokens
    )
    loss.backward()
    return sums | {"entropy": entropy.sum().item(), "tokens": int(batch.mask.sum())}
