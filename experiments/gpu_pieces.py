"""The pieces of an iteration, measured: what experiments/gpu.py puts together."""

import math
import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config

from empo2 import Algorithm, Pair, accumulate_gradient, score_rows
from engine.errors import first_line
from engine.packing import micro_batches, pack, shared_length
from experiments import gpu_memory
from experiments.dialogues import TYPICAL, learnt_pairs, make_episode, message
from settings import Settings

TIP_REQUEST = 80  # tokens: the last observation and the request
TIP = 100  # tokens of the longest tip
KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


@dataclass
class Scale:
    """How much is measured."""

    config: Qwen2Config
    dtype: torch.dtype
    dialogues: int  # side by side
    turns: tuple  # the measured ones
    sampled: int  # tokens of a measured action
    micro_tokens: int
    matrix: int  # rows of the matrices of the peak rate
    repeats: int = 3
    context: int = TYPICAL  # tokens of a dialogue, about


def seconds(run, prepare=lambda: None, repeats=3, until=math.inf):
    """Median time of `run`, after a first one that is not counted. `prepare` is not timed.

    until: on time.monotonic(); from then on nothing is repeated.
    """
    times = []
    while len(times) < 1 + repeats:
        prepare()
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
        if len(times) > 1 and time.monotonic() > until:
            break
    return statistics.median(times[1:])


def synchronize():
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_rates(device, scale):
    """Operations and bytes a second: a large matrix product, and a large copy."""
    n = scale.matrix
    a = torch.randn(n, n, dtype=scale.dtype, device=device)
    source = torch.zeros(16 * n * n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * n**3 / seconds(lambda: a @ a, repeats=10),
        "bytes": 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats=10),
    }


class Bench:
    """A policy, episodes as long as recorded ones, and what their turns cost."""

    def __init__(self, policy, scale, rates):
        self.policy = policy
        self.scale = scale
        self.rates = rates
        rng = np.random.default_rng(0)
        context = None if scale.context == TYPICAL else scale.context
        self.episodes = [make_episode(policy, rng, n, context) for n in range(scale.dialogues)]
        self.turns = min(len(episode.turns) for episode in self.episodes)
        self.until = math.inf
        self.request = message(policy, rng, "user", TIP_REQUEST) + policy.header
        self.settings = Settings(micro_tokens=scale.micro_tokens)
        self.computed = 0  # tokens that went through the model
        base = policy.model.get_base_model()
        self.hook = base.model.register_forward_pre_hook(self.count, with_kwargs=True)
        layers = base.model.layers
        linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
        self.products = sum(m.in_features * m.out_features for m in linear)  # of a token
        read = [p for name, p in base.named_parameters() if "embed_tokens" not in name]
        self.weight_bytes = sum(p.nbytes for p in read)
        key = layers[0].self_attn.k_proj
        self.cache_bytes = 2 * len(layers) * key.out_features * base.dtype.itemsize  # of a token

    def count(self, module, args, kwargs):
        self.computed += kwargs["input_ids"].numel()

    def close(self):
        """Hold on to nothing."""
        self.hook.remove()
        self.policy.forget()

    def begin(self, record=None):
        """With an empty cache. record: what records the steps of sampling, as of Policy."""
        self.policy.record = record
        self.policy.forget()

    def hold(self, held):
        """Make the cache believe that it holds these ids: what they are costs no time."""
        self.policy.cache.bring_to_front(range(len(held)))
        self.policy.cache.held[: len(held)] = [list(ids) for ids in held]

    def sample(self, prompts, tokens):
        """Sample so many tokens after each prompt."""
        uniforms = np.full((len(prompts), tokens), 0.5)
        self.policy.sample(prompts, uniforms, 1.0, range(len(prompts)))

    def turn(self, t):
        """(what the dialogues hold, their prompts) at turn t."""
        held = [[] for _ in self.episodes]
        if t:
            held = [
                e.prompt(t - 1, e.turns[t - 1].shown_ids) + e.turns[t - 1].action_ids
                for e in self.episodes
            ]
        return held, [episode.prompt(t, episode.turns[t].shown_ids) for episode in self.episodes]

    def flops_floor(self, tokens, passes=1):
        """Seconds of the matrix products of so many tokens."""
        return passes * 2 * self.products * tokens / self.rates["flops"]

    def step_floor(self, dialogues, context):
        """Seconds to read all weights, and all keys and values, once."""
        size = self.weight_bytes + dialogues * context * self.cache_bytes
        return size / self.rates["bytes"]

    # --- Pieces: each returns a dict that goes to the JSON ---
    def prefill(self):
        """Reading what is new at each turn."""
        self.begin()
        times, needed, computed = [], [], []
        for t in self.scale.turns:
            held, prompts = self.turn(t)
            self.hold(held)
            self.computed = 0
            self.sample(prompts, 1)
            computed.append(self.computed)
            shared = map(shared_length, held, prompts)
            needed.append(sum(map(len, prompts)) - sum(shared))
            times.append(self.seconds(partial(self.sample, prompts, 1), partial(self.hold, held)))
        needed = self.all_turns(needed)
        return {
            "seconds": self.all_turns(times),
            "needed": needed,
            "computed": self.all_turns(computed),
            "floor": self.flops_floor(needed),
            "measured": dict(zip(self.scale.turns, times, strict=True)),
        }

    def decode(self, record=None):
        """Sampling at each turn, as many steps as the longest recorded action there."""
        self.begin(record)
        times, floors = [], []
        for t in self.scale.turns:
            _, prompts = self.turn(t)
            times.append(self.step(prompts))
            floors.append(self.step_floor(len(prompts), statistics.mean(map(len, prompts))))
        longest = [
            max(len(e.turns[t].action_ids) for e in self.episodes) for t in range(self.turns)
        ]
        steps = float(np.mean(longest))
        return {
            "seconds": steps * self.all_turns(times),
            "floor": steps * self.all_turns(floors),
            "steps a turn": steps,
            "a step": dict(zip(self.scale.turns, times, strict=True)),
        }

    def step(self, prompts):
        """Seconds of a step of sampling."""
        n = self.scale.sampled
        prepare = partial(self.hold, prompts)
        long = self.seconds(partial(self.sample, prompts, n + 1), prepare)
        return (long - self.seconds(partial(self.sample, prompts, 1), prepare)) / n

    def tips(self, record=None):
        """Summing up all episodes."""
        self.begin(record)
        held = [e.prompt(-1, e.turns[-1].shown_ids) + e.turns[-1].action_ids for e in self.episodes]
        prompts = [ids + self.request for ids in held]
        reading = self.seconds(partial(self.sample, prompts, 1), partial(self.hold, held))
        context = statistics.mean(map(len, prompts))
        floor = self.flops_floor(len(prompts) * len(self.request))
        floor += TIP * self.step_floor(len(prompts), context)
        return {
            "seconds": reading + TIP * self.step(prompts),
            "floor": floor,
        }

    def learn(self, with_gradient):
        """All micro-batches of the iteration, from the largest one."""
        s = self.settings
        rows = [pack(learnt_pairs(episode, s)) for episode in self.episodes]
        batches = []
        for first in range(0, len(rows), s.minibatch_episodes):
            step = rows[first : first + s.minibatch_episodes]
            batches += micro_batches(step, s.micro_tokens)
        sizes = [len(batch) * max(len(row.ids) for row in batch) for batch in batches]
        batch = batches[int(np.argmax(sizes))]
        self.begin()
        if with_gradient:
            run = partial(accumulate_gradient, self.policy, batch, Algorithm(s), denominator=1)
        else:
            run = partial(score_rows, self.policy, batch, s)
        one = self.seconds(run)
        needed = sum(len(row.ids) for row in rows)
        return {
            "seconds": one * sum(sizes) / max(sizes),
            "needed": needed,
            "computed": sum(sizes),
            "floor": self.flops_floor(needed, 3 if with_gradient else 1),
            "measured": one,
        }

    def attention(self):
        """Seconds of a step of sampling and of a micro-batch with each kernel, or why it cannot."""
        _, prompts = self.turn(self.scale.turns[-1])
        found = {}
        for kernel in KERNELS:
            for piece in ("step", "update"):
                self.begin()
                try:
                    with sdpa_kernel(getattr(SDPBackend, kernel)):
                        if piece == "step":
                            found[kernel, piece] = self.step(prompts)
                        else:
                            found[kernel, piece] = self.learn(True)["measured"]
                except RuntimeError as error:  # no kernel for a mask, or for this card
                    found[kernel, piece] = first_line(error)
        return {" ".join(name): value for name, value in found.items()}

    def sampler_gap(self):
        """Sampled against recomputed log-probs, nats a token, of the first dialogues."""
        self.begin()
        prompts = [episode.prompt(1, episode.turns[1].shown_ids) for episode in self.episodes[:8]]
        uniforms = np.random.default_rng(0).random((len(prompts), 32))
        actions, logps = self.policy.sample(prompts, uniforms, 1.0)
        triples = zip(prompts, actions, logps, strict=True)
        rows = [pack([Pair(p, a, sampled_logps=own)]) for p, a, own in triples]
        gaps = []
        for pair, own in score_rows(self.policy, rows, self.settings):
            gaps += np.abs(np.subtract(own, pair.sampled_logps)).tolist()
        return {"mean": float(np.mean(gaps)), "max": float(np.max(gaps))}

    def seconds(self, run, prepare=lambda: None):
        """The same, in the time that the piece has."""
        return seconds(run, prepare, self.scale.repeats, self.until)

    def all_turns(self, values):
        """The sum over all turns of an iteration, between the measured ones linearly."""
        return float(np.interp(range(self.turns), self.scale.turns, values).sum())


class CudaBytes:
    """Bytes of the GPU's tensors, as torch's allocator counts them."""

    def reset(self):
        torch.cuda.reset_peak_memory_stats()

    peak = property(lambda self: torch.cuda.max_memory_allocated())
    live = property(lambda self: torch.cuda.memory_allocated())


def memory_peaks(bench, load_in_4bit):
    """Peaks in GB: measured beside computed (experiments/gpu_memory.py)."""
    scale = bench.scale
    sizes = (scale.context,), (scale.dialogues,), (scale.micro_tokens,)
    bench.begin()
    bench.policy.model.zero_grad()
    measured = {}
    if bench.policy.device.type == "cuda":
        measured = gpu_memory.all_peaks(bench.policy, CudaBytes(), *sizes)
    computed = gpu_memory.compute(scale.config, load_in_4bit, scale.dtype, *sizes)
    peaks = {}
    for piece, peak in computed.items():
        name = " ".join(map(str, piece))
        peaks[name] = {"computed": peak / 1e9}
        if measured:
            peaks[name]["measured"] = measured[piece] / 1e9
    return peaks
