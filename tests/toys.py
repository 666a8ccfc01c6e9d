"""Small things that several tests play with."""

import numpy as np
import torch

from rollout import Episode, Job, Turn


def drawn_episode(turns=3, group=0, rewards=(), actions=()):
    """System 1, header 5; turn t: observation 10+t, tips 30+t (none at turn 0), action 20+t, 9."""
    rng = np.random.default_rng(group)
    episode = Episode(Job("task", 0, group, 0), rng, 0, "text", [1], [5])
    for t in range(turns):
        turn = Turn(f"o{t}", [10 + t], shown_ids=[30 + t] if t else [], action_ids=[20 + t, 9])
        turn.logps = [-1.0 - t, -0.5]
        episode.turns.append(turn)
    for turn, reward in zip(episode.turns, rewards, strict=False):
        turn.reward = reward
    for turn, action in zip(episode.turns, actions, strict=False):
        turn.action_ids = action
    for turn in episode.turns:
        turn.past_ids = [*turn.observation_ids, 5, *turn.action_ids]
    return episode


class Bag:
    """Logits of the next token: a sum over the tokens that it sees, weighted by position."""

    device = "cpu"

    def __init__(self, dtype=torch.float32):
        weights = 0.1 * torch.randn(2, 40, 40, generator=torch.manual_seed(0))
        self.reference, weight = weights.to(dtype)
        self.weight = weight.requires_grad_()
        self.scored = 0
        self.shared = 0  # most tokens of a batch of several rows

    def trainable(self):
        return [self.weight]

    def forget(self):
        self.scored_before = self.scored

    def logprobs(self, ids, mask, temperature, positions=None, visible=None, reference=False):
        weight = self.reference if reference else self.weight
        self.scored += int(mask.sum())
        self.shared = max(self.shared, ids.numel() * (len(ids) > 1))
        if positions is None:
            positions = torch.arange(ids.shape[1])
            visible = torch.ones(ids.shape[1], ids.shape[1]).tril()
        seen = visible.to(weight.dtype) @ (weight[ids] * 0.9 ** positions[..., None])
        of_all = (seen / temperature).log_softmax(-1)[:, :-1]
        logp = of_all.gather(2, ids[:, 1:, None])[..., 0]
        entropy = -(of_all.exp() * of_all).sum(-1)
        return [torch.nn.functional.pad(values, (1, 0)) * mask for values in (logp, entropy)]

    def of(self, prompt, action, temperature=1.0, reference=False):
        """(log-probs, entropies) of an action, alone."""
        ids = torch.tensor([prompt + action])
        mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        scored = self.logprobs(ids, mask, temperature, reference=reference)
        return [values[0, len(prompt) :] for values in scored]

    def of_action(self, prompt, action, temperature=1.0, reference=False):
        """Log-probs of an action, alone."""
        return self.of(prompt, action, temperature, reference)[0]

    def of_turn(self, e, t, temperature=1.0, reference=False):
        """Those under the numerator's prompt."""
        turn = e.turns[t]
        prompt = e.prompt(t, () if turn.offpolicy else turn.shown_ids)
        return self.of_action(prompt, turn.action_ids, temperature, reference)


class KnownOrder:
    """A generator that shuffles in a known way."""

    def random(self):
        return 0.5

    def permutation(self, n):
        return [i for i in (2, 0, 3, 1, 4) if i < n]
