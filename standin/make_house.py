"""Make the player of the laptop experiment: a tiny language model that knows how to play in a house, and no house.

It has what a language model would bring: it writes well-formed actions, thinks before it acts ("seek ITEM in ROOM
CONTAINER: ACTION"), follows tips that it is shown, looks somewhere at random when nothing is known, and sums an
episode up in one true sentence. It is trained from scratch by imitation of a scripted player with exactly that
behaviour, on made-up tasks: a thing and its parts are drawn from all names, their places anew in each episode. The
house's own tasks, that is its things with their own parts in their places, are never played.

    python standin/house.py --force       12 minutes on two cores; learning is limited by time, so that another
                                          machine gets another player of the same kind
    python standin/house.py --check       what the player in the folder can do
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import empo2  # noqa: E402
import envs  # noqa: E402
import memory  # noqa: E402
from policy import Policy  # noqa: E402
from standin.make import make_tokenizer  # noqa: E402

FACT = re.compile(r"(?:found|score \d+:|,) ([a-z ]+) in (\w+) (\w+)")  # in an observation or a tip
FOLDER = Path(__file__).parent / "house"
EXPERIMENT = {"rooms": 12, "containers": 6, "parts": 1, "step_limit": 7, "partial_credit": False}
SETTINGS = empo2.Settings(env="house")


class OtherHouses(envs.House):
    """Made-up tasks: any thing, with any parts but its own, in new places in every episode."""

    NAMES = sorted(name for thing, parts in envs.House.THINGS.items() for name in (thing, *parts))

    def __init__(self, rng, **options):
        super().__init__(**options)
        self.rng = rng

    def tasks(self):
        return self.NAMES

    def _hide(self, task, variation):
        others = [
            name for name in self.NAMES if name != task and name not in self.THINGS.get(task, ())
        ]
        needed = [*self.rng.sample(others, self.rng.choice((0, 1, 2, 2))), task]
        return dict(zip(needed, self.rng.sample(self.places, len(needed))))


def think(env, known, plan, rng):
    """The scripted player's next line, and where it now thinks the next thing is (item, place)."""
    item = next((thing for thing in env.hiding if thing not in env.carried), None)
    if item is None:
        return f"all found: turn on {env.task}", None
    if item in known:
        place = known[item]
    elif plan and plan[0] == item and plan[1] not in env.opened:
        place = plan[1]
    else:  # luck cannot be foreseen, so what is learnt is to guess; but it makes episodes from which more is learnt
        lucky = (
            [place for place in env.hiding.values() if place not in env.opened]
            if rng.random() < 0.5
            else []
        )
        place = rng.choice(lucky or [place for place in env.places if place not in env.opened])
    room, box = place
    action = (
        f"go to {room}"
        if room != env.room
        else f"open {box}"
        if place not in env.opened
        else f"take {item}"
    )
    return f"seek {item} in {room} {box}: {action}", (item, place)


def tip_of(score, needed, facts):
    """What was found and what is missing, thing by thing: the same facts always make the same sentence."""
    return (
        f"score {score:.0f}: "
        + ", ".join(
            f"{item} in {' '.join(facts[item])}" if item in facts else f"{item} unknown"
            for item in needed
        )
        + "."
    )


def random_tips(env, rng):
    """What earlier episodes of the same task may have left in the memory."""
    share, lines = rng.choice((0.2, 0.4, 0.7, 1)), []
    for _ in range(rng.randint(1, 4)):
        facts = {item: place for item, place in env.hiding.items() if rng.random() < share}
        lines.append(
            tip_of(
                100 if len(facts) == len(env.hiding) and rng.random() < 0.5 else 0,
                env.hiding,
                facts,
            )
        )
    return list(dict.fromkeys(lines))


def play(policy, env, rng):
    """One episode by the scripted player, tip included, laid out as a rollout lays it out -> Row. Where training has
    behaviour log-probs, it holds the weight of each token in the loss."""
    p = empo2.begin(policy, env, (rng.choice(env.tasks()), 0, 0), 0, envs.EnvFault)
    env._limit = rng.randint(4, 11)
    e, plan, often = p.episode, None, rng.choice((0, 0.3, 0.6, 0.9))
    tips = random_tips(env, rng)
    seen = {}
    while not e.ended:
        shown = tips if rng.random() < often else []
        empo2.open_turn(policy, p, shown, SETTINGS)
        known = {item: (room, box) for item, room, box in FACT.findall(" ".join(shown))} | seen
        line, plan = think(env, known, plan, rng)
        blunder = rng.random() < 0.03
        e.turns[-1].action = policy.encode("open it" if blunder else line) + [policy.end_id]
        e.turns[-1].logps = [float(not blunder)] * len(e.turns[-1].action)
        empo2.act(policy, p, envs.EnvFault)
        seen |= {
            item: (room, box)
            for item, room, box in FACT.findall(p.observation)
            if item in env.hiding
        }
    request = f"{p.observation}\n\n{empo2.TIP_REQUEST.format(score=e.score)}"
    e.tip = tip_of(e.score, env.hiding, seen)
    action = policy.encode(e.tip) + [policy.end_id]
    e.turns.append(
        empo2.Turn(
            policy.closing(e.turns[-1].action) + policy.message("user", request),
            [],
            action,
            [3.0] * len(action),
            {"observation": request},
        )
    )
    return empo2.training_row(e, 1.0, SETTINGS)


def corpus(env):
    """What the tokenizer is made from: every word of the house, whole."""
    yield from (
        empo2.TIPS_TEXT.format("- score 0: a unknown, b unknown.\n- "),
        envs.UNKNOWN,
        "score 100",
        "all found: turn on",
    )
    for item in env.NAMES + list(env.JUNK):
        for room, box in env.places:
            yield f"seek {item} in {room} {box}: go to {room}, open {box}, take {item}, turn on {item}"
        yield tip_of(0, [item, "it"], {item: (room, box)})
    for task in env.NAMES:
        yield env.reset(task, 0)[1]["prompt"]
        for action in env.gold_path():
            yield env.step(action)[0]
        yield empo2.TIP_REQUEST.format(score=100)


def make_model(vocabulary, layers=3, heads=4, size=32, theta=1e5):
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=heads * size,
            intermediate_size=3 * heads * size,
            num_hidden_layers=layers,
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
    model.model.embed_tokens.weight.data *= 3
    start_looking_up(
        model.model.layers[0].self_attn, model.model.layers[1].self_attn, heads, size, theta
    )
    return model


@torch.no_grad()
def start_looking_up(first, second, heads, size, theta):
    """Start the first two layers as a circuit that looks a fact up: after "battery in", what followed "battery in"
    before? That is all that following a tip needs, and would take longer to emerge than the rest takes to learn."""
    half, d = size // 2, heads * size
    angles = theta ** (
        -torch.arange(half) / half
    )  # of a head's rotary pairs (i, i + half), fast to slow
    strength = 5.0 * (torch.arange(half) < 5)  # the fast pairs tell neighbours apart
    slow = [
        i for i in range(size) if i % half >= half // 2
    ]  # pairs that hardly turn: content at any distance
    content = torch.linalg.qr(torch.randn(d, d))[0][
        : len(slow)
    ]  # [n, d]: what of a token is compared
    channels = [content] + list(
        torch.linalg.qr(torch.randn(d, 3 * len(slow)))[0].T.split(len(slow))
    )
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    for head, back in enumerate((1, 2, 3)):
        mine = slice(head * size, (head + 1) * size)
        # Layer 0: heads that look 1, 2, 3 tokens back and write what they see into channels of their own ...
        first.k_proj.bias[mine] = torch.cat([strength, 0 * strength])
        first.q_proj.bias[mine] = torch.cat(
            [strength * (back * angles).cos(), -strength * (back * angles).sin()]
        )
        first.v_proj.weight[mine][: len(slow)] = content
        first.o_proj.weight[:, mine][:, : len(slow)] = 0.3 * channels[back].T
        # ... layer 1: the token n back here is sought n + 1 back there, and what stands there is said.
        at = [head * size + i for i in slow]
        second.q_proj.weight[at], second.k_proj.weight[at] = (
            2.0 * channels[head],
            2.0 * channels[back],
        )
        second.v_proj.weight[mine] = basis[head * size : (head + 1) * size]
        second.o_proj.weight[:, mine] = 0.5 * basis[head * size : (head + 1) * size].T


def learn(policy, env, minutes, rng, episodes=8, lr=0.015):
    """Imitate the scripted player, on fresh episodes at each step."""
    base, fast = policy.model.get_base_model(), torch.cpu._is_avx512_bf16_supported()
    parameters = {name: p.requires_grad_("lora" not in name) for name, p in base.named_parameters()}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    kind = {
        name: "rest"
        if p.ndim < 2 or "layers" not in name
        else "lookup"
        if re.search(r"layers\.[01]\.self_attn", name)
        else "matrix"
        for name, p in parameters.items()
    }
    optimizers = [
        torch.optim.Muon(
            [p for n, p in parameters.items() if kind[n] == "matrix"], lr=lr, weight_decay=0.05
        ),
        # slow, or the circuit is lost before it is of use
        torch.optim.Muon(
            [p for n, p in parameters.items() if kind[n] == "lookup"], lr=0.3 * lr, weight_decay=0
        ),
        torch.optim.AdamW(
            [p for n, p in parameters.items() if kind[n] == "rest"],
            lr=0.4 * lr,
            betas=(0.9, 0.95),
            weight_decay=0,
        ),
    ]
    peak = [o.param_groups[0]["lr"] for o in optimizers]
    start, average, step = time.time(), None, 0
    bar = tqdm(total=round(60 * minutes), desc="learn", unit="s")
    while (passed := (time.time() - start) / (60 * minutes)) < 1:
        for optimizer, rate in zip(optimizers, peak):
            optimizer.param_groups[0]["lr"] = rate * min(
                1, (step + 1) / 30, (1 - passed) / 0.6 + 0.01
            )
            optimizer.zero_grad()
        rows = [play(policy, env, rng) for _ in range(episodes)]
        total, shown = sum(sum(r.old_logp) for r in rows), 0.0
        for batch in empo2.micro_batches(rows, 2048):
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logp = empo2.score(policy, batch, reference=True)[0]  # without the adapter
            loss = -(logp * empo2.stack(batch, "old_logp")).sum() / total
            loss.backward()
            shown += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        average = shown if average is None else 0.95 * average + 0.05 * shown
        bar.n = min(bar.total, round(time.time() - start))
        bar.set_postfix_str(f"step {step}, loss {average:.3f}")
    bar.close()


def check(folder, variations=16, seed=0):
    """What the player can do on the house's own tasks before anything is learnt -> {name: share}.

    Its memory holds the true facts, one a tip. A tip that it writes claims to have found things, or claims nothing.
    """
    s = empo2.Settings(
        env="house", memory_key="task", memory_scope="task", action_tokens=16, tip_tokens=40
    )
    simulators, embed = [envs.make("house", **EXPERIMENT) for _ in range(64)], memory.embedder()
    policy, env, told, own = (
        Policy.load(str(folder)),
        simulators[0],
        memory.TipMemory(k=4),
        memory.TipMemory(),
    )
    jobs = [(task, v, 0) for task in env.tasks() for v in env.variations(task, "test")[:variations]]
    for task in env.tasks():
        key = embed([env.reset(task, 0)[1]["task"]])[0]
        for item, place in env.hiding.items():
            told.add(key, tip_of(0, env.hiding, {item: place}), 0, task)
    result, claims = {}, []
    for name, s.memory_prob, policy.temperature in (
        ("without tips, greedy", 0, 0),
        ("without tips", 0, 1),
        ("with true tips", 1, 1),
    ):
        torch.manual_seed(seed)
        played = []
        for wave in empo2.rollout(
            policy,
            simulators,
            jobs,
            told,
            None,
            embed,
            s,
            np.random.default_rng(seed),
            envs.EnvFault,
        ):
            empo2.write_tips(policy, wave, own, embed, s)
            played += wave
        understood = [turn.texts["next"] != envs.UNKNOWN for e in played for turn in e.turns]
        result |= {
            f"success {name}": float(np.mean([e.score == 100 for e in played])),
            f"actions understood {name}": float(np.mean(understood)),
        }
        for e in played:
            env.reset(e.task, e.variation)
            claims += [
                (room, box) == env.hiding.get(item) for item, room, box in FACT.findall(e.tip)
            ]
    return result | {
        "claims in its own tips": len(claims),
        "of them true": float(np.mean(claims or [0])),
    }


def make(folder, minutes, seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    env = OtherHouses(rng, **{k: EXPERIMENT[k] for k in ("rooms", "containers")})
    tokenizer = make_tokenizer(corpus(env), 1024)
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer)).save_pretrained(folder)
    policy = Policy.load(str(folder))
    learn(policy, env, minutes, rng)
    model = policy.model.unload().requires_grad_(True)
    model.to(torch.bfloat16).save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=12, help="time to learn, on two cores (default: 12)"
    )
    parser.add_argument(
        "--check", action="store_true", help="make nothing, measure the player in the folder"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything that is drawn (default: 0)"
    )
    parser.add_argument("--force", action="store_true", help="replace the model in the folder")
    args = parser.parse_args()
    if not args.check:
        if (args.out / "model.safetensors").exists() and not args.force:
            parser.error(
                f"{args.out} already holds a model; give another --out, or --force to replace it"
            )
        make(args.out, args.minutes, args.seed)
    print(*(f"{name}: {value:.3f}" for name, value in check(args.out).items()), sep="\n")


if __name__ == "__main__":
    main()
