"""Make the built-in stand-in policy: a tiny language model that lets the whole loop be seen to work on a laptop.

It takes the place of a real language model when there is neither a GPU nor weights: it writes ScienceWorld actions,
explores, sums episodes up in one sentence and makes a little use of such tips. It is no result, and nothing measured
with it says anything about EMPO². It is trained from scratch on the 12 ScienceWorld tasks that are *not* among the
paper's 18 (`TASKS` below), on their training variations, by imitation of a scripted player:

1. play:  the simulator's own solutions, interrupted by wandering; tips are written by rule, and later episodes of a
          variation are shown earlier ones' tips at some turns, where the player does not wander
2. learn: next-token prediction on whole dialogues, laid out as in a rollout, mostly on actions and tips; in most of
          them things are given made-up names, so that names must be copied from the dialogue, not remembered

    python standin/make.py --force      about 20 minutes on two cores; longer --minutes help

The files in this folder come from the transcripts of seed 0 and 29 minutes of learning on one shared core, in three
stages (12, 10 and 7 minutes; the slips of `slips` only in the last). Learning is limited by time, so that another
machine gets another model of the same kind.
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs  # noqa: E402
from empo2 import TIP_REQUEST, TIPS_TEXT  # noqa: E402
from policy import Policy  # noqa: E402

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
ROOMS = [
    "art studio",
    "bathroom",
    "bedroom",
    "foundry",
    "greenhouse",
    "hallway",
    "kitchen",
    "living room",
    "outside",
    "workshop",
]
# How often the wandering player uses a verb.
VERBS = {
    "look at": 3,
    "look in": 1,
    "open": 4,
    "pick up": 4,
    "read": 4,
    "activate": 2,
    "move": 2,
    "connect": 4,
    "use": 1,
    "inventory": 0.5,
    "wait1": 0.3,
    "pour": 0.3,
    "mix": 0.2,
    "put down": 0.3,
    "deactivate": 0.3,
    "focus on": 0.25,
}
IDLE = ("look", "wait", "inventory", "task", "0", "1", "2")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


# --- 1. Play ----------------------------------------------------------------------------------------------------
def room_of(observation):
    found = re.match(
        r"(?:You (?:move|teleport) to|This (?:room|outside location) is called) the ([a-z ]+)\.",
        observation,
    )
    return found and found[1]


def solution(env, task, variation):
    """The simulator's solution as (room, action), without walking, open doors and repetitions."""
    opening, steps = envs.solve(task, variation, "easy")
    room, plan = room_of(opening.split("\n", 1)[1]), []
    for action, observation, _ in steps:
        action = action.replace("examine ", "look at ")
        if not re.match(r"go to|open door|look around", action) and (room, action) not in plan[-2:]:
            plan.append((room, action))
        room = room_of(observation) or room
    return plan


def wander(env, done, rng):
    """A random action that makes some sense."""
    options = {}
    for action in env.valid_actions():
        verb = next((v for v in VERBS if action.startswith(v)), None)
        things = action.removeprefix(verb or "")
        if (
            verb
            and action not in done
            and not re.search(
                rf"agent|\bair\b|sewer|drain|door|ground|component|{'|'.join(ROOMS)}|look around",
                things,
            )
        ):
            ends = things.split(" to ")
            if verb == "connect" and (
                not all(re.search("terminal|anode|cathode", end) for end in ends)
                or set(ends[0].split()[:2]) & set(ends[1].split()[:2])
            ):
                continue  # the ends of two different things, please
            if verb != "move" or "inventory" not in things:
                options.setdefault(verb, []).append(action)
    if not options:
        return "look around"
    verb = rng.choices(list(options), [VERBS[v] for v in options])[0]
    return min(rng.choices(options[verb], k=2), key=len)  # rather short ones: plain names


def play(env, task, variation, plan, tips, rng):
    """One episode by the scripted player. A turn: observation, tips, action, whether the action is to be learnt."""
    observation, info = env.reset(task, variation)
    wandering = rng.choice([0.1, 0.3, 0.5, 0.9])
    blunder = rng.randrange(2, 12) if rng.random() < 0.2 else None  # the turn of a wrong focus
    e = {"prompt": info["prompt"], "task": info["task"], "turns": [], "score": 0}
    room, at, fresh, done, failures = room_of(observation), 0, False, set(), 0
    for turn in range(rng.choice([3, 5, 7, 9, 12, 15, 20, 30])):
        shown = rng.sample(tips, rng.randint(1, len(tips))) if tips and rng.random() < 0.3 else []
        planned, learn = None, True
        if observation.startswith("Ambiguous"):
            action = "0"
        elif fresh and rng.random() < 0.9:
            action = "look around"
        elif turn == blunder:
            action, learn = (
                rng.choice([a for a in env.valid_actions() if a.startswith("focus on")]),
                False,
            )
        elif rng.random() < 0.03:
            action, learn = (
                rng.choice(
                    ["go door", "take it", "use", "look the", "open all", "focus", "search"]
                ),
                False,
            )
        elif at < len(plan) and failures < 3 and (shown or rng.random() > wandering):
            if plan[at][0] != room:
                doors = re.findall(r"door to the ([a-z ]+) \(", observation)
                action = (
                    "go" if plan[at][0] in doors and rng.random() < 0.4 else "teleport"
                ) + f" to {plan[at][0]}"
            else:
                planned = action = plan[at][1]
        elif rng.random() < 0.3:
            action = f"teleport to {rng.choice([r for r in ROOMS if r != room])}"
        else:
            action = wander(env, done, rng)
        before = observation
        observation, reward, terminated, truncated, info = env.step(action)
        known = observation != envs.UNKNOWN and not observation.startswith("Unknown action")
        if planned:
            at += 1
            failures += not known
        e["turns"].append(
            {
                "observation": before,
                "tips": shown,
                "action": action,
                "known": known,
                "reward": reward,
                "learn": learn and known and reward >= 0,
            }
        )
        fresh = (
            observation.startswith(("You move to the", "You teleport"))
            and room_of(observation) is not None
        )
        room = room_of(observation) or room
        done.add(action)
        e["score"] = info["score"]
        if terminated or truncated:
            break
    return e | {"final": observation, "tip": tip(e, rng)}


def tip(e, rng):
    """One true sentence on an episode, from what its dialogue shows."""
    useful = [
        t["action"] for t in e["turns"] if t["reward"] > 0 and not t["action"].startswith(IDLE)
    ]
    other = [
        t["action"]
        for t in e["turns"]
        if t["known"] and t["reward"] == 0 and not t["action"].startswith(IDLE)
    ]
    chosen = list(dict.fromkeys(useful))[:6]
    chosen += list(dict.fromkeys(other))[: max(0, 3 - len(chosen))]
    did = (
        ", ".join(a for a in dict.fromkeys(t["action"] for t in e["turns"]) if a in chosen)
        or "nothing useful"
    )
    unknown = [t["action"] for t in e["turns"] if not t["known"]]
    opening = rng.choice(["I did", "I did", "the steps were"])
    if e["score"] < 0:
        return f"Score {e['score']}: {e['turns'][-1]['action']} was wrong and ended it; before that {opening} {did}."
    focused = " ".join(
        t["action"] for t in e["turns"] if t["action"].startswith("focus") and t["known"]
    ).lower()
    missing = [x for x in envs.focus_targets(e["task"]) if x.lower() not in focused]
    end = f"; {unknown[0]} was not understood" if unknown and rng.random() < 0.5 else ""
    if e["score"] == 100:
        return f"Score 100: the task was completed by {did}{end}."
    if missing:
        end += f"; still to do: focus on {missing[0]}"
    return f"Score {e['score']}: {opening} {did}{end}."


def play_all(seed):
    episodes, rng = [], random.Random(seed)
    todo = [(task, k) for task, n in TASKS.items() for k in range(n)]
    # A second house has wires to connect: the actions of electrical tasks exist in it.
    worlds = [
        envs.make("scienceworld", step_limit=40, simplification=s)
        for s in ("easy", "teleportAction,selfWateringFlowerPots,openDoors")
    ]
    for task, k in tqdm(todo, desc="play", unit="house"):
        variation = worlds[0].variations(task, "train")[k]
        plan, tips = solution(worlds[0], task, variation), []
        for _ in range(EPISODES):
            episodes.append(play(worlds[rng.random() < 0.35], task, variation, plan, tips, rng))
            tips.append(episodes[-1]["tip"])
    return episodes


# --- 2. Learn ---------------------------------------------------------------------------------------------------
def texts(e):
    yield from (
        e["prompt"],
        e["final"],
        e["tip"],
        TIP_REQUEST.format(score=e["score"]),
        TIPS_TEXT.format("- "),
    )
    yield from (text for t in e["turns"] for text in (t["observation"], t["action"], *t["tips"]))


def make_tokenizer(texts, size):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_model(vocabulary, heads=4, size=48, theta=1e6):
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=heads * size,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.model.embed_tokens.weight.data *= (
        2.5  # 0.05: the untrained copies below are loud enough to be learnt from
    )
    start_copying(
        model.model.layers[0].self_attn, model.model.layers[1].self_attn, heads, size, theta
    )
    return model


@torch.no_grad()
def start_copying(first, second, heads, size, theta):
    """Start the first two layers as an induction circuit ("what came after this token last time?"), which is all
    that copying a name needs and would take longer to emerge than the rest takes to train."""
    half = size // 2
    angles = theta ** (
        -torch.arange(half) / half
    )  # of a head's rotary pairs (i, i + half), fast to slow
    strength = 4.0 * (torch.arange(half) < 6)  # the fast pairs tell neighbours apart
    for head, back in enumerate(
        (1, 2, 3)
    ):  # heads that look 1, 2 and 3 tokens back, whatever the content
        mine = slice(head * size, (head + 1) * size)
        first.k_proj.bias[mine] = torch.cat([strength, 0 * strength])
        first.q_proj.bias[mine] = torch.cat(
            [strength * (back * angles).cos(), -strength * (back * angles).sin()]
        )
    basis = torch.linalg.qr(torch.randn(heads * size, heads * size))[0]
    content, channel = (
        basis[:half],
        torch.linalg.qr(torch.randn(heads * size, half))[0].T,
    )  # [half, d]
    slow = [
        i for i in range(size) if i % half >= half // 2
    ]  # pairs that hardly turn: content at any distance
    first.v_proj.weight[:half] = (
        content  # head 0 writes what the token before was into a channel ...
    )
    first.o_proj.weight[:, :half] = 0.15 * channel.T
    for head in range(
        2
    ):  # ... where the second layer looks for the present token, and says what followed
        at = [head * size + i for i in slow]
        second.q_proj.weight[at], second.k_proj.weight[at] = 2.0 * content, 2.0 * channel
        mine = slice(head * size, (head + 1) * size)
        second.v_proj.weight[mine] = basis[head * size : (head + 1) * size]
        second.o_proj.weight[:, mine] = 0.5 * basis[head * size : (head + 1) * size].T


def things(episodes):
    """Names of things in the observations, the most frequent ones first."""
    count = {}
    for e in episodes:
        seen = " ".join(t["observation"] for t in e["turns"])
        for name in set(
            re.findall(r"\ban? ([a-z]+(?: [a-z]+){0,3}?)(?=[,.\n]| which| \(| currently)", seen)
        ):
            count[name] = count.get(name, 0) + 1
    return [
        name
        for name in sorted(count, key=lambda n: (-count[n], n))
        if count[name] > 2 and name not in ("substance", "agent", "temperature")
    ]


def renaming(e, names, rng):
    """A function that gives things and rooms of this episode other names, made up from the words of all names."""
    acted = " ".join([e["task"], *(t["action"] for t in e["turns"])]).lower()
    targets = [target.lower() for target in envs.focus_targets(e["task"])]
    old = [n for n in names + targets if n in acted and rng.random() < 0.7]
    words = sorted({word for n in names for word in n.split()})
    new = {n: " ".join(rng.sample(words, rng.choice([1, 1, 2, 2, 3]))) for n in old}
    if rng.random() < 0.4:
        new |= dict(zip(ROOMS, rng.sample(ROOMS, len(ROOMS))))
    if not new:
        return str
    pattern = re.compile(
        r"\b(" + "|".join(sorted(map(re.escape, new), key=len, reverse=True)) + r")\b",
        re.IGNORECASE,
    )
    return lambda text: pattern.sub(lambda found: new[found[0].lower()], text)


def slips(ids, weight, rng, often):
    """Let a token slip in, or stick, now and then; what follows is right again, so that a slip becomes no loop."""
    out, weights = [], []
    for token in ids:
        if out and rng.random() < often:
            extra = [out[-1] if rng.random() < 0.7 else rng.choice(ids)] * rng.choice([1, 1, 2, 4])
            out, weights = out + extra, weights + [0.0] * len(extra)
        out.append(token)
        weights.append(weight)
    return out, weights


def sequence(policy, e, rename, rng, context=4500):
    """One dialogue as a rollout makes it -> ids, weight of each in the loss. (A rollout drops the tips of past
    turns; here they stay, so that one sequence teaches several turns with tips.)"""
    ids, weights = [], []

    def add(piece, weight, often=0.0):
        for whole, part in zip((ids, weights), slips(piece, weight, rng, often)):
            whole.extend(part)

    add(policy.message("system", rename(e["prompt"])), 0.0)
    for t in e["turns"]:
        add(policy.message("user", rename(t["observation"])), 0.1)
        if t["tips"]:
            add(
                policy.message(
                    "user", TIPS_TEXT.format("\n".join(f"- {rename(x)}" for x in t["tips"]))
                ),
                0.1,
            )
        add(policy.header, 0.0)
        add(policy.encode(rename(t["action"])) + [policy.end_id], float(t["learn"]), 0.01)
        add(policy.encode("\n"), 0.0)
    add(
        policy.message("user", rename(e["final"]) + "\n\n" + TIP_REQUEST.format(score=e["score"])),
        0.0,
    )
    add(policy.header, 0.0)
    add(policy.encode(rename(e["tip"])) + [policy.end_id], 1.0, 0.06)
    return ids[:context], weights[:context]


def recall(vocabulary, rng, length=400, piece=8):
    """Exercise in copying: random tokens, then pieces of them again -> ids, weights."""
    ids = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(50, length))]
    weights = [0.0] * len(ids)
    for start in [rng.randrange(len(ids) - piece) for _ in range(len(ids) // piece)]:
        again, weight = slips(ids[start : start + piece], 0.15, rng, 0.06)
        ids += again
        weights += [0.0] + weight[1:]  # where a piece begins cannot be known
    return ids, weights


def learn(model, policy, episodes, minutes, rng, batch_tokens=2500):
    first, second = model.model.layers[:2]
    copying = [p for part in (first, second.self_attn) for p in part.parameters() if p.ndim == 2]
    matrices = [
        p
        for p in model.model.layers.parameters()
        if p.ndim == 2 and not any(p is c for c in copying)
    ]
    rest = [p for p in model.parameters() if not any(p is m for m in copying + matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.006, weight_decay=0.1),
        torch.optim.Muon(
            copying, lr=0.001, weight_decay=0.0
        ),  # slow, or it is lost before it is of use
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peak = [o.param_groups[0]["lr"] for o in optimizers]
    fast = torch.cpu._is_avx512_bf16_supported()
    names, start, queue, average, step = things(episodes), time.time(), [], None, 0
    bar = tqdm(total=round(60 * minutes), desc="learn", unit="s")
    while (passed := (time.time() - start) / (60 * minutes)) < 1:
        for optimizer, rate in zip(optimizers, peak):
            optimizer.param_groups[0]["lr"] = rate * min(
                1, (step + 1) / 30, (1 - passed) / 0.6 + 0.02
            )
        batch, tokens = [], 0
        while tokens < batch_tokens:
            if step < 40 or rng.random() < 0.1:
                batch.append(recall(model.config.vocab_size, rng))
            else:
                queue = queue or rng.sample(episodes, len(episodes))
                e = queue.pop()
                batch.append(
                    sequence(policy, e, renaming(e, names, rng) if rng.random() < 0.6 else str, rng)
                )
            tokens += len(batch[-1][0])
        total = sum(sum(weights) for _, weights in batch)
        shown = [0.0, 0.0]
        for ids, weights in batch:
            ids, weights = torch.tensor(ids), torch.tensor(weights)[1:]
            where = weights.nonzero()[:, 0]
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[
                    0, where
                ]  # [n, d]
                logits = model.lm_head(hidden).float()
            losses = F.cross_entropy(logits, ids[1:][where], reduction="none")  # [n]
            (losses @ weights[where] / total).backward()
            target = weights[where] == 1
            shown[0] += losses[target].sum().item()
            shown[1] += target.sum().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if shown[1]:
            loss = shown[0] / shown[1]
            average = loss if average is None else 0.95 * average + 0.05 * loss
        bar.n = min(bar.total, round(time.time() - start))
        bar.set_postfix_str(f"step {step}, loss on actions and tips {average or 0:.2f}")
    bar.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)"
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="time to learn, after the playing (default: 10)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything that is drawn (default: 0)"
    )
    parser.add_argument("--force", action="store_true", help="replace the model in the folder")
    args = parser.parse_args()
    if (args.out / "model.safetensors").exists() and not args.force:
        parser.error(
            f"{args.out} already holds a model; give another --out, or --force to replace it"
        )
    torch.manual_seed(args.seed)
    episodes = play_all(args.seed)
    tokenizer = make_tokenizer((text for e in episodes for text in texts(e)), 3072)
    model = make_model(len(tokenizer))
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    policy = Policy.load(str(args.out))  # for its dialogue format, which it also checks
    learn(model, policy, episodes, args.minutes, random.Random(args.seed))
    model.to(torch.bfloat16).save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
