"""What is fast computes the same: cached rollouts and packed rows."""

import random

import numpy as np
import pytest
import torch

import empo2
from experiments import speed
from policy import Policy
from rollout import Job
from settings import Settings


@pytest.fixture(scope="module")
def policy(checkpoint):
    policy = Policy.load(checkpoint)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():  # a new adapter changes nothing
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return policy


def played(policy, episodes=3, turns=5):
    rng = random.Random(1)
    prompts = [[rng.randrange(5, 300) for _ in range(30)] for _ in range(episodes)]
    observations = []
    for _ in range(turns):
        texts = ["box " * rng.randrange(1, 20) for _ in range(episodes)]
        observations.append([policy.message("user", text) for text in texts])
    return speed.play(policy, prompts, observations, 6)


def gradient_pair_by_pair(policy, pairs, s):
    """-Σ min(ratio A, clipped ratio A) / tokens, each pair through the model on its own."""
    policy.model.zero_grad()
    for pair in pairs:
        logits = policy.model(torch.tensor([pair.prompt + pair.action])).logits[0, :-1]
        logps = logits[-len(pair.action) :].log_softmax(-1)
        logp = logps[range(len(pair.action)), pair.action]
        ratio = (logp - torch.tensor(pair.old_logps)).exp()
        clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
        advantages = torch.tensor(pair.advantages)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
        (loss / sum(len(pair.action) for pair in pairs)).backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable()])


def test_cached_rollout_equals_generate_with_prefill(policy):
    assert speed.replay_plainly(policy, played(policy)) < 1e-4


@pytest.mark.parametrize("seed", range(2))
def test_one_row_per_episode_gives_the_gradient_of_one_row_per_pair(policy, seed):
    """All mixtures of plain, on-policy and off-policy turns, in one micro-batch and in several."""
    rng = random.Random(seed)
    s = Settings(min_prob=0.0)
    packs = []
    for episode in played(policy):
        for turn in episode.turns:
            turn.advantage = rng.choice((1.0, -1.0, 0.5))
            if rng.random() < 0.6:
                turn.shown_ids = policy.message("user", "tip " * rng.randrange(1, 9))
                turn.offpolicy = rng.random() < 0.5
        packs.append(speed.learnt_pairs(episode, s))
    plain = gradient_pair_by_pair(policy, [pair for pairs in packs for pair in pairs], s)
    tokens = set()
    for micro_tokens in (10_000, 200):
        s.micro_tokens = micro_tokens
        packed, computed = speed.gradient(policy, packs, s)
        assert (packed - plain).norm() < 1e-5 * plain.norm()
        tokens.add(computed)
    assert len(tokens) == 2  # it was one micro-batch, and it was several


def test_episodes_without_advantage_are_not_computed(policy, monkeypatch):
    episodes = played(policy, episodes=4)
    for episode, group, reward in zip(episodes, (0, 0, 1, 1), (5.0, 5.0, 0.0, 9.0), strict=True):
        episode.job = Job("", 0, group, 0)
        episode.turns[0].reward = reward
    computed = []
    score_tokens = empo2.score_tokens

    def counted(policy, batch, *args):
        computed.append(len(batch.ids))
        return score_tokens(policy, batch, *args)

    monkeypatch.setattr(empo2, "score_tokens", counted)
    optimizer = torch.optim.SGD(policy.trainable(), lr=0.0)
    algorithm = empo2.Algorithm(Settings())
    metrics = empo2.update(policy, optimizer, episodes, algorithm, np.random.default_rng(0))
    assert sum(computed) == 2  # rows, of the only step
    assert metrics["zero_variance_groups"] == 0.5
