"""The examples of algorithms/, worked by hand.     pytest tests/test_algorithms.py"""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from toys import Bag, KnownOrder, drawn_episode

import empo2
import rollout
import train
from algorithms import dr_grpo, gigpo, gspo, mode_credit, sdpo
from empo2 import Algorithm, Batch
from engine import runs
from envs import UNKNOWN, Env, EnvFault, make
from rollout import Episode, Job, Turn

STEPS = ([2, 0], [3, 1], [4])  # episodes of each optimiser step, in the order of KnownOrder
GROUPS = [0, 1, 0, 0, 0]  # episode 1 has nobody to be compared with
REWARDS = [[6], [1, 4], [0, 0, 1], [0, 2], [7]]
GAINS = [2, 0, -3, -2, 3]  # R - mean R: 6, 1, 2 and 7 around 4


# --- An update, against its definition ------------------------------------------------------------
def some_episodes():
    """Five, of one turn more than they have rewards; actions of two to four tokens."""
    draw = np.random.default_rng(3)
    episodes = []
    for group, rewards in zip(GROUPS, REWARDS, strict=True):
        actions = [[*draw.integers(20, 26, draw.integers(1, 4)).tolist(), 9] for _ in range(4)]
        episodes.append(drawn_episode(1 + len(rewards), group, rewards, actions))
        for turn in episodes[-1].turns:
            turn.logps = [-2.0] * len(turn.action_ids)
    return episodes


def clipped(ratio, a, s):
    return torch.minimum(ratio * a, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * a)


def plain_update(bag, episodes, s, lr, term, denominator):
    """Action by action, unpacked -> the sum of all terms.

    term(logp, old_logp, i, t): what is maximised of action t of episode i, for each token or once.
    denominator(turns): of a step with these turns.
    """
    old = [[bag.of_turn(e, t).detach() for t in range(len(e.turns))] for e in episodes]
    total = 0.0
    for step in STEPS:
        objective = 0.0
        turns = []
        for i in step:
            for t, turn in enumerate(episodes[i].turns):
                logp = bag.of_turn(episodes[i], t)
                log_ref_ratio = bag.of_turn(episodes[i], t, reference=True) - logp
                kl = log_ref_ratio.exp() - 1 - log_ref_ratio
                of_action = term(logp, old[i][t], i, t)
                if of_action.dim() == 0:  # the action counts once, and so does its mean KL
                    kl = kl.mean()
                objective += (of_action - s.beta * kl).sum()
                turns.append(turn)
        (gradient,) = torch.autograd.grad(-objective / denominator(turns), bag.weight)
        with torch.no_grad():
            bag.weight -= lr * gradient
        total += objective.item()
    return total


def check_update(algorithm, episodes, lr, term, denominator):
    """`update` does the same to the weights, and says the same loss, over three steps."""
    s = algorithm.s
    bag, plain = Bag(torch.float64), Bag(torch.float64)
    before = bag.weight.detach().clone()
    sgd = torch.optim.SGD([bag.weight], lr)
    metrics = empo2.update(bag, sgd, episodes, algorithm, KnownOrder())
    total = plain_update(plain, episodes, s, lr, term, denominator)
    moved = bag.weight - before
    torch.testing.assert_close(moved, plain.weight - before, rtol=1e-5, atol=1e-7)
    assert moved.abs().max() > 0.01 and metrics["optimizer_steps"] == 3
    learnt = [t for e in episodes for t in e.turns if any(t.pair.advantages) or s.beta]
    tokens = sum(len(turn.action_ids) for turn in learnt)
    assert metrics["loss"] == pytest.approx(-total / tokens, rel=1e-5)
    assert metrics["approx_kl"] > 1e-5 and 0 < metrics["clipfrac"] < 1  # ratios have left 1


def tokens_of(turns):
    return sum(len(turn.action_ids) for turn in turns)


def options(**more):
    """Two episodes a step, no mask, and rows of several actions in several micro-batches."""
    return {
        "minibatch_episodes": 2,
        "micro_tokens": 40,
        "min_prob": 0.0,
        "max_grad_norm": 9.0,
        **more,
    }


@pytest.mark.parametrize("beta, pack", [(0.0, "episode"), (0.02, "group")])
def test_dr_grpo(beta, pack):
    """No σ, and each token counts the same: also in the last step, of one episode."""
    s = dr_grpo.Settings(**options(beta=beta, pack=pack, token_budget=12, clip_high=0.01))

    def term(logp, old, i, t):
        return clipped((logp - old).exp(), GAINS[i] / 100, s)

    check_update(dr_grpo.DrGRPO(s), some_episodes(), 60.0, term, lambda turns: 2 * 12)


CLIP_RANGES = [{}, {"clip_low": 0.01, "clip_high": 0.02}]


@pytest.mark.parametrize("beta, pack", [(0.0, "episode"), (0.2, "group")])
@pytest.mark.parametrize("clip", CLIP_RANGES)
def test_gspo(clip, beta, pack):
    """One ratio, one clip and one weight per action; those without an advantage count in n."""
    s = gspo.Settings(**options(beta=beta, pack=pack, **clip))
    if not clip:
        assert (s.clip_low, s.clip_high) == (3e-4, 4e-4)

    def term(logp, old, i, t):
        return clipped((logp - old).mean().exp(), GAINS[i] / math.sqrt(26 / 4), s)

    check_update(gspo.GSPO(s), some_episodes(), 0.5, term, len)


# --- Credit within the mode -----------------------------------------------------------------------
def test_episodes_with_tips_are_compared_with_each_other_too():
    """Returns 10 and 6 with tips, -4 and -12 without; another group of one episode."""
    returns = {(0, True): [10.0, 6.0], (0, False): [-4.0, -12.0], (1, True): [3.0]}
    episodes = []
    for (group, tips), scores in returns.items():
        for score in scores:
            episode = drawn_episode(2, group, [score])
            if not tips:
                episode.turns[1].shown_ids = []
            episodes.append(episode)
    s = mode_credit.Settings(mode_weight=0.5, advantage_eps=1.0, intrinsic_coef=0.0)
    got = mode_credit.ModeCredit(s).advantages(episodes)
    sigma = math.sqrt((100 + 36 + 16 + 144) / 4) + 1  # around 0
    expected = [10 / sigma + 0.5 * 2 / 3, 6 / sigma - 0.5 * 2 / 3]
    expected += [-4 / sigma, -12 / sigma, 0.0]
    assert got == [[pytest.approx(a, abs=1e-6)] * 2 for a in expected]


def test_a_token_of_gspo_has_the_share_of_its_action():
    """Two actions in a row, of two tokens and of one: value and gradient."""
    s = gspo.Settings(clip_low=0.1, clip_high=0.1)
    old = torch.tensor([[0.0, -1.0, -1.0, 0.0, -1.0]], dtype=torch.float64)
    logp = torch.tensor([[9.0, -0.8, -1.1, 9.0, -1.2]], dtype=torch.float64, requires_grad=True)
    action_of = torch.tensor([[-1, 0, 0, -1, 1]])
    a = torch.tensor([[0.0, 2.0, 2.0, 0.0, 3.0]], dtype=torch.float64)
    batch = Batch(None, action_of >= 0, action_of, old, a)
    losses, metrics = gspo.GSPO(s).loss(batch, logp)
    first, second = math.exp((0.2 - 0.1) / 2), math.exp(-0.2)  # neither is clipped: A > 0
    expected = [[0, -first, -first, 0, -3 * second]]
    assert losses.tolist() == [pytest.approx(row) for row in expected]
    losses.sum().backward()
    assert logp.grad.tolist() == [pytest.approx(row) for row in expected]
    assert metrics["ratio"] == pytest.approx(2 * first + second)


def teach(episodes):
    """Turns that retrieved tips; the one after has none."""
    for e in episodes:
        for t, turn in enumerate(e.turns):
            turn.retrieved, turn.retrieved_ids = (["tip"], [30 + t]) if t else ([], [])
            turn.shown_ids = []
    return episodes


@pytest.mark.parametrize("beta, pack", [(0.0, "episode"), (0.2, "group")])
def test_sdpo(beta, pack):
    """The advantage of a token is what tips would have added to its log-prob, before the update."""
    s = sdpo.Settings(**options(beta=beta, pack=pack, clip_low=0.02))
    episodes = teach(some_episodes())
    old = Bag(torch.float64)
    a = {}
    for i, e in enumerate(episodes):
        for t, turn in enumerate(e.turns):
            teacher = old.of_action(e.prompt(t, turn.retrieved_ids), turn.action_ids)
            a[i, t] = (teacher - old.of_turn(e, t)).detach()
            assert t == 0 or a[i, t].abs().min() > 1e-4
    assert len({value.item() for value in a[0, 1]}) > 1  # per token

    def term(logp, old_logp, i, t):
        return clipped((logp - old_logp).exp(), a[i, t], s)

    algorithm = sdpo.SDPO(s)
    check_update(algorithm, episodes, 2.0, term, tokens_of)
    taught = torch.cat([value for (_, t), value in a.items() if t])
    expected = {"taught_turns": 9, "teacher_kl": -taught.mean().item()}
    assert algorithm.metrics(episodes) == pytest.approx(expected, rel=1e-5)
    untaught = [drawn_episode(1)]
    empo2.update(Bag(), torch.optim.SGD([torch.ones(1)]), untaught, algorithm, KnownOrder())
    assert algorithm.metrics(untaught) == {"taught_turns": 0, "teacher_kl": None}
    never = teach([drawn_episode(2)])  # without an update: --learning-rate 0
    assert algorithm.metrics(never) == {"taught_turns": 0, "teacher_kl": None}


def test_sdpo_samples_without_tips_and_learns_what_they_say(tmp_path):
    """Retrieved, never shown; every turn that tips were found for has a teacher."""
    played = small_run(tmp_path, "sdpo")
    metrics = runs.records(tmp_path / "run" / "metrics.jsonl")
    assert [m["tips_shown"] for m in metrics] == [0, 0]
    assert metrics[0]["taught_turns"] == 0 and metrics[1]["taught_turns"] == metrics[1]["turns"]
    assert metrics[0]["optimizer_steps"] == 0 < metrics[1]["optimizer_steps"]
    assert metrics[1]["memory_size"] > 0 and metrics[1]["teacher_kl"] > 0
    assert all(not turn["tips"] for e in played for turn in e["turns"])
    for name in ("taught_turns", "teacher_kl"):
        assert f"`{name}`" in (ROOT / "docs" / "metrics.md").read_text()


def small_run(tmp_path, algorithm):
    """Two iterations in the house -> the episodes."""
    command = f"""--algorithm {algorithm} --env house --tasks radio fan --step-limit 6
        --env-options rooms=6 containers=3 parts=2 --variations 1 --action-tokens 16 --lora-r 2
        --group-size 5 --tasks-per-iteration 2 --model standin/house --eval-every 0
        --iterations 2"""
    assert train.main([*command.split(), "--run-dir", str(tmp_path / "run")]) == 0
    return runs.records(tmp_path / "run" / "episodes.jsonl")


# --- GiGPO ----------------------------------------------------------------------------------------
def walk(states, rewards, group=0):
    """An episode whose actions were taken in these states, a letter each."""
    episode = Episode(Job("task", 0, group, 0), None, 0, "text", [], [])
    for t, (state, reward) in enumerate(zip(states, rewards, strict=True)):
        episode.turns.append(Turn(f"o{t}", [], anchor=state, reward=reward))
    return episode


def test_advantages_by_hand():
    """A state met twice by one episode, states met once, equal returns, tips, another group."""
    long = walk("abac", [0, 0, 0, 8])  # return 8; R_t 1, 2, 4, 8
    short = walk("ac", [3, 8])  # return 12 with the intrinsic reward; R_t 7, 8
    short.turns[1].novelty = 0.5
    short.turns[0].shown, short.turns[0].shown_ids = ["tip"], [1]
    alone = walk("a", [99], group=1)
    episodes = [long, alone, short]
    own = {"step_weight": 2, "discount": 0.5, "intrinsic_coef": 2}
    # Returns 8 and 12: 2 / (2 + 2). In state a: 1, 4 and 7, around 4. In state c: 8 and 8.
    step = 2 * 3 / (math.sqrt(6) + 2)
    with_std = [[-0.5 - step, -0.5, -0.5, -0.5], [0], [0.5 + step, 0.5]]
    fixed = [[-0.2 - 0.6, -0.2, -0.2, -0.2], [0], [0.2 + 0.6, 0.2]]
    for eps, std, expected in ((2, 0, with_std), (5, 10, fixed)):
        s = gigpo.Settings(**own, advantage_eps=eps, fixed_std=std)
        algorithm = gigpo.GiGPO(s)
        for ours, theirs in zip(algorithm.advantages(episodes), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
    assert algorithm.metrics(episodes) == {"shared_states": 5 / 7}


def test_without_weight_it_is_grpo_to_the_last_bit():
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(24):
        length = rng.integers(1, 9)
        states = rng.choice(list("abc"), length)
        episodes.append(walk(states, rng.normal(size=length), number // 8))
    s = gigpo.Settings(step_weight=0)
    assert gigpo.GiGPO(s).advantages(episodes) == Algorithm(s).advantages(episodes)


def test_gigpo():
    """All begin in one state; the others are met once. R_t with a discount of a half."""
    own = {"step_weight": 2, "discount": 0.5, "fixed_std": 10}
    s = gigpo.Settings(**options(**own, clip_low=0.02, clip_high=0.02))
    episodes = some_episodes()
    for i, e in enumerate(episodes):
        for t, turn in enumerate(e.turns):
            turn.anchor = f"{i}, {t}" if t else "start"
    mean = (6 + 0.25 + 1 + 7) / 4  # of R_0 in group 0
    of_start = [6 - mean, 0, 0.25 - mean, 1 - mean, 7 - mean]

    def term(logp, old, i, t):
        a = GAINS[i] / 10 + (2 * of_start[i] / 10 if t == 0 else 0)
        return clipped((logp - old).exp(), a, s)

    check_update(gigpo.GiGPO(s), episodes, 2.0, term, tokens_of)


def anchors(env, variation, actions):
    """The names of the states that these actions are taken in, and of the last one."""
    env.reset("radio", variation)
    found = [env.anchor()]
    for action in actions:
        env.step(action)
        found.append(env.anchor())
    return found


def test_a_state_of_the_house_is_what_has_been_done_not_how_or_what_was_answered():
    env = make("house", parts=1, step_limit=50)
    env.reset("radio", 0)
    home, path = f"go to {env.room}", env.gold_path()
    part, thing = path[:3], path[3:6]  # go there, open, take
    nothing = ["dance", "look around", "inventory", "take nothing"]
    states = anchors(env, 0, [*nothing, part[0], *nothing, part[1], *nothing, part[2]])
    assert [states.count(state) for state in dict.fromkeys(states)] == [5, 5, 5, 1]
    one = anchors(env, 0, [*part, *thing, home])
    other = anchors(env, 0, [*thing, *part, home])
    assert one[0] == other[0] and one[-1] == other[-1]
    assert len({*one, *other}) == 8 + 8 - 2
    opened_there = anchors(env, 0, [part[0], "open box", home])
    assert anchors(env, 0, ["open box"])[-1] != opened_there[-1]


def test_the_default_is_the_last_observation_that_was_understood():
    env = make("house")
    first, _ = env.reset("fan", 1)
    assert env.step("fly")[0] == UNKNOWN and Env.anchor(env) == first
    assert env.step("look around")[0] == Env.anchor(env) != first
    assert env.reset("radio", 0)[0] == Env.anchor(env)


def test_a_step_notes_the_state_before_it_if_asked_and_a_fault_of_asking_is_a_lost_episode(
    monkeypatch,
):
    def die():
        raise EnvFault("died")

    env = make("house")
    env.reset("fan", 0)
    before = env.anchor()
    assert rollout.step(env, "open box", EnvFault, anchored=True)[4]["anchor"] == before
    monkeypatch.setattr(env, "anchor", die)
    assert rollout.step(env, "look around", EnvFault)[4]["anchor"] == ""
    assert rollout.step(env, "look around", EnvFault, anchored=True) is None


def test_a_run(tmp_path):
    """Its preset comes with its name."""
    played = small_run(tmp_path, "gigpo")
    metrics = runs.records(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < m["shared_states"] < 1 and m["optimizer_steps"] for m in metrics)
    assert "`shared_states`" in (ROOT / "docs" / "metrics.md").read_text()
    assert any(len({turn["advantage"] for turn in e["turns"]}) > 1 for e in played)
    saved, _ = runs.read_checkpoint(tmp_path / "run" / "checkpoint-2")
    assert (saved.preset, saved.fixed_std, saved.step_weight) == ("gigpo", 10.0, 1.0)
