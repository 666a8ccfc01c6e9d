"""The machine, and what is decided by it."""

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

# A cache that grows leaves gaps too small to use. Drop this when it is torch's default.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before CUDA starts
# On H100, torch 2.13 prefers cuDNN's attention, which makes a plan for each length of keys. That
# may cost minutes an iteration (not measured). Drop this when it prefers flash attention again.
torch.backends.cuda.enable_cudnn_sdp(False)

# Cards of less than so many GB: dialogues side by side, padded tokens in a forward pass.
# They follow from experiments/gpu_memory.py.
CARDS = ((40, 32, 16384), (60, 64, 16384), (math.inf, 128, 16384))


class Place(NamedTuple):
    """Where the model is."""

    device: str
    name: str
    gigabytes: float  # of a GPU; 0 without. A "24 GB" card has 25.4


def find_place():
    """This process's GPU, or the CPU. All else is settings, which a CPU can have as well."""
    if not torch.cuda.is_available():
        return Place("cpu", "no GPU", 0.0)
    number = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(number)
    return Place(f"cuda:{number}", properties.name, properties.total_memory / 1e9)


def defaults(s, default_tasks):
    """Fill in what was left to the hardware -> (settings, a line of reason per value)."""
    place = find_place()
    where = place.name
    if place.gigabytes:
        dialogues, tokens = next(fits for limit, *fits in CARDS if place.gigabytes < limit)
        where = f"{place.name}, {place.gigabytes:.0f} GB"
        choices = {
            "model": ("Qwen/Qwen2.5-7B-Instruct", "the paper's model"),
            "tasks_per_iteration": (16, "the paper's"),
            "iterations": (200, "the paper's 200-250"),
            "learning_rate": (1e-5, "usual for LoRA at 7B"),
            "rollout_batch": (dialogues, "as many dialogues as fit"),
            "micro_tokens": (tokens, "as many tokens as fit"),
            "dtype": ("bfloat16", "half the memory of float32, and faster"),
            "load_in_4bit": (place.gigabytes < 30, "4-bit is slower, needed up to 24 GB only"),
            "gradient_checkpointing": (True, "slower, but activations would not fit"),
            "decode_graph": (False, "true should be faster; it was never run on a GPU"),
            "variations": (5, "the authors'"),
            "eval_every": (0, "evaluations take time"),
            "eval_variations": (20, "the authors'"),
            "eval_episodes": (4, "the authors'"),
        }
    else:
        choices = {
            "model": ("standin", "a tiny stand-in for a language model; its scores are no result"),
            "tasks_per_iteration": (1, "a small iteration for a CPU"),
            "iterations": (10, "a few minutes"),
            "learning_rate": (1e-3, "for a tiny model"),
            "rollout_batch": (64, "more than are played"),
            "micro_tokens": (16384, "little memory is needed"),
            "dtype": ("float32", "exact, and little memory is needed"),
            "load_in_4bit": (False, "slower, and little memory is needed"),
            "gradient_checkpointing": (False, "slower, and little memory is needed"),
            "decode_graph": (False, "it needs a GPU"),
            "variations": (2, "few enough to meet their tips again"),
            "eval_every": (s.iterations or 10, "before the first and after the last iteration"),
            "eval_variations": (4, "a small evaluation"),
            "eval_episodes": (2, "a small evaluation"),
        }
    tasks = s.tasks or default_tasks
    parts = [Path(s.env).stem, "+".join(tasks[:3]), Path(s.algorithm).stem, s.preset, str(s.seed)]
    run_dir = "runs/" + "-".join(part for part in dict.fromkeys(parts) if part != "empo2")
    choices["run_dir"] = (run_dir, "from environment, tasks, algorithm, preset and seed")
    chosen = {"tasks": tasks}
    reasons = []
    for setting, (value, why) in choices.items():
        if getattr(s, setting) is None:
            chosen[setting] = value
            reasons.append(f"  {setting} = {value}  ({where}: {why})")
    return dataclasses.replace(s, **chosen), reasons
