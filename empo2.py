"""EMPO²: Exploratory Memory-Augmented On- and Off-Policy Optimization (arXiv 2602.23008).

`rollout` explores (§4.1, rollout.py), `update` learns (§2 and §4.2, here); train.py has the loop.
`Algorithm` holds the decisions of both: subclass it to try another one.

Where the paper is silent, contradicts itself, or its authors' code does something else, this is
what we do; a comment `# [n]` marks each place in the code. "Paper" is the main text, "Alg. 1"
is in its appendix: the p and q there are 1 - p and 1 - q of the text (`memory_prob`,
`offpolicy_prob`). A setting in backquotes switches to the other reading.

 1. The rollout mode is drawn at each turn (§4.2). `mode_level`: once per `episode`, or once per
    `batch` (Alg. 1, authors). The update mode of memory turns is drawn at the same level.
 2. An off-policy ratio divides by π_old(a | s, u), without tips (§4.2, Alg. 1), evaluated before
    the update. `denominator="tips"` divides by the sampled π_old(a | s, u, tips) (Table 3,
    authors); the ratio then starts near 0 on the tokens that are likely only with the tip.
 3. The low-probability mask is per token, under π_θ, in every mode (authors: off by default; drops
    whole turns, by their old log-probs). Eq. 2 masks the policy term; the KL term is not masked.
    k3 estimates KL only from tokens sampled from π_θ; on off-policy tokens it is biased, and one
    token can outweigh the rest. β is 0 by default.
 4. The intrinsic reward is 1/n over a store of distinct states, in every rollout, and part of the
    return (authors: 1/(retrieved tips + 1), in memory rollouts only, and it never reaches the
    advantage). States are compared by observation alone, without the task text, within their
    memory slot. n counts visits in earlier iterations and earlier in the same episode, so equal
    episodes of a group get equal rewards.
 5. Retrieved tips: similarity >= 0.5, then the 10 best by score (authors). `tip_rank=similarity`
    takes the most similar ones (paper). Ties: the higher mean score of the episodes that wrote
    the tip or saw it first in the list, and one of the slot's mean; then the newer. (Else a false
    tip, written once after a good episode, would lead: for ever by age alone, once by the plain
    mean, at times if all tips that an episode saw were judged by it.)
 6. Memory key and query: task text and current observation; a tip is stored under the last state
    of its episode. `memory_key="task"`: task text alone. (Authors: the prompt's beginning, cut by
    a 256-token encoder.) With the task text in the key nearly all states of a task are similar
    enough, so in effect the ten best tips of the slot are shown.
 7. One memory per task variation, 1,000 tips each, oldest dropped (authors). An exact duplicate
    only counts for [5] (authors: is ignored). `memory_scope`: one per `task`, or one for `all` (the
    paper's single buffer M).
 8. One tip per episode, with its final score (paper; authors: one per action, all the same text).
 9. Tips belong to the turn they were retrieved for and are not in the history of later turns
    (authors: every past tip stays). A tip-free prompt is *built* without tips, never stripped.
10. An action is sent as written. ScienceWorld's option `action_correction`: the valid action that
    shares the most words (authors).
11. No solved examples in the prompt. ScienceWorld's option `shots=2` shows solved development
    variations (paper: two).
12. The ratio is per token (authors; the paper writes it per action; algorithms/gspo.py).
13. For A < 0 the surrogate is at least `clip_c` · A (dual clip; in the paper's settings, not in
    Eq. 2).
14. The normaliser is the number of action tokens of the optimiser step (Eq. 2 has 1/(NT), turns).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

import memory
from engine import processes
from engine.errors import paired
from engine.metrics import update_metrics
from engine.packing import micro_batches, pack_rows, visibility
from engine.scoring import by_pair, score_later_steps, score_pairs
from rollout import no_progress
from settings import Settings


# --- What is learnt from --------------------------------------------------------------------------
@dataclass
class Pair:
    """What learning sees of a turn."""

    prompt: list[int]  # what the numerator π_θ(a | prompt) is conditioned on
    action: list[int]
    old_logps: list[float] | None = None  # of the action; None = to be evaluated under `prompt`
    sampled_logps: list[float] | None = None  # if it was sampled with `prompt`: for `sampler_gap`
    second: "Pair | None" = None  # the action under another prompt, for `needs_logps`
    advantages: list[float] = field(default_factory=list)  # of each token, once they are known


@dataclass
class Batch:
    """A micro-batch: rows of packed pairs, padded on the right. All tensors are [B, L].

    `visible` [B, L, L] (query, key) and `positions` are None where every row is a plain sequence.
    """

    ids: torch.Tensor
    mask: torch.Tensor  # bool, True on action tokens
    action_of: torch.Tensor  # which action a token belongs to, 0, 1, ...; -1 outside the mask
    old_logps: torch.Tensor  # 0 outside the mask
    advantages: torch.Tensor  # 0 outside the mask
    positions: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    unscored: torch.Tensor | None = None  # bool, True where `old_logps` are missing, if any are
    entropy: torch.Tensor | None = None  # of π_θ at each token, in nats, with its gradient
    ref_logp: torch.Tensor | None = None  # under π_ref, if `beta` asks for it

    def action_sum(self, values):
        """For each token the sum of `values` [B, L] over its action; 0 outside the mask."""
        index = self.action_of[self.mask]
        sums = values.new_zeros(len(index)).index_add(0, index, values[self.mask])
        return torch.zeros_like(values).masked_scatter(self.mask, sums[index])

    def action_length(self):
        """For each token how many its action has, [B, L]; 1 outside the mask."""
        return self.action_sum(self.mask.float()).clamp(min=1)

    def action_mean(self, values):
        """For each token the mean of `values` [B, L] over its action; 0 outside the mask."""
        return self.action_sum(values) / self.action_length()


# --- The method -----------------------------------------------------------------------------------
class Algorithm:
    """EMPO², one method per decision of the paper. GRPO is its settings without memory.

    For another method subclass it in a file of its own, override what differs and run
    `python train.py --algorithm my_idea.py` (docs/forks.md). `s`: the settings. `iteration`: the
    current one. Other attributes of `self` are lost on resume.
    """

    Settings = Settings  # a subclass of it has the settings of its own
    preset = "empo2"  # the default preset
    needs_anchors = False  # does each turn need the name of its state, `Env.anchor`?
    needs_logps = False  # do `advantages` need the log-probs of each `turn.pair`?

    def __init__(self, s):
        self.s = s
        self.iteration = 0

    # Exploration (§4.1)
    def collect(self, draw, play):
        """The episodes of an iteration. draw(n): jobs of n further groups; play(jobs): episodes."""
        return play(draw(self.s.tasks_per_iteration))

    def memory_mode(self, rng):
        """Rollout mode: is the prompt augmented with tips? True with probability p. [1]"""
        return rng.random() < self.s.memory_prob

    def order_tips(self, slot, similarity):
        """Indexes of the tips to retrieve, best first. slot: TipSlot; similarity: [n]. [5]"""
        s = self.s
        return memory.best_first(slot, similarity, s.tip_threshold, s.max_tips, s.tip_rank)

    def shown_tips(self, retrieved):
        """Which of the retrieved tips the prompt shows to π_old."""
        return retrieved

    def admitted(self, episodes):
        """The episodes whose tips enter the memory, of all the iteration's that wrote one. [8]"""
        return episodes

    def intrinsic_reward(self, n):
        """r_int of the n-th visit to a state. [4]"""
        return 1 / n

    # Learning (§2, §4.2)
    def offpolicy_mode(self, rng):
        """Update mode of a memory turn: off-policy, without its tips, with probability q. [1]"""
        return rng.random() < self.s.offpolicy_prob

    def training_pairs(self, episode) -> Iterator[Pair]:
        """A pair for each turn.

        | turn               | numerator           | denominator                                  |
        | without memory     | π_θ(a | s, u)       | π_old(a | s, u)                              |
        | memory, on-policy  | π_θ(a | s, u, tips) | π_old(a | s, u, tips)                        |
        | memory, off-policy | π_θ(a | s, u)       | π_old(a | s, u), or sampled with tips [2]    |
        """
        for t, turn in enumerate(episode.turns):
            if not turn.offpolicy:
                prompt = episode.prompt(t, turn.shown_ids)
                yield Pair(prompt, turn.action_ids, sampled_logps=turn.logps)
            elif self.s.denominator == "tips":  # [2]
                yield Pair(episode.prompt(t), turn.action_ids, old_logps=turn.logps)
            else:
                yield Pair(episode.prompt(t), turn.action_ids)

    def episode_return(self, episode):
        """R = Σ_t (r_t + c · r_int,t), §4.1."""
        return sum(turn.reward + self.s.intrinsic_coef * turn.novelty for turn in episode.turns)

    def advantages(self, episodes):
        """For each episode a list with an advantage per turn: a number, or a list of one per token.

        GRPO: the same for all turns of an episode (§2).
        """
        returns = [self.episode_return(episode) for episode in episodes]
        groups = [episode.job.group for episode in episodes]
        advantages = group_advantages(returns, groups, self.s.advantage_eps, self.s.fixed_std)
        return [
            [a] * len(episode.turns)
            for a, episode in zip(advantages.tolist(), episodes, strict=True)
        ]

    def learns_from(self, pair):
        """Can the pair contribute to the loss? If not, its forward and backward pass are spared."""
        return any(pair.advantages) or self.s.beta > 0

    def logratio(self, batch, logp):
        """log ρ [B, L] from the log-probs `logp` [B, L] under π_θ: per token. [12]"""
        return logp - batch.old_logps

    def loss(self, batch, logp):
        """(the loss of each token [B, L], its metrics summed over the action tokens)."""
        logratio = self.logratio(batch, logp)
        return hybrid_loss(logp, logratio, batch.advantages, batch.mask, self.s, batch.ref_logp)

    def normaliser(self, pairs):
        """What the losses of an optimiser step are divided by; `pairs`: of all its turns. [14]"""
        return sum(len(pair.action) for pair in pairs)

    def metrics(self, episodes):
        """Further numbers for metrics.jsonl."""
        return {}


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


# --- Loss (Eq. 2) ---------------------------------------------------------------------------------
def hybrid_loss(logp, logratio, advantages, mask, s, ref_logp=None):
    """Minus Eq. 2 at each token, with dual clip and the k3 estimate of KL(π_θ || π_ref).

    logp, logratio (log of π_θ / π_old), advantages, ref_logp: [B, L] float; mask: [B, L] bool, True
    on action tokens; values outside the mask are ignored. s: settings (clip_low, clip_high, clip_c,
    min_prob, beta). Returns (loss [B, L], metrics); the metrics are sums over the action tokens.

    >>> one = torch.ones(1, 1)  # π_θ / π_old = 2, clipped at 1.3
    >>> loss, _ = hybrid_loss((.8 * one).log(), (2 * one).log(), one, one.bool(), Settings())
    >>> round(loss.item(), 6)
    -1.3
    """
    keep = mask & (logp.detach().exp() >= s.min_prob)  # [3] a constant, no gradient through it
    ratio = torch.where(keep, logratio, 0.0).exp()  # before exp: a masked one may not overflow
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    bounded = torch.maximum(surrogate, s.clip_c * advantages)  # [13]
    surrogate = torch.where(advantages < 0, bounded, surrogate)
    objective = torch.where(keep, surrogate, 0.0)
    with torch.no_grad():
        logratio = torch.where(mask, logratio, 0.0)
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
        kl = log_ref_ratio.exp() - 1 - log_ref_ratio  # k3 (Schulman), gradient included
        objective = objective - s.beta * kl
        metrics["kl_ref"] = kl.sum().item()
    return -objective, metrics


# --- Update (Alg. 1, lines of the policy update) --------------------------------------------------
def update(policy, optimizer, episodes, algorithm, rng, progress=no_progress):
    """One pass over the episodes, `minibatch_episodes` per optimiser step.

    Returns metrics; those of the loss are means over the action tokens that were learnt from.
    Raises FloatingPointError before that step's weights are touched if a gradient is not finite.
    """
    s = algorithm.s
    policy.forget()  # the rollout's keys and values: the weights are about to change
    draw_update_modes(episodes, algorithm, rng)
    for episode in episodes:
        pairs = algorithm.training_pairs(episode)
        for turn, pair in paired(episode.turns, pairs, "training_pairs, per turn,"):
            turn.pair = pair
    score = partial(score_rows, policy, s=s)
    progress("update", "old log-probs")
    if algorithm.needs_logps:
        score_pairs(episodes, s, score)
    give_advantages(episodes, algorithm.advantages(episodes))
    parts, norms = [], []
    steps = optimiser_steps(episodes, algorithm, rng)
    score_later_steps(steps, score)
    for number, (rows, normaliser) in enumerate(steps, 1):
        progress("update", f"step {number} of {len(steps)}")
        optimizer.zero_grad()
        for batch in micro_batches(rows, s.micro_tokens):
            parts.append(accumulate_gradient(policy, batch, algorithm, normaliser))
        processes.add_gradients(policy.trainable())
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable(), s.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(
                "the gradient is not finite; start another run with a lower --learning-rate or "
                "with the low-probability mask (--min-prob 0.0067)"
            )
        optimizer.step()
        norms.append(norm.item())
    returns = [algorithm.episode_return(episode) for episode in episodes]
    return update_metrics(parts, norms, episodes) | {"return": float(np.mean(returns))}


def draw_update_modes(episodes, algorithm, rng):
    """Draw which memory turns are updated off-policy, at the level of `mode_level`. [1]"""
    level = algorithm.s.mode_level
    batch_mode = algorithm.offpolicy_mode(rng)
    for episode in episodes:
        mode = batch_mode
        if level == "episode":
            mode = algorithm.offpolicy_mode(episode.rng)
        for turn in episode.turns:
            if turn.shown_ids:
                if level == "turn":
                    mode = algorithm.offpolicy_mode(episode.rng)
                turn.offpolicy = mode


@torch.no_grad()
def score_rows(policy, rows, s):
    """[(pair, log-probs of its action)] under π_θ."""
    scored = []
    for batch in micro_batches(rows, s.micro_tokens):
        logp, _ = score_tokens(policy, collate(batch, policy.device), s)
        scored += by_pair(batch, logp)
    return scored


def give_advantages(episodes, estimated):
    """Give each token of each turn its advantage."""
    for episode, of_turns in paired(episodes, estimated, "advantages, per episode,"):
        for turn, advantage in paired(episode.turns, of_turns, "advantages, per turn,"):
            length = len(turn.pair.action)
            turn.pair.advantages = np.broadcast_to(advantage, length).tolist()
            turn.advantage = float(np.mean(turn.pair.advantages))


def optimiser_steps(episodes, algorithm, rng):
    """[(this process's rows, normaliser)] of each step, in random order of the episodes."""
    s = algorithm.s
    order = rng.permutation(len(episodes))
    steps = []
    for first in range(0, len(episodes), s.minibatch_episodes):
        indexes = order[first : first + s.minibatch_episodes]
        rows = pack_rows(
            episodes, indexes, s, lambda pair: [pair] if algorithm.learns_from(pair) else []
        )
        if rows:
            pairs = [turn.pair for index in indexes for turn in episodes[index].turns]
            steps.append((processes.share(rows), algorithm.normaliser(pairs)))
    return steps


def collate(rows, device="cpu"):
    """The tensors of a micro-batch."""
    width = max(len(row.ids) for row in rows)
    shape = (len(rows), width)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    ends = torch.full(shape, width)  # padding stands behind all that counts, and sees itself
    action_of = torch.full(shape, -1)
    old_logps = torch.zeros(shape)
    unscored = torch.zeros(shape, dtype=torch.bool)
    advantages = torch.zeros(shape)
    number = 0
    for b, row in enumerate(rows):
        length = len(row.ids)
        ids[b, :length] = torch.tensor(row.ids)
        positions[b, :length] = torch.tensor(row.positions)
        ends[b, :length] = torch.tensor(row.ends)
        for start, pair in row.spans:
            action = slice(start, start + len(pair.action))
            action_of[b, action] = number
            number += 1
            if pair.old_logps is None:
                unscored[b, action] = True
            else:
                old_logps[b, action] = torch.tensor(pair.old_logps)
            if pair.advantages:
                advantages[b, action] = torch.tensor(pair.advantages)
    ids, action_of, old_logps, advantages = (
        tensor.to(device) for tensor in (ids, action_of, old_logps, advantages)
    )
    batch = Batch(ids, action_of >= 0, action_of, old_logps, advantages)
    if unscored.any():
        batch.unscored = unscored.to(device)
    if not all(row.is_sequence() for row in rows):
        batch.positions = positions.to(device)
        batch.visible = visibility(ends.to(device))
    return batch


def score_tokens(policy, batch, s, reference=False):
    """Log-probs and entropies [B, L] of the action tokens of a batch (0 elsewhere)."""
    return policy.logprobs(
        batch.ids, batch.mask, s.temperature, batch.positions, batch.visible, reference
    )


def accumulate_gradient(policy, rows, algorithm, normaliser):
    """Add the gradient of a micro-batch to the adapter's. Returns sums over its action tokens."""
    batch = collate(rows, policy.device)
    logp, batch.entropy = score_tokens(policy, batch, algorithm.s)
    if batch.unscored is not None:  # the first step: π_θ is π_old
        batch.old_logps = torch.where(batch.unscored, logp.detach(), batch.old_logps)
        for pair, logps in by_pair(rows, logp):
            pair.old_logps = pair.old_logps or logps
    if algorithm.s.beta:
        with torch.no_grad():
            batch.ref_logp, _ = score_tokens(policy, batch, algorithm.s, reference=True)
    losses, sums = algorithm.loss(batch, logp)
    if losses.shape != logp.shape:  # a mean would be divided once more
        raise ValueError(
            f"{type(algorithm).__name__}.loss: return a loss per token, {list(logp.shape)}, "
            f"not {list(losses.shape)}"
        )
    loss = losses.sum()
    (loss / normaliser).backward()
    of_all = {"loss": loss, "entropy": batch.entropy.sum(), "tokens": batch.mask.sum()}
    return {name: torch.as_tensor(value).item() for name, value in (sums | of_all).items()}
