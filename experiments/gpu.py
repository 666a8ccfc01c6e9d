"""Where the time of an iteration goes on a GPU.

  python -m experiments.gpu
  python -m experiments.gpu --estimate H100

Weights of Qwen2.5-7B's shape are drawn at random on the GPU, in bf16 and then in NF4; nothing is
downloaded. The lengths are those of dialogues recorded in ScienceWorld (gpu_memory.py). A few turns
and micro-batches are measured, and an iteration of 16 x 8 episodes of 30 turns is extrapolated from
them: turns linearly in between, the update by its padded tokens.

  prefill, decode   reading what is new, and sampling as many tokens as the longest action has,
                    at all turns
  tips              reading the requests and sampling 100 tokens
  ..., graphs       with the steps of sampling recorded as CUDA graphs (--decode-graph)
  pre-pass, update  old log-probs, and the steps

gpu.json also has the peak of each piece in GB.

`floor` is what the necessary work takes at the peak rates measured in the same run: matrix products
of each token needed, or reading weights, keys and values once a step. Without a GPU a tiny model is
measured, which shows that the program runs. Every piece is written to gpu.json when it is done, so
Ctrl-C loses none.

Before the pieces come checks (gpu_checks.py), the most important ones first: do sampling and
learning agree; do graphs sample the same tokens; are they faster; what takes the time; does it pay
to keep activations; what do 32 long dialogues take.

--estimate measures nothing and needs no GPU: the same pieces run on tensors that have a shape but
no numbers, and each operation that the code issues is given a time (gpu_estimate.py). Models of one
layer and of two are computed; each further layer costs what the second does.
"""

import argparse
import copy
import dataclasses
import gc
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from transformers import Qwen2Config
from transformers.utils import logging as transformers_logging

from empo2 import Algorithm, accumulate_gradient, score_rows
from engine import activations
from engine.activations import how_many_keep
from engine.decode import CudaGraphs
from engine.errors import first_line
from engine.hardware import find_device
from engine.packing import micro_batches, pack, shared_length
from engine.runs import write_json
from experiments import gpu_checks, gpu_memory
from experiments.gpu_estimate import CARDS, Cost
from settings import Settings

TIP_REQUEST = 80  # tokens: the last observation and the request
TIP = 100  # tokens of the longest tip


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
    context: int | None = None  # tokens of a dialogue, about; None = as recorded


GPU = Scale(gpu_memory.QWEN_7B, torch.bfloat16, 128, (0, 7, 15, 22, 29), 16, 8192, 8192)
CPU = Scale(gpu_memory.TINY, torch.float32, 3, (0, 4), 3, 4096, 256)


# --- The pieces of an iteration -------------------------------------------------------------------
def seconds(run, prepare=lambda: None, repeats=3):
    """Median time of `run`, after a first one that is not counted. `prepare` is not timed."""
    times = []
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(1 + repeats):
        prepare()
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


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

    def __init__(self, policy, scale, rates, seconds=seconds):
        self.policy = policy
        self.seconds = seconds
        self.scale = scale
        self.rates = rates
        rng = np.random.default_rng(0)
        self.episodes = [
            gpu_memory.make_episode(policy, rng, n, scale.context) for n in range(scale.dialogues)
        ]
        self.turns = min(len(episode.turns) for episode in self.episodes)
        self.request = gpu_memory.message(policy, rng, "user", TIP_REQUEST) + policy.header
        self.settings = Settings(micro_tokens=scale.micro_tokens)
        self.computed = 0  # tokens that went through the model
        base = policy.model.get_base_model()
        self.hook = base.model.register_forward_pre_hook(self.count, with_kwargs=True)
        layers = base.model.layers
        linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
        self.products = sum(m.in_features * m.out_features for m in linear)  # of a token
        looked_up = base.model.embed_tokens.weight.nbytes
        self.weight_bytes = sum(p.nbytes for p in base.parameters()) - looked_up
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
        return (self.weight_bytes + dialogues * context * self.cache_bytes) / self.rates["bytes"]

    # --- Pieces: each returns a dict that goes to the JSON ---
    def checks(self, on_gpu):
        """{name: what answers a question}, the most important one first."""
        _, prompts = self.turn(self.turns - 1)
        step = partial(self.sample, prompts, 2)
        row = pack(gpu_memory.learnt_pairs(self.episodes[0], self.settings))
        learn = partial(accumulate_gradient, self.policy, [row], Algorithm(self.settings), 1)
        checks = {"sampler gap": partial(gpu_checks.gap_and_gradient, self)}
        if on_gpu:
            checks["graphs"] = partial(gpu_checks.with_and_without_graphs, self, CudaGraphs())
            checks["decode, graphs"] = partial(self.decode, CudaGraphs())
        checks["decode"] = self.decode
        checks["two steps, top"] = partial(gpu_checks.top_kernels, self, step)
        checks["micro-batch, top"] = partial(gpu_checks.top_kernels, self, learn)
        if on_gpu:
            checks["checkpointing"] = partial(gpu_checks.computing_twice, self)
            checks["32 dialogues"] = partial(gpu_checks.crowd, self)
        return checks

    def pieces(self):
        """{name: what measures it}."""
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "tips": self.tips,
            "pre-pass": partial(self.learn, with_gradient=False),
            "update": partial(self.learn, with_gradient=True),
        }

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
        }

    def decode(self, record=None):
        """Sampling at each turn, as many steps as the longest recorded action there."""
        self.begin(record)
        measured = {"seconds": [], "floor": []}
        for t in self.scale.turns:
            _, prompts = self.turn(t)
            length = statistics.mean(map(len, prompts))
            measured["seconds"].append(self.step(prompts))
            measured["floor"].append(self.step_floor(len(prompts), length))
        turns = zip(*(episode.turns for episode in self.episodes), strict=False)
        steps = statistics.mean(max(len(turn.action_ids) for turn in t) for t in turns)
        return {name: steps * self.all_turns(of) for name, of in measured.items()}

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
        return {"seconds": reading + TIP * self.step(prompts), "floor": floor}

    def learn(self, with_gradient):
        """All micro-batches of the iteration, from the largest one."""
        s = self.settings
        rows = [pack(gpu_memory.learnt_pairs(episode, s)) for episode in self.episodes]
        batches = []
        for first in range(0, len(rows), s.minibatch_episodes):
            batches += micro_batches(rows[first : first + s.minibatch_episodes], s.micro_tokens)
        sizes = [len(batch) * max(len(row.ids) for row in batch) for batch in batches]
        batch = batches[int(np.argmax(sizes))]
        self.begin()
        run = partial(score_rows, self.policy, batch, s)
        if with_gradient:
            run = partial(accumulate_gradient, self.policy, batch, Algorithm(s), 1)
        one = self.seconds(run)
        # The old log-probs of the first step are that step's own.
        share = 1 if with_gradient else 1 - s.minibatch_episodes / gpu_memory.EPISODES
        needed = share * sum(len(row.ids) for row in rows)
        computed = share * sum(sizes)
        return {
            "seconds": one * computed / max(sizes),
            "needed": needed,
            "computed": computed,
            "floor": self.flops_floor(needed, 2 if with_gradient else 1),
        }

    def all_turns(self, values):
        """The sum over all turns of an iteration, between the measured ones linearly."""
        return float(np.interp(range(self.turns), self.scale.turns, values).sum())


# --- All of them ----------------------------------------------------------------------------------
def measure(scale, load_in_4bit, device, rates, note):
    """All pieces with one kind of weights; note(name, result) is told each when it is done."""
    torch.manual_seed(0)
    model = gpu_memory.skeleton(scale.config, load_in_4bit, scale.dtype)
    policy = gpu_memory.fill(model, device, gradient_checkpointing=None)
    bench = Bench(policy, scale, rates)
    on_gpu = bench.policy.device.type == "cuda"
    pieces = bench.checks(on_gpu) | bench.pieces()
    if on_gpu:
        pieces["tips, graphs"] = partial(bench.tips, CudaGraphs())
    for name, piece in pieces.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            result = piece()
        except RuntimeError as error:  # out of memory: what comes after it may still fit
            result = {"error": first_line(error)}
        if on_gpu:
            result["GB"] = torch.cuda.max_memory_allocated() / 1e9
        note(name, result)
    bench.close()


def estimate(card, scale):
    """The same pieces as `measure`, computed for a `Card`: {name: result}."""
    scale = dataclasses.replace(
        scale, dialogues=card.dialogues, sampled=1, micro_tokens=card.micro_tokens
    )
    one, two = (computed(card, scale, layers) for layers in (1, 2))
    layers = scale.config.num_hidden_layers
    for name, result in one.items():
        for key, value in result.items():
            result[key] = value + (layers - 1) * (two[name][key] - value)
    memory = one.pop("memory") | {"of_layer": two["memory"]["of_layer"]}
    # CUDA keeps 0.6 GB.
    keeping = how_many_keep(1e9 * (card.gigabytes - 0.6) - memory["held"], memory["of_layer"])
    kept = min(1.0, max(0.0, keeping / layers))
    without = one.pop("update, all kept")["seconds"]
    one["update"]["seconds"] += kept * (without - one["update"]["seconds"])
    for result in one.values():
        for key in result:
            result[key] *= gpu_memory.EPISODES / card.dialogues
    for name in ("decode", "tips"):
        one[name]["seconds"] = max(one[name]["seconds"], one[f"{name}, graphs"]["seconds"])
    return one


def computed(card, scale, layers):
    """{name: result} with so many layers; those of decode and tips: Python launches the kernels."""
    rates = {"flops": 1e12 * card.bf16, "bytes": 1e12 * card.bandwidth}
    config = copy.copy(scale.config)
    config.num_hidden_layers = layers
    model = gpu_memory.skeleton(config, card.load_in_4bit, scale.dtype)
    with gpu_memory.imagined() as memory:
        policy = gpu_memory.fill(model)
        held = memory.live + 3 * sum(p.nbytes for p in policy.trainable())  # gradients, moments
        with Cost(card) as cost:
            bench = Bench(policy, scale, rates, cost.time)
            results = {name: piece() for name, piece in bench.pieces().items()}
            policy.checkpointing.always = False
            with patch.object(activations, "free_bytes", lambda: 1e15):
                results["update, all kept"] = bench.learn(with_gradient=True)
            bench.seconds = partial(cost.time, launched=True)
            for name, piece in (("decode", bench.decode), ("tips", bench.tips)):
                results[f"{name}, graphs"] = results[name]
                results[name] = piece()
    return results | {"memory": {"held": held, "of_layer": policy.checkpointing.of_layer}}


def table(results):
    """The README's table: Markdown lines."""
    lines = ["| weights | piece | seconds | floor | times the floor | tokens computed / needed |"]
    lines.append("|---|---|---|---|---|---|")
    for weights, pieces in results["weights"].items():
        timed = {name: piece for name, piece in pieces.items() if "seconds" in piece}
        whole = {"seconds": 0.0, "floor": 0.0}
        for name, piece in timed.items():
            if f"{name}, graphs" not in timed:  # which is instead of it
                whole = {key: value + piece[key] for key, value in whole.items()}
        if timed:
            timed["all, without the environment"] = whole
        for name, piece in timed.items():
            took, floor = piece["seconds"], piece["floor"]
            padded = f"{piece['computed'] / piece['needed']:.2f}" if "needed" in piece else ""
            cells = f"{took:.3g} | {floor:.3g} | {took / floor:.1f} | {padded}"
            lines.append(f"| {weights} | {name} | {cells} |")
    return lines


def print_estimate(name, rates):
    """What an iteration would cost on this card. rates: other ones than `CARDS` has, or None."""
    card = CARDS[name]
    if rates:
        card = card._replace(**dict(zip(("bandwidth", "bf16", "fp32"), rates)))
    transformers_logging.set_verbosity_error()
    weights = "NF4" if card.load_in_4bit else "bf16"
    print(
        f"An estimate for one iteration on {name} ({card.bandwidth} TB/s, {card.bf16} TFLOP/s in "
        f"bf16, {card.fp32} in fp32), {card.dialogues} dialogues side by side; nothing is measured."
    )
    print("", *table({"weights": {weights: estimate(card, GPU)}}), sep="\n")


def main(argv=None):
    """Measure, write gpu.json, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file to write")
    parser.add_argument("--estimate", choices=CARDS, help="measure nothing, but compute")
    parser.add_argument(
        "--rates",
        type=float,
        nargs=3,
        metavar=("BANDWIDTH", "BF16", "FP32"),
        help="of the estimate, in TB/s and TFLOP/s",
    )
    args = parser.parse_args(argv)
    if args.estimate:
        return print_estimate(args.estimate, args.rates)
    if args.out.exists():
        parser.error(f"{args.out} exists; give another --out")
    transformers_logging.set_verbosity_error()
    begin = time.monotonic()
    place = find_device()
    scale = GPU if place.gigabytes else CPU
    rates = peak_rates(place.device, scale)
    results = {"place": place.name, "torch": torch.__version__, "rates": rates, "weights": {}}
    for load_in_4bit in (False, True):
        weights = "NF4" if load_in_4bit else str(scale.dtype).removeprefix("torch.")
        own = results["weights"][weights] = {}

        def note(name, result, own=own, weights=weights):
            own[name] = result
            write_json(args.out, results)
            print(f"{time.monotonic() - begin:4.0f} s  {weights} {name}: {result}", flush=True)

        measure(scale, load_in_4bit, place.device, rates, note)
        gc.collect()  # or the next model would not fit
        torch.cuda.empty_cache()
    print("", *table(results), sep="\n")


if __name__ == "__main__":
    main()
