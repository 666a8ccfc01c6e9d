"""The maths of empo2.py against definitions.     pytest tests/test_empo2.py"""

import doctest
import math
from functools import partial

import numpy as np
import pytest
import torch
from toys import Bag, KnownOrder, drawn_episode

import empo2
import envs
import memory
import policy
import rollout
from empo2 import Algorithm, Pair, group_advantages, hybrid_loss
from engine import packing
from engine.packing import pack
from engine.scoring import score_pairs
from settings import Settings

YES = torch.tensor([[True]])


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
    episodes = [drawn_episode(41, group) for group in range(50)]
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
def update(bag, algorithm, episodes, lr=0.1, *progress):
    """A pass of SGD -> its metrics."""
    sgd = torch.optim.SGD([bag.weight], lr)
    return empo2.update(bag, sgd, episodes, algorithm, KnownOrder(), *progress)


def steps(episodes, s, cls=Algorithm):
    """Optimiser steps of pairs with advantages of 1."""
    algorithm = cls(s)
    for e in episodes:
        for turn, pair in zip(e.turns, algorithm.training_pairs(e), strict=True):
            turn.pair = pair
    empo2.give_advantages(episodes, [[1.0] * len(e.turns) for e in episodes])
    return empo2.optimiser_steps(episodes, algorithm, KnownOrder())


@pytest.mark.parametrize("pack, lengths", [("episode", [7, 7, 7]), ("group", [7, 12])])
def test_a_group_can_share_a_row(pack, lengths):
    """The first prompt of its episodes is there once; its last token belongs to the action."""
    episodes = [drawn_episode(1, group, [1], [[20, 21, 22, 9]]) for group in (0, 1, 1)]
    ((rows, _),) = steps(episodes, Settings(pack=pack))
    assert sorted(len(row.ids) for row in rows) == lengths


def test_with_history_each_pair_has_a_row_and_no_row_branches():
    episode = drawn_episode(3)
    for turn in episode.turns:
        turn.past_ids = [50, *turn.observation_ids]
    episode.history = 1
    ((rows, _),) = steps([episode], Settings(history=1))
    assert len(rows) == 3 and all(row.is_sequence() for row in rows)


def test_the_metrics_of_an_update():
    episodes = [drawn_episode(2, 0, [4.0]), drawn_episode(1), drawn_episode(1, 1)]
    episodes[0].turns[1].novelty = 1.0
    bag = Bag()
    entropies = []
    for e in episodes:
        for t, turn in enumerate(e.turns):
            logps, entropy = bag.of(e.prompt(t, turn.shown_ids), turn.action_ids)
            turn.logps = logps.tolist()
            entropies.append(entropy.mean().item())
    episodes[0].turns[1].logps[0] += 0.6
    scored = bag.scored  # keys and values are forgotten before anything else
    s = Settings(offpolicy_prob=0.0, min_prob=0.0, minibatch_episodes=1)
    said = []
    metrics = update(bag, Algorithm(s), episodes, 0.0, lambda *text: said.append(text))
    assert said == [("update", x) for x in ("old log-probs", "step 1 of 2", "step 2 of 2")]
    assert metrics.pop("grad_norm") > 0 and bag.scored_before == scored
    expected = {"ratio": 1, "approx_kl": 0, "clipfrac": 0, "masked_fraction": 0}
    expected |= {"loss": -1 / 3, "sampler_gap": 0.6, "sampler_gap_mean": 0.1, "return": 5 / 3}
    expected |= {"optimizer_steps": 2, "zero_variance_groups": 0.5}
    expected |= {"entropy": np.mean(entropies[:3])}  # what is learnt from: not the last
    assert metrics == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("denominator", ["no-tips", "tips"])
def test_old_log_probs_are_those_of_before_the_update(denominator):
    """Those of the first step are its own, without a pass: as if all were evaluated before."""
    s = Settings(denominator=denominator, offpolicy_prob=0.5, beta=0.1, minibatch_episodes=2)
    cls = type("Asks", (Algorithm,), {"needs_logps": True})
    updated = []
    for algorithm in (Algorithm(s), cls(s)):
        bag = Bag()
        episodes = [drawn_episode(3, n // 3, [4.0 * n]) for n in range(5)]
        metrics = update(bag, algorithm, episodes, 5.0)
        assert metrics["optimizer_steps"] == 3 and abs(metrics["ratio"] - 1) > 0.01
        updated.append((bag, metrics, [turn.pair.old_logps for e in episodes for turn in e.turns]))
    (bag, metrics, old), (other, expected, all_old) = updated
    torch.testing.assert_close(bag.weight, other.weight, rtol=0, atol=1e-6)
    assert old == [pytest.approx(logps, abs=1e-6) for logps in all_old]
    assert metrics == pytest.approx(expected, abs=1e-6)
    if denominator == "no-tips":
        assert other.scored - bag.scored == 2 * 3 * 2  # two episodes of three turns


def test_without_spread_nothing_is_learnt_and_the_metrics_say_so():
    bag = Bag()
    before = bag.weight.clone()
    episode = drawn_episode(1)
    episode.turns[0].shown_ids = [30]
    metrics = update(bag, Algorithm(Settings(offpolicy_prob=1.0)), [episode])
    assert torch.equal(bag.weight, before)
    nothing = {"grad_norm": 0.0, "optimizer_steps": 0, "zero_variance_groups": 1.0, "return": 0.0}
    assert metrics == nothing | {"sampler_gap": None, "sampler_gap_mean": None}


def test_a_gradient_that_is_not_finite_changes_nothing():
    episodes = [drawn_episode(2, rewards=[4.0]), drawn_episode(2)]
    bag = Bag()
    with torch.no_grad():
        bag.weight[20] = math.inf
    before = bag.weight.clone()
    with pytest.raises(FloatingPointError, match="--learning-rate"):
        update(bag, Algorithm(Settings(minibatch_episodes=1)), episodes, 1.0)
    assert torch.equal(bag.weight, before)


# --- The seam: what a subclass can override -------------------------------------------------------
class Distil(Algorithm):
    """SDPO's: sampled without tips; what the same policy would rather say with them."""

    needs_logps = True

    def training_pairs(self, episode):
        for t, turn in enumerate(episode.turns):
            pair = Pair(episode.prompt(t), turn.action_ids, sampled_logps=turn.logps)
            if turn.shown_ids:
                pair.second = Pair(episode.prompt(t, turn.shown_ids), turn.action_ids)
            yield pair

    def advantages(self, episodes):
        return [[self.advantage(turn.pair) for turn in e.turns] for e in episodes]

    def advantage(self, pair):
        if not pair.second:
            return 0.0
        return [0.0, *np.subtract(pair.second.old_logps, pair.old_logps)[1:]]


@pytest.mark.parametrize("options", [{}, {"pack": "group", "micro_tokens": 20}, {"history": 3}])
def test_a_second_prompt_is_scored_and_advantages_are_of_tokens(options):
    """Scored before advantages are asked for; what has none is dropped after that."""
    s = Settings(temperature=0.7, min_prob=0.0, max_grad_norm=9.0, **options)
    episodes = [drawn_episode(2, group) for group in range(3)]
    bag, plain = Bag(), Bag()
    objective = 0.0
    gaps = []
    for e in episodes:
        for t, turn in enumerate(e.turns):
            turn.action_ids = [20 + e.job.group, 21, 9][t:]
            turn.logps = [-1.0] * len(turn.action_ids)
            logp = plain.of(e.prompt(t), turn.action_ids, 0.7)[0]
            gaps += (logp.detach() + 1).abs().tolist()
            if t:  # the only one with tips
                with_tips = plain.of(e.prompt(t, turn.shown_ids), turn.action_ids, 0.7)[0]
                turn.expected = (with_tips - logp).detach()
                turn.expected[0] = 0.0
                objective += (turn.expected * logp).sum()
    (gradient,) = torch.autograd.grad(objective, plain.weight)
    metrics = update(bag, Distil(s), episodes, 1.0)
    tokens = 3 * (3 + 2)  # also of the turns without tips
    torch.testing.assert_close(bag.weight, plain.weight + gradient / tokens)
    for e in episodes:
        first, second = e.turns
        assert first.pair.advantages == [0.0] * 3 and first.advantage == 0.0
        assert second.pair.advantages == pytest.approx(second.expected.tolist(), abs=1e-5)
        assert second.advantage == pytest.approx(second.expected.mean().item(), abs=1e-5)
    assert bag.scored == tokens + 2 * 3 * 2  # π_old of all; with tips; π_θ of what is learnt
    assert metrics["zero_variance_groups"] == 0
    assert metrics["sampler_gap"] == pytest.approx(max(gaps), abs=1e-4)
    assert metrics["sampler_gap_mean"] == pytest.approx(np.mean(gaps), abs=1e-4)


def test_given_log_probs_are_not_scored():
    """Those of `denominator="tips"`, beside a turn whose are."""
    episode = drawn_episode(2)
    algorithm = Algorithm(Settings(denominator="tips"))
    episode.turns[1].offpolicy = True
    episode.turns[0].pair, episode.turns[1].pair = algorithm.training_pairs(episode)
    bag = Bag()
    score_pairs([episode], algorithm.s, partial(empo2.score_rows, bag, s=algorithm.s))
    own = bag.of([1, 10, 5], [20, 9])[0].tolist()
    assert episode.turns[0].pair.old_logps == pytest.approx(own, abs=1e-5)
    assert episode.turns[1].pair.old_logps == [-2.0, -0.5] and bag.scored == 2 + 2


@pytest.mark.parametrize(
    "cls, beta, learnt",
    [
        (Algorithm, 0.0, [True, True, False]),
        (Algorithm, 0.1, [True, True, True]),
        (type("All", (Algorithm,), {"learns_from": lambda self, pair: True}), 0.0, [True] * 3),
        (
            type("Best", (Algorithm,), {"learns_from": lambda self, pair: pair.advantages[0] > 0}),
            0.0,
            [True, False, False],
        ),
    ],
)
def test_what_is_learnt_from(cls, beta, learnt):
    """A pair with an advantage at any token, unless the algorithm chooses otherwise."""
    episode = drawn_episode(3)
    steps([episode], Settings(beta=beta), cls)
    empo2.give_advantages([episode], [[2.0, [0.0, -1.0], 0.0]])
    ((rows, tokens),) = empo2.optimiser_steps([episode], cls(Settings(beta=beta)), KnownOrder())
    spans = [pair for row in rows for _, pair in row.spans]
    assert [any(pair is turn.pair for pair in spans) for turn in episode.turns] == learnt
    assert tokens == 6, "of all turns"


@pytest.mark.parametrize("wrong", [[[1.0, 1.0]], [[1.0], [1.0] * 2], [[1.0, [1.0] * 3], [1.0] * 2]])
def test_an_advantage_for_each_turn_or_token(wrong):
    """An episode, a turn or a token without one."""
    algorithm = Algorithm(Settings())
    algorithm.advantages = lambda episodes: wrong
    with pytest.raises(ValueError, match="gave|broadcast"):
        update(Bag(), algorithm, [drawn_episode(2), drawn_episode(2)])


def test_a_loss_that_is_not_per_token_is_refused():
    """A mean would be divided by the normaliser once more, and nobody would see it."""

    class Mean(Algorithm):
        def loss(self, batch, logp):
            losses, metrics = super().loss(batch, logp)
            return losses.mean(), metrics

    with pytest.raises(
        ValueError, match=r"^Mean\.loss: return a loss per token, \[2, 5\], not \[\]$"
    ):
        update(Bag(), Mean(Settings()), [drawn_episode(1, 0, [1.0]), drawn_episode(1)])


def test_a_pair_may_have_another_action_than_its_turn():
    """Its advantages, too, are of its own tokens."""

    class Begun(Algorithm):
        def training_pairs(self, episode):
            for t, turn in enumerate(episode.turns):
                yield Pair(episode.prompt(t), turn.action_ids[:1])

    episodes = [drawn_episode(1, 0, [2.0]), drawn_episode(1)]
    update(Bag(), Begun(Settings(max_grad_norm=9.0)), episodes, 1.0)
    given = [e.turns[0].pair.advantages for e in episodes]
    assert given == [[pytest.approx(1, abs=1e-5)], [pytest.approx(-1, abs=1e-5)]]


@pytest.mark.parametrize("micro_tokens", [None, 10])
def test_an_algorithm_has_its_own_loss_normaliser_and_metrics(micro_tokens):
    """The loss sees advantages, entropies with a gradient, and which token is whose."""
    seen = []

    class Own(Algorithm):
        def loss(self, batch, logp):
            seen.extend(batch.advantages[batch.mask].tolist())
            loss = -batch.entropy - batch.action_mean(logp) * batch.advantages
            return loss, {"twice": 2.0 * batch.mask.sum()}  # a tensor is as good as a number

        def normaliser(self, pairs):
            return 4 * len(pairs)

        def learns_from(self, pair):
            return True

    s = Settings(micro_tokens=micro_tokens, max_grad_norm=1e6, minibatch_episodes=2)
    episodes = [drawn_episode(2, rewards=[2.0]), drawn_episode(1)]
    episodes[0].turns[1].action_ids, episodes[0].turns[1].logps = [25, 26, 9], [-1.0] * 3
    bag, alone = Bag(), Bag()
    objective = 0.0
    for e, A in zip(episodes, (1.0, -1.0), strict=True):
        for t, turn in enumerate(e.turns):
            logp, entropy = alone.of(e.prompt(t, turn.shown_ids), turn.action_ids)
            objective += entropy.sum() + A * logp.sum()
    (gradient,) = torch.autograd.grad(objective, alone.weight)
    s.offpolicy_prob = 0.0
    metrics = update(bag, Own(s), episodes, 1.0)
    torch.testing.assert_close(bag.weight, alone.weight + gradient / 12)  # 4 * 3 turns
    assert (
        metrics["twice"] == 2
        and type(metrics["twice"]) is float
        and sorted(seen) == pytest.approx([-1.0] * 2 + [1.0] * 5, abs=1e-5)
    )


def test_clipping_and_metrics_are_of_the_ratio_of_the_algorithm():
    class Twice(Algorithm):
        def logratio(self, batch, logp):
            return 0 * logp + math.log(2.0)

    bag = Bag()
    metrics = update(
        bag, Twice(Settings(min_prob=0.0)), [drawn_episode(1, 0, [1.0]), drawn_episode(2)]
    )
    assert metrics["ratio"] == pytest.approx(2) and metrics["clipfrac"] == pytest.approx(2 / 6)
    assert metrics["loss"] == pytest.approx((-1.3 * 2 + 2 * 4) / 6, abs=1e-5)


def test_the_mean_over_an_action_by_hand():
    """Two rows, two actions in the first; also its gradient, and whose a token is."""
    branching = pack([Pair([1, 2], [7, 8]), Pair([1, 2], [9])])
    batch = empo2.collate([branching, pack([Pair([3], [4, 5, 6])])])
    values = torch.tensor([[9.0, 9, 1, 3, 9, 5], [9, 2, 2, 8, 9, 9]], requires_grad=True)
    mean = batch.action_mean(values)
    assert mean.tolist() == [[0, 0, 2, 2, 0, 5], [0, 4, 4, 4, 0, 0]]
    mean[1, 1].backward()
    assert values.grad[1].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert not values.grad[0].any()


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
