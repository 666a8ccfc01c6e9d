"""Defaults that depend on the machine."""

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from settings import QWEN

# A growing cache fragments memory. Drop this when it is torch's default.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before CUDA starts
# On H100, torch 2.13 prefers cuDNN's attention, which makes a plan for each length of keys. That
# may cost minutes an iteration (not measured). Drop this when it prefers flash attention again.
torch.backends.cuda.enable_cudnn_sdp(False)

# Cards of less than so many GB: dialogues side by side, padded tokens in a forward pass.
# They follow from experiments/gpu_memory.py.
CARDS = ((40, 32, 16384), (60, 64, 16384), (math.inf, 128, 16384))


class Device(NamedTuple):
    """Where the model is."""

    device: str
    name: str
    gigabytes: float  # of a GPU; 0 without. A "24 GB" card has 25.4


def find_device():
    """This process's GPU, or the CPU. All else is settings, which a CPU can have as well."""
    if not torch.cuda.is_available():
        return Device("cpu", "no GPU", 0.0)
    number = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(number)
    return Device(f"cuda:{number}", properties.name, properties.total_memory / 1e9)


STANDIN = "a tiny stand-in for a language model; its scores are no result"
# setting: with a GPU, why; without one, why. None: computed in `defaults`.
CHOICES = {
    "model": (QWEN, "the paper's model", "standin/house", STANDIN),
    "tasks_per_iteration": (16, "the paper's", 1, "a small iteration for a CPU"),
    "iterations": (200, "the paper's 200-250", 10, "a few minutes"),
    "learning_rate": (1e-5, "usual for LoRA at 7B", 1e-3, "for a tiny model"),
    "rollout_batch": (None, "as many dialogues as fit", 64, "more than are played"),
    "micro_tokens": (None, "as many tokens as fit", 16384, "little memory is needed"),
    "dtype": ("bfloat16", "half the memory of float32, and faster", "float32", "exact"),
    "load_in_4bit": (None, "4-bit is slower, needed up to 24 GB only", False, "slower"),
    "gradient_checkpointing": (True, "slower, but activations would not fit", False, "slower"),
    "decode_graph": (False, "true should be faster; never run on a GPU", False, "it needs a GPU"),
    "variations": (5, "the authors'", 2, "few enough to meet their tips again"),
    "eval_every": (0, "evaluations take time", None, "before the first and after the last one"),
    "eval_variations": (20, "the authors'", 4, "a small evaluation"),
    "eval_episodes": (4, "the authors'", 2, "a small evaluation"),
}


def defaults(s, default_tasks):
    """Fill in what was left to the hardware -> (settings, a line of reason per value).

    Raises ValueError with one line if there is no GPU and no model for the environment.
    """
    place = find_device()
    where = place.name
    if place.gigabytes:
        where = f"{place.name}, {place.gigabytes:.0f} GB"
        choices = {name: choice[:2] for name, choice in CHOICES.items()}
        fits = next(fits for limit, *fits in CARDS if place.gigabytes < limit)
        values = {"rollout_batch": fits[0], "micro_tokens": fits[1]}
        values["load_in_4bit"] = place.gigabytes < 30
    else:
        choices = {name: choice[2:] for name, choice in CHOICES.items()}
        values = {"eval_every": s.iterations or 10}
        if not (s.model or s.env == "house" or s.resume):
            raise ValueError(
                f"no GPU: --env {s.env} needs a --model: smollm2 (to install it:"
                " standin/README.md), a hub id or a folder."
                " --env scienceworld without --tasks is a demonstration"
            )
    tasks = s.tasks or default_tasks
    parts = [Path(s.env).stem, "+".join(tasks[:3]), Path(s.algorithm).stem, s.preset, str(s.seed)]
    values["run_dir"] = "runs/" + "-".join(p for p in dict.fromkeys(parts) if p != "empo2")
    choices["run_dir"] = (None, "from environment, tasks, algorithm, preset and seed")
    chosen = {"tasks": tasks}
    reasons = []
    for setting, (value, why) in choices.items():
        if getattr(s, setting) is None:
            chosen[setting] = values.get(setting, value)
            reasons.append(f"  {setting} = {chosen[setting]}  ({where}: {why})")
    return dataclasses.replace(s, **chosen), reasons
