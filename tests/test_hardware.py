"""The defaults of each card, and a GPU that torch cannot use."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train
from engine import hardware
from experiments import gpu_memory
from settings import Settings


@pytest.fixture
def card(monkeypatch):
    """A function: (GB, has it bfloat16?) -> of two cards this is the current one."""

    def fake(gigabytes, bfloat16):
        cards = SimpleNamespace(name="A", total_memory=4e9), SimpleNamespace(name="B")
        cards[1].total_memory = gigabytes * 1e9
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
        monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported",
            lambda including_emulation: bfloat16 or including_emulation,
        )

    return fake


# docs/runs.md: GB | model, dialogues, tokens | the same of a card without bfloat16
TABLE = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
CELLS = r"^\| (\d+) GB \| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \| (.*) \|$"
TABLE = {int(sold): row for sold, *row in re.findall(CELLS, TABLE, re.MULTILINE)}


@pytest.mark.parametrize("sold", [8, 12, 16, 24, 32, 40, 48, 80, 141])
def test_decisions_for_a_card(card, sold):
    row = TABLE[sold]
    for dtype, expected in (("bfloat16", row[:3]), ("float32", row[3:])):
        card(0.977 * sold, dtype == "bfloat16")  # a T4, sold with 16 GB, shows 15.64
        s, reasons = hardware.defaults(Settings(), ["fan"])
        size = expected[0].split(",")[0]
        assert (s.dtype, s.model) == (dtype, f"Qwen/Qwen2.5-{size}-Instruct")
        assert s.load_in_4bit == (expected[0] == f"{size}, 4-bit")
        assert [str(s.rollout_batch), str(s.micro_tokens)] == expected[1:]
        assert s.gradient_checkpointing is None and s.tasks_per_iteration == 16
        licence = "its licence is for research only" if size == "3B" else "Apache-2.0"
        assert any("  model =" in line and f"; {licence})" in line for line in reasons)


@pytest.mark.parametrize(
    "gigabytes, row", [(3.9, 6), (10.5, 8), (11.3, 8), (95.0, 80), (180.0, 80)]
)
def test_cards_of_other_sizes_get_the_next_smaller_row(card, gigabytes, row):
    card(gigabytes, True)
    s, _ = hardware.defaults(Settings(), ["fan"])
    expected = next(values for least, *values in hardware.CARDS["bfloat16"] if least == row)
    assert [s.load_in_4bit, s.rollout_batch, s.micro_tokens] == expected[1:]


def test_what_is_named_counts(card):
    card(15.6, False)
    s, reasons = hardware.defaults(Settings(model="mine", dtype="bfloat16"), ["fan"])
    assert (s.model, s.dtype, s.load_in_4bit) == ("mine", "bfloat16", True)
    assert not hardware.defaults(Settings(model="standin/house"), ["fan"])[0].load_in_4bit
    assert "  rollout_batch = 16  (B, 16 GB: as many dialogues as fit with 7B)" in reasons
    _, reasons = hardware.defaults(Settings(), ["fan"])
    assert "  dtype = float32  (B, 16 GB: it has no bfloat16, and emulates it slowly)" in reasons


@pytest.mark.parametrize("env", ["scienceworld", "house"])
@pytest.mark.parametrize(
    "driver, tool, cuda, visible, why",
    [
        (True, False, None, None, "built without CUDA; install a build of torch for CUDA"),
        (True, False, "13.0", None, "built for CUDA 13.0, and the driver is older"),
        (False, True, "13.0", "0", "built for CUDA 13.0, and the driver is older"),
        (True, True, "13.0", "", None),
        (True, True, None, "-1", None),
        (False, False, None, None, None),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    env, driver, tool, cuda, visible, why, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(hardware, "DRIVER", tmp_path if driver else tmp_path / "none")
    (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if tool else "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.find_device()[:3] == ("cpu", "no GPU", 0.0)
    if why:
        assert train.main(["--env", env]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1 and "--model standin/stages" in said
    s, _ = hardware.defaults(Settings(model="mine"), ["fan"])
    said = capsys.readouterr().err
    assert s.dtype == "float32"
    assert said.count("\n") == bool(why) and bool(why) == (". mine runs on the CPU\n" in said)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, card", [("bfloat16", 16), ("bfloat16", 8), ("float32", 8)])
def test_the_defaults_fit_by_the_computed_memory(dtype, card, monkeypatch):
    """Of the cards that are quick to compute; experiments/gpu_memory.py does all."""
    rows = {least: row for least, *row in hardware.CARDS[dtype]}
    size, in_4bit, *most = rows[card]
    monkeypatch.setattr(gpu_memory, "ROLLOUT_BATCHES", most[:1])
    model = gpu_memory.skeleton(gpu_memory.QWEN[size], in_4bit, getattr(torch, dtype))
    with gpu_memory.imagined() as memory:
        peaks = gpu_memory.all_peaks(gpu_memory.fill(model), memory, Settings().context)
    assert gpu_memory.what_fits(peaks, card) == tuple(most)
