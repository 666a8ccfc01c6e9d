"""Defaults that depend on the machine."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from settings import is_standin

# A growing cache fragments memory. Drop this when it is torch's default.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before CUDA starts
# On H100, torch 2.13 prefers cuDNN's attention, which makes a plan for each length of keys. That
# may cost minutes an iteration (not measured). Drop this when it prefers flash attention again.
torch.backends.cuda.enable_cudnn_sdp(False)

# For cards of at least so many GB (the last row also for smaller ones): the size of Qwen2.5, is it
# in 4-bit, dialogues side by side, padded tokens in a forward pass. By experiments/gpu_memory.py.
CARDS = {
    "bfloat16": (
        (80, "7B", False, 128, 8192),
        (40, "7B", False, 64, 4096),
        (32, "7B", False, 32, 2048),
        (24, "7B", True, 32, 2048),
        (16, "7B", True, 16, 2048),
        (12, "3B", True, 32, 2048),
        (8, "3B", True, 16, 2048),
        (6, "0.5B", False, 32, 2048),
    ),
    "float32": (
        (141, "7B", False, 128, 8192),
        (80, "7B", False, 64, 4096),
        (48, "3B", False, 64, 4096),
        (32, "3B", False, 32, 2048),
        (24, "3B", False, 16, 2048),
        (16, "1.5B", False, 16, 2048),
        (12, "0.5B", False, 32, 4096),
        (8, "0.5B", False, 16, 2048),
    ),
}
DRIVER = "/proc/driver/nvidia/version"


class Device(NamedTuple):
    """Where the model is."""

    device: str
    name: str
    gigabytes: float  # of a GPU; 0 without. A "24 GB" card has 23.7 to 25.8
    bfloat16: bool = True  # computed by the hardware, not emulated
    fault: str = ""  # why torch cannot use the GPU that is here


def find_device():
    """This process's GPU, or the CPU. All else is settings, which a CPU can have as well."""
    if not torch.cuda.is_available():
        return Device("cpu", "no GPU", 0.0, fault=gpu_fault())
    number = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(number)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device(f"cuda:{number}", properties.name, properties.total_memory / 1e9, bfloat16)


def gpu_fault():
    """Why torch cannot use a GPU although an NVIDIA driver is here, and what to install; or ""."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (os.path.exists(DRIVER) or shutil.which("nvidia-smi")):
        return ""
    if torch.version.cuda is None:
        why = "it is built without CUDA; install a build of torch for CUDA"
    else:
        why = (
            f"it is built for CUDA {torch.version.cuda}, and the driver is older or shows no GPU; "
            "install a newer driver, or torch built for the CUDA that nvidia-smi names"
        )
    return f"an NVIDIA driver is here, but torch {torch.__version__} cannot use a GPU: {why}"


STANDIN = "a tiny stand-in for a language model; its scores are no result"
# setting: with a GPU, why; without one, why. None: `of_card` or `defaults` computes it.
CHOICES = {
    "model": (None, None, "standin/house", STANDIN),
    "tasks_per_iteration": (16, "the paper's", 1, "a small iteration for a CPU"),
    "iterations": (200, "the paper's 200-250", 10, "a few minutes"),
    "learning_rate": (1e-5, "usual for LoRA at 7B", 1e-3, "for a tiny model"),
    "rollout_batch": (None, None, 64, "more than are played"),
    "micro_tokens": (None, None, 16384, "little memory is needed"),
    "dtype": (None, None, "float32", "exact"),
    "load_in_4bit": (None, None, False, "slower"),
    "decode_graph": (False, "true should be faster; never run on a GPU", False, "it needs a GPU"),
    "variations": (5, "the authors'", 2, "few enough to meet their tips again"),
    "eval_every": (50, "as in configs/paper.yaml", None, "before the first and after the last one"),
    "eval_variations": (20, "the authors'", 4, "a small evaluation"),
    "eval_episodes": (4, "the authors'", 2, "a small evaluation"),
}


def of_card(place, dtype):
    """What a GPU's memory decides -> {setting: (value, why)}. dtype: asked for, or None."""
    dtype = dtype or ("bfloat16" if place.bfloat16 else "float32")
    # A card shows up to 3 % less than it is sold with.
    rows = (row for least, *row in CARDS[dtype] if place.gigabytes > 0.95 * least)
    size, in_4bit, dialogues, tokens = next(rows, CARDS[dtype][-1][1:])
    model = "the paper's model" if size == "7B" else "the largest Qwen2.5 that fits"
    licence = "its licence is for research only" if size == "3B" else "Apache-2.0"
    number_type = "half the memory of float32, and faster"
    if not place.bfloat16:
        number_type = "it has no bfloat16, and emulates it slowly"
    return {
        "model": (f"Qwen/Qwen2.5-{size}-Instruct", f"{model}; {licence}"),
        "rollout_batch": (dialogues, f"as many dialogues as fit with {size}"),
        "micro_tokens": (tokens, f"as many tokens as fit with {size}"),
        "dtype": (dtype, number_type),
        "load_in_4bit": (in_4bit, f"{size} fits only so" if in_4bit else "4-bit is slower"),
    }


def defaults(s, default_tasks):
    """Fill in what was left to the hardware -> (settings, a line of reason per value).

    Raises ValueError without a GPU and a model for the environment, and if torch cannot use the GPU
    that is here, unless a model was named: it runs on the CPU.
    """
    place = find_device()
    if place.fault and not (s.model or s.resume):
        raise ValueError(f"{place.fault}. For a small model on the CPU: --model standin/stages")
    if place.fault:
        print(f"{place.fault}. {s.model or 'the model'} runs on the CPU", file=sys.stderr)
    where = place.name
    if place.gigabytes:
        where = f"{place.name}, {place.gigabytes:.0f} GB"
        choices = {name: choice[:2] for name, choice in CHOICES.items()}
        choices |= of_card(place, s.dtype)
        if s.model and is_standin(s.model):
            choices["load_in_4bit"] = (False, "it is small")
    else:
        choices = {name: choice[2:] for name, choice in CHOICES.items()}
        choices["eval_every"] = (s.iterations or 10, choices["eval_every"][1])
        if not (s.model or s.env == "house" or s.resume):
            raise ValueError(
                f"no GPU: --env {s.env} needs a --model: smollm2 (to install it:"
                " standin/README.md), a hub id or a folder."
                " --env scienceworld without --tasks is a demonstration"
            )
    tasks = s.tasks or default_tasks
    parts = [Path(s.env).stem, "+".join(tasks[:3]), Path(s.algorithm).stem, s.preset, str(s.seed)]
    run_dir = "runs/" + "-".join(p for p in dict.fromkeys(parts) if p != "empo2")
    choices["run_dir"] = (run_dir, "from environment, tasks, algorithm, preset and seed")
    chosen = {"tasks": tasks}
    reasons = []
    for setting, (value, why) in choices.items():
        if getattr(s, setting) is None:
            chosen[setting] = value
            reasons.append(f"  {setting} = {value}  ({where}: {why})")
    return dataclasses.replace(s, **chosen), reasons
