"""The fast paths equal the plain versions kept in benchmarks/speed.py.     pytest tests/test_speed.py"""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import empo2
import train
from policy import DialogueCache, Policy

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed


@pytest.fixture(scope="module")
def policy(checkpoint):
    policy = Policy.load(checkpoint)
    with torch.no_grad():
        for p in policy.trainable():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return policy


def words(rng, n):
    return [rng.randrange(5, 300) for _ in range(n)]


@torch.no_grad()
def test_cache_is_exact_for_any_change_of_any_dialogue(policy):
    """Dialogues cut back, changed, extended, finished, coming back and joining late: states as if read from nothing."""
    rng, model, cache = random.Random(0), policy.model.get_base_model().model, DialogueCache()
    dialogues = [
        words(rng, rng.randrange(5, 800)) for _ in range(6)
    ]  # beyond PREFILL_CHUNK and SLOT_BLOCK
    for turn in range(20):
        rows = rng.sample(range(6 if turn > 5 else 3), rng.randrange(1, 4))
        for row in rows:
            kept = rng.randrange(1, len(dialogues[row]) + 1)
            dialogues[row] = dialogues[row][:kept] + words(rng, rng.randrange(0, 60))
        states = cache.extend(model, [dialogues[row] for row in rows], rows)
        done = torch.tensor([rng.random() < 0.3 for _ in rows])
        token = torch.tensor([words(rng, 1) for _ in rows])
        after = cache.append(model, token, done)
        for i, row in enumerate(rows):
            alone = model(torch.tensor([dialogues[row] + [token[i].item()]])).last_hidden_state[0]
            torch.testing.assert_close(states[i], alone[-2], atol=1e-4, rtol=0)
            if not done[i]:
                dialogues[row].append(token[i].item())
                torch.testing.assert_close(after[i], alone[-1], atol=1e-4, rtol=0)


def test_only_what_is_new_is_computed(policy, monkeypatch):
    rng, fed = random.Random(0), []
    forward = DialogueCache.forward
    monkeypatch.setattr(
        DialogueCache,
        "forward",
        lambda self, model, ids, positions: (
            fed.append(int((positions >= 0).sum())),
            forward(self, model, ids, positions),
        )[1],
    )
    policy.forget()
    dialogue = words(rng, 100)
    policy.sample([dialogue], 1, rows=[0])
    policy.sample([dialogue + words(rng, 7)], 1, rows=[0])
    policy.sample([dialogue[:50] + words(rng, 7)], 1, rows=[0])
    assert fed == [100, 7, 7]


def test_an_update_empties_the_cache(policy):
    episodes = played(policy)
    assert policy.cache.held
    empo2.update(
        policy,
        torch.optim.SGD(policy.trainable(), lr=0.0),
        episodes,
        empo2.Settings(),
        np.random.default_rng(0),
    )
    assert not policy.cache.held and not policy.cache.layers


def played(policy, rows=3, turns=5):
    rng = random.Random(1)
    observations = [
        [policy.message("user", "box " * rng.randrange(1, 20)) for _ in range(rows)]
        for _ in range(turns)
    ]
    return speed.play(policy, [words(rng, 30) for _ in range(rows)], observations, 6)


def test_cached_rollout_equals_generate_with_prefill(policy):
    assert speed.replay_plainly(policy, played(policy)) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_one_row_per_episode_gives_the_gradient_of_one_row_per_turn(policy, seed):
    """All mixtures of plain, on-policy and off-policy turns, in one micro-batch and in several."""
    rng, episodes = random.Random(seed), [copy.copy(e) for e in played(policy)]
    for episode in episodes:
        for turn in episode.turns:
            if rng.random() < 0.6:
                turn.tips, turn.offpolicy = (
                    policy.message("user", "tip " * rng.randrange(1, 9)),
                    rng.random() < 0.5,
                )
    advantages, gradients = [1.0, -1.0, 0.5], []
    for budget in (10_000, 200):
        s = empo2.Settings(micro_tokens=budget, min_prob=0.0, max_grad_norm=1e9)
        rows = [empo2.training_row(e, a, s) for e, a in zip(episodes, advantages)]

        def ours():
            for micro in empo2.micro_batches(rows, budget):
                logp, _, mask = empo2.score(policy, micro)
                old = torch.where(
                    empo2.stack(micro, "recompute", False),
                    logp.detach(),
                    empo2.stack(micro, "old_logp", 0.0),
                )
                empo2.hybrid_loss(
                    logp,
                    old,
                    torch.tensor([[r.advantage] for r in micro]),
                    mask,
                    min_prob=0.0,
                    denominator=sum(sum(r.mask) for r in rows),
                )[0].backward()

        gradients.append(speed.gradient(policy, ours)[0])
        gradients.append(
            speed.gradient(policy, lambda: speed.plain_update(policy, episodes, advantages, s))[0]
        )
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-5


def test_episodes_without_advantage_are_not_computed(policy, monkeypatch):
    episodes, scored = played(policy, rows=4), []
    for episode, group, reward in zip(episodes, (0, 0, 1, 1), (5.0, 5.0, 0.0, 9.0)):
        episode.group, episode.turns[0].reward = group, reward
    score = empo2.score
    monkeypatch.setattr(
        empo2, "score", lambda p, rows, *a, **k: (scored.extend(rows), score(p, rows, *a, **k))[1]
    )
    metrics = empo2.update(
        policy,
        torch.optim.SGD(policy.trainable(), lr=0.0),
        episodes,
        empo2.Settings(),
        np.random.default_rng(0),
    )
    assert len(scored) == 2 and metrics["zero_variance_groups"] == 0.5


def test_out_of_memory_names_the_settings_to_lower_and_keeps_the_checkpoint(
    checkpoint, tmp_path, monkeypatch, capsys
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(empo2, "update", full)
    run_dir = tmp_path / "run"
    assert (
        train.main(
            [
                "--env",
                "house",
                "--tasks",
                "fan",
                "--model",
                checkpoint,
                "--run-dir",
                str(run_dir),
                "--group-size",
                "2",
                "--step-limit",
                "2",
                "--iterations",
                "2",
            ]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert (
        "--micro_tokens" in error
        and "--rollout_batch" in error
        and (run_dir / "checkpoint-0").exists()
    )
