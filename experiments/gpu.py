"""Where the time of an iteration goes on a GPU, in ten minutes.

  python -m experiments.gpu

Weights of Qwen2.5-7B's shape are drawn at random on the GPU, in bf16 and then in NF4; nothing is
downloaded. The lengths are those of dialogues recorded in ScienceWorld (experiments/dialogues.py).
A few turns and micro-batches are measured, and an iteration of 16 x 8 episodes of 30 turns is
extrapolated from them: turns linearly in between, the update by its padded tokens.

  prefill, decode   reading what is new, and sampling as many tokens as the longest action has,
                    at all turns
  tips              reading the requests and sampling 100 tokens
  ..., graphs       with the steps of sampling recorded as CUDA graphs (--decode-graph)
  pre-pass, update  old log-probs, and the steps

`floor` is what the necessary work takes at the peak rates measured in the same run: matrix products
of each token needed, or reading weights, keys and values once a step. Without a GPU a tiny model is
measured, which shows that the program runs. Every piece is written to gpu.json when it is done.
"""

import argparse
import gc
import time
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2Config
from transformers.utils import logging as transformers_logging

from engine.decode import CudaGraphs
from engine.errors import first_line
from engine.hardware import find_place
from engine.runs import write_json
from experiments.gpu_pieces import Bench, Scale, memory_peaks, peak_rates
from experiments.random_policy import QWEN_7B, fill, skeleton

TINY = Qwen2Config(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=2000,
)
GPU = Scale(QWEN_7B, torch.bfloat16, 128, (0, 7, 15, 22, 29), 16, 16384, 8192)
CPU = Scale(TINY, torch.float32, 3, (0, 4), 3, 4096, 256)


def measure(scale, load_in_4bit, device, rates, deadline, note):
    """All pieces with one kind of weights; note(name, result) is told each when it is done."""
    torch.manual_seed(0)
    bench = Bench(fill(skeleton(scale.config, load_in_4bit, scale.dtype), device), scale, rates)
    on_gpu = bench.policy.device.type == "cuda"
    pieces = {"prefill": bench.prefill, "decode": bench.decode, "tips": bench.tips}
    if on_gpu:
        pieces["decode, graphs"] = lambda: bench.decode(CudaGraphs())
        pieces["tips, graphs"] = lambda: bench.tips(CudaGraphs())
    pieces |= {
        "pre-pass": partial(bench.learn, with_gradient=False),
        "update": partial(bench.learn, with_gradient=True),
        "sampler gap": bench.sampler_gap,
        "memory": partial(memory_peaks, bench, load_in_4bit),
        "attention": bench.attention,
    }
    for number, (name, piece) in enumerate(pieces.items()):
        left = deadline - time.monotonic()
        bench.until = time.monotonic() + left / (len(pieces) - number)
        if left < 0:
            note(name, {"error": "no time was left"})
            continue
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            result = piece()
        except RuntimeError as error:  # out of memory: what comes after it may still fit
            result = {"error": first_line(error)}
        if on_gpu:
            result["GB"] = torch.cuda.max_memory_allocated() / 1e9
            result["GB with gaps"] = torch.cuda.max_memory_reserved() / 1e9
        note(name, result)
    bench.close()


def table(results):
    """The README's table: Markdown lines."""
    lines = ["| weights | piece | seconds | floor | times the floor | tokens computed / needed |"]
    lines.append("|---|---|---|---|---|---|")
    for weights, pieces in results["weights"].items():
        timed = {name: piece for name, piece in pieces.items() if "seconds" in piece}
        for name, piece in timed.items():
            padded = ""
            if "needed" in piece:
                padded = f"{piece['computed'] / piece['needed']:.2f}"
            lines.append(line(weights, name, piece["seconds"], piece["floor"], padded))
        for name in ("decode", "tips"):
            if f"{name}, graphs" in timed:  # instead of it
                del timed[name]
        total = sum(piece["seconds"] for piece in timed.values())
        floor = sum(piece["floor"] for piece in timed.values())
        if timed:
            lines.append(line(weights, "all, without the environment", total, floor, ""))
    return lines


def line(weights, name, seconds, floor, padded):
    """A line of the table."""
    return (
        f"| {weights} | {name} | {seconds:.3g} | {floor:.3g} | {seconds / floor:.1f} | {padded} |"
    )


def main(argv=None):
    """Measure, write gpu.json, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu.json"), help="file to write (default: %(default)s)")
    add("--minutes", type=float, default=9, help="stop after about so many (default: 9)")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists; give another --out")
    transformers_logging.set_verbosity_error()
    begin = time.monotonic()
    place = find_place()
    scale = GPU if place.gigabytes else CPU
    rates = peak_rates(place.device, scale)
    results = {"place": place.name, "torch": torch.__version__, "rates": rates, "weights": {}}
    for number, load_in_4bit in enumerate((False, True), 1):
        weights = "NF4" if load_in_4bit else str(scale.dtype).removeprefix("torch.")
        own = results["weights"][weights] = {}

        def note(name, result, own=own, weights=weights):
            own[name] = result
            write_json(args.out, results)
            print(f"{time.monotonic() - begin:4.0f} s  {weights} {name}: {result}", flush=True)

        deadline = begin + 60 * args.minutes * number / 2
        measure(scale, load_in_4bit, place.device, rates, deadline, note)
        gc.collect()  # or the next model would not fit
        torch.cuda.empty_cache()
    print("", *table(results), sep="\n")


if __name__ == "__main__":
    main()
