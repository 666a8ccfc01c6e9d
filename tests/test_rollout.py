"""Rolling out, tips and intrinsic rewards, on toy classes.     pytest tests/test_rollout.py"""

import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import eval as evaluation
import rollout
import train
from empo2 import Algorithm, draw_update_modes
from envs import EnvFault, make
from memory import NoveltyStore, TipMemory, embedder
from policy import Policy
from rollout import Episode, Job, Turn
from settings import Settings

EMBED = embedder()
STOP = 0


class ToyPolicy:
    """Every id is a character; an action is a digit that the first uniform number decides.

    Nine is cut at the token limit.
    """

    header = [ord("A")]
    stop_ids = [STOP]

    def __init__(self):
        self.shown = []
        self.asked = []  # (temperature, most tokens of a prompt, of an answer)

    def forget(self):
        pass

    def message(self, role, text):
        return [ord(c) for c in f"<{role[0]}:{text}>"]

    def past(self, action_ids):
        return [*self.header, *action_ids, ord("|")]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != STOP)

    def sample(self, prompts, uniforms, temperature, env_indexes):
        self.shown += [self.decode(prompt) for prompt in prompts]
        for prompt, own in zip(prompts, uniforms, strict=True):
            self.asked.append((temperature, len(prompt), len(own)))
        digits = [ord("0") + int(10 * u[0]) for u in uniforms]
        actions = [[digit] if digit == ord("9") else [digit, STOP] for digit in digits]
        return actions, [[-float(len(prompt))] for prompt in prompts]


class ToyEnv:
    """Four turns, whose rewards are the digits; variation 9 crashes at the second turn."""

    @property
    def worker(self):
        return self.env_index % 2  # called from two threads

    def anchor(self):
        return f"after {self.turns}"

    def reset(self, task, variation):
        self.variation = variation
        self.turns = self.score = 0
        return "start", {"prompt": "P", "task": f"T-{task}", "score": 0}

    def step(self, action):
        self.turns += 1
        if self.variation == 9 and self.turns == 2:
            raise EnvFault("died")
        self.score += int(action)
        info = {"score": self.score, "action": f"sent {action}"}
        return f"seen{action}", float(action), self.score > 20, self.turns == 4, info


JOBS = [Job("task", 0, 0, member) for member in range(5)]


def memory_of(*tips):
    """The score of a tip is its place."""
    memory = TipMemory()
    for score, tip in enumerate(tips):
        memory.add(EMBED(["T-task\nstart"])[0], tip, score, "task/0")
    return memory


def play(jobs=JOBS, memory=None, parallel=3, seed=0, cls=Algorithm, **options):
    """(policy, episodes) of a rollout; the memory holds "old tip" unless another is given."""
    memory = memory_of("old tip") if memory is None else memory
    algorithm = cls(Settings(**options))
    if isinstance(memory, TipMemory):
        memory.order = algorithm.order_tips
    policy = ToyPolicy()
    rng = np.random.default_rng(seed)
    envs = [ToyEnv() for _ in range(parallel)]
    batches = rollout.rollout(policy, envs, jobs, memory, EMBED, algorithm, rng, EnvFault)
    return policy, [episode for batch in batches for episode in batch]


# --- Rolling out ----------------------------------------------------------------------------------
def test_an_episode_is_what_was_sampled_and_what_came_of_it():
    _, episodes = play(memory_prob=0.5, seed=1)
    assert [e.job for e in episodes] == JOBS
    assert {e.ended for e in episodes} == {"completed", "step limit"}
    for e in episodes:
        assert e.score == sum(turn.reward for turn in e.turns)
        assert e.ended == ("completed" if e.score > 20 else "step limit")
        observation = "start"
        for t, turn in enumerate(e.turns):
            digit = chr(turn.action_ids[0])
            assert (turn.observation, turn.next_observation) == (observation, f"seen{digit}")
            assert turn.action == f"sent {digit}" and turn.reward == int(digit)
            assert turn.logps == [-len(e.prompt(t, turn.shown_ids))]
            assert turn.action_cut == (digit == "9")
            observation = turn.next_observation


def test_tips_are_shown_only_at_the_turn_they_were_retrieved_for():
    policy, episodes = play(memory_prob=0.5)
    with_tips = [shown for shown in policy.shown if "old tip" in shown]
    modes = [bool(turn.shown) for e in episodes for turn in e.turns]
    assert 0 < len(with_tips) == sum(modes) < len(modes) == len(policy.shown)
    for shown in with_tips:
        assert shown.endswith("<u:Tips from earlier attempts at this task:\n- old tip>A")
        assert shown.count("old tip") == 1


@pytest.mark.parametrize(
    "score, terminated, truncated, ended",
    [
        (-100, True, False, "failed"),
        (0, True, False, "completed"),
        (100, True, True, "completed"),
        (-100, False, True, "step limit"),
        (50, False, False, ""),
    ],
)
def test_how_an_episode_ends(score, terminated, truncated, ended):
    info = {"score": score, "action": "a"}
    env = SimpleNamespace(worker=0, step=lambda action: ("o", 0.0, terminated, truncated, info))
    episode = Episode(JOBS[0], None, 0, "", [], [], [Turn("", [])])
    rollout.act(ToyPolicy(), [rollout.Playing(episode, env, "", False)], EnvFault)
    assert (episode.ended, episode.score) == (ended, score)


@pytest.mark.parametrize("level", ["turn", "episode", "batch"])
def test_rollout_modes_are_drawn_at_their_level(level):
    batches = []
    for seed in range(20):
        _, episodes = play(memory_prob=0.4, mode_level=level, seed=seed)
        batches.append([{bool(turn.shown_ids) for turn in e.turns} for e in episodes])
    assert any(len(modes) == 2 for batch in batches for modes in batch) == (level == "turn")
    assert any(len(set.union(*batch)) == 2 for batch in batches) == (level != "batch")
    assert len({frozenset(modes) for batch in batches for modes in batch}) >= 2


@pytest.mark.parametrize("level", ["turn", "episode", "batch"])
def test_p_0_never_asks_and_nothing_retrieved_is_mode_1(level):
    never = SimpleNamespace(retrieve=None)
    for p, memory in ((0.0, never), (1.0, memory_of()), (1.0, memory_of("old tip"))):
        policy, episodes = play(memory_prob=p, mode_level=level, memory=memory)
        expected = {"Tips" in shown for shown in policy.shown}
        assert {bool(turn.shown_ids) for e in episodes for turn in e.turns} == expected
        assert expected == {memory is not never and len(memory) > 0}


def test_a_crashed_simulator_drops_its_episode_and_only_that():
    jobs = [Job("task", variation, 0, 0) for variation in (0, 9, 0, 9, 0)]
    _, episodes = play(jobs)
    _, undisturbed = play()
    assert [e.turns for e in episodes] == [undisturbed[i].turns for i in (0, 2, 4)]


def test_a_simulator_that_does_not_start_is_tried_five_times():
    tries = []

    def reset(task, variation):
        tries.append(task)
        if len(tries) != 8:
            raise EnvFault("no Java")
        return "it does"

    with pytest.raises(RuntimeError, match="five times in a row: no Java"):
        rollout.reset_env(SimpleNamespace(reset=reset), JOBS[0], EnvFault)
    assert len(tries) == 5
    assert rollout.reset_env(SimpleNamespace(reset=reset), JOBS[0], EnvFault) == "it does"


def test_workers_are_called_at_the_same_time_and_each_in_the_order_of_its_lanes():
    meeting = threading.Barrier(2, timeout=20)
    busy, seen = Counter(), []

    def call(env, argument, env_fault):
        assert busy[env.worker] == 0, "it is called by one thread at a time"
        busy[env.worker] += 1
        meeting.wait()
        seen.append((env.worker, argument))
        busy[env.worker] -= 1
        if argument == bad:
            raise RuntimeError("this one")
        return 10 * argument

    envs = [SimpleNamespace(worker=worker) for worker in (0, 0, 1, 0, 1, 1)]
    bad = None
    assert rollout.side_by_side(call, envs, list(range(6)), EnvFault) == [0, 10, 20, 30, 40, 50]
    assert sorted(seen) == [(0, 0), (0, 1), (0, 3), (1, 2), (1, 4), (1, 5)]
    assert [argument for worker, argument in seen if worker == 0] == [0, 1, 3]
    bad = 5
    with pytest.raises(RuntimeError, match="this one"):
        rollout.side_by_side(call, envs, list(range(6)), EnvFault)


def test_the_context_limit_drops_the_worst_tips_first_and_then_ends_the_episode():
    memory = memory_of("bad", "good", "best")
    options = {"memory": memory, "memory_prob": 1.0, "action_tokens": 2}
    _, (whole, *_) = play(**options)
    without = len(whole.prompt(3)) + 2
    with_best = without + len(rollout.tips_message(ToyPolicy(), ["best"]))
    for context, shown in ((with_best, ["best"]), (with_best - 1, []), (without, [])):
        _, (e, *_) = play(**options, context=context)
        assert e.turns[3].shown == shown and e.turns[3].tips_left_out == 3 - len(shown)
        assert bool(e.turns[3].shown_ids) == bool(shown)
    _, (e, *_) = play(**options, context=without - 1)
    assert e.ended == "context full" and len(e.turns) == 3
    with pytest.raises(ValueError, match="no room for even one turn of task"):
        play(context=20)


def test_a_window_has_the_last_turns_without_their_tips_and_reasoning():
    policy, (e, *_) = play(memory_prob=1.0, history=2)
    a, b, c, d = (chr(turn.action_ids[0]) for turn in e.turns)
    system = "<s:P>"
    first, second, third, fourth = (
        f"<u:{seen}\n\nYour action: sent {digit}>"
        for seen, digit in (("start", a), (f"seen{a}", b), (f"seen{b}", c), (f"seen{c}", d))
    )
    tips = "<u:Tips from earlier attempts at this task:\n- old tip>A"
    prompts = [
        f"{system}<u:start>{tips}",
        f"{system}{first}<u:seen{a}>{tips}",
        f"{system}{first}{second}<u:seen{b}>{tips}",
        f"{system}{second}{third}<u:seen{c}>{tips}",
    ]
    assert set(prompts) <= set(policy.shown)
    for t, prompt in enumerate(prompts):
        assert policy.decode(e.prompt(t, e.turns[t].shown_ids)) == prompt
        assert policy.decode(e.prompt(t)) == prompt.replace(tips, "A")
        assert e.turns[t].written in (a, b, c, d) and e.turns[t].action.startswith("sent ")
    # A tip is written from the whole episode; a short context costs its beginning.
    request = f"<u:seen{d}\n\n{rollout.TIP_REQUEST.format(score=e.score)}>A"
    whole = rollout.tip_prompt(policy, e, context=1000)
    assert policy.decode(whole) == f"{system}{first}{second}{third}{fourth}{request}"
    short = rollout.tip_prompt(policy, e, context=len(whole) - 1)
    assert policy.decode(short) == f"{system}{second}{third}{fourth}{request}"


def test_the_context_limit_counts_the_window_alone():
    options = {"action_tokens": 2, "memory_prob": 0.0}
    _, (e, *_) = play(history=1, **options)
    needed = len(e.prompt(3)) + 2
    assert {len(e.prompt(t)) + 2 for t in (1, 2, 3)} == {needed}
    for history, context, ended, turns in (
        (1, needed, e.ended, 4),
        (1, needed - 1, "context full", 1),
        (0, needed, "context full", 3),
    ):
        _, (other, *_) = play(history=history, context=context, **options)
        assert (other.ended, len(other.turns)) == (ended, turns)


def test_a_rollout_first_forgets_the_keys_and_values_of_other_weights(monkeypatch):
    prompts_before = []
    monkeypatch.setattr(ToyPolicy, "forget", lambda policy: prompts_before.append(policy.shown[:]))
    play()
    assert prompts_before == [[]]


def test_what_is_going_on_is_said():
    said = []
    policy = ToyPolicy()
    worlds, rng = [ToyEnv(), ToyEnv()], np.random.default_rng(0)
    algorithm = Algorithm(Settings(memory_prob=0.0))
    batches = rollout.rollout(
        policy,
        worlds,
        JOBS[:3],
        None,
        EMBED,
        algorithm,
        rng,
        EnvFault,
        lambda *text: said.append(text),
    )
    for batch in batches:
        rollout.write_tips(policy, batch, algorithm.s, lambda *text: said.append(text))
    turns = [("rollout", f"turn {t}") for t in (1, 2, 3, 4)]
    batch = [("rollout", "reset"), *turns]
    assert said == [*batch, ("tips", "2 episodes"), *batch, ("tips", "1 episodes")]


@pytest.mark.parametrize("needs", [False, True])
def test_the_state_that_an_action_is_taken_in_is_noted_if_asked_for(needs):
    cls = type("Own", (Algorithm,), {"needs_anchors": needs})
    _, (e, *_) = play(cls=cls)
    assert [turn.anchor for turn in e.turns] == [f"after {t}" * needs for t in range(4)]


def test_the_episodes_of_all_processes_come_in_the_order_of_their_jobs():
    order = [(1, 0), (0, 1), (1, 1), (0, 0)]
    episodes = [SimpleNamespace(job=Job("task", 0, *numbers)) for numbers in order]
    assert [e.job[2:] for e in rollout.gather(episodes)] == sorted(order)


# --- Tips -----------------------------------------------------------------------------------------
def test_a_tip_is_written_from_the_whole_tip_free_episode():
    s = Settings()
    policy, (e, other, silent, *_) = play(memory_prob=1.0)
    policy.shown.clear()
    rollout.write_tips(policy, [e], s)
    a, b, c, d = (chr(turn.action_ids[0]) for turn in e.turns)
    dialogue = f"<s:P><u:start>A{a}|<u:seen{a}>A{b}|<u:seen{b}>A{c}|<u:seen{c}>A{d}|"
    request = rollout.TIP_REQUEST.format(score=e.score)
    assert policy.shown == [f"{dialogue}<u:seen{d}\n\n{request}>A"] and "21 of 100" in request
    assert e.tip.isdigit() and not e.tip_cut

    answers = [[*map(ord, "to " * 99), STOP]] * 3
    policy.sample = lambda *_: (answers, None)
    rollout.write_tips(policy, [e, other, silent], s)
    assert not e.tip_cut and len(e.tip.split()) == 99
    answers = [[*map(ord, "to " * 100), STOP], [ord("x")], [ord(" "), STOP]]
    policy.sample = lambda *_: (answers, None)
    rollout.write_tips(policy, [e, other, silent], s)
    assert [e.tip, other.tip, silent.tip] == [" ".join(["to"] * 99), "x", ""]
    assert [e.tip_cut, other.tip_cut, silent.tip_cut] == [True, True, False]
    memory = TipMemory()
    memory.add(EMBED(["T-task\nstart"])[0], "old tip", 99, "task/0")
    rollout.store_tips([e, other, silent], memory, EMBED, Algorithm(s))
    slot = memory.slots["task/0"]
    assert slot.texts == ["old tip", e.tip, "x"], "no empty one"
    assert slot.scores == [99, e.score, other.score]
    assert (slot.keys[1] == EMBED([f"T-task\nseen{d}"])[0]).all()
    assert slot.trials == [4, 1, 1], "all three episodes were shown it, at several turns"
    assert slot.totals[0] == 99 + e.score + other.score + silent.score


@pytest.mark.parametrize("parallel", [1, 5])
def test_tips_enter_the_memory_when_all_episodes_are_over(parallel):
    learner = SimpleNamespace(policy=ToyPolicy(), tip_memory=TipMemory())
    s = Settings(memory_prob=1.0)
    envs = [ToyEnv() for _ in range(parallel)]
    rng = np.random.default_rng(0)
    episodes = train.explore(learner, envs, JOBS, EMBED, Algorithm(s), rng, rollout.no_progress)
    assert all(e.tip for e in episodes) and not any("Tips" in x for x in learner.policy.shown)
    assert len(learner.tip_memory) == 0


def test_memory_slots_and_keys():
    job = Job("task", 3, 0, 0)
    slots = [rollout.memory_slot(job, scope) for scope in ("variation", "task", "all")]
    assert slots == ["task/3", "task", "all"]
    e = Episode(job, None, 0, "find it", [], [])
    assert rollout.memory_text(e, "a room", "state") == "find it\na room"
    assert rollout.memory_text(e, "a room", "task") == "find it"


# --- Slots and judging ----------------------------------------------------------------------------
THREE = [Job("task", 0, 0, 0), Job("task", 1, 1, 0), Job("other", 0, 2, 0)]
SLOTS = {
    "variation": ["task/0", "task/1", "other/0"],
    "task": ["task", "task", "other"],
    "all": ["all", "all", "all"],
}


def finished(job, score=0, tip="", shown=([],)):
    """An episode from the hall to the attic. shown: the tips of each turn."""
    turns = [Turn("hall", [], shown=tips, next_observation="attic") for tips in shown]
    return Episode(job, None, 0, "text", [], [], turns, score=score, tip=tip)


@pytest.mark.parametrize("scope", SLOTS)
def test_tips_are_retrieved_for_the_state_to_act_in_from_the_slot_of_the_episode(scope):
    memory = TipMemory()
    for job, slot in zip(THREE, SLOTS[scope], strict=True):
        for seen in ("start", *(f"seen{digit}" for digit in range(10))):
            (key,) = EMBED([f"T-{job.task}\n{seen}"])
            memory.add(key, f"{slot}, {job.task}, {seen}", 0, slot)
    _, episodes = play(THREE, memory, memory_prob=1.0, memory_scope=scope, tip_threshold=0.99)
    for e, slot in zip(episodes, SLOTS[scope], strict=True):
        for turn in e.turns:
            assert turn.shown == [f"{slot}, {e.job.task}, {turn.observation}"]


def test_tips_are_judged_by_hand():
    """(total, trials) of each: once by every episode in whose list it stood first at any turn."""
    memory = TipMemory()
    for slot in ("task", "other"):
        memory.add(np.eye(1024)[0], "x", 10, slot)
        memory.add(np.eye(1024)[0], "y", 20, slot)
    episodes = [
        finished(THREE[0], -100, "first", [[], ["x"], ["x", "y"]]),
        finished(THREE[1], 50, "second", [["x", "y"], []]),
        finished(THREE[2], 0, "third", [[], ["y"]]),
    ]
    rollout.store_tips(episodes, memory, EMBED, Algorithm(Settings(memory_scope="task")))
    expected = {
        "task": {"x": (-40, 3), "y": (20, 1), "first": (-100, 1), "second": (50, 1)},
        "other": {"x": (10, 1), "y": (20, 2), "third": (0, 1)},
    }
    assert expected == {
        name: dict(zip(held.texts, zip(held.totals, held.trials, strict=True), strict=True))
        for name, held in memory.slots.items()
    }


@pytest.mark.parametrize(
    "scope, again", [("variation", [2, 2, 2]), ("task", [3, 3, 2]), ("all", [4, 4, 4])]
)
def test_states_are_counted_in_the_slot_of_the_episode(scope, again):
    novelty = NoveltyStore()
    for n in ([1, 1, 1], again):
        episodes = [finished(job) for job in THREE]
        rollout.give_intrinsic_rewards(
            episodes, novelty, EMBED, Algorithm(Settings(memory_scope=scope))
        )
        assert [1 / e.turns[0].novelty for e in episodes] == pytest.approx(n)


def test_with_the_task_as_key_a_tip_is_at_hand_in_every_state():
    memory = TipMemory()
    turns = [Turn("hall", [], next_observation="attic")]
    writer = Episode(JOBS[0], None, 0, "T-task", [], [], turns, tip="a tip")
    rollout.store_tips([writer], memory, EMBED, Algorithm(Settings(memory_key="task")))
    _, episodes = play(memory=memory, memory_prob=1.0, memory_key="task")
    assert {tuple(turn.shown) for e in episodes for turn in e.turns} == {("a tip",)}


def test_actions_and_tips_are_sampled_at_the_temperature_of_training():
    options = {"temperature": 0.7, "action_tokens": 5, "tip_tokens": 6}
    policy, episodes = play(**options)
    assert {(temperature, most) for temperature, _, most in policy.asked} == {(0.7, 5)}
    policy.asked.clear()
    rollout.write_tips(policy, episodes, Settings(**options))
    assert {(temperature, most) for temperature, _, most in policy.asked} == {(0.7, 6)}


# --- Intrinsic rewards ----------------------------------------------------------------------------
def walk(*observations):
    e = Episode(JOBS[0], None, 0, "turn the lamp on in the house " * 9, [], [])
    for before, after in zip(observations, observations[1:], strict=False):
        e.turns.append(Turn(before, [], next_observation=after))
    return e


def test_intrinsic_rewards_by_hand():
    """First states count as visited; the task text, which all states share, does not count."""
    novelty = NoveltyStore()
    algorithm = Algorithm(Settings())
    group = [walk("hall", "kitchen", "hall", "kitchen", "attic") for _ in range(4)]
    rollout.give_intrinsic_rewards(group, novelty, EMBED, algorithm)
    for e in group:  # equal episodes get equal rewards
        assert [turn.novelty for turn in e.turns] == [1, 1 / 2, 1 / 2, 1]
    assert algorithm.advantages(group) == [[0.0] * 4] * 4
    assert novelty.slots["task/0"].counts == [8, 8, 4]
    later = walk("hall", "attic", "cellar")
    rollout.give_intrinsic_rewards([later], novelty, EMBED, algorithm)
    assert [turn.novelty for turn in later.turns] == [1 / 5, 1]


# --- The seam: what a subclass can override -------------------------------------------------------
def toy_learner(algorithm):
    memory = memory_of("old tip")
    memory.order = algorithm.order_tips
    parts = {"tip_memory": memory, "novelty": NoveltyStore(), "episodes": 0}
    return SimpleNamespace(policy=ToyPolicy(), **parts)


def iterate(algorithm, learner=None, iteration=0, pool=(("task", 0), ("task", 1), ("task", 2))):
    """(episodes, metrics) of an iteration that moves no weight."""
    algorithm.s.learning_rate = 0.0
    return train.iterate(
        iteration,
        learner or toy_learner(algorithm),
        algorithm,
        [ToyEnv(), ToyEnv()],
        pool,
        EMBED,
        rollout.no_progress,
    )


def test_tips_can_be_retrieved_but_not_shown():
    """Room is kept for them; prompts, modes, judging and metrics know of none."""

    class Unshown(Algorithm):
        def shown_tips(self, retrieved):
            return []

    algorithm = Unshown(Settings(memory_prob=1.0, group_size=2, tasks_per_iteration=1))
    learner = toy_learner(algorithm)
    episodes, metrics = iterate(algorithm, learner, pool=[("task", 0)])
    assert not any("old tip" in shown for shown in learner.policy.shown)
    told = rollout.tips_message(learner.policy, ["old tip"])
    for e in episodes:
        for t, turn in enumerate(e.turns):
            assert (turn.retrieved, turn.retrieved_ids) == (["old tip"], told)
            assert (turn.shown, turn.shown_ids) == ([], [])
            assert turn.logps == [-len(e.prompt(t))]
    draw_update_modes(episodes, Algorithm(Settings(offpolicy_prob=1.0)), np.random.default_rng(0))
    assert not any(turn.offpolicy for e in episodes for turn in e.turns)
    assert learner.tip_memory.slots["task/0"].trials[0] == 1, "the one that wrote it"
    none = {"memory_turns": 0, "tips_shown": 0, "score_with_memory": None}
    assert none.items() <= metrics.items() and metrics["score_without_memory"] is not None
    # The first of two; and the last gives way where only one has room.
    first = type("First", (Algorithm,), {"shown_tips": lambda self, retrieved: retrieved[:1]})
    _, (e, *_) = play(memory=memory_of("bad", "good"), memory_prob=1.0, cls=first)
    assert e.turns[0].retrieved == ["good", "bad"] and e.turns[0].shown == ["good"]
    assert e.turns[0].logps == [-len(e.prompt(0, rollout.tips_message(ToyPolicy(), ["good"])))]
    room = len(e.prompt(0, e.turns[0].shown_ids)) + 2
    _, (e, *_) = play(
        memory=memory_of("bad", "good"), memory_prob=1.0, cls=first, context=room, action_tokens=2
    )
    assert e.turns[0].retrieved == ["good"] and e.turns[0].tips_left_out == 1


def test_which_tips_are_retrieved_and_in_which_order(monkeypatch):
    """From the scores, trials and similarities of a slot."""
    seen = []

    class Lowest(Algorithm):
        def order_tips(self, slot, similarity):
            seen.append((list(slot.texts), list(slot.scores), len(similarity)))
            return np.argsort(slot.scores)[: self.s.max_tips]

    memory = memory_of("bad", "good", "best")
    _, episodes = play(memory=memory, memory_prob=1.0, cls=Lowest, max_tips=2)
    assert {tuple(turn.shown) for e in episodes for turn in e.turns} == {("bad", "good")}
    assert seen[0] == (["bad", "good", "best"], [0, 1, 2], 3)
    policy = SimpleNamespace(trainable=lambda: [torch.zeros(1, requires_grad=True)])
    monkeypatch.setattr(train, "load_policy", lambda s, checkpoint: policy)
    algorithm = Lowest(Settings(learning_rate=1.0, memory_capacity=7, novelty_threshold=0.3))
    learner = train.make_learner(algorithm)
    assert learner.tip_memory.order == algorithm.order_tips and learner.tip_memory.capacity == 7
    assert learner.novelty.threshold == 0.3


def test_which_tips_are_admitted():
    """The best of a group; those that were shown are judged by all."""
    offered = []

    class Best(Algorithm):
        def admitted(self, episodes):
            offered.extend(episodes)
            return iter([max(episodes, key=lambda e: e.score)])  # a list is as good

    memory = memory_of("old")
    episodes = [finished(JOBS[0], score, tip, [["old"]]) for score, tip in zip((5, 9, 7), "ab ")]
    episodes[2].tip = ""
    rollout.store_tips(episodes, memory, EMBED, Best(Settings()))
    assert offered == episodes[:2]
    held = memory.slots["task/0"]
    assert (held.texts, held.scores) == (["old", "b"], [0, 9])
    assert (held.totals, held.trials) == ([0 + 5 + 9 + 7, 9], [4, 1])
    none = type("None_", (Algorithm,), {"admitted": lambda self, episodes: []})
    rollout.store_tips(episodes, memory, EMBED, none(Settings()))
    assert held.texts == ["old", "b"] and held.trials == [7, 1]


def test_an_intrinsic_reward_is_a_function_of_the_visits():
    class Root(Algorithm):
        def intrinsic_reward(self, n):
            return n**-0.5

    e = walk("hall", "kitchen", "hall", "hall")
    rollout.give_intrinsic_rewards([e], NoveltyStore(), EMBED, Root(Settings(intrinsic_coef=2)))
    assert [turn.novelty for turn in e.turns] == pytest.approx([1, 2**-0.5, 3**-0.5])
    assert Root(Settings(intrinsic_coef=2)).episode_return(e) == pytest.approx(
        2 * (1 + 2**-0.5 + 3**-0.5)
    )


def test_an_iteration_collects_groups_until_it_has_what_it_wants():
    """Dynamic sampling: numbers go on, each task comes once before any comes again."""
    rounds = []

    class Twice(Algorithm):
        def memory_mode(self, rng):
            assert self.iteration == 5
            return super().memory_mode(rng)

        def collect(self, draw, play):
            kept = []
            for count in (1, 2, 1):
                rounds.append(draw(count))
                kept += play(rounds[-1])
            return kept[2:]

        def metrics(self, episodes):
            return {"kept": len(episodes)}

    algorithm = Twice(Settings(group_size=2, tasks_per_iteration=9))
    learner = toy_learner(algorithm)
    assert algorithm.iteration == 0
    episodes, metrics = iterate(algorithm, learner, iteration=5)
    jobs = [job for jobs in rounds for job in jobs]
    assert [(job.group, job.member) for job in jobs] == [(g, m) for g in range(4) for m in (0, 1)]
    assert [e.job for e in episodes] == jobs[2:] and metrics["kept"] == 6
    assert {job.variation for job in jobs[:6]} == {0, 1, 2} and jobs[6].variation in (0, 1, 2)
    assert (metrics["episodes"], metrics["episodes_dropped"]) == (6, 0)
    assert learner.episodes == 8  # played, also those that nothing is learnt from
    assert len({tuple(turn.action for turn in e.turns) for e in episodes}) > 1
    held = sum(len(slot.texts) for slot in learner.tip_memory.slots.values())
    assert held == 1 + len({(e.job.variation, e.tip) for e in episodes})
    assert sum(learner.novelty.slots["task/1"].counts) == sum(
        len(e.turns) + 1 for e in episodes if e.job.variation == 1
    )


def test_a_metric_has_one_meaning():
    own = type("Own", (Algorithm,), {"metrics": lambda self, episodes: {"score": 1.0}})
    algorithm = own(Settings(group_size=2, tasks_per_iteration=1))
    with pytest.raises(ValueError, match="score is a metric already"):
        iterate(algorithm, toy_learner(algorithm))


def test_an_iteration_without_episodes_is_one_line():
    empty = type("Picky", (Algorithm,), {"collect": lambda self, draw, play: play(draw(1))[:0]})
    with pytest.raises(ValueError, match="Picky.collect returned no episodes; return"):
        iterate(empty(Settings()))


@pytest.mark.parametrize("level", ["turn", "episode", "batch"])
@pytest.mark.parametrize("tips", [None, memory_of("old tip")])
def test_an_evaluation_has_tips_if_it_is_given_a_memory_whatever_training_does(level, tips):
    class Contrary(Algorithm):
        def memory_mode(self, rng):
            return tips is None

        def shown_tips(self, retrieved):
            return []

    s = Settings(mode_level=level, memory_prob=0.5, eval_temperature=0.0)
    algorithm = Contrary(s)
    policy = ToyPolicy()
    played = evaluation.evaluate(
        policy,
        [ToyEnv()],
        [("task", 0)],
        3,
        algorithm,
        np.random.default_rng(0),
        tips=tips,
        embed=EMBED,
    )
    assert {"old tip" in shown for shown in policy.shown} == {tips is not None}
    assert {bool(turn.shown) for e in played for turn in e.turns} == {tips is not None}
    assert (
        {asked[0] for asked in policy.asked} == {0.0} and algorithm.s is s and s.temperature == 1.0
    )
    assert algorithm.memory_mode(None) is (tips is None) and algorithm.shown_tips(["a"]) == []


# --- `--rollout-batch` ----------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["turn", "episode", "batch"])
def test_the_number_of_environments_changes_no_draw(level):
    s = Settings(memory_prob=0.5, mode_level=level)

    def everything(parallel):
        worlds = [ToyEnv() for _ in range(parallel)]
        learner = toy_learner(Algorithm(s))
        rng = np.random.default_rng(0)
        played = train.explore(learner, worlds, JOBS, EMBED, Algorithm(s), rng, rollout.no_progress)
        return [(e.turns, e.score, e.ended, e.tip, e.rng.random()) for e in played]

    assert everything(1) == everything(2) == everything(3) == everything(5)


def an_episode(rng, history):
    """Turns of all lengths -> (episode, the text of each turn)."""

    def words(letter, longest):
        return letter * int(rng.integers(longest))

    turns, texts = [], []
    for _ in range(rng.integers(1, 6)):
        texts.append(f"<u:{words('o', 200)}>A{words('a', 9)}|")
        turns.append(Turn("", [], past_ids=[ord(c) for c in texts[-1]]))
    turns[-1].next_observation = words("x", 400)
    episode = Episode(JOBS[0], None, 0, "text", [ord(c) for c in "<s:P>"], [ord("A")], turns)
    episode.history, episode.score = history, int(rng.integers(-100, 101))
    return episode, texts


def shortened(observation):
    """It and what is left of it when it is cut again and again."""
    yield observation
    while observation:
        observation = observation[: len(observation) // 2]
        yield observation + rollout.CUT if observation else ""


@pytest.mark.parametrize("history", [0, 1, 3])
def test_a_tip_request_is_the_best_that_fits(history):
    """Of all that may be shown, in this order: turns, then the observation, then fewer turns."""
    rng = np.random.default_rng(history)
    kinds = Counter()
    for _ in range(400):
        e, texts = an_episode(rng, history)
        request = rollout.TIP_REQUEST.format(score=e.score)
        last = e.turns[-1].next_observation
        kept = min(len(texts), max(1, history))
        candidates = [(count, last) for count in range(len(texts), kept, -1)]
        for count in range(kept, -1, -1):
            candidates += [(count, observation) for observation in shortened(last)]
        context = int(rng.integers(200, 900))
        for count, observation in candidates:
            shown = "".join(texts[len(texts) - count :])
            expected = f"<s:P>{shown}<u:{observation}\n\n{request}>A"
            if len(expected) <= context:
                prompt = rollout.tip_prompt(ToyPolicy(), e, context)
                assert "".join(map(chr, prompt)) == expected
                kinds["whole" if observation == last else "cut", min(count, 2)] += 1
                break
        else:
            with pytest.raises(ValueError, match="no room to ask for a tip after task"):
                rollout.tip_prompt(ToyPolicy(), e, context)
            kinds["none"] += 1
    assert min(kinds[kind, count] for kind in ("whole", "cut") for count in (0, 1)) > 5
    assert kinds["none"] > 5 and kinds["whole", 2] > 5


@pytest.mark.parametrize("history", [0, 2])
def test_every_prompt_and_what_is_written_after_it_fit_the_context(history):
    left = []
    for context in range(305, 400, 2):
        sizes = {"history": history, "context": context, "action_tokens": 9, "tip_tokens": 40}
        policy, episodes = play(JOBS[:2], memory_prob=0.5, seed=context, **sizes)
        rollout.write_tips(policy, episodes, Settings(**sizes))
        assert all(e.tip for e in episodes)
        left.append(context - max(prompt + answer for _, prompt, answer in policy.asked))
    assert min(left) == 0, "all the room there is, and no more"


def test_a_run_does_not_start_without_room_for_the_longest_request():
    policy = Policy.load(str(ROOT / "standin" / "house"))
    request = f"\n\n{rollout.TIP_REQUEST.format(score=-100)}"
    _, info = make("house").reset("radio", 0)
    least = policy.message("system", info["prompt"]) + policy.message("user", request)
    needed = len(least + policy.header) + 300
    run = {"env": "house", "tasks": ["radio"], "variations": 1, "eval_every": 0, "tip_tokens": 300}
    run |= {"tasks_per_iteration": 1, "rollout_batch": 1}
    train.make_envs(policy, Algorithm(Settings(**run, context=needed)))
    train.make_envs(
        policy, Algorithm(Settings(**run, context=needed - 1, memory_prob=0.0))
    )  # no tips
    with pytest.raises(ValueError, match="no room to ask for a tip after radio .1 tokens short"):
        train.make_envs(policy, Algorithm(Settings(**run, context=needed - 1)))
