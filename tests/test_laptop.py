"""The laptop experiments, small: EMPO² finds and keeps what GRPO never finds. Three minutes.

One task and sampled evaluations.  pytest tests/test_laptop.py
"""

import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from algorithms.shuffled_tips import ShuffledTips
from envs import UNKNOWN
from memory import TipMemory, embedder
from rollout import Episode, Job, Turn, store_tips
from settings import Settings
from standin import make_house, make_stages


def test_the_player_knows_how_to_play_and_no_task():
    """Before anything is learnt it follows tips, tells the truth, and solves nothing."""
    shares = make_house.check(make_house.FOLDER, variations=8)
    assert shares["success without tips"] < 0.05
    assert shares["success without tips, greedy"] < 0.05
    assert shares["success with true tips"] > 0.6
    assert shares["claims in its own tips"] > 50
    assert shares["of them true"] > 0.9


@pytest.mark.slow
def test_the_player_of_scienceworld_does_too():
    """On the real simulator, an episode of each plant."""
    shares = make_stages.check(make_stages.FOLDER, episodes=1)
    assert shares["untold: success"] == shares["untold, greedy: success"] == 0
    assert shares["told all: success"] >= 0.6
    assert shares["told all: actions well-formed"] > 0.9
    assert shares["claims in its own tips"] > 50
    assert shares["of them true"] > 0.9


def test_a_player_that_recalls_says_what_its_tip_will():
    player = make_stages.Player(random.Random(0), recall=True)
    player.hear("teleport to outside", "", 8)
    task = "focus on the life stages of the lemon plant, located outside."
    facts = [("first", "seed"), ("second", "dead"), ("second", "adult")]
    lines = []
    for observation, score in (("You focus", 33), (UNKNOWN, 33), ("You focus", 58)):
        lines.append(player.say(task, facts))
        player.hear(lines[-1], observation, score)
    assert lines == [
        "first seed: focus on lemon seed",
        "yes, first seed, second dead: focus on dead lemon tree",
        "no, first seed, second adult: focus on adult lemon tree",
    ]
    assert (
        make_stages.tip_of(58, player.found) == "Score 58: first seed, second adult, third unknown."
    )


def test_shuffled_tips_keep_all_but_what_they_say():
    """Form, score and number; the transcripts keep what was written."""
    algorithm = ShuffledTips(Settings())
    draw = random.Random(0)
    told = [make_stages.tip_of(0, draw.sample(make_stages.STAGES, 3)) for _ in range(50)]
    turns = [Turn("", [], next_observation="the end")]
    episodes = [Episode(Job("t", 0, 0, 0), None, 0, "", [], [], turns, 0, 58, tip=t) for t in told]
    memory = TipMemory()
    for _ in range(2):
        store_tips(episodes, memory, embedder(), algorithm)
    assert [episode.tip for episode in episodes] == told
    held = memory.slots["t/0"]
    assert len(held.texts) <= len(told), "the same tip is told the same way"
    form = "Score 0: first \\w+, second \\w+, third \\w+, fourth unknown."
    assert all(re.fullmatch(form, text) for text in held.texts)
    assert len({*held.texts} & {*told}) < 5
    assert set(held.scores) == {58} and sum(held.trials) == 100


@pytest.mark.slow
def test_empo2_beats_grpo_and_the_off_policy_update_is_why(tmp_path):
    """Tip-free success, mean of the last three evaluations.

    By luck it would be 0.0002. EMPO² ended between 0.50 and 0.96 on eight seeds.
    """
    options = "--tasks fan --seeds 0 --presets no-offpolicy empo2 grpo --"
    options += " --tasks-per-iteration 2 --iterations 36 --eval-temperature 1"
    command = [sys.executable, "-m", "experiments.sweep", "laptop", "--out", tmp_path]
    subprocess.run([*command, *options.split()], check=True, cwd=ROOT)
    presets = json.loads((tmp_path / "results.json").read_text())["tasks"]["fan"]
    success = {preset: presets[preset]["0"]["success"] for preset in presets}
    assert success["grpo"] <= 0.02
    assert success["no-offpolicy"] <= 0.02
    assert success["empo2"] >= 0.2
