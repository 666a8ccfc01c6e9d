"""Make the player of the ScienceWorld experiment: a tiny model that knows how to play, no answers.

The experiment's task is identify-life-stages-2 on the real simulator: to focus on the stages of a
plant's life in their order, where a wrong focus ends the episode at -100. The player has what a
language model would bring: it goes where the plants are, knows how the simulator calls a stage of a
plant, names the stages in an order that tips tell, or tries some at random, and sums an episode up
in one true sentence. It does not know which stages a plant has, nor their order.

It is trained from scratch by imitation of a scripted player on made-up tasks. What it has seen: the
simulator's prompt and first observations of nine rooms (recorded from `boil`); the task's sentence
with any place; the 12 words that the simulator has for stages of life, animals' too, of which each
episode draws 4 as its plant's, in any order, and one that is wrong; the names of plants.

  python -m standin.make_stages --force   18 minutes on a core; learning is limited by time, so that
                                          another machine gets another player of the same kind
  python -m standin.make_stages --check   what the player in the folder can do, in the simulator
"""

import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

import rollout
from envs import UNKNOWN, Env
from memory import TipMemory, best_first, embedder
from policy import Policy
from rollout import TIP_REQUEST, TIPS_TEXT, Job
from settings import Settings
from standin import tiny
from worlds.scienceworld import ScienceWorld, system_prompt

FOLDER = str(Path(__file__).parent / "stages")
TASK = "identify-life-stages-2"
STAGES = ["seed", "seedling", "adult", "reproducing", "dead", "egg", "hatchling", "baby",
          "juvenile", "caterpillar", "pupa", "tadpole"]  # fmt: skip
ANSWER = ["seed", "seedling", "adult", "reproducing"]  # of every plant; for `check` alone
NUMBERS = ["first", "second", "third", "fourth"]
PLANTS = ["apple", "apricot", "avocado", "banana", "cherry", "grapefruit", "lemon", "orange",
          "peach", "pear", "pea", "rose", "tomato", "plum", "walnut", "maple", "blue jay",
          "brown bear", "giant tortoise", "common toad"]  # fmt: skip
ROOMS = ["outside", "art studio", "bathroom", "bedroom", "foundry", "greenhouse", "hallway",
         "kitchen", "living room", "workshop"]  # fmt: skip
SLIPS = ["focus on it", "open door", "go there", "take all"]
FACT = re.compile(rf"({'|'.join(NUMBERS)}) (?!unknown)(\w+)")  # in a tip


class OtherPlants(Env):
    """Made-up tasks that answer as the simulator does: any stages in any order.

    The variation says what the prompt tells: the plant, the place, where one is.
    """

    def __init__(self, rng):
        super().__init__()
        self.rng = rng
        self.openings, self.templates = record()

    def tasks(self):
        return [TASK]

    def variation_count(self, task):
        return 1_000_000

    def start(self, task, variation):
        *self.order, self.wrong = self.rng.sample(STAGES, 5)
        self.there = False
        self.found = 0
        self.step_points = self.rng.choice(([8, 33, 58, 83, 100], [4, 29, 54, 83, 100]))
        told = random.Random(variation)
        self.plant = told.choice(PLANTS)
        self.place = told.choice(("outside", *told.choices(ROOMS)))
        where = "outside" if self.place == "outside" else f"in the {self.place}"
        text = (
            f"Your task is to focus on the life stages of the {self.plant} plant, "
            f"starting from earliest to latest. The plants are located {where}."
        )
        inventory = "In your inventory, you see:\n\tan orange\n"
        prompt = system_prompt(text, self.templates, inventory, thoughts=True)
        return told.choice(self.openings), text, prompt

    def act(self, action):
        command = action.rpartition(":")[2].strip()
        going = re.fullmatch("teleport to (.+)", command)
        if going and going[1] in ROOMS:
            self.there = going[1] == self.place
            points = self.step_points[self.found] if self.there else self.score
            return f"You teleport to the {going[1]}.", points, False, command
        for stage in [*self.order, self.wrong]:
            if self.there and command == f"focus on {called(stage, self.plant)}":
                name = "seed" if stage == "seed" else "tree"
                observation = f"You focus on the {self.plant} {name}."
                if stage != self.order[self.found]:
                    return observation, -100, True, command
                self.found += 1
                return observation, self.step_points[self.found], self.found == 4, command
        return UNKNOWN, self.score, False, command

    def valid_actions(self):
        return []

    def gold_path(self):
        return []


def record():
    """The first observations of `boil`, a task that is not the paper's, and the action formats."""
    world = ScienceWorld()
    openings = {}
    for variation in world.variations("boil", "train"):
        observation, _ = world.reset("boil", variation)
        openings.setdefault(observation.partition("\n")[0], observation)
    simulator = world.simulator()
    templates = simulator.ask(simulator.server.getPossibleActions)
    return list(openings.values()), templates


def called(stage, plant):
    """How the simulator calls the plant in this stage."""
    return f"{plant} seed" if stage == "seed" else f"{stage} {plant} tree"


# --- The scripted player --------------------------------------------------------------------------
class Player:
    """What it knows in an episode.

    lucky: how often it guesses what is right (to see more). recall: does it say in every line
    whether the last one worked, and what was found so far, as its tip will?
    """

    def __init__(self, rng, lucky=0.0, recall=False):
        self.rng = rng
        self.lucky = lucky
        self.recall = recall
        self.found = []  # the stages in order
        self.tried = []
        self.there = False
        self.worked = ""  # did the last try? Nothing was tried yet

    def say(self, task_text, facts, order=None):
        """Its next line. facts: (number, stage) as the tips tell; order: the truth, for luck."""
        if not self.there:
            place = re.search(r"located (?:in the )?([a-z ]+)\.", task_text)[1]
            return f"teleport to {place}"
        plant = re.search(r"of the ([a-z ]+) plant", task_text)[1]
        number = NUMBERS[len(self.found)]
        told = [fact for of, fact in facts if of == number and fact not in self.tried]
        if told:  # by the best tip that has not proved wrong
            stage = told[0]
        elif self.rng.random() < self.lucky:
            stage = order[len(self.found)]
        else:
            # Now and then what it tried: what it writes of that must be true as well.
            tried = self.tried if self.rng.random() < 0.8 else []
            stage = self.rng.choice([stage for stage in STAGES if stage not in tried])
        self.last = stage
        thought = f"try {number} {stage}"
        if self.recall:
            thought = self.worked + numbered([*self.found, stage])
        return f"{thought}: focus on {called(stage, plant)}"

    def hear(self, line, observation, score):
        """What came of it."""
        if line.startswith("teleport"):
            self.there = True
        else:
            self.tried.append(self.last)
            self.worked = "no, "
            if observation != UNKNOWN and score >= 0:
                self.found.append(self.last)
                self.worked = "yes, "


def tip_of(score, found):
    """What was found and what is missing: the same facts always make the same sentence."""
    return f"Score {score:.0f}: {numbered([*found, 'unknown'])}."


def numbered(stages):
    """At most four, each with its number.

    >>> numbered(["seed", "unknown"])
    'first seed, second unknown'
    """
    return ", ".join(f"{number} {stage}" for number, stage in zip(NUMBERS, stages, strict=False))


def random_tips(env, rng):
    """What earlier episodes may have left in the memory, the best first. One in five is wrong."""
    tips = {}
    for _ in range(rng.randint(1, 4)):
        found = rng.choice((0, 1, 2, 3, 4, rng.randint(1, 4)))
        stages = env.order[:found]
        score = env.step_points[found]
        if rng.random() < 0.3:  # of four, too: what a tip says counts, not its score
            score = -100
        if stages and rng.random() < 0.2:
            stages[rng.randrange(found)] = rng.choice(STAGES)
        tips[tip_of(score, stages)] = score
    return sorted(tips, key=tips.get, reverse=True)


def play(policy, env, rng, variation, recall=False):
    """An episode by the scripted player, its tip as the last turn, laid out as in a rollout.

    The advantage of a turn is its weight in what is learnt.
    """
    job = Job(TASK, variation, group=0, member=0)
    playing = tiny.start_episode(policy, env, job)
    episode = playing.episode
    env.step_limit = rng.randint(4, 8)
    often = rng.choice((0, 0, 0.5, 0.9, 1))
    tips = random_tips(env, rng)
    player = Player(rng, lucky=rng.choice((0.1, 0.5)) if recall else 0.5, recall=recall)
    while not episode.ended:
        shown = tips if rng.random() < often else []
        rollout.open_turn(policy, playing, shown, tiny.ALGORITHM)
        blunder = rng.random() < 0.03
        line = player.say(episode.task_text, FACT.findall(" ".join(shown)), env.order)
        if blunder:
            line = rng.choice(SLIPS)
        tiny.write_turn(policy, playing, line, float(not blunder))
        if not blunder:
            player.hear(line, playing.observation, episode.score)
    return tiny.end_episode(policy, playing, tip_of(episode.score, player.found), 2.0)


# --- Learning -------------------------------------------------------------------------------------
def corpus(env):
    """What the tokenizer is made from: every word, whole."""
    yield TIPS_TEXT.format("- Score 0: first unknown.\n- ")
    yield from (UNKNOWN, *SLIPS, *env.openings)
    for score in (-100, 0, 4, 8, 29, 33, 54, 58, 83, 100):
        yield f"Score {score}:"
        yield TIP_REQUEST.format(score=score)
    for plant in PLANTS:
        for stage in STAGES:
            for number in NUMBERS:
                yield f"try {number} {stage}: focus on {called(stage, plant)}"
                yield f"You focus on the {plant} tree. {number} {stage}, {number} unknown."
    for room in ROOMS:
        yield f"teleport to {room}"
        yield f"You teleport to the {room}."
    for variation in range(50):
        yield env.reset(TASK, variation)[1]["prompt"]


def make(folder, minutes, seed):
    """Write a player to the folder."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    env = OtherPlants(rng)

    def episode(policy):
        return [play(policy, env, rng, rng.randrange(env.variation_count(TASK)))]

    tiny.make_player(folder, corpus(env), episode, minutes)


# --- What it can do -------------------------------------------------------------------------------
def check(folder, episodes=8, seed=0):
    """In the simulator, on the plants that the experiment plays -> {name: value}.

    Those are three to train on and four to test. Told: the memory holds the true facts. A tip that
    it writes claims to have found stages, or claims nothing.
    """
    s = Settings(
        env="scienceworld", memory_key="task", memory_scope="task", action_tokens=24, tip_tokens=40
    )
    policy = Policy.load(folder)
    worlds = [ScienceWorld(step_limit=5, thoughts=True) for _ in range(16)]
    embed = embedder()
    plants = worlds[0].variations(TASK, "train")[:3] + worlds[0].variations(TASK, "test")
    jobs = [Job(TASK, plant, 0, 0) for plant in plants]
    result = {}
    claims = []
    for name, known, temperature, times in (
        ("untold, greedy", 0, 0, 1),
        ("untold", 0, 1, episodes),
        ("told the first", 1, 1, episodes),
        ("told two", 2, 1, episodes),
        ("told three", 3, 1, episodes),
        ("told all", 4, 1, episodes),
    ):
        told = TipMemory(order=partial(best_first, max_tips=4))
        for job in jobs:
            key = embed([worlds[0].reset(*job[:2])[1]["task"]])[0]
            for count in range(1, known + 1):
                score = (8, 33, 58, 83, 100)[count]
                told.add(key, tip_of(score, ANSWER[:count]), score, TASK)
        s.memory_prob = float(known > 0)
        s.temperature = temperature
        played = tiny.play_all(policy, worlds, jobs * times, told, embed, s, seed)
        scores = np.array([episode.score for episode in played])
        result[f"{name}: success"] = np.mean(scores == 100)
        result[f"{name}: score"] = np.mean(scores)
        result[f"{name}: share at -100"] = np.mean(scores == -100)
        written = [well_formed(turn, e.task_text) for e in played for turn in e.turns]
        result[f"{name}: actions well-formed"] = np.mean(written)
        true = [e.tip == tip_of(e.score, found_in(e)) for e in played]
        result[f"{name}: tips exactly as they should be"] = np.mean(true)
        for episode in played:
            found = dict(zip(NUMBERS, found_in(episode), strict=False))
            claims += [found.get(number) == stage for number, stage in FACT.findall(episode.tip)]
    result["claims in its own tips"] = len(claims)
    result["of them true"] = np.mean(claims)
    return result


def well_formed(turn, task_text):
    """Would it have been understood if the plant had this stage?"""
    plant = re.search(r"of the ([a-z ]+) plant", task_text)[1]
    known = [f"focus on {called(stage, plant)}" for stage in STAGES]
    return turn.action in [*known, "teleport to outside"]


def found_in(episode):
    """The stages that the episode focused on in their order."""
    found = []
    for turn in episode.turns:
        if turn.reward > 0 and "focus on" in turn.action:
            found.append(next(stage for stage in STAGES if f" {stage} " in f"{turn.action} "))
    return found


def main():
    """Make the player, and say what it can do."""
    tiny.main(__doc__, FOLDER, 18, make, check)


if __name__ == "__main__":
    main()
