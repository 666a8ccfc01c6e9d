"""The laptop experiment on a reduced size (one task): EMPO² finds and keeps what GRPO never finds.

    pytest tests/test_laptop.py          (two minutes)
"""
import json

import numpy as np

import empo2
import sweep
import train
from standin import house

LAPTOP = sweep.EXPERIMENTS["laptop"]
REDUCED = [*LAPTOP[LAPTOP.index("--") + 1:], "--tasks", "fan", "--tasks-per-iteration", "2",
           "--iterations", "24", "--eval-every", "8", "--eval-temperature", "1"]


def test_the_player_knows_how_to_play_and_no_task():
    """What is required of it before anything is learnt: it follows tips, tells the truth, and solves nothing."""
    shares = house.check(house.FOLDER, variations=8)
    assert shares["success without tips"] < 0.05 and shares["success without tips, greedy"] < 0.05
    assert shares["success with true tips"] > 0.6
    assert shares["claims in its own tips"] > 50 and shares["of them true"] > 0.9


def test_empo2_beats_grpo_and_the_off_policy_update_is_why(tmp_path):
    """Sampled success without tips, since greedy success is all or nothing for a task; by luck it would be 0.0002."""
    success = {}
    for preset in ("grpo", "no-offpolicy", "empo2"):
        own = [f"--{name}={value}" for name, value in empo2.PRESETS[preset].items()]  # last, so that they count
        assert train.main([*REDUCED, "--preset", preset, "--run-dir", str(tmp_path / preset), *own]) == 0
        evals = [json.loads(line) for line in open(tmp_path / preset / "evals.jsonl")]
        success[preset] = np.mean([e["success"] for e in evals[-2:]])
    assert success["grpo"] <= 0.02 and success["no-offpolicy"] <= 0.02 and success["empo2"] >= 0.1, success
