"""The whole loop learns: an easy house of one room, a small policy that begins by acting at random.

pytest tests/test_learning.py
"""

import dataclasses
import json
import random

import pytest
import torch
from conftest import write_checkpoint
from transformers import AutoModelForCausalLM

import empo2
import envs
import train
from policy import Policy

HOUSE = {"rooms": 1, "containers": 1, "step_limit": 4}
TIP = "I have not turned it on."


def random_dialogues(rng, count):
    """(role, text) lists of episodes in which every action is drawn from the valid ones, ended by a tip."""
    env = envs.make("house", **HOUSE)
    for _ in range(count):
        observation, info = env.reset("radio", rng.choice(env.variations("radio", "train")))
        turns, over = [("system", info["prompt"])], False
        while not over:
            turns.append(("user", observation))
            if rng.random() < 0.2:
                turns.append(
                    ("user", empo2.TIPS_TEXT.format("\n".join([f"- {TIP}"] * rng.randint(1, 10))))
                )
            turns.append(("assistant", rng.choice(env.valid_actions())))
            observation, _, terminated, truncated, info = env.step(turns[-1][1])
            over = terminated or truncated
        final = f"{observation}\n\n{empo2.TIP_REQUEST.format(score=info['score'])}"
        yield turns + [("user", final), ("assistant", TIP)]


@pytest.fixture(scope="module")
def random_player(tmp_path_factory):
    """A Qwen2 of 0.2 M parameters that imitates random valid actions: well-formed, and aimless."""
    folder, rng = tmp_path_factory.mktemp("player"), random.Random(0)
    dialogues = list(random_dialogues(rng, 400))
    write_checkpoint(
        folder,
        hidden=96,
        vocab=420,
        scale=0.02,
        corpus=[f"{role}\n{text}\n" for d in dialogues for role, text in d],
    )
    policy = Policy.load(str(folder))
    rows = []
    for dialogue in dialogues:
        ids, mask = [], []
        for role, text in dialogue:
            trained = role == "assistant"
            new = (policy.encode(text) + [policy.end_id]) if trained else policy.message(role, text)
            for part, learn in (
                ((policy.header, False), (new, True), (policy.encode("\n"), False))
                if trained
                else ((new, False),)
            ):
                ids += part
                mask += [learn] * len(part)
        rows.append((ids, mask))
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    torch.manual_seed(0)
    for _ in range(500):
        batch = rng.sample(rows, 16)
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in batch])
        logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        loss = -logp[mask[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return str(folder)


def success(run_dir, player, adapter=None):
    """Tip-free success on unseen variations, 64 episodes at the temperature of the paper's evaluations."""
    s = empo2.Settings(**json.loads((run_dir / "settings.json").read_text()))
    simulators, pool = train.make_envs(dataclasses.replace(s, variations=4, group_size=16), "test")
    table, _, _ = empo2.evaluate(
        Policy.load(player, adapter=adapter),
        simulators,
        pool,
        16,
        s.eval_temperature,
        s,
        s.seed,
        envs.EnvFault,
    )
    return table["radio"]["share_100"]


def run(player, run_dir, iterations):
    # No mask: in a vocabulary of 420 its delta would hide nonsense from the update, which is then never unlearnt.
    assert (
        train.main(
            [
                "--env",
                "house",
                "--tasks",
                "radio",
                "--model",
                player,
                "--run-dir",
                str(run_dir),
                "--env-options",
                *(f"{k}={v}" for k, v in HOUSE.items()),
                "--iterations",
                str(iterations),
                "--tasks-per-iteration",
                "4",
                "--learning-rate",
                "1e-3",
                "--min-prob",
                "0",
                "--save-every",
                "100",
            ]
        )
        == 0
    )
    return success(run_dir, player), success(run_dir, player, run_dir / f"checkpoint-{iterations}")


def test_it_learns(random_player, tmp_path):
    before, after = run(random_player, tmp_path / "run", 20)
    assert before < 0.2 and after > 0.9


def test_it_does_not_learn_with_the_sign_of_the_advantage_flipped(
    random_player, tmp_path, monkeypatch
):
    """The same measurement must fail then: what makes it pass is the advantage."""
    advantages = empo2.group_advantages
    monkeypatch.setattr(empo2, "group_advantages", lambda *args: -advantages(*args))
    before, after = run(random_player, tmp_path / "run", 10)
    assert before < 0.2 and after < 0.2
