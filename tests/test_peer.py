"""The pieces of experiments/peer.py that need no TRL."""

import time

import pytest
import torch
from transformers import AutoTokenizer

from engine.plugins import ROOT
from experiments import peer


class Sampler:
    """The one method of TRL's trainer that episodes are played with."""

    def __init__(self, actions):
        self.actions = iter(actions)
        self.dialogues = []

    def _generate_single_turn(self, dialogues, images, multimodal_fields, num_generations):
        self.dialogues.append([list(ids) for ids in dialogues])
        return next(self.actions), None


def test_an_episode_is_the_chat_templates_dialogue_and_only_actions_are_learnt():
    """Also after an action that was cut, which lacks its end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "standin" / "house")
    written = tokenizer("look around<|im_end|>").input_ids
    cut = tokenizer("inventory").input_ids
    sampler = Sampler([[written], [cut], [written]])
    output = peer.play(sampler, tokenizer, ["radio"], turns=3)
    house = peer.Letters(step_limit=3)
    messages = peer.opening(house, "radio")
    for action in ("look around", "inventory"):
        messages.append({"role": "assistant", "content": action})
        messages.append({"role": "user", "content": house.step(action)[0]})
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert sampler.dialogues[-1] == [expected]
    assert output["prompt_ids"][0] + output["completion_ids"][0] == expected + written
    learnt = [i for i, m in zip(output["completion_ids"][0], output["env_mask"][0]) if m]
    assert learnt == written + cut + written
    assert output["score"] == [len(set("look around"))]


def test_the_meter_counts_padded_tokens_and_leaves_the_first_iteration_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    embedding = torch.nn.Embedding(9, 2)
    meter = peer.Meter()
    for seconds, rows in ((50, 5), (1, 2), (3, 4)):
        for phase, factor in (("rollout", 1), ("update", 10)):
            meter(phase)
            embedding(torch.zeros(rows * factor, 7, dtype=torch.long))
            meter(phase)  # the same phase goes on
            now[0] += seconds * factor
    meter("")
    meter.hook.remove()
    table = meter.table(turns=6, action_tokens=9)
    assert table["generation, s"] == 2 and table["generation, tokens"] == 3 * 7
    assert table["update, s"] == 20 and table["update, tokens"] == 30 * 7
    assert table["turns"] == 2 and table["action tokens"] == 3


def test_a_worker_that_fails_ends_the_comparison():
    with pytest.raises(SystemExit, match="trl failed"):
        peer.worker("false", "trl", "model", 1, 1)
