"""The benchmark of the GPU runs on a CPU, too, and adds up what it measures."""

import pytest
import torch

from experiments import gpu, gpu_memory

# One dialogue: nothing is padded.
ALONE = gpu.Scale(gpu_memory.TINY, torch.float32, 1, (0, 2), 2, 1024, 64, context=700)
RATES = {"flops": 1e9, "bytes": 1e9}


def test_all_pieces_are_measured_and_none_computes_more_than_is_needed():
    found = {}
    gpu.measure(ALONE, False, "cpu", RATES, found.__setitem__)
    assert list(found) == ["prefill", "decode", "tips", "pre-pass", "update"]
    assert all("seconds" in piece and piece["floor"] > 0 for piece in found.values())
    for name in ("prefill", "pre-pass", "update"):
        assert found[name]["computed"] == found[name]["needed"]
    *_, total = gpu.table({"weights": {"float32": found}})
    seconds = sum(piece["seconds"] for piece in found.values())
    assert total.startswith(f"| float32 | all, without the environment | {seconds:.3g} |")


def test_turns_that_were_not_measured_are_interpolated():
    model = gpu_memory.skeleton(gpu_memory.TINY, dtype=torch.float32)
    bench = gpu.Bench(gpu_memory.fill(model), ALONE, RATES)
    bench.turns = 5
    assert bench.all_turns([1.0, 3.0]) == pytest.approx(1 + 2 + 3 + 3 + 3)
