"""How much faster the code is than the obvious way, and that it computes the same: `python benchmarks/speed.py`.

One process, one set of random weights. Each arm is timed only after its log-probs (and gradients) have been compared
with the plain version kept in this file (the difference is printed; on a CPU, in fp32, it must be below 1e-5); medians of interleaved repeats; ratios are what to look at.

  rollout   plain: `generate` re-reads the whole dialogue at every turn         ours: keys and values kept over turns
  update    plain: one forward/backward row per (prompt, action) pair           ours: one row per episode, with branches
  env       plain: the package's ScienceWorldEnv, a JVM each                    ours: many simulators in one JVM
On a GPU the model is 7B-shaped (bf16, or --load-in-4bit) and the floors are computed from peaks measured in this run.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent.parent))
import empo2
import envs
from policy import Policy

ROOT = Path(__file__).parent.parent


# --- The plain versions -----------------------------------------------------------------------------------------
class Forced(LogitsProcessor):
    """Makes `generate` draw given tokens; its raw logits are untouched."""

    def __init__(self, actions, width):
        self.actions, self.width = actions, width

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, action in enumerate(self.actions):
            forced[row, action[min(ids.shape[1] - self.width, len(action) - 1)]] = 0.0
        return forced


@torch.no_grad()
def plain_sample(policy, contexts, actions):
    """`generate` from nothing, left-padded; returns the log-probs of the forced actions."""
    policy.model.eval()
    width = max(map(len, contexts))
    ids = torch.tensor(
        [[policy.end_id] * (width - len(c)) + c for c in contexts], device=policy.device
    )
    seen = torch.tensor(
        [[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=policy.device
    )
    longest = max(map(len, actions))
    with policy.autocast():
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=seen,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=LogitsProcessorList([Forced(actions, width)]),
            generation_config=GenerationConfig(
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=policy.end_id,
            ),
        )
    return [
        [out.logits[t][row].float().log_softmax(-1)[token].item() for t, token in enumerate(action)]
        for row, action in enumerate(actions)
    ]


def plain_rows(episode, advantage):
    """(ids, mask, old log-probs, advantage, recompute) for each turn on its own."""
    for t, turn in enumerate(episode.turns):
        prompt = episode.dialogue(t, tips=bool(turn.tips) and not turn.offpolicy)
        yield (
            prompt + turn.action,
            [False] * len(prompt) + [True] * len(turn.action),
            [0.0] * len(prompt) + turn.logps,
            advantage,
            turn.offpolicy,
        )


def plain_update(policy, episodes, advantages, s):
    """The gradient of one optimiser step, turn by turn. Returns the padded tokens computed."""
    rows = sorted(
        (row for e, a in zip(episodes, advantages) for row in plain_rows(e, a)),
        key=lambda r: len(r[0]),
    )
    total, computed, batch, batches = sum(sum(r[1]) for r in rows), 0, [], []
    for row in rows:
        if batch and (len(batch) + 1) * len(row[0]) > s.micro_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    for batch in batches + [batch]:
        width = max(len(r[0]) for r in batch)

        def pad(field):
            return torch.tensor(
                [r[field] + [0] * (width - len(r[0])) for r in batch], device=policy.device
            )

        logp, _ = policy.logprobs(pad(0), pad(1).bool())
        old = torch.where(
            torch.tensor([[r[4]] for r in batch], device=policy.device), logp.detach(), pad(2)
        )
        advantage = torch.tensor([[r[3]] for r in batch], device=policy.device)
        empo2.hybrid_loss(
            logp, old, advantage, pad(1).bool(), min_prob=s.min_prob, denominator=total
        )[0].backward()
        computed += width * len(batch)
    return computed


# --- Arms -------------------------------------------------------------------------------------------------------
def play(policy, prompts, observations, action_tokens, check=None):
    """Lock-step turns with given observation ids [turn][row]; returns the episodes.

    check: called with (contexts, actions, log-probs) of each turn."""
    torch.manual_seed(0)
    policy.forget()
    episodes = [empo2.Episode("", 0, 0, p, policy.header, "", row=i) for i, p in enumerate(prompts)]
    for t, turn_observations in enumerate(observations):
        for episode, observation in zip(episodes, turn_observations):
            closing = policy.closing(episode.turns[-1].action) if t else []
            episode.turns.append(empo2.Turn(closing + observation, [], [], [], {}))
        contexts = [e.dialogue(t) for e in episodes]
        actions, logps = policy.sample(contexts, action_tokens, rows=range(len(episodes)))
        for episode, action, logp in zip(episodes, actions, logps):
            episode.turns[t].action, episode.turns[t].logps = action, logp
        if check:
            check(contexts, actions, logps)
    return episodes


def replay_plainly(policy, episodes):
    """The same tokens through `generate`; returns the largest difference of a log-prob."""
    worst = 0.0
    for t in range(len(episodes[0].turns)):
        got = plain_sample(
            policy, [e.dialogue(t) for e in episodes], [e.turns[t].action for e in episodes]
        )
        for e, logps in zip(episodes, got):
            worst = max(worst, max(abs(a - b) for a, b in zip(logps, e.turns[t].logps)))
    return worst


def gradient(policy, step):
    policy.model.zero_grad()
    policy.model.train()
    computed = step()
    return torch.cat([p.grad.flatten() for p in policy.trainable()]), computed


def timed(device, *arms, repeats):
    """Median seconds of each arm; the arms take turns."""
    seconds = [[] for _ in arms]
    for _ in range(repeats):
        for arm, times in zip(arms, seconds):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            arm()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def memory_for_backward(policy, rows, s):
    """GB that the forward pass of a micro-batch keeps for the backward pass, weights excluded."""
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logp, _, mask = empo2.score(policy, rows)
        loss, _ = empo2.hybrid_loss(
            logp, logp.detach(), torch.ones_like(logp), mask
        )  # alive while we count
    return sum(kept.values()) / 1e9


def line(name, plain, ours, note):
    print(f"{name:38}{plain:10.2f} s{ours:10.2f} s{plain / ours:9.1f}x   {note}", flush=True)


def bench_model(args, policy):
    rng = np.random.default_rng(0)

    def text(n):
        return rng.integers(10, 1500, n).tolist()

    def message(n):
        return policy.message("user", "")[:-2] + text(n) + policy.message("user", "")[-2:]

    print(f"\n{'':38}{'plain':>12}{'ours':>12}{'ratio':>10}")
    prompts = [text(args.prompt) for _ in range(args.rows)]
    observations = [
        [
            message(int(n))
            for n in rng.integers(args.observation // 4, 2 * args.observation, args.rows)
        ]
        for _ in range(args.turns)
    ]
    episodes = play(policy, prompts, observations, args.action)
    tokens = sum(len(e.dialogue(args.turns - 1)) for e in episodes)
    worst = replay_plainly(policy, episodes)
    assert policy.device.type == "cuda" or worst < 1e-5, f"log-probs differ by {worst}"
    plain, ours = timed(
        policy.device,
        lambda: replay_plainly(policy, episodes),
        lambda: play(policy, prompts, observations, args.action),
        repeats=args.repeats,
    )
    reread = sum(len(e.dialogue(t)) for e in episodes for t in range(args.turns))
    line(
        f"rollout, {args.rows} rows x {args.turns} turns",
        plain,
        ours,
        f"log-probs equal to {worst:.0e}; tokens read {reread:,} -> {tokens:,}",
    )
    policy.forget()

    s = empo2.Settings(micro_tokens=args.micro_tokens, min_prob=0.0)
    for turns, tips in ((args.turns, False), (2 * args.turns, False), (args.turns, True)):
        batch = [copy.copy(e) for e in episodes[: args.update_rows]]
        for e in batch:
            e.turns = [copy.copy(turn) for turn in (e.turns * 2)[:turns]]
            for t, turn in enumerate(e.turns):
                if (
                    tips and t % 4 == 3
                ):  # a quarter of the turns had tips, two thirds of those are off-policy
                    turn.tips, turn.offpolicy = message(4 * args.observation), t // 4 % 3 > 0
        advantages = [(-1.0) ** i for i in range(len(batch))]

        def ours_step():
            rows = [empo2.training_row(e, a, s) for e, a in zip(batch, advantages)]
            total, computed = sum(sum(r.mask) for r in rows), 0
            for micro in empo2.micro_batches(rows, s.micro_tokens):
                logp, _, mask = empo2.score(policy, micro)
                old = torch.where(
                    empo2.stack(micro, "recompute", False, policy.device),
                    logp.detach(),
                    empo2.stack(micro, "old_logp", 0.0, policy.device),
                )
                advantage = torch.tensor([[r.advantage] for r in micro], device=policy.device)
                empo2.hybrid_loss(logp, old, advantage, mask, min_prob=0.0, denominator=total)[
                    0
                ].backward()
                computed += mask.numel()
            return computed

        def plain_step():
            return plain_update(policy, batch, advantages, s)

        (g_plain, n_plain), (g_ours, n_ours) = (
            gradient(policy, plain_step),
            gradient(policy, ours_step),
        )
        error = ((g_plain - g_ours).norm() / g_plain.norm()).item()
        assert policy.device.type == "cuda" or error < 1e-5, f"gradients differ by {error}"
        plain, ours = timed(
            policy.device,
            lambda: gradient(policy, plain_step),
            lambda: gradient(policy, ours_step),
            repeats=args.repeats,
        )
        line(
            f"update, {turns} turns" + (", p = 0.25, q = 2/3" if tips else ""),
            plain,
            ours,
            f"gradients equal to {error:.0e}; tokens {n_plain:,} -> {n_ours:,}",
        )
        if policy.device.type == "cuda":
            floors(policy, n_ours, ours)

    print(
        "\nkept for the backward pass, by tokens of the micro-batch; logits of the whole dialogues would be"
    )
    for count in (1, 2, 4):
        rows = [empo2.training_row(e, 1.0, s) for e in (episodes * count)[:count]]
        tokens = sum(len(r.ids) for r in rows)
        kept = memory_for_backward(policy, rows, s)
        logits = 4 * tokens * policy.model.config.vocab_size / 1e9
        print(
            f"  {tokens:7,} tokens: {kept:.3f} GB, {1e6 * kept / tokens:.1f} kB a token   {logits:.3f} GB"
        )


def floors(policy, tokens, seconds):
    """Distance of an update to the time that its matrix products take at the peak rate measured now."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    (matmul,) = timed(policy.device, lambda: [a @ a for _ in range(20)], repeats=3)
    peak = 20 * 2 * 8192**3 / matmul
    config = policy.model.config
    linear = config.num_hidden_layers * (
        2 * config.hidden_size**2
        + 3 * config.hidden_size * config.intermediate_size
        + 2
        * config.hidden_size
        * config.hidden_size
        // config.num_attention_heads
        * config.num_key_value_heads
    )
    floor = (
        3 * 2 * linear * tokens / peak
    )  # forward, its recomputation, and the gradient of activations
    print(
        f"{'':38}floor {floor:.2f} s at {peak / 1e12:.0f} TFLOP/s measured: {seconds / floor:.1f}x above it"
    )


def bench_env(count, steps):
    """Steps per second over ordinary actions: the package's wrapper against ours."""
    from scienceworld import ScienceWorldEnv

    actions = [
        "look around",
        "teleport to kitchen",
        "look around",
        "open cupboard",
        "pick up thermometer",
        "inventory",
    ]
    os.environ["PATH"] = os.pathsep.join(
        [os.path.dirname(envs.find_java()), os.environ["PATH"]]
    )  # all it looks at
    stock = ScienceWorldEnv("power-component")
    stock.load("power-component", 0, "easy")
    stock.reset()
    ours = [envs.make("scienceworld", step_limit=10**6) for _ in range(count)]
    for env in ours:
        env.reset("power-component", 0)

    def run_stock():
        for i in range(steps):
            stock.step(actions[i % len(actions)])

    def run_ours():
        for i in range(steps * 4 // count):
            for env in ours:
                env.step(actions[i % len(actions)])

    run_stock(), run_ours()  # the JVMs warm up
    t_stock, t_ours = timed(torch.device("cpu"), run_stock, run_ours, repeats=3)
    per_second = steps / t_stock, steps * 4 // count * count / t_ours
    resident = psutil.Process(envs.Jvm.shared.process.pid).memory_info().rss / 1e9
    print(
        f"\n{'ScienceWorld, steps per second':38}{per_second[0]:12.0f}{per_second[1]:12.0f}"
        f"{per_second[1] / per_second[0]:9.1f}x   {count} simulators in one JVM of {resident:.2f} GB resident"
    )
    stock.close()


def random_policy(args):
    """A random Qwen2 (7B-shaped on a GPU) with the stand-in's tokenizer, through the ordinary loading code."""
    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "standin")
    shape = (
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        )
        if cuda
        else dict(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
        )
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM._from_config(
            Qwen2Config(max_position_embeddings=32768, **shape),
            dtype=torch.bfloat16 if cuda else torch.float32,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        policy = Policy.load(folder, load_in_4bit=args.load_in_4bit)
    with torch.no_grad():
        for p in (
            policy.trainable()
        ):  # a fresh adapter is the identity, and half of its gradient is zero
            p += 0.01 * torch.randn_like(p)
    return policy


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["model", "env"], help="leave the other part out")
    parser.add_argument("--rows", type=int, default=4, help="dialogues side by side (default 4)")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument(
        "--update-rows", type=int, default=2, help="episodes of an update step (default 2)"
    )
    parser.add_argument(
        "--prompt", type=int, default=200, help="tokens of the system message (default 200)"
    )
    parser.add_argument(
        "--observation", type=int, default=40, help="mean tokens of an observation (default 40)"
    )
    parser.add_argument("--action", type=int, default=8, help="tokens of an action")
    parser.add_argument("--micro-tokens", type=int, default=16384)
    parser.add_argument("--simulators", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load-in-4bit", action="store_true")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, "
        f"{torch.get_num_threads()} threads; {args}"
    )
    if args.only != "env":
        bench_model(args, random_policy(args))
    if args.only != "model":
        bench_env(args.simulators, 60)


if __name__ == "__main__":
    main()
