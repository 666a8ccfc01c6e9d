"""Make the stand-in for ScienceWorld: a tiny model that shows the whole loop work on a laptop.

It takes the place of a real language model when there is neither a GPU nor weights: it writes
ScienceWorld actions, explores, sums episodes up in one sentence and makes a little use of such
tips. It is no result, and nothing measured with it says anything about EMPO². It is trained from
scratch on the 12 ScienceWorld tasks that are *not* among the paper's 18 (`TASKS` below), on their
training variations, by imitation of a scripted player:

1. play:  the simulator's own solutions, interrupted by wandering; tips are written by rule, and
          later episodes of a variation are shown earlier ones' tips at some turns, where the player
          does not wander
2. learn: next-token prediction on whole dialogues, laid out as in a rollout, mostly on actions and
          tips; in most of them things are given made-up names, so that names must be copied from
          the dialogue, not remembered

  python -m standin.make_scienceworld --force   about 20 minutes on two cores; more --minutes help

The shipped files come from the transcripts of seed 0 and 29 minutes of learning on one shared core,
in three stages (12, 10 and 7 minutes; the slips of `slips` only in the last). Learning is limited
by time, so that another machine gets another model of the same kind.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from envs import UNKNOWN
from rollout import TIP_REQUEST, TIPS_TEXT, Turn, tips_message
from standin import tiny
from worlds.scienceworld import ScienceWorld, focus_targets, solve

FOLDER = str(Path(__file__).parent / "scienceworld")
# Task: how many of its training variations are played. Solving one of the last two takes 10 s.
TASKS = {
    "boil": 14,
    "melt": 14,
    "freeze": 14,
    "change-the-state-of-matter-of": 14,
    "measure-melting-point-unknown-substance": 40,
    "grow-plant": 12,
    "grow-fruit": 10,
    "inclined-plane-determine-angle": 14,
    "inclined-plane-friction-named-surfaces": 14,
    "inclined-plane-friction-unnamed-surfaces": 8,
    "mendelian-genetics-known-plant": 3,
    "mendelian-genetics-unknown-plant": 3,
}
EPISODES = 5  # of each variation
ROOMS = ["art studio", "bathroom", "bedroom", "foundry", "greenhouse", "hallway", "kitchen",
         "living room", "outside", "workshop"]  # fmt: skip
# How often the wandering player uses a verb.
VERBS = {"look at": 3, "look in": 1, "open": 4, "pick up": 4, "read": 4, "activate": 2, "move": 2,
         "connect": 4, "use": 1, "inventory": 0.5, "wait1": 0.3, "pour": 0.3, "mix": 0.2,
         "put down": 0.3, "deactivate": 0.3, "focus on": 0.25}  # fmt: skip
DULL = re.compile(rf"agent|\bair\b|sewer|drain|door|ground|component|{'|'.join(ROOMS)}|look around")
SLIPS_OF_THE_TONGUE = ["go door", "take it", "use", "look the", "open all", "focus", "search"]
IDLE = ("look", "wait", "inventory", "task", "0", "1", "2")
CONTEXT = 4500  # tokens of a dialogue that are learnt from


# --- 1. Play --------------------------------------------------------------------------------------
@dataclass
class Transcript:
    """An episode of the scripted player, as text; the advantage of a turn is its weight."""

    prompt: str
    task_text: str
    turns: list[Turn] = field(default_factory=list)
    score: int = 0
    tip: str = ""


def understood(turn):
    """Did the simulator know the action?"""
    return not turn.next_observation.startswith((UNKNOWN, "Unknown action"))


def room_of(observation):
    """The room that an observation names, or None."""
    here = r"You (?:move|teleport) to|This (?:room|outside location) is called"
    found = re.match(rf"(?:{here}) the ([a-z ]+)\.", observation)
    return found[1] if found else None


def solution(task, variation):
    """The simulator's, as (room, action), without walking, open doors and repetitions."""
    opening, turns = solve(task, variation, "easy", 0)
    room = room_of(opening.split("\n", 1)[1])
    plan = []
    for action, observation, _ in turns:
        action = action.replace("examine ", "look at ")
        walking = re.match(r"go to|open door|look around", action)
        if not walking and (room, action) not in plan[-2:]:
            plan.append((room, action))
        room = room_of(observation) or room
    return plan


def makes_sense(verb, things):
    """Should the wandering player do this to these things?"""
    if DULL.search(things):
        return False
    if verb == "connect":  # the ends of two different things, please
        first, _, second = things.partition(" to ")
        ends = all(re.search("terminal|anode|cathode", end) for end in (first, second))
        return ends and not set(first.split()[:2]) & set(second.split()[:2])
    return verb != "move" or "inventory" not in things


def wander(env, done, rng):
    """A random action that makes some sense."""
    options = {}
    for action in env.valid_actions():
        verb = next((verb for verb in VERBS if action.startswith(verb)), None)
        if verb and action not in done and makes_sense(verb, action.removeprefix(verb)):
            options.setdefault(verb, []).append(action)
    if not options:
        return "look around"
    verb = rng.choices(list(options), [VERBS[verb] for verb in options])[0]
    return min(rng.choices(options[verb], k=2), key=len)  # rather short ones: plain names


def play(env, task, variation, plan, tips, rng):
    """One episode by the scripted player -> Transcript."""
    observation, info = env.reset(task, variation)
    transcript = Transcript(info["prompt"], info["task"])
    wandering = rng.choice([0.1, 0.3, 0.5, 0.9])
    blunder = rng.randrange(2, 12) if rng.random() < 0.2 else None  # the turn of a wrong focus
    room = room_of(observation)
    fresh = False  # has the room just been entered?
    at = 0  # place in the plan
    failures = 0
    done = set()
    for number in range(rng.choice([3, 5, 7, 9, 12, 15, 20, 30])):
        shown = []
        if tips and rng.random() < 0.3:
            shown = rng.sample(tips, rng.randint(1, len(tips)))
        planned = False
        imitate = True
        if observation.startswith("Ambiguous"):
            action = "0"
        elif fresh and rng.random() < 0.9:
            action = "look around"
        elif number == blunder:
            action = rng.choice([a for a in env.valid_actions() if a.startswith("focus on")])
            imitate = False
        elif rng.random() < 0.03:
            action = rng.choice(SLIPS_OF_THE_TONGUE)
            imitate = False
        elif at < len(plan) and failures < 3 and (shown or rng.random() > wandering):
            goal, action = plan[at]
            planned = goal == room
            if not planned:
                doors = re.findall(r"door to the ([a-z ]+) \(", observation)
                walk = goal in doors and rng.random() < 0.4
                action = f"go to {goal}" if walk else f"teleport to {goal}"
        elif rng.random() < 0.3:
            action = f"teleport to {rng.choice([other for other in ROOMS if other != room])}"
        else:
            action = wander(env, done, rng)
        turn = Turn(observation, [], shown=shown, action=action)
        transcript.turns.append(turn)
        observation, turn.reward, terminated, truncated, info = env.step(action)
        turn.next_observation = observation
        turn.advantage = float(imitate and understood(turn) and turn.reward >= 0)
        if planned:
            at += 1
            failures += not understood(turn)
        entered = observation.startswith(("You move to the", "You teleport"))
        fresh = entered and room_of(observation) is not None
        room = room_of(observation) or room
        done.add(action)
        if terminated or truncated:
            break
    transcript.score = info["score"]
    transcript.tip = write_tip(transcript, rng)
    return transcript


def write_tip(transcript, rng):
    """One true sentence on an episode, from what its dialogue shows."""
    turns = transcript.turns
    score = transcript.score
    told = [turn for turn in turns if not turn.action.startswith(IDLE)]
    useful = [turn.action for turn in told if turn.reward > 0]
    other = [turn.action for turn in told if understood(turn) and turn.reward == 0]
    chosen = list(dict.fromkeys(useful))[:6]
    chosen += list(dict.fromkeys(other))[: max(0, 3 - len(chosen))]
    in_order = dict.fromkeys(turn.action for turn in turns if turn.action in chosen)
    did = ", ".join(in_order) or "nothing useful"
    opening = rng.choice(["I did", "I did", "the steps were"])
    if score < 0:
        wrong = f"{turns[-1].action} was wrong and ended it"
        return f"Score {score}: {wrong}; before that {opening} {did}."
    unknown = [turn.action for turn in turns if not understood(turn)]
    end = ""
    if unknown and rng.random() < 0.5:
        end = f"; {unknown[0]} was not understood"
    if score == 100:
        return f"Score 100: the task was completed by {did}{end}."
    tried = [turn for turn in turns if turn.action.startswith("focus") and understood(turn)]
    focused = " ".join(turn.action for turn in tried).lower()
    missing = [x for x in focus_targets(transcript.task_text) if x.lower() not in focused]
    if missing:
        end += f"; still to do: focus on {missing[0]}"
    return f"Score {score}: {opening} {did}{end}."


def play_all(seed):
    """All transcripts."""
    rng = random.Random(seed)
    # A second house has wires to connect: the actions of electrical tasks exist in it.
    wired = "teleportAction,selfWateringFlowerPots,openDoors"
    worlds = [ScienceWorld(40, simplification=name) for name in ("easy", wired)]
    todo = []
    for task, count in TASKS.items():
        todo += [(task, v) for v in worlds[0].variations(task, "train")[:count]]
    transcripts = []
    for task, variation in tqdm(todo, desc="play", unit="house"):
        plan = solution(task, variation)
        tips = []
        for _ in range(EPISODES):
            world = worlds[rng.random() < 0.35]
            transcripts.append(play(world, task, variation, plan, tips, rng))
            tips.append(transcripts[-1].tip)
    return transcripts


# --- 2. Learn -------------------------------------------------------------------------------------
def corpus(transcripts):
    """What the tokenizer is made from."""
    for transcript in transcripts:
        yield from (transcript.prompt, transcript.turns[-1].next_observation, transcript.tip)
        yield from (TIP_REQUEST.format(score=transcript.score), TIPS_TEXT.format("- "))
        for turn in transcript.turns:
            yield from (turn.observation, turn.action, *turn.shown)


def things(transcripts):
    """Names of things in the observations, the most frequent ones first."""
    name = re.compile(r"\ban? ([a-z]+(?: [a-z]+){0,3}?)(?=[,.\n]| which| \(| currently)")
    count = {}
    for transcript in transcripts:
        seen = " ".join(turn.observation for turn in transcript.turns)
        for thing in set(name.findall(seen)):
            count[thing] = count.get(thing, 0) + 1
    for thing in ("substance", "agent", "temperature"):
        count.pop(thing, None)
    frequent = [thing for thing in count if count[thing] > 2]
    return sorted(frequent, key=lambda thing: (-count[thing], thing))


def renaming(transcript, names, rng):
    """A function that gives things and rooms other names, made up from the words of all names."""
    acted = " ".join([transcript.task_text, *(turn.action for turn in transcript.turns)]).lower()
    targets = [target.lower() for target in focus_targets(transcript.task_text)]
    old = [name for name in names + targets if name in acted and rng.random() < 0.7]
    words = sorted({word for name in names for word in name.split()})
    new = {name: " ".join(rng.sample(words, rng.choice([1, 1, 2, 2, 3]))) for name in old}
    if rng.random() < 0.4:
        new |= dict(zip(ROOMS, rng.sample(ROOMS, len(ROOMS)), strict=True))
    if not new:
        return str
    longest_first = sorted(map(re.escape, new), key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(longest_first)})\b", re.IGNORECASE)
    return lambda text: pattern.sub(lambda found: new[found[0].lower()], text)


def slips(ids, weight, rng, often):
    """Let a token slip in, or stick, now and then -> ids, weights.

    What follows is right again, so that a slip becomes no loop.
    """
    out = []
    weights = []
    for token in ids:
        if out and rng.random() < often:
            wrong = out[-1] if rng.random() < 0.7 else rng.choice(ids)
            times = rng.choice([1, 1, 2, 4])
            out += [wrong] * times
            weights += [0.0] * times
        out.append(token)
        weights.append(weight)
    return out, weights


def dialogue(policy, transcript, rename, rng):
    """As a rollout makes it -> ids, weight of each in the loss.

    A rollout drops the tips of past turns; here they stay, so that one sequence teaches several
    turns with tips.
    """
    parts = [(policy.message("system", rename(transcript.prompt)), 0.0, 0.0)]  # ids, weight, slips
    for turn in transcript.turns:
        parts.append((policy.message("user", rename(turn.observation)), 0.1, 0.0))
        if turn.shown:
            tips = [rename(tip) for tip in turn.shown]
            parts.append((tips_message(policy, tips), 0.1, 0.0))
        parts.append((policy.header, 0.0, 0.0))
        action = [*policy.encode(rename(turn.action)), policy.end_id]
        parts.append((action, turn.advantage, 0.01))
        parts.append((policy.encode("\n"), 0.0, 0.0))
    request = TIP_REQUEST.format(score=transcript.score)
    last = f"{rename(turn.next_observation)}\n\n{request}"
    parts.append((policy.message("user", last), 0.0, 0.0))
    parts.append((policy.header, 0.0, 0.0))
    parts.append(([*policy.encode(rename(transcript.tip)), policy.end_id], 1.0, 0.06))
    ids = []
    weights = []
    for piece, weight, often in parts:
        piece_ids, piece_weights = slips(piece, weight, rng, often)
        ids += piece_ids
        weights += piece_weights
    return ids[:CONTEXT], weights[:CONTEXT]


def recall(vocabulary, rng, length=400, piece=8):
    """Exercise in copying: random tokens, then pieces of them again -> ids, weights."""
    ids = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(50, length))]
    weights = [0.0] * len(ids)
    for start in [rng.randrange(len(ids) - piece) for _ in range(len(ids) // piece)]:
        again, again_weights = slips(ids[start : start + piece], 0.15, rng, 0.06)
        ids += again
        weights += [0.0, *again_weights[1:]]  # where a piece begins cannot be known
    return ids, weights


def learn(model, policy, transcripts, minutes, rng):
    """Predict the next token, on at least 2,500 tokens at each step."""
    names = things(transcripts)
    queue = []
    optimizers = tiny.make_optimizers(
        model, r"layers\.(0|1\.self_attn)\.", rates=(0.006, 0.001, 0.003), weight_decay=0.1
    )

    def sequence(step):
        if step < 40 or rng.random() < 0.1:
            return recall(model.config.vocab_size, rng)
        if not queue:
            queue.extend(rng.sample(transcripts, len(transcripts)))
        transcript = queue.pop()
        rename = str
        if rng.random() < 0.6:
            rename = renaming(transcript, names, rng)
        return dialogue(policy, transcript, rename, rng)

    def backward(step):
        batch = []
        while sum(len(ids) for ids, _ in batch) < 2500:
            batch.append(sequence(step))
        total = sum(sum(weights) for _, weights in batch)
        loss_sum = 0.0
        for ids, weights in batch:
            ids = torch.tensor(ids)
            weights = torch.tensor(weights)[1:]  # [L - 1], of the targets
            where = weights.nonzero()[:, 0]  # [n]
            with tiny.autocast():
                states = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                logits = model.lm_head(states[where]).float()  # [n, vocab]
            losses = F.cross_entropy(logits, ids[1:][where], reduction="none")  # [n]
            loss = losses @ weights[where] / total
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    tiny.learn(optimizers, minutes, last_rate=0.02, backward=backward)


def main():
    """Play, then learn."""
    parser = tiny.command_line(__doc__, FOLDER, minutes=10)
    args = parser.parse_args()
    tiny.refuse_overwrite(parser, args)
    torch.manual_seed(args.seed)
    transcripts = play_all(args.seed)
    tokenizer = tiny.make_tokenizer(corpus(transcripts), 3072)
    model = tiny.make_model(len(tokenizer), layers=4, heads=4, size=48, width=512, theta=1e6)
    # Two heads: what came after this token?
    lookups = [(0, 1), (0, 1)]
    # Loud enough that the untrained copies can be learnt from.
    tiny.start_copying(model, 2.5, sharpness=4.0, fast=6, volume=0.15, lookups=lookups)
    policy = tiny.load_policy(model, tokenizer, args.out)  # for its dialogue format
    learn(model, policy, transcripts, args.minutes, random.Random(args.seed))
    tiny.save(model, args.out)


if __name__ == "__main__":
    main()
