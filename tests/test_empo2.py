"""The maths of empo2.py against definitions.     pytest tests/test_empo2.py"""

import doctest
import math

import numpy as np
import pytest
import torch

import empo2
import envs
import memory
import policy
import rollout
from empo2 import Algorithm, Pair, group_advantages, hybrid_loss
from engine import packing
from rollout import Episode, Job, Turn
from settings import Settings

YES = torch.tensor([[True]])


def drawn_episode(turns=3, group=0, rewards=(), actions=()):
    """System 1, header 5; turn t: observation 10+t, tips 30+t (none at turn 0), action 20+t, 9."""
    rng = np.random.default_rng(group)
    episode = Episode(Job("task", 0, group, 0), rng, 0, "text", [1], [5])
    for t in range(turns):
        turn = Turn(f"o{t}", [10 + t], shown_ids=[30 + t] if t else [], action_ids=[20 + t, 9])
        turn.logps = [-1.0 - t, -0.5]
        episode.turns.append(turn)
    for turn, reward in zip(episode.turns, rewards, strict=False):
        turn.reward = reward
    for turn, action in zip(episode.turns, actions, strict=False):
        turn.action_ids = action
    for turn in episode.turns:
        turn.past_ids = [*turn.observation_ids, 5, *turn.action_ids]
    return episode


# --- Eq. 2 ----------------------------------------------------------------------------------------
def loss_of_one(p, p_old, advantage, ref=None, **options):
    """Loss of a token with probabilities p and p_old, its slope in log p, and the metrics."""
    logp = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(p_old)]], dtype=torch.float64)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    ref_logp = None if ref is None else torch.tensor([[math.log(ref)]], dtype=torch.float64)
    s = Settings(**options)
    loss, metrics = hybrid_loss(logp, logp - old, advantages, YES, s, ref_logp)
    loss.backward()
    return loss.item(), logp.grad.item(), metrics


@pytest.mark.parametrize(
    "p, p_old, advantage, loss, slope, clipped, masked",
    [
        (0.40, 0.40, 1.0, -1.0, -1.0, 0, 0),  # ratio 1: the policy gradient itself
        (0.44, 0.40, 1.0, -1.1, -1.1, 0, 0),  # inside the clip range
        (0.80, 0.40, 1.0, -1.3, 0.0, 1, 0),  # A > 0, ratio 2: clipped at 1.3
        (0.20, 0.40, 0.6, -0.3, -0.3, 0, 0),  # A > 0, ratio 0.5: the lower clip does not act
        (0.20, 0.40, -1.0, 0.8, 0.0, 1, 0),  # A < 0, ratio 0.5: clipped at 0.8
        (0.80, 0.40, -0.6, 1.2, 1.2, 0, 0),  # A < 0, ratio 2: the upper clip does not act
        (0.80, 0.40, 0.0, 0.0, 0.0, 0, 0),  # A = 0: nothing to clip
        (0.20, 0.40, 0.0, 0.0, 0.0, 0, 0),
        (0.80, 0.04, -1.0, 10.0, 0.0, 0, 0),  # A < 0, ratio 20: dual clip at c = 10
        (0.80, 0.04, -0.5, 5.0, 0.0, 0, 0),  # the dual clip scales with A
        (0.50, 0.001, -1.0, 10.0, 0.0, 0, 0),  # old log-probs do not mask
        (0.0066, 0.004, 1.0, 0.0, 0.0, 0, 1),  # below delta = 0.0067: nothing, and no gradient
        (0.0068, 0.0068, 1.0, -1.0, -1.0, 0, 0),  # just above delta
    ],
)
def test_each_branch_of_the_loss_by_hand(p, p_old, advantage, loss, slope, clipped, masked):
    *got, metrics = loss_of_one(p, p_old, advantage)
    assert got == pytest.approx([loss, slope], abs=1e-9)
    ratio = p / p_old
    expected = {"ratio": ratio, "approx_kl": ratio - 1 - math.log(ratio), "clipfrac": clipped}
    assert metrics == pytest.approx(expected | {"masked_fraction": masked}, abs=1e-9)


def test_the_mask_keeps_delta_itself_and_can_be_off():
    assert loss_of_one(0.5, 0.5, 1.0, min_prob=0.5)[0] == -1.0
    assert loss_of_one(0.001, 0.001, 1.0, min_prob=0.0)[0] == -1.0


def test_values_outside_the_mask_do_not_matter_even_if_infinite():
    logp = torch.tensor([[math.log(0.5), -math.inf, 3.0]], requires_grad=True)
    old = torch.tensor([[math.log(0.5), 5.0, math.inf]])
    mask = torch.tensor([[True, False, False]])
    s = Settings(beta=0.5)
    loss, metrics = hybrid_loss(logp, logp - old, torch.ones(1, 3), mask, s, old)
    loss.sum().backward()
    assert loss.tolist() == [[pytest.approx(-1), 0, 0]] and logp.grad.tolist() == [[-1.0, 0.0, 0.0]]
    expected = {"ratio": 1, "approx_kl": 0, "clipfrac": 0, "masked_fraction": 0, "kl_ref": 0}
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_the_kl_term_is_the_kl_in_expectation_over_a_vocabulary_of_five():
    """Each token once, weighted by its probability under π_θ, must give Σ π log(π / π_ref)."""
    logits, ref = torch.randn(2, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    pi = logits.softmax(0)
    exact = (pi * (pi.log() - ref.log_softmax(0))).sum().item()
    total = 0.0
    for p, p_ref in zip(pi.tolist(), ref.softmax(0).tolist(), strict=True):
        loss, slope, metrics = loss_of_one(p, p, 0.0, p_ref, beta=0.3, min_prob=0.9)
        assert loss == pytest.approx(0.3 * metrics["kl_ref"])  # not masked by min_prob
        assert slope == pytest.approx(0.3 * (1 - p_ref / p))  # towards the reference
        total += p * metrics["kl_ref"]
    assert total == pytest.approx(exact) and exact > 0.01


# --- Advantages -----------------------------------------------------------------------------------
def test_advantages_by_hand_per_group_of_episodes():
    short = drawn_episode(1, rewards=[0.0])
    long = drawn_episode(3, rewards=[4.0, 0.0, 5.0])  # counts once, not three times
    alone = drawn_episode(2, group=1, rewards=[500.0])
    long.turns[1].novelty = 0.5
    s = Settings(intrinsic_coef=2.0, advantage_eps=5.0)
    # Returns 0 and 10 (9 + 2 * 0.5): mean 5, std 5, and 5 more in the denominator.
    assert Algorithm(s).advantages([short, alone, long]) == [[-0.5], [0.0, 0.0], [0.5] * 3]
    got = group_advantages([0.0, 10.0, 5.0, 5.0], [7, 7, 3, 7])
    sigma = math.sqrt(50 / 3)  # of 0, 10, 5 around 5
    assert got.tolist() == pytest.approx([-5 / sigma, 5 / sigma, 0.0, 0.0], rel=1e-5)


def test_equal_returns_give_exactly_zero_and_small_differences_do_not():
    residue = sum([0.1] * 10)  # 0.9999999999999999
    for returns in ([3.0] * 3, [1.0, residue, 1.0], [1e12, 1e12 * residue], [42.0]):
        assert group_advantages(returns, [0] * len(returns)).abs().max() == 0.0
    assert group_advantages([0.0, 2e-6], [0, 0], 0.0).tolist() == [-1.0, 1.0]


# --- Update modes and training pairs --------------------------------------------------------------
@pytest.mark.parametrize(
    "level, in_episode, in_batch", [("turn", 2, 2), ("episode", 1, 2), ("batch", 1, 1)]
)
def test_update_modes_are_drawn_at_their_level(level, in_episode, in_batch):
    episodes = [drawn_episode(101, group) for group in range(60)]
    shares = []
    for seed in range(20):
        s = Settings(mode_level=level, offpolicy_prob=0.6)
        empo2.draw_update_modes(episodes, Algorithm(s), np.random.default_rng(seed))
        drawn = [{turn.offpolicy for turn in e.turns[1:]} for e in episodes]
        assert {len(modes) for modes in drawn} == {in_episode}
        assert len(set.union(*drawn)) == in_batch
        assert not any(e.turns[0].offpolicy for e in episodes)  # it had no tips
        shares.append(np.mean([turn.offpolicy for e in episodes for turn in e.turns[1:]]))
    assert np.mean(shares) == pytest.approx(0.6, abs=0.2 if level == "batch" else 0.03)


@pytest.mark.parametrize("level", ["turn", "episode", "batch"])
@pytest.mark.parametrize("q, expected", [(0.0, [False, False]), (1.0, [False, True])])
def test_q_is_the_share_that_is_updated_off_policy(level, q, expected):
    """Not its complement; the turn without tips is never off-policy."""
    episode = drawn_episode(2)
    s = Settings(mode_level=level, offpolicy_prob=q)
    empo2.draw_update_modes([episode], Algorithm(s), np.random.default_rng(0))
    assert [turn.offpolicy for turn in episode.turns] == expected


def test_the_training_pairs_of_a_drawn_trajectory():
    """Turn 0 without memory, turn 1 with memory on-policy, turn 2 with memory off-policy."""
    episode = drawn_episode()
    episode.turns[2].offpolicy = True
    plain, on_policy, off_policy = Algorithm(Settings()).training_pairs(episode)
    assert plain == Pair([1, 10, 5], [20, 9], None, [-1.0, -0.5])
    prompt = [1, 10, 5, 20, 9, 11, 31, 5]  # its own tips, and its end of turn is learnt
    assert on_policy == Pair(prompt, [21, 9], None, [-2.0, -0.5])
    prompt = [1, 10, 5, 20, 9, 11, 5, 21, 9, 12, 5]  # no tips at all
    assert off_policy == Pair(prompt, [22, 9])
    tips = Algorithm(Settings(denominator="tips"))
    on_policy, off_policy = list(tips.training_pairs(episode))[1:]
    assert on_policy.old_logps is None and off_policy.old_logps == [-3.0, -0.5]


# --- The update -----------------------------------------------------------------------------------
class Bag:
    """Logits of the next token: a sum over the tokens that it sees, weighted by position."""

    device = "cpu"

    def __init__(self):
        self.reference, weight = 0.1 * torch.randn(2, 40, 40, generator=torch.manual_seed(0))
        self.weight = weight.requires_grad_()
        self.scored = 0
        self.shared = 0  # most tokens of a batch of several rows

    def trainable(self):
        return [self.weight]

    def forget(self):
        pass

    def logprobs(self, ids, mask, temperature, positions=None, visible=None, reference=False):
        weight = self.reference if reference else self.weight
        self.scored += int(mask.sum())
        self.shared = max(self.shared, ids.numel() * (len(ids) > 1))
        if positions is None:
            positions = torch.arange(ids.shape[1])
            visible = torch.ones(ids.shape[1], ids.shape[1]).tril()
        seen = visible.float() @ (weight[ids] * 0.9 ** positions[..., None])
        logp = (seen / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        logp = torch.where(mask, torch.nn.functional.pad(logp, (1, 0)), 0.0)
        return logp, 3.0 * mask  # as if each token had an entropy of 3

    def of_turn(self, e, t, temperature=1.0, reference=False):
        """Log-probs of an action under its numerator's prompt, alone."""
        prompt = e.prompt(t, () if e.turns[t].offpolicy else e.turns[t].shown_ids)
        ids = torch.tensor([prompt + e.turns[t].action_ids])
        mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        return self.logprobs(ids, mask, temperature, reference=reference)[0][0, len(prompt) :]


class KnownOrder:
    """A generator that shuffles in a known way."""

    def random(self):
        return 0.5

    def permutation(self, n):
        return [i for i in (2, 0, 3, 1, 4) if i < n]


def plain_update(bag, advantages, episodes, s, lr):
    """The update from its definition, turn by turn."""
    old = {}
    for e in episodes:
        for t, turn in enumerate(e.turns):
            old[id(turn)] = bag.of_turn(e, t, s.temperature).detach()
            if turn.offpolicy and s.denominator == "tips":
                old[id(turn)] = torch.tensor(turn.logps)
    for step in ([2, 0], [3, 1], [4]):
        objective = 0.0
        tokens = 0
        for i in step:
            a = advantages[i]
            for t, turn in enumerate(episodes[i].turns):
                logp = bag.of_turn(episodes[i], t, s.temperature)
                ref = bag.of_turn(episodes[i], t, s.temperature, reference=True)
                ratio = (logp - old[id(turn)]).exp()
                term = torch.minimum(ratio * a, ratio.clamp(0.9, 1.05) * a)
                if a < 0:
                    term = term.clamp(min=1.2 * a)
                kl = (ref - logp).exp() - 1 - (ref - logp)
                objective += (term * (logp.exp() >= 0.018) - s.beta * kl).sum()
                tokens += len(turn.action_ids)
        (gradient,) = torch.autograd.grad(-objective / tokens, bag.weight)
        with torch.no_grad():
            bag.weight -= lr * gradient / max(1.0, gradient.norm() / s.max_grad_norm)


@pytest.mark.parametrize("pack", ["episode", "group"])
@pytest.mark.parametrize("micro_tokens", [None, 20])
@pytest.mark.parametrize(
    "denominator, beta, max_norm",
    [("no-tips", 0.0, 9.0), ("no-tips", 0.2, 0.25), ("tips", 0.0, 9.0)],
)
def test_an_update_is_that_of_algorithm_1_turn_by_turn(
    denominator, beta, max_norm, micro_tokens, pack
):
    """Three optimiser steps, so that ratios leave 1; one of them mixes in an episode without A."""
    loss = {"clip_low": 0.1, "clip_high": 0.05, "clip_c": 1.2, "min_prob": 0.018, "beta": beta}
    step = {"minibatch_episodes": 2, "micro_tokens": micro_tokens, "max_grad_norm": max_norm}
    step["pack"] = pack
    s = Settings(temperature=0.7, offpolicy_prob=0.7, denominator=denominator, **loss, **step)
    draw = np.random.default_rng(134)  # all clips and the mask come up
    episodes = []
    for group, rewards in ((0, [6]), (1, [1, 4]), (0, [0, 0, 1]), (0, [0, 2]), (1, [5])):
        actions = [[*draw.integers(20, 26, draw.integers(1, 4)).tolist(), 9] for _ in range(4)]
        episodes.append(drawn_episode(1 + len(rewards), group, rewards, actions))
        episodes[-1].rng = draw
        for turn in episodes[-1].turns:
            turn.logps = draw.uniform(-4.5, -3, len(turn.action_ids)).tolist()
    returns = np.array([6.0, 1.0, 2.0])
    a, b, c = ((returns - returns.mean()) / returns.std()).tolist()
    bag, plain = Bag(), Bag()
    sgd = torch.optim.SGD([bag.weight], 0.3)
    metrics = empo2.update(bag, sgd, episodes, Algorithm(s), KnownOrder())
    plain_update(plain, [a, 0.0, b, c, 0.0], episodes, s, 0.3)
    torch.testing.assert_close(bag.weight, plain.weight, rtol=1e-3, atol=1e-4)
    assert 0.1 < metrics["masked_fraction"] < 0.6
    assert {turn.offpolicy for turn in episodes[2].turns[1:3]} == {
        True,
        False,
    }  # a row that branches
    assert (bag.shared <= 20) == (micro_tokens is not None)
    turns = [turn for e in episodes for turn in e.turns]
    learnt = sum(len(turn.action_ids) for i in (0, 2, 3) for turn in episodes[i].turns)
    given = denominator == "tips"
    unknown = sum(len(turn.action_ids) for turn in turns if not (given and turn.offpolicy))
    assert beta or bag.scored == unknown + learnt  # what has nothing to learn is not computed


def steps(episodes, s):
    algorithm = Algorithm(s)
    for e in episodes:
        for turn, pair in zip(e.turns, algorithm.training_pairs(e), strict=True):
            turn.pair = pair
    return empo2.optimiser_steps(episodes, algorithm, np.random.default_rng(0))


@pytest.mark.parametrize("pack, lengths", [("episode", [7, 7, 7]), ("group", [7, 12])])
def test_a_group_can_share_a_row(pack, lengths):
    """The first prompt of its episodes is there once; its last token belongs to the action."""
    episodes = [drawn_episode(1, group, [1], [[20, 21, 22, 9]]) for group in (0, 1, 1)]
    s = Settings(pack=pack, beta=1.0)
    ((rows, _),) = steps(episodes, s)
    assert sorted(len(row.ids) for row in rows) == lengths


def test_with_history_each_pair_has_a_row_and_no_row_branches():
    episode = drawn_episode(3)
    for turn in episode.turns:
        turn.past_ids = [50, *turn.observation_ids]
    episode.history = 1
    s = Settings(history=1, beta=1.0)
    ((rows, _),) = steps([episode], s)
    assert len(rows) == 3 and all(row.is_sequence() for row in rows)


def test_the_metrics_of_an_update():
    episodes = [drawn_episode(2, 0, [4.0]), drawn_episode(1), drawn_episode(1, 1)]
    episodes[0].turns[1].novelty = 1.0
    bag = Bag()
    for e in episodes:
        for t, turn in enumerate(e.turns):
            turn.logps = bag.of_turn(e, t).tolist()
    episodes[0].turns[1].logps[0] += 0.6
    s = Settings(offpolicy_prob=0.0, min_prob=0.0, minibatch_episodes=1)
    said = []
    sgd = torch.optim.SGD([bag.weight], 0.0)
    metrics = empo2.update(
        bag, sgd, episodes, Algorithm(s), KnownOrder(), lambda *text: said.append(text)
    )
    assert said == [("update", x) for x in ("old log-probs", "step 1 of 2", "step 2 of 2")]
    assert metrics.pop("grad_norm") > 0
    expected = {"ratio": 1, "approx_kl": 0, "clipfrac": 0, "masked_fraction": 0, "entropy": 3}
    expected |= {"loss": -1 / 3, "sampler_gap": 0.6, "sampler_gap_mean": 0.075, "return": 5 / 3}
    expected |= {"optimizer_steps": 2, "zero_variance_groups": 0.5}
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing():
    episodes = [drawn_episode(2, rewards=[4.0]), drawn_episode(2)]
    bag = Bag()
    with torch.no_grad():
        bag.weight[20] = math.inf
    before = bag.weight.clone()
    s = Settings(minibatch_episodes=1)
    sgd = torch.optim.SGD([bag.weight], 1.0)
    with pytest.raises(FloatingPointError, match="--learning-rate"):
        empo2.update(bag, sgd, episodes, Algorithm(s), KnownOrder())
    assert torch.equal(bag.weight, before)


# --- Settings and docstrings ----------------------------------------------------------------------
def test_settings_refuse_nonsense():
    wrong = {"memory_prob": 1.5, "min_prob": -1, "group_size": 0, "temperature": 0, "beta": -1}
    for name, value in (wrong | {"preset": "gpro"}).items():
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            Settings(**{name: value})


@pytest.mark.parametrize("module", [empo2, envs, memory, policy, rollout, packing])
def test_the_examples_in_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
