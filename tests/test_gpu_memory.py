"""The computed memory is what a run on real tensors takes."""

import numpy as np
import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from experiments import gpu_memory
from experiments.gpu_memory import fill, skeleton

SHAPE = gpu_memory.shape(128, 512, 2, 4, 2, 2000)


class Allocated:
    """What torch's allocator gave out and took back since the reset, as its profiler saw it."""

    def reset(self):
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    @property
    def peak(self):
        self.profiler.stop()
        events = self.profiler.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        return np.cumsum(sizes).max()


class Imagined:
    """The same of tensors without numbers."""

    def __init__(self, memory):
        self.memory = memory

    def reset(self):
        self.memory.reset()
        self.before = self.memory.live

    @property
    def peak(self):
        return self.memory.peak - self.before


def peaks(policy, memory):
    optimizer = torch.optim.AdamW(policy.trainable())
    found = {"first update": gpu_memory.update_peak(policy, optimizer, memory, 1, 400)}
    found["update"] = gpu_memory.update_peak(policy, optimizer, memory, 2, 500)
    return found | gpu_memory.rollout_peaks(policy, memory, 3, 600)


@pytest.mark.parametrize("load_in_4bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_computed_peaks_are_the_allocators(load_in_4bit):
    model = skeleton(SHAPE, load_in_4bit, torch.float32)
    kind = type(model.get_base_model().model.layers[0].mlp.up_proj)
    assert kind is (peft.tuners.lora.Linear4bit if load_in_4bit else peft.tuners.lora.Linear)
    measured = peaks(fill(model), Allocated())
    model = skeleton(SHAPE, load_in_4bit, torch.float32)
    with gpu_memory.imagined() as memory:
        computed = peaks(fill(model), Imagined(memory))
    unpacked = 4 * SHAPE.hidden_size * SHAPE.intermediate_size  # a weight, inside a 4-bit kernel
    for piece in measured:
        missing = measured[piece] - computed[piece]
        assert abs(missing) < 0.01 * measured[piece] + load_in_4bit * unpacked, piece


def test_bigger_things_do_not_fit_smaller_cards():
    peaks = {("weights",): 5e9, ("update", 1000): 8e9, ("update", 2000): 20e9}
    for dialogues, peak in ((2, 10e9), (4, 30e9)):
        peaks["prefill", dialogues] = peak
        peaks["decode", dialogues] = 1e9
    peaks["prefill", 8] = peaks["decode", 16] = 1e9
    assert gpu_memory.what_fits(peaks, 11.8) == (2, 1000)
    assert gpu_memory.what_fits(peaks, 11.7) == (None, 1000)  # 0.6 GB and a tenth are left free
    assert gpu_memory.what_fits(peaks, 80) == (4, 2000)
