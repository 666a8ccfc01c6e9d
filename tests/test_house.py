"""The house: what is drawn, what is hidden, what is scored. No Java, instant.

python -m pytest tests/test_house.py
"""

import pytest

from envs import UNKNOWN, make
from worlds.house import House

LAPTOP = {"rooms": 12, "containers": 6, "parts": 2, "step_limit": 10}
LONG = LAPTOP | {"step_limit": 100}


@pytest.mark.parametrize("options", [{}, LAPTOP])
def test_layout_is_a_function_of_task_and_variation(options):
    """Same task and variation: same everything. Another variation: same hiding places only."""

    def layout(task, variation):
        env = make("house", **options)
        return env.reset(task, variation), env.hiding, env.inside, env.room

    for task in House.THINGS:
        layouts = [layout(task, variation) for variation in range(16)]
        assert layouts[3] == layout(task, 3)
        _, hiding, inside, room = zip(*layouts)
        assert all(places == hiding[0] for places in hiding)
        assert len(set(room)) > 1
        assert any(content != inside[0] for content in inside)
    assert layout("fan", 0)[1]["fan"] != layout("radio", 0)[1]["radio"]


def test_draws_never_change():
    """A frozen example: results recorded earlier stay comparable."""
    env = make("house", **LAPTOP)
    env.reset("radio", 0)
    places = [("garage", "box"), ("cellar", "suitcase"), ("workshop", "chest")]
    assert env.room == "bathroom"
    assert env.hiding == dict(zip(["antenna", "speaker", "radio"], places))


@pytest.mark.parametrize("options", [{"step_limit": 100}, LONG])
def test_nothing_shown_before_the_right_container_is_opened_tells_where_a_thing_is(options):
    env = make("house", **options)
    for task in env.tasks():
        start = env.reset(task, 5)[0]
        assert start.endswith(f"You need: {', '.join(env.hiding)}.")
        for room in env.rooms:
            shown = env.step(f"go to {room}")[0] + env.step("look around")[0]
            assert not any(thing in shown for thing in env.hiding)
        for thing in env.hiding:
            assert env.step(f"take {thing}")[0] == UNKNOWN
            assert env.step(f"turn on {thing}")[0] == UNKNOWN


WITH_PARTS = [0, 8, 16, 16, 24, 32, 32, 40, 48, 100]
GOLD_SCORES = [
    ({"rooms": 4}, [0, 25, 50, 100]),
    ({"rooms": 4, "parts": 2}, WITH_PARTS),
    ({"rooms": 1, "containers": 1}, [25, 50, 100]),
    ({"partial_credit": False}, [0, 0, 0, 100]),
    (LAPTOP, WITH_PARTS),
]


@pytest.mark.parametrize(("options", "scores"), GOLD_SCORES)
def test_gold_path_solves_every_variation(options, scores):
    """The shortest way, one room a thing; nobody starts where one lies."""
    env = make("house", **options)
    for task in env.tasks():
        for variation in env.variations(task, "train"):
            env.reset(task, variation)
            assert [env.step(action)[4]["score"] for action in env.gold_path()] == scores


def test_every_part_is_needed():
    """The thing alone does not work, and the answer says what is missing."""
    env = make("house", **LONG)
    env.reset("fan", 0)
    room, box = env.hiding["fan"]
    for action in (f"go to {room}", f"open {box}", "take fan"):
        assert env.step(action)[0] != UNKNOWN
    observation, reward, terminated, _, _ = env.step("turn on fan")
    assert observation == "Nothing happens. You need: plug, blade."
    assert (reward, terminated) == (0, False)


def test_what_stands_before_a_colon_is_a_thought():
    env = make("house", **LAPTOP)
    env.reset("fan", 0)
    action = "seek fan in attic box: go to attic"
    observation, _, _, _, info = env.step(action)
    assert observation == "You are in the attic."
    assert info["action"] == "go to attic", "what was sent"


def test_other_things_do_nothing():
    """Turning on a wrong thing neither ends the episode nor changes the score."""
    env = make("house", containers=6, step_limit=100)
    env.reset("clock", 1)
    room, box = next(place for place, x in env.inside.items() if x in House.JUNK)
    thing = env.inside[room, box]
    env.step(f"go to {room}")
    assert env.step(f"open {box}")[0] == f"You open the {box}: found {thing} in {room} {box}."
    for action in (f"take {thing}", f"turn on {thing}"):
        observation, reward, terminated, _, _ = env.step(action)
        assert observation != UNKNOWN
        assert (reward, terminated) == (0, False)
    assert env.step("inventory")[0] == f"You carry: {thing}."
    assert f"The {box}: empty." in env.step("look around")[0]


@pytest.mark.parametrize("options", [{"rooms": 13}, {"containers": 0}, {"parts": 3}])
def test_impossible_houses_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        make("house", **options)
    with pytest.raises(ValueError, match="raise rooms or containers"):
        make("house", rooms=1, containers=2, parts=2)
