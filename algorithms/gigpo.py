"""GiGPO: credit per step (Group-in-Group Policy Optimization, arXiv 2505.10978).

The episodes of a group keep coming back to the same states. There their actions can be compared
with each other, not only the whole episodes:

    A_t = A^E + ω · A^S_t            ω = `step_weight`

A^E is GRPO's advantage of the episode. A^S is the same formula over all turns that the group took
in one state, each with its return R_t = r_t + γ R_{t+1}; a state that was met once has A^S = 0.
With `--preset empo2` the exploration is EMPO²'s.

This is what we do where the paper is silent or its authors' code does something else; `# [n]` marks
the place:

 1. A state is what the environment says it is, `Env.anchor`. (Authors: the last observation. Equal
    observations then merge different states, and all actions that are not understood lead to one.)
    Tips are not part of it: turns with and without are compared with each other.
 2. A^E is computed over episodes. (Authors: over turns, so that long episodes weigh more.)
 3. The only episode of a group has A^E = 0. (Authors: its score.)
 4. r_t is the environment's reward. The intrinsic reward stays in A^E: every turn has some, so
    from an equal state whoever has more turns left would return more, whatever is done there.
 5. Both levels divide by the standard deviation (1/n; authors: 1/(n - 1)), or both by `fixed_std`
    points. 10 is the authors' scale, where a success counts 10. A standard deviation makes a
    full-size A^S also of one turn more or less to the same end.
 6. An action that is not understood has no penalty. (Authors: 1 point of 100, in GRPO as well.)
"""

from collections import Counter
from dataclasses import dataclass

import settings
from empo2 import Algorithm, group_advantages
from settings import setting


@dataclass
class Settings(settings.Settings):
    """Those of GiGPO beside EMPO²'s."""

    step_weight: float = setting(1.0, "omega: weight of step-level advantages")
    discount: float = setting(0.95, "gamma of the step-level returns")


class GiGPO(Algorithm):
    """Overrides the advantages."""

    Settings = Settings
    preset = "gigpo"
    needs_anchors = True

    def advantages(self, episodes):
        """A^E + ω · A^S of each turn."""
        s = self.s
        returns = [value for episode in episodes for value in step_returns(episode, s.discount)]
        numbers = {}
        groups = [numbers.setdefault(state, len(numbers)) for state in states(episodes)]
        of_steps = group_advantages(returns, groups, s.advantage_eps, s.fixed_std)  # [5]
        of_steps = iter(of_steps.tolist())
        advantages = []
        for of_episode in super().advantages(episodes):
            advantages.append([a + s.step_weight * next(of_steps) for a in of_episode])
        return advantages

    def metrics(self, episodes):
        """shared_states: share of turns in a state that their group met more than once."""
        met = Counter(states(episodes))
        shared = sum(count for count in met.values() if count > 1)
        return {"shared_states": shared / met.total()}


def states(episodes):
    """What each turn is grouped by: its group, and the state that its action was taken in. [1]"""
    return [(episode.job.group, turn.anchor) for episode in episodes for turn in episode.turns]


def step_returns(episode, discount):
    """R_t = r_t + γ R_{t+1} of each turn. [4]"""
    returns = []
    following = 0.0
    for turn in reversed(episode.turns):
        following = turn.reward + discount * following
        returns.append(following)
    return returns[::-1]
