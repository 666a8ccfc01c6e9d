"""The computed memory is what a run on real tensors takes, and what an update is fitted to."""

import numpy as np
import peft
import pytest
import torch
from test_policy import gradients, load, played_episode, score
from torch.profiler import ProfilerActivity, profile

from engine import activations
from engine.activations import Checkpointing
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


@pytest.mark.parametrize("keeping", [0, 1, 2])
def test_as_many_layers_keep_their_activations_as_fit(checkpoint, monkeypatch, keeping):
    """The last ones; the gradient is the same."""
    policy = load(checkpoint)
    episode = played_episode(policy)
    pairs = [(episode.prompt(t), turn.action_ids) for t, turn in enumerate(episode.turns)]
    expected = gradients(policy, torch.cat(score(policy, *zip(*pairs, strict=True))))

    policy.checkpointing = Checkpointing(policy.model, always=False)
    base = policy.model.get_base_model().model
    of_layer = activations.bytes_of_token(base) * max(len(p) + len(a) for p, a in pairs) * 3
    free = activations.room_for(keeping + 0.5, of_layer)
    monkeypatch.setattr(activations, "free_bytes", lambda: free)
    calls = []
    for number, layer in enumerate(base.layers):
        layer.mlp.register_forward_pre_hook(lambda *args, number=number: calls.append(number))
    score(policy, *zip(*pairs, strict=True))
    calls.clear()  # the first time the bytes of a token are measured, too
    found = gradients(policy, torch.cat(score(policy, *zip(*pairs, strict=True))))
    assert sorted(calls) == sorted([0, 1, *range(2 - keeping)])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "load_in_4bit, size, rows, context",
    [
        (False, 256, 2, 800),
        (False, 64, 1, 3000),  # most of it is masks
        pytest.param(True, 256, 2, 800, marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_stays_within_what_is_free(monkeypatch, load_in_4bit, size, rows, context):
    """Half, and four fifths, of what all layers would keep."""
    shape = gpu_memory.shape(size, 4 * size, 7, 8, 2, 500)
    model = skeleton(shape, load_in_4bit, torch.bfloat16)
    with gpu_memory.imagined() as memory:
        policy = fill(model)
        before = memory.live
        with policy.autocast():
            activations.bytes_of_token(policy.model.train().get_base_model().model)
        assert memory.live <= before, "what it kept is free again"
        optimizer = torch.optim.AdamW(policy.trainable())
        gpu_memory.update_peak(policy, optimizer, memory, 1, 700)  # gradients and moments stay
        held = memory.live
        policy.checkpointing.always = False

        def peak(free):
            monkeypatch.setattr(activations, "free_bytes", lambda: free - (memory.live - held))
            return gpu_memory.update_peak(policy, optimizer, memory, rows, context) - held

        everything = peak(1e12)
        for free in (everything / 2, everything * 0.8):
            assert 0.3 * free < peak(free) <= free


def test_bigger_things_do_not_fit_smaller_cards():
    peaks = {("weights",): 5e9, ("update", 1000): 8e9, ("update", 2000): 9e9}
    peaks["update, half of the activations kept", 1000] = 10e9
    peaks["update, half of the activations kept", 2000] = 20e9
    for dialogues, peak in ((2, 10e9), (4, 30e9)):
        peaks["prefill", dialogues] = peak
        peaks["decode", dialogues] = 1e9
    peaks["prefill", 8] = peaks["decode", 16] = 1e9
    assert gpu_memory.what_fits(peaks, 11.8) == (2, 1000)
    assert gpu_memory.what_fits(peaks, 11.7) == (None, 1000)  # 0.6 GB and a tenth are left free
    assert gpu_memory.what_fits(peaks, 10.7) == (None, 1000)  # all activations computed twice
    assert gpu_memory.what_fits(peaks, 80) == (4, 2000)
