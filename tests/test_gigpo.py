"""Credit per step, against advantages worked by hand.     pytest tests/test_gigpo.py"""

import math

import numpy as np
import pytest
from conftest import ROOT

import rollout
import train
from algorithms.gigpo import gigpo_advantages, shared_states
from empo2 import grpo_advantages
from engine import runs
from envs import UNKNOWN, Env, EnvFault, make
from rollout import Episode, Job, Turn
from settings import Settings


def drawn_episode(states, rewards, group=0):
    """An episode whose actions were taken in these states, a letter each."""
    episode = Episode(Job("task", 0, group, 0), None, 0, "text", [], [])
    for t, (state, reward) in enumerate(zip(states, rewards, strict=True)):
        episode.turns.append(Turn(f"o{t}", [], anchor=state, reward=reward))
    return episode


def test_advantages_by_hand():
    """A state met twice by one episode, states met once, equal returns, tips, another group."""
    long = drawn_episode("abac", [0, 0, 0, 8])  # return 8; R_t 1, 2, 4, 8
    short = drawn_episode("ac", [3, 8])  # return 12 with the intrinsic reward; R_t 7, 8
    short.turns[1].novelty = 0.5
    short.turns[0].tips, short.turns[0].tip_ids = ["tip"], [1]
    alone = drawn_episode("a", [99], group=1)
    episodes = [long, alone, short]
    assert shared_states(episodes) == 5 / 7
    s = Settings(step_weight=2, discount=0.5, intrinsic_coef=2, advantage_eps=2)
    # Returns 8 and 12: 2 / (2 + 2). In state a: 1, 4 and 7, around 4. In state c: 8 and 8.
    step = 2 * 3 / (math.sqrt(6) + 2)
    expected = [[-0.5 - step, -0.5, -0.5, -0.5], [0], [0.5 + step, 0.5]]
    for ours, theirs in zip(gigpo_advantages(episodes, s), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    s = Settings(step_weight=2, discount=0.5, intrinsic_coef=2, advantage_eps=5, fixed_std=10)
    expected = [[-0.2 - 0.6, -0.2, -0.2, -0.2], [0], [0.2 + 0.6, 0.2]]
    for ours, theirs in zip(gigpo_advantages(episodes, s), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_an_action_that_is_not_understood_is_compared_with_the_next_one():
    """The state stays; what came before is not blamed."""
    episode = drawn_episode("zaa", [0, 0, 8])  # R_t 2, 4, 8, of which 4 becomes 2
    episode.turns[1].next_observation = UNKNOWN
    other = drawn_episode("z", [2])
    s = Settings(step_weight=1, discount=0.5, invalid_penalty=2, fixed_std=10)
    (before, failed, better), (equal,) = gigpo_advantages([episode, other], s)
    assert (before, equal) == pytest.approx((0.3, -0.3))  # 8 and 2, around 5
    assert (failed, better) == pytest.approx((0.3 - 0.3, 0.3 + 0.3))  # 2 and 8, around 5


def test_without_weight_it_is_grpo_to_the_last_bit():
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(24):
        length = rng.integers(1, 9)
        states = rng.choice(list("abc"), length)
        episodes.append(drawn_episode(states, rng.normal(size=length), number // 8))
    s = Settings(invalid_penalty=3)
    assert gigpo_advantages(episodes, s) == grpo_advantages(episodes, s)


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
    run_dir = tmp_path / "run"
    command = """--preset gigpo --env house --tasks radio fan --step-limit 6
        --env-options rooms=6 containers=3 parts=2 --variations 1 --action-tokens 16 --lora-r 2
        --group-size 5 --tasks-per-iteration 2 --model standin --eval-every 0 --iterations 2"""
    assert train.main([*command.split(), "--run-dir", str(run_dir)]) == 0
    metrics = runs.records(run_dir / "metrics.jsonl")
    assert all(0 < m["shared_states"] < 1 and m["optimizer_steps"] for m in metrics)
    assert "`shared_states`" in (ROOT / "docs" / "metrics.md").read_text()
    played = runs.records(run_dir / "episodes.jsonl")
    assert any(len({turn["advantage"] for turn in e["turns"]}) > 1 for e in played)
