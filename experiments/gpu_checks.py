"""Is it right on a GPU, and what decides the settings? gpu.py asks this before it times the pieces.

All take a gpu.Bench and return a dict for gpu.json.
"""

import dataclasses

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from empo2 import Algorithm, accumulate_gradient
from engine.packing import pack
from engine.weights import sampler_gap
from experiments import gpu_memory

SAME = 24  # tokens that are sampled with and without graphs
CROWD = 32  # dialogues of the default context: the most on a card of 24 GB


def gap_and_gradient(bench):
    """Mean difference of sampled and recomputed log-probs, in nats; the norm of a gradient."""
    policy = bench.policy
    gap, spread = sampler_gap(policy)
    row = pack(gpu_memory.learnt_pairs(bench.episodes[0], bench.settings))
    s = dataclasses.replace(bench.settings, min_prob=0.0)  # or all of a random policy is masked
    accumulate_gradient(policy, [row], Algorithm(s), 1)
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable(), 1.0).item()
    for parameter in policy.trainable():
        parameter.grad = None
    return {"gap": gap, "spread of the logits": spread, "gradient": norm}


def with_and_without_graphs(bench, record):
    """Do recorded steps sample what others do? Two widths of keys; `record` as of Policy."""
    few = bench.episodes[:8]
    sampled = []
    for recorder in (None, record):
        bench.begin(recorder)
        rng = np.random.default_rng(0)
        for t in (0, min(len(episode.turns) for episode in few) - 1):
            prompts = [episode.prompt(t) for episode in few]
            actions, logps = bench.policy.sample(
                prompts, rng.random((len(few), SAME)), 1.0, range(len(few))
            )
            sampled += zip(actions, logps, strict=True)
    bench.begin()
    half = len(sampled) // 2
    differences = [0.0]
    equal = 0
    for (action, logps), (other, other_logps) in zip(sampled[:half], sampled[half:], strict=True):
        equal += action == other
        pairs = zip(action, other, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(action), len(other)))
        differences.append(np.abs(np.subtract(logps[:same], other_logps[:same])).max(initial=0.0))
    return {"actions": half, "equal": equal, "largest difference": float(max(differences))}


def top_kernels(bench, piece):
    """What a step of sampling, or a micro-batch, spends its time with: [name, milliseconds]."""
    on_gpu = bench.policy.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        piece()
    total = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    cpu = torch.autograd.DeviceType.CPU
    times = [
        (getattr(event, total) / 1e3, event.key)
        for event in profiler.key_averages()
        if (event.device_type == cpu) != on_gpu  # an operation has its kernels' time as well
    ]
    return {"top": [[name, round(ms, 3)] for ms, name in sorted(times, reverse=True)[:10]]}


def computing_twice(bench):
    """Seconds of the update if all layers compute their activations twice, and as they fit.

    The peak of the first is what gpu_memory.py computes.
    """
    if bench.policy.checkpointing is None:
        return {}
    found = {}
    for always in (True, False):
        bench.policy.checkpointing.always = always
        name = "all" if always else "as they fit"
        torch.cuda.reset_peak_memory_stats()
        found[name] = bench.learn(with_gradient=True)["seconds"]
        found[f"{name}, GB"] = torch.cuda.max_memory_allocated() / 1e9
    layers = bench.policy.model.get_base_model().model.layers
    return found | {"layers that keep them": sum(not x.gradient_checkpointing for x in layers)}


def crowd(bench):
    """GB at the peak of 32 dialogues of the default context, as PyTorch gave them out."""

    class Allocated:
        reset = staticmethod(torch.cuda.reset_peak_memory_stats)
        peak = property(lambda self: torch.cuda.max_memory_allocated())

    context = bench.settings.context
    peaks = gpu_memory.rollout_peaks(bench.policy, Allocated(), CROWD, context)
    found = {name: peak / 1e9 for name, peak in peaks.items()}
    return found | {"reserved": torch.cuda.max_memory_reserved() / 1e9}
