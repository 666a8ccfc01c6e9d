"""How much faster the code is than the obvious way, and that it computes the same.

  python -m experiments.speed

One process, one set of random weights. Each arm is timed only after its log-probs or gradients have
been compared with the plain version's: the difference is printed, and on a CPU, in fp32, it must be
below 1e-5. Times are medians of interleaved repeats; look at the ratios.

  rollout   plain: `generate` reads the whole dialogue again at every turn
            ours:  keys and values are kept from turn to turn
  update    plain: a row for each (prompt, action) pair
            ours:  a row for each episode, with branches
  env       plain: the package's ScienceWorldEnv, a JVM each
            ours:  many simulators in one JVM

On a GPU the model is 7B-shaped (bf16, or --load-in-4bit); experiments/gpu.py says what its time
goes to there.
"""

import argparse
import dataclasses
import os
import statistics
import time

import numpy as np
import psutil
import torch
from scienceworld import ScienceWorldEnv
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config
from transformers.utils import logging as transformers_logging

import rollout
from empo2 import Algorithm, accumulate_gradient, collate, score_tokens
from engine.hardware import find_place
from engine.packing import micro_batches, pack
from experiments.dialogues import learnt_pairs, message, some_ids
from experiments.random_policy import QWEN_7B, fill, skeleton
from settings import Settings
from worlds.scienceworld import Jvm, ScienceWorld, find_java

PROMPT = 200  # tokens of the system message
OBSERVATION = 40  # mean tokens of an observation
ACTION = 8  # most tokens of an action
UPDATE_EPISODES = 2  # of an optimiser step
SIMULATORS = 16
REPEATS = 3
SETTINGS = Settings(micro_tokens=16384, min_prob=0.0)
SMALL = Qwen2Config(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1735,
    tie_word_embeddings=False,
)
WALK = ("look around", "teleport to kitchen", "look around", "open cupboard",
        "pick up thermometer", "inventory")  # fmt: skip


# --- Rollout --------------------------------------------------------------------------------------
@torch.no_grad()
def plain_sample(policy, prompts, actions):
    """`generate` from nothing, padded on the left -> the log-probs of the given actions."""
    policy.model.eval()
    ids = pad_sequence([torch.tensor(p) for p in prompts], True, policy.end_id, "left")
    seen = pad_sequence([torch.ones(len(p)) for p in prompts], True, 0, "left")
    width = ids.shape[1]
    longest = max(map(len, actions))

    def forced(b, ids):  # what may come next
        action = actions[b]
        return [action[min(len(ids) - width, len(action) - 1)]]

    with policy.autocast():
        out = policy.model.generate(
            input_ids=ids.to(policy.device),
            attention_mask=seen.to(policy.device),
            prefix_allowed_tokens_fn=forced,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=policy.end_id,
            return_dict_in_generate=True,
            output_logits=True,  # raw, as if nothing was forced
        )
    logps = torch.stack(out.logits, 1).float().log_softmax(-1)  # [B, longest, vocab]
    return [logps[b, range(len(action)), action].tolist() for b, action in enumerate(actions)]


def play(policy, prompts, observations, action_tokens):
    """Turns with given observation ids [turn][episode] -> episodes."""
    policy.forget()
    episodes = []
    for lane, rng in enumerate(np.random.default_rng(0).spawn(len(prompts))):
        job = rollout.Job("", 0, lane, 0)
        episodes.append(rollout.Episode(job, rng, lane, "", prompts[lane], policy.header))
    for turn_observations in observations:
        for episode, ids in zip(episodes, turn_observations, strict=True):
            episode.turns.append(rollout.Turn("", ids))
        contexts = [episode.prompt(-1) for episode in episodes]
        actions, logps = rollout.sample(policy, episodes, contexts, action_tokens, 1.0)
        for episode, action, action_logps in zip(episodes, actions, logps, strict=True):
            episode.turns[-1].action_ids = action
            episode.turns[-1].logps = action_logps
            episode.turns[-1].past_ids = rollout.past(policy, episode.turns[-1])
    return episodes


def replay_plainly(policy, episodes):
    """The same tokens through `generate` -> the largest difference of a log-prob."""
    worst = 0.0
    for t in range(len(episodes[0].turns)):
        prompts = [episode.prompt(t) for episode in episodes]
        turns = [episode.turns[t] for episode in episodes]
        plain = plain_sample(policy, prompts, [turn.action_ids for turn in turns])
        for logps, turn in zip(plain, turns, strict=True):
            worst = max(worst, np.abs(np.subtract(logps, turn.logps)).max())
    return worst


def check_equal(policy, what, difference):
    """An arm that computes something else is not timed."""
    if policy.device.type == "cpu" and difference >= 1e-5:
        raise RuntimeError(f"{what} differ by {difference:.1e}: one of the two is wrong")


def timed(*arms):
    """Median seconds of each arm; the arms take turns."""
    seconds = [[] for _ in arms]
    for _ in range(REPEATS):
        for arm, times in zip(arms, seconds, strict=True):
            start = time.perf_counter()
            arm()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def show(name, plain, ours, note):
    """A line of the table."""
    print(f"{name:38}{plain:10.2f} s{ours:10.2f} s{plain / ours:9.1f}x   {note}", flush=True)


def bench_rollout(policy, rng, dialogues, turns):
    """Episodes of so many turns, for the other arms."""
    prompts = [some_ids(rng, PROMPT) for _ in range(dialogues)]
    observations = []
    for _ in range(turns):
        sizes = rng.integers(OBSERVATION // 4, 2 * OBSERVATION, dialogues)
        observations.append([message(policy, rng, "user", n) for n in sizes])
    episodes = play(policy, prompts, observations, ACTION)
    difference = replay_plainly(policy, episodes)
    check_equal(policy, "log-probs", difference)
    plain, ours = timed(
        lambda: replay_plainly(policy, episodes),
        lambda: play(policy, prompts, observations, ACTION),
    )
    policy.forget()
    tokens = sum(len(episode.prompt(-1)) for episode in episodes)
    read = sum(len(episode.prompt(t)) for episode in episodes for t in range(turns))
    note = f"log-probs equal to {difference:.0e}; tokens read {read:,} -> {tokens:,}"
    show(f"rollout, {dialogues} dialogues x {turns} turns", plain, ours, note)
    return episodes


# --- Update ---------------------------------------------------------------------------------------
def gradient(policy, packs, s):
    """Of an optimiser step, a row for each list of pairs -> [n], and padded tokens computed."""
    policy.model.zero_grad()
    num_tokens = sum(len(pair.action) for pairs in packs for pair in pairs)
    computed = 0
    for rows in micro_batches([pack(pairs) for pairs in packs], s.micro_tokens):
        accumulate_gradient(policy, rows, Algorithm(s), num_tokens)
        computed += len(rows) * max(len(row.ids) for row in rows)
    return torch.cat([p.grad.flatten() for p in policy.trainable()]), computed


def bench_update(policy, rng, episodes, turns, with_tips):
    """A step on so many turns; with tips: on a quarter of them, two thirds of those off-policy."""
    packed = []
    for number, episode in enumerate(episodes[:UPDATE_EPISODES]):
        own = [dataclasses.replace(turn) for turn in (episode.turns * 2)[:turns]]
        for t, turn in enumerate(own):
            turn.advantage = (-1.0) ** number
            if with_tips and t % 4 == 3:
                turn.shown_ids = message(policy, rng, "user", 4 * OBSERVATION)
                turn.offpolicy = t // 4 % 3 > 0
        packed.append(learnt_pairs(dataclasses.replace(episode, turns=own), SETTINGS))
    alone = [[pair] for pairs in packed for pair in pairs]
    plain_gradient, plain_tokens = gradient(policy, alone, SETTINGS)
    our_gradient, our_tokens = gradient(policy, packed, SETTINGS)
    difference = ((plain_gradient - our_gradient).norm() / plain_gradient.norm()).item()
    check_equal(policy, "gradients", difference)
    plain, ours = timed(
        lambda: gradient(policy, alone, SETTINGS), lambda: gradient(policy, packed, SETTINGS)
    )
    note = f"gradients equal to {difference:.0e}; tokens {plain_tokens:,} -> {our_tokens:,}"
    mixture = ", p = 0.25, q = 2/3" if with_tips else ""
    show(f"update, {turns} turns{mixture}", plain, ours, note)


def bench_memory(policy, episodes):
    """What the forward pass of a micro-batch keeps for the backward pass."""
    print("\nkept for the backward pass, by tokens of the micro-batch, and what their logits are")
    for count in (1, 2, 4):
        rows = [pack(learnt_pairs(episode, SETTINGS)) for episode in (episodes * 4)[:count]]
        tokens = sum(len(row.ids) for row in rows)
        kept = memory_for_backward(policy, rows)
        logits = 4 * tokens * policy.model.config.vocab_size / 1e9
        per_token = f"{1e6 * kept / tokens:.1f} kB a token"
        print(f"  {tokens:7,} tokens: {kept:.3f} GB, {per_token}   {logits:.3f} GB")


def memory_for_backward(policy, rows):
    """GB of the tensors kept for the backward pass, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = collate(rows, policy.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logp, _ = score_tokens(policy, batch, SETTINGS)
        # The graph lives, so that no two tensors are at the same address, until all are counted.
        batch.advantages = torch.ones_like(logp)
        loss, _ = Algorithm(SETTINGS).loss(batch, logp)
    return sum(kept.values()) / 1e9


# --- ScienceWorld ---------------------------------------------------------------------------------
def bench_env(steps=60):
    """Steps per second over ordinary actions: the package's wrapper against ours."""
    java = os.path.dirname(find_java())  # the wrapper looks at PATH alone
    os.environ["PATH"] = os.pathsep.join([java, os.environ["PATH"]])
    stock = ScienceWorldEnv("power-component")
    stock.load("power-component", 0, "easy")
    stock.reset()
    ours = [ScienceWorld(step_limit=10**6) for _ in range(SIMULATORS)]
    for env in ours:
        env.reset("power-component", 0)
    rounds = steps * 4 // SIMULATORS

    def run_stock():
        for i in range(steps):
            stock.step(WALK[i % len(WALK)])

    def run_ours():
        for i in range(rounds):
            for env in ours:
                env.step(WALK[i % len(WALK)])

    run_stock()  # the JVMs warm up
    run_ours()
    stock_time, our_time = timed(run_stock, run_ours)
    stock_rate = steps / stock_time
    our_rate = rounds * SIMULATORS / our_time
    resident = psutil.Process(Jvm.living[0].process.pid).memory_info().rss / 1e9
    print(
        f"\n{'ScienceWorld, steps per second':38}{stock_rate:12.0f}{our_rate:12.0f}"
        f"{our_rate / stock_rate:9.1f}x   "
        f"{SIMULATORS} simulators in one JVM of {resident:.2f} GB resident"
    )
    stock.close()


# --- Command line ---------------------------------------------------------------------------------
def make_policy(load_in_4bit):
    """A random Qwen2: small, or of 7B on a GPU. Its adapter is random, too."""
    place = find_place()
    torch.manual_seed(0)
    if place.gigabytes:
        return fill(skeleton(QWEN_7B, load_in_4bit), place.device)
    model = skeleton(SMALL, load_in_4bit, torch.float32)
    return fill(model, gradient_checkpointing=False)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=["model", "env"], help="leave the other part out")
    add("--dialogues", type=int, default=4, help="side by side (default 4)")
    add("--turns", type=int, default=30, help="of an episode (default 30)")
    add("--load-in-4bit", action="store_true")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; {args}")
    if args.only != "env":
        policy = make_policy(args.load_in_4bit)
        rng = np.random.default_rng(0)
        print(f"\n{'':38}{'plain':>12}{'ours':>12}{'ratio':>10}")
        episodes = bench_rollout(policy, rng, args.dialogues, args.turns)
        bench_update(policy, rng, episodes, args.turns, with_tips=False)
        bench_update(policy, rng, episodes, 2 * args.turns, with_tips=False)
        bench_update(policy, rng, episodes, args.turns, with_tips=True)
        bench_memory(policy, episodes)
    if args.only != "model":
        bench_env()


if __name__ == "__main__":
    main()
