"""`update` against an oracle that goes token by token: no rows, no cache, no micro-batches.

Both train a copy of one policy, in float64 but for Qwen2's norms and the logits of `update`. The
learning rate is so high that the four optimiser steps reach every branch of Eq. 2.
"""

import copy

import numpy as np
import pytest
import torch

import empo2
from policy import Policy
from rollout import Episode, Job, Turn, past
from settings import Settings

GROUPS = [0, 0, 0, 1, 1, 2, 2]
RETURNS = [6.0, -2.0, 1.0, 4.0, 9.0, 3.0, 3.0]  # the last group has no advantage
COMMON = {
    "minibatch_episodes": 2,
    "micro_tokens": 150,  # a row has 68 to 124
    "intrinsic_coef": 0.5,
    "advantage_eps": 0.25,
    "clip_low": 0.1,
    "clip_high": 0.15,
    "clip_c": 2.0,
    "min_prob": 1e-3,
    "max_grad_norm": 1e6,
}
CASES = {
    "no-tips": {"pack": "group"},
    "tips-kl": {"denominator": "tips", "beta": 0.01, "micro_tokens": 10_000},
    "all": {"beta": 0.05, "temperature": 1.5, "max_grad_norm": 0.5, "micro_tokens": None},
    "tips": {"denominator": "tips"},
    "kl": {"beta": 0.01},
    "gradient-clip": {"max_grad_norm": 0.3},
}
FAST = ("no-tips", "tips-kl", "all")


def token_logps(model, episode, t, tip_ids, s):
    """Log-probs of the tokens of action t, [len(action)], by one forward pass."""
    prompt = episode.prompt(t, tip_ids)
    action = episode.turns[t].action_ids
    logits = model(torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1]
    return (logits / s.temperature).log_softmax(-1)[range(len(action)), action]


def make_episodes(policy, s):
    """2 to 4 turns each, of random tokens; without memory, on-policy and off-policy in turn."""
    rng = np.random.default_rng(1)
    vocab = policy.model.config.vocab_size
    episodes = []
    for i, group in enumerate(GROUPS):
        system = policy.message("system", f"task {group}")
        episode = Episode(Job("t", 0, group, i), rng, 0, "", system, policy.header)
        for t in range(2 + i % 3):
            turn = Turn("", policy.message("user", f"room {rng.integers(99)}"))
            turn.action_ids = rng.integers(vocab, size=rng.integers(2, 7)).tolist()
            if rng.random() < 0.5:
                turn.action_ids.append(policy.end_id)
            turn.past_ids = past(policy, turn)
            if (i + t) % 3:
                turn.shown_ids = policy.message("user", f"take the radio {rng.integers(99)}")
            turn.offpolicy = (i + t) % 3 == 2
            turn.novelty = 1 / 2**t
            turn.reward = -s.intrinsic_coef * turn.novelty  # so that R is as in RETURNS
            episode.turns.append(turn)
            logps = token_logps(policy.model, episode, t, turn.shown_ids, s).detach().numpy()
            turn.logps = (logps + 0.1 * rng.normal(size=len(logps))).tolist()
        episode.turns[-1].reward += RETURNS[i]
        episodes.append(episode)
    return episodes


def advantage(i, s):
    """A of episode i (§2)."""
    returns = [R for R, group in zip(RETURNS, GROUPS, strict=True) if group == GROUPS[i]]
    return (RETURNS[i] - np.mean(returns)) / (np.std(returns) + s.advantage_eps)


def eq2(logp, old, ref, A, s):
    """The objective of one token, and which branch of it holds."""
    ratio = (logp - old).exp()
    term, branch = ratio * A, "ratio"
    if A > 0 and ratio > 1 + s.clip_high:
        term, branch = (1 + s.clip_high) * A, "clipped above"
    if A < 0 and ratio < 1 - s.clip_low:
        term, branch = (1 - s.clip_low) * A, "clipped below"
    if A < 0 and ratio > s.clip_c:
        term, branch = s.clip_c * A, "dual clip"
    if logp.exp() < s.min_prob:
        term, branch = 0.0, "masked"
    k3 = (ref - logp).exp() - 1 - (ref - logp)
    return term - s.beta * k3, branch


def oracle(model, optimizer, episodes, s, order):
    """The optimiser steps of an iteration. Returns the branches that learnt tokens were in."""

    def numerator(i, t):
        turn = episodes[i].turns[t]
        return token_logps(model, episodes[i], t, () if turn.offpolicy else turn.shown_ids, s)

    turns = [(i, t) for i, episode in enumerate(episodes) for t in range(len(episode.turns))]
    with torch.no_grad():
        old = {turn: numerator(*turn) for turn in turns}
        with model.disable_adapter():
            ref = {turn: numerator(*turn) for turn in turns}
    for i, t in turns:
        if s.denominator == "tips" and episodes[i].turns[t].offpolicy:
            old[i, t] = torch.tensor(episodes[i].turns[t].logps, dtype=torch.float64)
    branches = set()
    for first in range(0, len(order), s.minibatch_episodes):
        objective = 0.0
        num_tokens = 0
        for i, t in turns:
            if i not in order[first : first + s.minibatch_episodes]:
                continue
            A = advantage(i, s)
            for logps in zip(numerator(i, t), old[i, t], ref[i, t], strict=True):
                term, branch = eq2(*logps, A, s)
                objective += term
                num_tokens += 1
                if A:
                    branches.add(branch)
        optimizer.zero_grad()
        (-objective / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)
        optimizer.step()
    return branches


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_update_trains_as_the_oracle_does(checkpoint, monkeypatch, case):
    s = Settings(**{**COMMON, **CASES[case]})
    policy = Policy.load(checkpoint, lora_r=4)
    policy.model.double()
    torch.manual_seed(0)
    for p in policy.trainable():  # a new adapter changes nothing
        p.data += 0.05 * torch.randn_like(p)
    model = copy.deepcopy(policy.model)
    before = torch.nn.utils.parameters_to_vector(policy.trainable()).detach()
    episodes = make_episodes(policy, s)
    # With its own small eps, AdamW would hardly feel the size of a gradient.
    adamw = {"lr": 0.01, "eps": 1e-2}
    weights = [p for p in model.parameters() if p.requires_grad]
    order = np.random.default_rng(7).permutation(len(episodes))
    branches = oracle(model, torch.optim.AdamW(weights, **adamw), episodes, s, order)
    assert branches == {"ratio", "clipped above", "clipped below", "dual clip", "masked"}

    monkeypatch.setattr(empo2, "draw_update_modes", lambda episodes, s, rng: None)
    optimizer = torch.optim.AdamW(policy.trainable(), **adamw)
    metrics = empo2.update(
        policy, optimizer, episodes, empo2.Algorithm(s), np.random.default_rng(7)
    )
    assert metrics["return"] == pytest.approx(np.mean(RETURNS))
    expected = torch.nn.utils.parameters_to_vector(weights)
    error = expected - torch.nn.utils.parameters_to_vector(policy.trainable())
    # The fp32 parts of both leave 2e-7 to 5e-7.
    assert error.norm() < 1e-5 * (expected - before).norm()
