"""Make the player of the laptop experiment: a tiny model that knows how to play, and no house.

It has what a language model would bring: it writes well-formed actions, thinks before it acts
("seek ITEM in ROOM CONTAINER: ACTION"), follows tips that it is shown, looks somewhere at random
when nothing is known, and sums an episode up in one true sentence. It is trained from scratch by
imitation of a scripted player with exactly that behaviour, on made-up tasks: a thing and its parts
are drawn from all names, their places anew in each episode. The house's own tasks, that is its
things with their own parts in their places, are never played.

  python -m standin.make_house --force   12 minutes on two cores; learning is limited by time, so
                                         that another machine gets another player of the same kind
  python -m standin.make_house --check   what the player in the folder can do
"""

import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

import rollout
from envs import UNKNOWN
from memory import TipMemory, best_first, embedder
from policy import Policy
from rollout import TIP_REQUEST, TIPS_TEXT, Job
from settings import Settings
from standin import tiny
from worlds.house import House

FOLDER = str(Path(__file__).parent / "house")
HOUSE = {"rooms": 12, "containers": 6}  # as in configs/laptop.yaml
TASKS = {"parts": 1, "step_limit": 7, "partial_credit": False}
FACT = re.compile(r"(?:found|score \d+:|,) ([a-z ]+) in (\w+) (\w+)")  # in an observation or a tip


class OtherHouses(House):
    """Made-up tasks: any thing, with any parts but its own, in new places in every episode."""

    NAMES = sorted([*House.THINGS, *(part for parts in House.THINGS.values() for part in parts)])

    def __init__(self, rng):
        super().__init__(**HOUSE)
        self.rng = rng

    def tasks(self):
        """All names, also those of parts."""
        return self.NAMES

    def hide(self, task, variation):
        """Up to two parts."""
        own = self.THINGS.get(task, ())
        others = [name for name in self.NAMES if name != task and name not in own]
        needed = [*self.rng.sample(others, self.rng.choice((0, 1, 2, 2))), task]
        return dict(zip(needed, self.rng.sample(self.places, len(needed)), strict=True))


# --- The scripted player --------------------------------------------------------------------------
def think(env, known, plan, rng):
    """Its next line, and where it now thinks the next thing is: (item, place)."""
    item = next((thing for thing in env.hiding if thing not in env.carried), None)
    if item is None:
        return f"all found: turn on {env.task}", None
    if item in known:
        place = known[item]
    elif plan and plan[0] == item and plan[1] not in env.opened:
        place = plan[1]
    else:
        place = guess(env, rng)
    room, box = place
    if room != env.room:
        action = f"go to {room}"
    elif place not in env.opened:
        action = f"open {box}"
    else:
        action = f"take {item}"
    return f"seek {item} in {room} {box}: {action}", (item, place)


def guess(env, rng):
    """A closed container, half of the time one that holds something needed.

    Luck cannot be foreseen, so what is learnt is to guess; but more is learnt from a lucky episode.
    """
    if rng.random() < 0.5:
        lucky = [place for place in env.hiding.values() if place not in env.opened]
        if lucky:
            return rng.choice(lucky)
    return rng.choice([place for place in env.places if place not in env.opened])


def facts_in(text):
    """Item -> (room, container), as an observation or a tip says."""
    return {item: (room, box) for item, room, box in FACT.findall(text)}


def tip_of(score, needed, facts):
    """What was found and what is missing: the same facts always make the same sentence."""
    parts = []
    for item in needed:
        parts.append(f"{item} in {' '.join(facts[item])}" if item in facts else f"{item} unknown")
    return f"score {score:.0f}: {', '.join(parts)}."


def random_tips(env, rng):
    """What earlier episodes of the same task may have left in the memory."""
    share = rng.choice((0.2, 0.4, 0.7, 1))
    tips = []
    for _ in range(rng.randint(1, 4)):
        facts = {item: place for item, place in env.hiding.items() if rng.random() < share}
        solved = len(facts) == len(env.hiding) and rng.random() < 0.5
        tips.append(tip_of(100 if solved else 0, env.hiding, facts))
    return list(dict.fromkeys(tips))


def play(policy, env, rng):
    """An episode by the scripted player, its tip as the last turn, laid out as in a rollout.

    The advantage of a turn is its weight in what is learnt.
    """
    job = Job(rng.choice(env.tasks()), variation=0, group=0, member=0)
    playing = tiny.start_episode(policy, env, job)
    env.step_limit = rng.randint(4, 11)
    often = rng.choice((0, 0.3, 0.6, 0.9))
    tips = random_tips(env, rng)
    seen = {}
    plan = None
    while not playing.episode.ended:
        shown = tips if rng.random() < often else []
        rollout.open_turn(policy, playing, shown, tiny.ALGORITHM)
        line, plan = think(env, facts_in(" ".join(shown)) | seen, plan, rng)
        blunder = rng.random() < 0.03
        tiny.write_turn(policy, playing, "open it" if blunder else line, float(not blunder))
        for item, place in facts_in(playing.observation).items():
            if item in env.hiding:
                seen[item] = place
    tip = tip_of(playing.episode.score, env.hiding, seen)
    return tiny.end_episode(policy, playing, tip, 3.0)


# --- Learning -------------------------------------------------------------------------------------
def corpus(env):
    """What the tokenizer is made from: every word of the house, whole."""
    yield TIPS_TEXT.format("- score 0: a unknown, b unknown.\n- ")
    yield from (UNKNOWN, "score 100", "all found: turn on")
    for item in [*env.NAMES, *env.JUNK]:
        for room, box in env.places:
            actions = f"go to {room}, open {box}, take {item}, turn on {item}"
            yield f"seek {item} in {room} {box}: {actions}"
        yield tip_of(0, [item, "it"], {item: (room, box)})
    for task in env.NAMES:
        yield env.reset(task, 0)[1]["prompt"]
        for action in env.gold_path():
            yield env.step(action)[0]
        yield TIP_REQUEST.format(score=100)


def make(folder, minutes, seed):
    """Write a player to the folder."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    env = OtherHouses(rng)
    tiny.make_player(folder, corpus(env), lambda policy: [play(policy, env, rng)], minutes)


# --- What it can do -------------------------------------------------------------------------------
def check(folder, variations=16, seed=0):
    """On the house's own tasks, before anything is learnt -> {name: share}.

    Its memory holds the true facts, one a tip. A tip that it writes claims to have found things, or
    claims nothing.
    """
    s = Settings(
        env="house", memory_key="task", memory_scope="task", action_tokens=16, tip_tokens=40
    )
    policy = Policy.load(folder)
    simulators = [House(**HOUSE, **TASKS) for _ in range(64)]
    env = simulators[0]
    embed = embedder()
    told = TipMemory(order=partial(best_first, max_tips=4))
    jobs = []
    for task in env.tasks():
        jobs += [Job(task, v, 0, 0) for v in env.variations(task, "test")[:variations]]
        key = embed([env.reset(task, 0)[1]["task"]])[0]
        for item, place in env.hiding.items():
            told.add(key, tip_of(0, env.hiding, {item: place}), 0, task)
    result = {}
    claims = []
    for name, memory_prob, temperature in (
        ("without tips, greedy", 0, 0),
        ("without tips", 0, 1),
        ("with true tips", 1, 1),
    ):
        s.memory_prob = memory_prob
        s.temperature = temperature
        played = tiny.play_all(policy, simulators, jobs, told, embed, s, seed)
        solved = [episode.score == 100 for episode in played]
        understood = [turn.next_observation != UNKNOWN for e in played for turn in e.turns]
        result[f"success {name}"] = float(np.mean(solved))
        result[f"actions understood {name}"] = float(np.mean(understood))
        for episode in played:
            env.reset(episode.job.task, episode.job.variation)
            for item, room, box in FACT.findall(episode.tip):
                claims.append(env.hiding.get(item) == (room, box))
    result["claims in its own tips"] = len(claims)
    result["of them true"] = float(np.mean(claims)) if claims else 0.0
    return result


def main():
    """Make the player, and say what it can do."""
    tiny.main(__doc__, FOLDER, 12, make, check)


if __name__ == "__main__":
    main()
