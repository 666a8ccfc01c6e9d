"""The contract on all environments, and playing by hand.

python -m pytest tests/test_envs.py          (under a minute; -k "not science" needs no Java)
"""

import doctest
import importlib
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import envs
from envs import UNKNOWN, Env, make

ROOT = pathlib.Path(envs.__file__).parent
TASK = {"scienceworld": "power-component", "house": "radio", "webshop": "webshop"}
HOSTILE = ["", "open " * 2_000, "\u706b a\x00b\x1b[2J", "\ud800", "-1", "reset task", "look\nlook"]


@pytest.fixture(params=["scienceworld", "house", "webshop"])
def name(request):
    if request.param == "scienceworld":
        pytest.importorskip("scienceworld")
    return request.param


@pytest.mark.parametrize("module", ["envs", "worlds.scienceworld"])
def test_the_examples_in_docstrings_are_true(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_contract(name):
    """Types, keys, rewards that sum to the score, a gold path that reaches 100, another episode."""
    env, task = make(name, step_limit=40), TASK[name]
    observation, info = env.reset(task, 0)
    assert observation
    assert info == {"task": info["task"], "prompt": info["prompt"], "score": 0}
    assert info["task"] in info["prompt"]
    assert env.valid_actions() == sorted(env.valid_actions())
    assert env.VERSION.startswith(name)
    assert set(env.DEFAULT_TASKS) <= set(env.tasks())
    total, played, terminated = 0.0, 0, False
    for action in env.gold_path():
        assert not terminated
        _, reward, terminated, truncated, info = env.step(action)
        total, played = total + reward, played + 1
        assert info == {"score": total, "action": action}
        assert (env.steps, env.score, truncated) == (played, total, False)
        if terminated:
            break
    assert terminated
    assert total == 100
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look around")
    env.reset(task, 1)
    assert (env.steps, env.score) == (0, 0)


def test_step_limit_is_exact_and_gold_path_is_no_step(name):
    """A limit of n is n actions. Asking for the solution changes neither state nor count."""
    env = make(name, step_limit=3)
    assert env.limit(TASK[name]) == 3
    assert make("house").limit("radio") == 12
    env.reset(TASK[name], 2)
    first = env.step("look around")
    env.gold_path()
    assert env.step("look around") == first
    assert not first[3]
    assert env.step("look around")[3]


def test_solving_with_the_last_action_is_not_truncation():
    env = make("house", rooms=1, step_limit=3)
    env.reset("fan", 0)
    ends = [env.step(action)[2:4] for action in env.gold_path()]
    assert ends == [(False, False), (False, False), (True, False)]


def test_any_text_is_one_harmless_line(name):
    """No text crashes a step; a newline cannot smuggle in a second action."""
    env = make(name)
    first, _ = env.reset(TASK[name], 0)
    for action in HOSTILE:
        observation, reward, terminated, _, info = env.step(action)
        assert isinstance(observation, str)
        assert (reward, terminated) == (0, False), action
        assert "\n" not in info["action"]
        info["action"].encode()
    unchanged = first if name == "webshop" else UNKNOWN
    assert observation == unchanged
    look = "search[look around]" if name == "webshop" else "look around"
    observation, _, _, _, info = env.step(look.replace(" ", " \n "))
    assert info["action"] == look
    assert observation != unchanged


def test_errors_are_one_line_and_say_what_exists(name):
    env, task = make(name), TASK[name]
    last = env.variation_count(task) - 1
    for call, hint in [
        (lambda: make("minihack"), "scienceworld, house, webshop"),
        (lambda: make(name, colour=1), "step_limit"),
        (lambda: make(name, step_limit=0), "at least 1"),
        (lambda: env.reset(task[:-2], 0), task),
        (lambda: env.reset("", 0), task),
        (lambda: env.variations(task[:-2], "train"), task),
        (lambda: env.variations(task, "validation"), "train, dev, test"),
        (lambda: env.reset(task, last + 1), f"0 to {last}"),
        (lambda: env.reset(task, "0"), f"0 to {last}"),
    ]:
        with pytest.raises(ValueError, match=hint) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look around")


def test_an_environment_without_one_of_the_six_methods_says_which():
    class Half(Env):
        tasks = variation_count = start = act = valid_actions = lambda self: []

    with pytest.raises(TypeError, match="gold_path"):
        Half()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scienceworld", None)
    monkeypatch.delitem(sys.modules, "worlds.scienceworld", raising=False)
    with pytest.raises(RuntimeError, match="package scienceworld: install"):
        make("scienceworld")


def by_hand(*arguments, text=""):
    command = [sys.executable, "envs.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, text=True, check=False
    )


def test_play_the_house_by_hand():
    """'gold' shows a solution; typing it wins."""
    env = make("house")
    env.reset("radio", 0)
    path = "\n".join(env.gold_path())
    won = by_hand("--env", "house", "--task", "radio", text=f"valid\ngold\n{path}")
    assert (won.returncode, won.stderr) == (0, "")
    assert "look around" in won.stdout and path in won.stdout
    assert "The episode is over: finished, score 100." in won.stdout


def test_play_scienceworld_by_hand():
    """Prompt, observation and score are shown; the end of the input ends the game."""
    pytest.importorskip("scienceworld")
    done = by_hand("--task", "power-component", text="go to kitchen\n")
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("turn on the red light bulb", "You move to the kitchen.", "score 7"):
        assert shown in done.stdout


def test_ctrl_c_ends_the_game_cleanly():
    command = [sys.executable, "-u", "envs.py", "--env", "house", "--task", "fan"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    while "You need" not in child.stdout.readline():
        pass
    time.sleep(0.5)  # it asks for an action
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (0, "")


def test_the_command_line_teaches():
    """--help explains; no task lists the tasks; a wrong name is one line and exit code 2."""
    assert "by hand" in by_hand("--help").stdout
    assert "power-component" in by_hand().stdout.splitlines()
    assert by_hand("--env", "house").stdout.splitlines() == make("house").tasks()
    for arguments in (
        ["--task", "power-componet"],
        ["--env", "house", "--task", "x"],
        ["--env", "webshop", "--env-options", "data=nowhere"],
        ["--env", "house", "--env-options", "rooms"],
    ):
        wrong = by_hand(*arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert len(wrong.stderr.splitlines()) == 1


def test_half_a_surrogate_pair_reaches_nobody(monkeypatch):
    env = make("house")
    monkeypatch.setattr(env, "start", lambda task, variation: ("seen \ud800", "text", "prompt"))
    monkeypatch.setattr(env, "act", lambda action: ("seen \udfff", 0, False, action))
    assert env.reset("radio", 0)[0] == "seen ?"
    assert env.step("look \ud800")[0] == "seen ?"
