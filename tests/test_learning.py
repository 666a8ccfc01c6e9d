"""The whole loop learns: an easy house of one room, a small policy that begins at random."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from transformers import AutoModelForCausalLM

import empo2
import envs
import eval as evaluation
import memory
import rollout
import settings
import train
from engine import runs
from engine.scoring import score_pairs
from policy import Policy, load_policy

HOUSE = {"rooms": 1, "containers": 1, "step_limit": 4}
TIP = "I have not turned it on."


def random_dialogues(rng, count):
    """(role, text) lists of episodes whose actions are drawn from the valid ones, with a tip."""
    env = envs.make("house", **HOUSE)
    for _ in range(count):
        observation, info = env.reset("radio", rng.choice(env.variations("radio", "train")))
        turns = [("system", info["prompt"])]
        over = False
        while not over:
            turns.append(("user", observation))
            if rng.random() < 0.2:
                tips = "\n".join([f"- {TIP}"] * rng.randint(1, 10))
                turns.append(("user", rollout.TIPS_TEXT.format(tips)))
            action = rng.choice(env.valid_actions())
            turns.append(("assistant", action))
            observation, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        request = rollout.TIP_REQUEST.format(score=info["score"])
        yield turns + [("user", f"{observation}\n\n{request}"), ("assistant", TIP)]


def as_ids(policy, dialogue):
    """(ids, mask): True on what the assistant writes."""
    ids = []
    mask = []
    for role, text in dialogue:
        if role == "assistant":
            answer = [*policy.encode(text), policy.end_id]
            newline = policy.encode("\n")
            ids += policy.header + answer + newline
            mask += [False] * len(policy.header) + [True] * len(answer) + [False] * len(newline)
        else:
            message = policy.message(role, text)
            ids += message
            mask += [False] * len(message)
    return ids, mask


@pytest.fixture(scope="module")
def random_player(tmp_path_factory):
    """A Qwen2 of 0.2 M parameters that imitates random valid actions: well-formed, and aimless."""
    folder = tmp_path_factory.mktemp("player")
    rng = random.Random(0)
    dialogues = list(random_dialogues(rng, 300))
    corpus = [f"{role}\n{text}\n" for dialogue in dialogues for role, text in dialogue]
    write_checkpoint(folder, hidden=96, vocab=420, scale=0.02, corpus=corpus)
    policy = Policy.load(str(folder))
    examples = [as_ids(policy, dialogue) for dialogue in dialogues]
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    torch.manual_seed(0)
    for _ in range(250):
        batch = rng.sample(examples, 16)
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


def success(run_dir, iteration):
    """Tip-free success on unseen variations, 64 episodes at the paper's temperature of 0.4."""
    s, _ = runs.read_checkpoint(run_dir / f"checkpoint-{iteration}")
    policy = load_policy(s, run_dir / f"checkpoint-{iteration}")
    houses = [envs.from_settings(s) for _ in range(64)]
    pool = envs.task_pool(houses[0], s.tasks, "test", 4)
    played = evaluation.evaluate(
        policy, houses, pool, 16, empo2.Algorithm(s), np.random.default_rng(0)
    )
    return evaluation.table(played)["radio"]["share_100"]


def run(player, run_dir, iterations):
    options = [f"{name}={value}" for name, value in HOUSE.items()]
    # No mask: in a vocabulary of 420 its delta would hide nonsense from the update.
    command = ["--env", "house", "--tasks", "radio", "--model", player, "--run-dir", str(run_dir)]
    command += ["--env-options", *options, "--iterations", str(iterations), "--min-prob", "0"]
    command += ["--tasks-per-iteration", "4", "--learning-rate", "1e-3", "--save-every", "100"]
    assert train.main(command) == 0
    return success(run_dir, 0), success(run_dir, iterations)


@pytest.mark.slow
def test_it_learns(random_player, tmp_path):
    before, after = run(random_player, tmp_path / "run", 20)
    assert before < 0.2 and after > 0.9


@pytest.mark.slow
def test_it_does_not_learn_with_the_sign_of_the_advantage_flipped(
    random_player, tmp_path, monkeypatch
):
    """The same measurement must fail then: what makes it pass is the advantage."""
    monkeypatch.setattr(empo2.Algorithm, "advantages", Flipped.advantages)
    before, after = run(random_player, tmp_path / "run", 10)
    assert before < 0.2 and after < 0.2


class Flipped(empo2.Algorithm):
    """What the episodes of a group lost by."""

    def advantages(self, episodes):
        returns = [-self.episode_return(e) for e in episodes]
        found = empo2.group_advantages(returns, [e.job.group for e in episodes]).tolist()
        return [[a] * len(e.turns) for a, e in zip(found, episodes, strict=True)]


@pytest.mark.parametrize("cls, sign", [(empo2.Algorithm, 1), (Flipped, -1)])
def test_an_iteration_makes_rewarded_actions_likelier(cls, sign):
    """Of a real policy: the mean change of log-probs, weighted by the advantages of `Algorithm`."""
    options = {"env": "house", "model": "standin/house", "min_prob": 0.0, "minibatch_episodes": 64}
    algorithm = cls(
        settings.Settings(learning_rate=1e-3, group_size=16, tasks_per_iteration=1, **options)
    )
    learner = train.make_learner(algorithm)
    houses = [envs.make("house", rooms=2, step_limit=4) for _ in range(16)]
    episodes, metrics = train.iterate(
        0, learner, algorithm, houses, [("fan", 0)], memory.embedder(), rollout.no_progress
    )
    pairs = [turn.pair for e in episodes for turn in e.turns]
    before = np.concatenate([pair.old_logps for pair in pairs])
    for pair in pairs:
        pair.old_logps = None
    score_pairs(episodes, algorithm.s, partial(empo2.score_rows, learner.policy, s=algorithm.s))
    change = np.concatenate([pair.old_logps for pair in pairs]) - before
    empo2.give_advantages(episodes, empo2.Algorithm(algorithm.s).advantages(episodes))
    weight = np.concatenate([pair.advantages for pair in pairs])
    assert metrics["optimizer_steps"] == 1 and weight.any()
    assert sign * (weight * change).mean() > 0.001
