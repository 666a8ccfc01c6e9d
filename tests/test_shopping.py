"""WebShop and a policy: prompts of the last turns, learning.     pytest tests/test_shopping.py"""

import json
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import empo2
import rollout
import train
from engine import arguments
from engine.metrics import sampler_gaps
from engine.scoring import score_pairs
from envs import EnvFault, make
from memory import NoveltyStore, TipMemory, embedder
from policy import Policy, inverse_cdf
from settings import PRESETS, Settings
from worlds.webshop.env import WebShop

EMBED = embedder()
TIP = "the first one is good"


class Browser(WebShop):
    """Whatever is written, it plays a valid action of its own choice, and buys nothing."""

    AVOIDED = ("click[buy now]", "click[back to search]")

    def start(self, task, variation):
        self.draw = random.Random(variation)
        return super().start(task, variation)

    def act(self, action):
        actions = [a for a in self.valid_actions() if a not in self.AVOIDED]
        return super().act(self.draw.choice(actions))


def play(policy, algorithm, count, turns):
    """One episode of each of the first goals, all at once; there is a tip for every state."""
    tips = TipMemory(order=lambda slot, similarity: [0])
    tips.add(EMBED([TIP])[0], TIP, 50, "all")
    jobs = [rollout.Job("webshop", number, number, 0) for number in range(count)]
    shops = [Browser(step_limit=turns) for _ in jobs]
    rng = np.random.default_rng(0)
    (episodes,) = rollout.rollout(policy, shops, jobs, tips, EMBED, algorithm, rng, EnvFault)
    empo2.draw_update_modes(episodes, algorithm, rng)
    return episodes


def logps(policy, prompt, action):
    """Log-probs of an action by the bare model."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(action)), action]


def test_what_is_learnt_has_the_log_probs_of_the_window_that_it_had(checkpoint):
    """All three kinds of turn, to 1e-4; and no prompt has a tip of another turn."""
    policy = Policy.load(checkpoint)
    torch.manual_seed(0)
    for parameter in policy.trainable():  # a new adapter changes nothing
        parameter.data += 0.02 * torch.randn_like(parameter)
    s = Settings(history=2, memory_prob=0.6, offpolicy_prob=0.5, memory_scope="all")
    s.action_tokens, s.context, s.beta = 8, 8000, 0.01
    algorithm = empo2.Algorithm(s)
    episodes = play(policy, algorithm, 2, turns=5)
    for e in episodes:
        for turn, pair in zip(e.turns, algorithm.training_pairs(e), strict=True):
            turn.pair = pair
    ((rows, _),) = empo2.optimiser_steps(episodes, algorithm, np.random.default_rng(0))
    assert len(rows) == sum(len(e.turns) for e in episodes)
    score_pairs(episodes, s, partial(empo2.score_rows, policy, s=s))
    assert max(sampler_gaps(episodes)) < 1e-4
    kinds = set()
    for e in episodes:
        for t, turn in enumerate(e.turns):
            sampled = logps(policy, e.prompt(t, turn.shown_ids), turn.action_ids)
            torch.testing.assert_close(sampled, torch.tensor(turn.logps), atol=1e-4, rtol=0)
            tip_ids = () if turn.offpolicy else turn.shown_ids
            prompt = e.prompt(t, tip_ids)
            expected = logps(policy, prompt, turn.action_ids)
            got = torch.tensor(turn.pair.old_logps)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
            text = policy.decode(prompt)
            assert text.count(TIP) == bool(tip_ids)
            assert text.count("Your action:") == min(t, 2)
            kinds.add((bool(turn.shown_ids), turn.offpolicy))
    assert kinds == {(False, False), (True, False), (True, True)}


# --- Learning -------------------------------------------------------------------------------------
class Table:
    """A policy whose tokens are whole texts: logits of the actions for each last message."""

    device = "cpu"
    stop_ids = ()

    def __init__(self, actions):
        self.actions = actions
        self.numbers = {text: number for number, text in enumerate([*actions, "header"])}
        self.header = [len(actions)]
        self.weight = torch.zeros(10_000, len(actions), requires_grad=True)

    def message(self, role, text):
        return [self.numbers.setdefault(text, len(self.numbers))]

    def decode(self, ids):
        return self.actions[ids[0]]

    def sample(self, prompts, uniforms, temperature, env_indexes):
        with torch.no_grad():
            logp = self.weight[[prompt[-2] for prompt in prompts]].log_softmax(-1)
        tokens = inverse_cdf(logp, torch.tensor(np.stack(uniforms))[:, 0])[:, None]
        return tokens.tolist(), logp.gather(1, tokens).tolist()

    def logprobs(self, ids, mask, temperature, positions, visible, reference):
        before = torch.nn.functional.pad(ids, (2, 0))[:, :-2]  # [B, L]: the header is between
        logp = self.weight[before].log_softmax(-1)  # [B, L, actions]
        logp = logp.gather(2, ids[..., None].clamp(max=len(self.actions) - 1))[..., 0]
        return logp * mask, 0.0 * mask

    def forget(self):
        pass

    def trainable(self):
        return [self.weight]


@pytest.fixture
def shops(tmp_path):
    """A bandit of eight mugs that look alike. Any is worth 50, one of them 100."""
    blank = {"full_description": "", "small_description": [], "customization_options": ""}
    blank |= {"name": "A mug", "pricing": "$9.00", "product_category": "Mugs", "query": "mug"}
    wish = {"instruction": "Buy a mug", "instruction_attributes": ["tall"]}
    items = [blank | {"asin": f"MUG{number}"} for number in range(8)]
    (tmp_path / "items_shuffle.json").write_text(json.dumps(items))
    notes = {"MUG5": wish | {"attributes": ["tall"]}}
    (tmp_path / "items_ins_v2.json").write_text(json.dumps(notes))
    return [make("webshop", data=tmp_path, step_limit=6) for _ in range(32)]


def shopping(shops, preset, iterations=30):
    """Mean score of each iteration of Algorithm 1, tip-free, from a policy that knows nothing."""
    options = {"history": 2, "group_size": 32, "tasks_per_iteration": 1, "learning_rate": 0.2}
    options |= PRESETS[preset]
    cls = arguments.algorithm_class(options.get("algorithm", "empo2"))
    algorithm = cls(cls.Settings(**options))
    clicks = [f"click[mug{number}]" for number in range(8)]
    policy = Table(["search[mug]", "click[back to search]", "click[buy now]", *clicks])
    parts = {"tip_memory": TipMemory(), "novelty": NoveltyStore(), "episodes": 0}
    learner = SimpleNamespace(policy=policy, **parts)
    learner.optimizer = torch.optim.Adam(policy.trainable(), 0.2)
    scores = []
    for iteration in range(iterations):
        _, metrics = train.iterate(
            iteration, learner, algorithm, shops, [("webshop", 0)], EMBED, rollout.no_progress
        )
        scores.append(metrics["score_without_memory"])
    return scores


@pytest.mark.parametrize(
    "preset",
    ["grpo", "empo2-gigpo"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("empo2", "gigpo", "gigpo-std")],
)
def test_it_learns_to_shop(shops, preset):
    scores = shopping(shops, preset)
    assert np.mean(scores[:3]) < 20 and np.mean(scores[-3:]) > 90


def test_it_does_not_with_the_sign_of_the_advantage_flipped(shops, monkeypatch):
    advantages = empo2.group_advantages
    monkeypatch.setattr(empo2, "group_advantages", lambda *args: -advantages(*args))
    assert np.mean(shopping(shops, "grpo")[-3:]) < 20
