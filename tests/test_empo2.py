"""The maths of empo2.py against definitions, and the drawn trajectory: who sees what, what is trained, what is masked.

pytest tests/test_empo2.py
"""

import dataclasses
import doctest
import math

import numpy as np
import pytest
import torch

import empo2
import memory
from conftest import trained_actions
from empo2 import Episode, Settings, Turn, group_advantages, hybrid_loss


def loss_of_one(p, p_old, advantage, **options):
    """The loss of a single token with probabilities p and p_old; its gradient with respect to log p."""
    logp = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(p_old)]], dtype=torch.float64)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss, metrics = hybrid_loss(logp, old, advantages, torch.tensor([[True]]), **options)
    loss.backward()
    return loss.item(), logp.grad.item(), metrics


# --- Eq. 2 ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "p, p_old, advantage, loss, gradient",
    [
        (0.40, 0.40, 1.0, -1.0, -1.0),  # ratio 1: the policy gradient itself
        (0.44, 0.40, 1.0, -1.1, -1.1),  # inside the clip range
        (0.80, 0.40, 1.0, -1.3, 0.0),  # A > 0, ratio 2: clipped at 1.3
        (0.20, 0.40, 1.0, -0.5, -0.5),  # A > 0, ratio 0.5: the lower clip does not act
        (0.20, 0.40, -1.0, 0.8, 0.0),  # A < 0, ratio 0.5: clipped at 0.8
        (0.80, 0.40, -1.0, 2.0, 2.0),  # A < 0, ratio 2: the upper clip does not act
        (0.80, 0.04, -1.0, 10.0, 0.0),  # A < 0, ratio 20: dual clip at c = 10
        (0.80, 0.04, -0.5, 5.0, 0.0),  # the dual clip scales with A
        (0.0066, 0.40, 1.0, 0.0, 0.0),  # less likely than delta: nothing, and no gradient
        (0.0068, 0.0068, 1.0, -1.0, -1.0),  # just above delta
    ],
)
def test_each_branch_of_the_loss_by_hand(p, p_old, advantage, loss, gradient):
    value, slope, _ = loss_of_one(p, p_old, advantage)
    assert value == pytest.approx(loss, rel=1e-9, abs=1e-12) and slope == pytest.approx(
        gradient, rel=1e-9, abs=1e-12
    )


def test_mask_is_under_the_current_policy_and_can_be_off():
    assert loss_of_one(0.5, 0.001, -1.0)[0] == 10.0, "old log-probs do not mask"
    assert loss_of_one(0.001, 0.001, 1.0, min_prob=0.0)[0] == -1.0
    assert loss_of_one(0.001, 0.5, 1.0)[2]["masked_fraction"] == 1.0


def test_values_outside_the_mask_do_not_matter_even_if_infinite():
    logp = torch.tensor([[math.log(0.5), -math.inf, 3.0]], requires_grad=True)
    old = torch.tensor([[math.log(0.5), 5.0, math.inf]])
    loss, metrics = hybrid_loss(logp, old, torch.ones(1, 3), torch.tensor([[True, False, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(-1) and logp.grad.tolist() == [[-1.0, 0.0, 0.0]]
    assert all(math.isfinite(value) for value in metrics.values())


def test_k3_is_exactly_the_kl_in_expectation_over_a_vocabulary_of_five():
    """Each token once, weighted by its probability under π_θ, must give Σ π log(π / π_ref)."""
    logits, ref = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pi, kl = (
        logits.softmax(0),
        (logits.softmax(0) * (logits.log_softmax(0) - ref.log_softmax(0))).sum(),
    )
    total = 0.0
    for a in range(5):
        logp, ref_logp = logits.log_softmax(0)[a].view(1, 1), ref.log_softmax(0)[a].view(1, 1)
        loss, metrics = hybrid_loss(
            logp, logp, torch.zeros(1, 1), torch.tensor([[True]]), ref_logp=ref_logp, beta=0.3
        )
        assert loss.item() == pytest.approx(0.3 * metrics["kl_ref"])
        total += pi[a] * metrics["kl_ref"]
    assert total.item() == pytest.approx(kl.item(), rel=1e-9) and kl > 0.01


def test_kl_term_has_a_gradient_that_pulls_towards_the_reference():
    logp = torch.tensor([[math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[math.log(0.1)]], dtype=torch.float64)
    loss, _ = hybrid_loss(
        logp, logp.detach(), torch.zeros(1, 1), torch.tensor([[True]]), ref_logp=ref, beta=1.0
    )
    loss.backward()
    assert logp.grad.item() == pytest.approx(1 - 0.1 / 0.5), "d/dx of exp(r-x) - 1 - (r-x)"


def test_gradient_is_the_same_for_1_2_and_4_micro_batches():
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    start = torch.rand(4, 6, generator=generator).log()
    old, advantages = (
        start + 0.3 * torch.randn(4, 6, generator=generator),
        torch.randn(4, 1, generator=generator),
    )
    results = []
    for parts in (1, 2, 4):
        logp, total = start.clone().requires_grad_(), {}
        for rows in torch.arange(4).chunk(parts):
            loss, metrics = hybrid_loss(
                logp[rows],
                old[rows],
                advantages[rows].expand(-1, 6),
                mask[rows],
                ref_logp=old[rows],
                beta=0.1,
                denominator=mask.sum(),
            )
            loss.backward()
            for name, value in metrics.items():
                total[name] = total.get(name, 0) + value
        results.append((logp.grad, total))
    for gradient, total in results[1:]:
        torch.testing.assert_close(gradient, results[0][0], rtol=1e-6, atol=1e-8)
        assert total == pytest.approx(results[0][1], rel=1e-5), (
            "metrics of micro-batches add up to the step's"
        )


def test_a_step_makes_good_actions_likelier_and_bad_ones_less():
    for advantage in (1.0, -1.0):
        logits = torch.zeros(1, 1, 5, requires_grad=True)
        logp = logits.log_softmax(-1)[..., 2]
        loss, _ = hybrid_loss(
            logp, logp.detach(), torch.full((1, 1), advantage), torch.tensor([[True]])
        )
        loss.backward()
        after = (logits - 0.1 * logits.grad).log_softmax(-1)[0, 0, 2]
        assert (after > logp).item() == (advantage > 0)


# --- Advantages -------------------------------------------------------------------------------------------------
def test_advantages_by_hand():
    got = group_advantages(torch.tensor([0.0, 10.0, 5.0, 5.0]), torch.tensor([7, 7, 3, 7]), 1e-6)
    sigma = math.sqrt((25 + 25 + 0) / 3)  # of 0, 10, 5 around 5
    assert got.tolist() == pytest.approx([-5 / sigma, 5 / sigma, 0.0, 0.0], rel=1e-5)


def test_equal_groups_single_episodes_and_rounding_residues_give_exactly_zero():
    residue = sum([0.1] * 10)  # 0.9999999999999999
    for returns in ([3.0, 3.0, 3.0], [1.0, residue, 1.0], [-100.0] * 3, [0.0] * 3):
        assert (
            group_advantages(torch.tensor(returns, dtype=torch.float64), torch.zeros(3)).tolist()
            == [0.0] * 3
        )
    assert group_advantages(torch.tensor([42.0]), torch.tensor([0])).tolist() == [0.0]


def test_one_episode_of_many_turns_counts_once():
    """Statistics over episodes, never over turns: lengths 1 and 3 with returns 0 and 10 give -1 and +1."""
    short, long = drawn_episode(turns=1), drawn_episode(turns=3)
    long.turns[0].reward, long.turns[2].reward = 4.0, 6.0
    returns = [empo2.intrinsic_return(e, 0.0) for e in (short, long)]
    assert group_advantages(returns, [0, 0], 0.0).tolist() == [-1.0, 1.0]


def test_intrinsic_reward_is_part_of_the_return():
    e = drawn_episode(turns=2)
    e.turns[0].reward, e.turns[0].novelty, e.turns[1].novelty = 3.0, 1.0, 0.5
    assert [empo2.intrinsic_return(e, c) for c in (0.0, 1.0, 2.0)] == [3.0, 4.5, 6.0]


# --- The drawn trajectory ---------------------------------------------------------------------------------------
def drawn_episode(turns=3):
    """Prompt 1, header 5; turn t: observation 10+t, tips 90+t, action (20+t, 29), behaviour log-probs -t."""
    return Episode(
        "task",
        0,
        0,
        [1],
        [5],
        "text",
        [
            Turn(
                [10 + t],
                [90 + t] if t else [],
                [20 + t, 29],
                [-float(t)] * 2,
                {"tips": ["x"] * bool(t)},
            )
            for t in range(turns)
        ],
    )


def test_the_drawn_trajectory_and_its_literal_masks():
    """Turn 0 without memory, turn 1 with memory on-policy, turn 2 with memory off-policy."""
    e = drawn_episode()
    e.turns[2].offpolicy = True
    plain, on_policy, off_policy = trained_actions(e, 0.5, Settings())
    assert plain == ([1, 10, 5], [20, 29], [0.0, 0.0], 0.5, False)
    assert on_policy == ([1, 10, 5, 20, 29, 11, 91, 5], [21, 29], [-1.0, -1.0], 0.5, False), (
        "its own tips, no others"
    )
    assert off_policy == (
        [1, 10, 5, 20, 29, 11, 5, 21, 29, 12, 5],
        [22, 29],
        [-2.0, -2.0],
        0.5,
        True,
    ), "no tips at all"
    assert not any(turn[-1] for turn in trained_actions(e, 0.5, Settings(denominator="tips")))


@pytest.mark.parametrize("q", [0.0, 1.0])
def test_q_0_and_q_1(q):
    e = drawn_episode(200)
    empo2.draw_update_modes([e], Settings(offpolicy_prob=q), np.random.default_rng(0))
    assert {t.offpolicy for t in e.turns[1:]} == {bool(q)} and not e.turns[0].offpolicy


@pytest.mark.parametrize("level, distinct_in_episode", [("turn", 2), ("episode", 1), ("batch", 1)])
def test_update_modes_are_drawn_at_their_level(level, distinct_in_episode):
    episodes = [drawn_episode(100) for _ in range(50)]
    empo2.draw_update_modes(
        episodes, Settings(mode_level=level, offpolicy_prob=0.6), np.random.default_rng(0)
    )
    drawn = [{t.offpolicy for t in e.turns[1:]} for e in episodes]
    assert {len(d) for d in drawn} == {distinct_in_episode}
    assert len(set.union(*drawn)) == (1 if level == "batch" else 2)
    if level == "turn":
        share = np.mean([t.offpolicy for e in episodes for t in e.turns[1:]])
        assert share == pytest.approx(0.6, abs=0.03)


# --- Rolling out with toy classes -------------------------------------------------------------------------------
class ToyPolicy:
    """Every id is a character; an action is always "go"; remembers what it was shown."""

    header, stop_ids = [ord("A")], [ord("o")]

    def __init__(self):
        self.shown = []

    def forget(self):
        """A cache would be emptied here."""

    def message(self, role, text):
        return [ord(c) for c in f"<{role[0]}:{text}>"]

    def closing(self, action):
        return [ord("|")]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def sample(self, contexts, max_tokens, **_):
        self.shown += [self.decode(c) for c in contexts]
        return [[ord("g"), ord("o")] for _ in contexts], [[-1.0, -2.0] for _ in contexts]


class ToyEnv:
    """Four turns, one point each; variation 9 crashes at the second turn."""

    def reset(self, task, variation):
        self.t, self.variation = 0, variation
        return "start", {"prompt": "P", "task": f"T-{task}", "score": 0}

    def step(self, action):
        self.t += 1
        if self.variation == 9 and self.t == 2:
            raise ZeroDivisionError
        return f"seen{self.t}", 1.0, self.t == 4, False, {"score": self.t, "action": action}


def play(s, jobs=None, tips=("old tip",), rng_seed=0):
    policy, store, embed = (
        ToyPolicy(),
        memory.TipMemory(threshold=0.0),
        lambda texts: np.ones((len(texts), 1)),
    )
    for tip in tips:
        store.add([1.0], tip, 1, "task/0")
    jobs = jobs or [("task", 0, 0)] * 5
    waves = list(
        empo2.rollout(
            policy,
            [ToyEnv() for _ in range(3)],
            jobs,
            store,
            memory.NoveltyStore(),
            embed,
            s,
            np.random.default_rng(rng_seed),
            ZeroDivisionError,
        )
    )
    episodes = [e for wave in waves for e in wave]
    return policy, store, episodes, len(jobs) - len(episodes)


def test_tips_are_shown_only_at_the_turn_they_were_retrieved_for():
    policy, _, episodes, _ = play(Settings(memory_prob=0.5))
    for shown in policy.shown:
        assert shown.count("old tip") <= 1 and (
            "old tip" not in shown or shown.endswith("old tip>A")
        )
    modes = [bool(t.tips) for e in episodes for t in e.turns]
    assert len(episodes) == 5 and len(modes) == 20 and 0 < sum(modes) < 20
    assert all(sum(t.reward for t in e.turns) == e.score == 4 for e in episodes)


@pytest.mark.parametrize("level", ["turn", "episode", "batch"])
def test_rollout_modes_are_drawn_at_their_level(level):
    drawn = [
        [
            {bool(t.tips) for t in e.turns}
            for e in play(Settings(memory_prob=0.5, mode_level=level), rng_seed=seed)[2]
        ]
        for seed in range(20)
    ]
    mixed_episodes = any(len(modes) == 2 for batch in drawn for modes in batch)
    mixed_batches = any(len(set.union(*batch)) == 2 for batch in drawn)
    assert (mixed_episodes, mixed_batches) == {
        "turn": (True, True),
        "episode": (False, True),
        "batch": (False, False),
    }[level]


def test_nothing_retrieved_is_mode_1_and_p_0_never_asks():
    assert not any(t.tips for e in play(Settings(memory_prob=1.0), tips=())[2] for t in e.turns)
    assert not any(t.tips for e in play(Settings(memory_prob=0.0))[2] for t in e.turns)
    assert all(t.tips for e in play(Settings(memory_prob=1.0))[2] for t in e.turns)


def test_a_crashed_simulator_drops_its_episode_and_only_that():
    _, _, episodes, dropped = play(
        Settings(), jobs=[("task", 0, 0), ("task", 9, 0), ("task", 0, 0), ("task", 9, 1)]
    )
    assert dropped == 2 and len(episodes) == 2 and all(len(e.turns) == 4 for e in episodes)


def test_context_limits():
    s = Settings(memory_prob=1.0, action_tokens=2)
    whole = len(play(s)[2][0].dialogue(3, tips=True)) + 2
    episodes = play(dataclasses.replace(s, context=whole - 30))[2]
    assert all(e.ended == "context full" or not e.turns[3].tips for e in episodes), (
        "tips give way first"
    )
    assert {e.ended for e in play(dataclasses.replace(s, context=40))[2]} == {"context full"}
    assert all(
        e.turns and all(t.action for t in e.turns)
        for e in play(dataclasses.replace(s, context=40))[2]
    )
    with pytest.raises(ValueError, match="no room for even one turn"):
        play(dataclasses.replace(s, context=10))


def test_a_tip_is_written_from_the_whole_tip_free_episode_and_stored_with_its_score():
    s = Settings(memory_prob=1.0)
    policy, store, episodes, _ = play(s)
    policy.shown.clear()
    empo2.write_tips(policy, episodes, store, lambda texts: np.ones((len(texts), 1)), s)
    assert all(
        "old tip" not in shown and "seen3" in shown and "seen4" in shown and " 4 of 100" in shown
        for shown in policy.shown
    )
    slot = store.slots["task/0"]
    assert (
        slot["texts"] == ["old tip", "go"]
        and slot["scores"] == [1.0, 4.0]
        and episodes[0].tip == "go"
    )


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("memory_scope", "variation", "task/0"),
        ("memory_scope", "task", "task"),
        ("memory_scope", "all", "all"),
    ],
)
def test_memory_scope(option, value, expected):
    assert empo2.memory_slot(drawn_episode(), value) == expected


def test_memory_key():
    e = drawn_episode()
    assert (
        empo2.memory_text(e, "a room", "state") == "text\na room"
        and empo2.memory_text(e, "a room", "task") == "text"
    )


def test_settings_refuse_nonsense():
    for wrong in ({"memory_prob": 1.5}, {"group_size": 0}, {"min_prob": -1}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


def test_the_examples_in_the_docstrings():
    for module in (empo2, memory):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
