"""How much faster the code is than the obvious way, and that it computes the same.

  python -m experiments.speed

One process, one set of random weights, fp32. Each arm is timed only after its log-probs or
gradients have been compared with the plain version's: the difference is printed and must be below
1e-5. Times are medians of interleaved repeats; look at the ratios.

  rollout   plain: `generate` reads the whole dialogue again at every turn
            ours:  keys and values are kept from turn to turn
  update    plain: a row for each (prompt, action) pair
            ours:  a row for each episode, with branches
  env       plain: the package's ScienceWorldEnv, a JVM each
            ours:  16 simulators in one JVM

All of it is measured on the CPU; experiments/gpu.py says what the time goes to on a GPU.
"""

import argparse
import dataclasses
import os
import statistics
import time
from functools import partial

import numpy as np
import torch
from scienceworld import ScienceWorldEnv
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as transformers_logging

import rollout
from empo2 import Algorithm, accumulate_gradient
from engine.packing import micro_batches, pack
from experiments.gpu_memory import fill, learnt_pairs, message, shape, skeleton, some_ids
from settings import Settings
from worlds.scienceworld import ScienceWorld, find_java

DIALOGUES = 4  # side by side
TURNS = 30  # of an episode
PROMPT = 200  # tokens of the system message
OBSERVATION = 40  # mean tokens of an observation
ACTION = 8  # most tokens of an action
UPDATE_EPISODES = 2  # of an optimiser step
SIMULATORS = 16
REPEATS = 3
SETTINGS = Settings(micro_tokens=16384, min_prob=0.0)
SMALL = shape(256, 768, 4, 8, 2, 1735)
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

    options = {"max_new_tokens": longest, "min_new_tokens": longest, "do_sample": False}
    options |= {"pad_token_id": policy.end_id, "prefix_allowed_tokens_fn": forced}
    with policy.autocast():  # the logits are raw, as if nothing was forced
        out = policy.model.generate(
            ids, attention_mask=seen, output_logits=True, return_dict_in_generate=True, **options
        )
    logps = torch.stack(out.logits, 1).float().log_softmax(-1)  # [B, longest, vocab]
    return [logps[b, range(len(action)), action].tolist() for b, action in enumerate(actions)]


def play(policy, prompts, observations, action_tokens):
    """Turns with given observation ids [turn][episode] -> episodes."""
    policy.forget()
    episodes = []
    for env_index, rng in enumerate(np.random.default_rng(0).spawn(len(prompts))):
        job = rollout.Job("", 0, env_index, 0)
        episodes.append(rollout.Episode(job, rng, env_index, "", prompts[env_index], policy.header))
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


def check_equal(what, difference):
    """An arm that computes something else is not timed."""
    if difference >= 1e-5:
        raise RuntimeError(f"{what} differ by {difference:.1e}: one of the two is wrong")


def timed(*arms):
    """Median seconds of each arm; the arms take turns."""
    seconds = [[] for _ in arms]
    for _ in range(REPEATS):
        for arm, times in zip(arms, seconds, strict=True):
            start = time.perf_counter()
            arm()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def show(name, plain, ours, note):
    """A line of the table."""
    print(f"{name:38}{plain:10.2f} s{ours:10.2f} s{plain / ours:9.1f}x   {note}", flush=True)


def bench_rollout(policy, rng):
    """Episodes for the other arms."""
    prompts = [some_ids(rng, PROMPT) for _ in range(DIALOGUES)]
    observations = []
    for _ in range(TURNS):
        sizes = rng.integers(OBSERVATION // 4, 2 * OBSERVATION, DIALOGUES)
        observations.append([message(policy, rng, "user", n) for n in sizes])
    episodes = play(policy, prompts, observations, ACTION)
    difference = replay_plainly(policy, episodes)
    check_equal("log-probs", difference)
    plain, ours = timed(
        lambda: replay_plainly(policy, episodes),
        lambda: play(policy, prompts, observations, ACTION),
    )
    policy.forget()
    tokens = sum(len(episode.prompt(-1)) for episode in episodes)
    read = sum(len(episode.prompt(t)) for episode in episodes for t in range(TURNS))
    note = f"log-probs equal to {difference:.0e}; tokens read {read:,} -> {tokens:,}"
    show(f"rollout, {DIALOGUES} dialogues x {TURNS} turns", plain, ours, note)
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
    arms = [partial(gradient, policy, packs, SETTINGS) for packs in (alone, packed)]
    (expected, plain_tokens), (found, our_tokens) = (arm() for arm in arms)
    difference = ((expected - found).norm() / expected.norm()).item()
    check_equal("gradients", difference)
    plain, ours = timed(*arms)
    note = f"gradients equal to {difference:.0e}; tokens {plain_tokens:,} -> {our_tokens:,}"
    mixture = ", p = 0.25, q = 2/3" if with_tips else ""
    show(f"update, {turns} turns{mixture}", plain, ours, note)


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

    def run(envs, rounds):
        for i in range(rounds):
            for env in envs:
                env.step(WALK[i % len(WALK)])
        return len(envs) * rounds

    arms = partial(run, [stock], steps), partial(run, ours, steps * 4 // SIMULATORS)
    counts = [arm() for arm in arms]  # the JVMs warm up
    plain, fast = (count / took for count, took in zip(counts, timed(*arms), strict=True))
    print(f"\n{'ScienceWorld, steps per second':38}{plain:12.0f}{fast:12.0f}{fast / plain:9.1f}x")
    stock.close()


# --- Command line ---------------------------------------------------------------------------------
def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["model", "env"], help="leave the other part out")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.only != "env":
        torch.manual_seed(0)
        policy = fill(skeleton(SMALL, dtype=torch.float32), gradient_checkpointing=False)
        rng = np.random.default_rng(0)
        print(f"\n{'':38}{'plain':>12}{'ours':>12}{'ratio':>10}")
        episodes = bench_rollout(policy, rng)
        for turns, with_tips in ((TURNS, False), (2 * TURNS, False), (TURNS, True)):
            bench_update(policy, rng, episodes, turns, with_tips)
    if args.only != "model":
        bench_env()


if __name__ == "__main__":
    main()
