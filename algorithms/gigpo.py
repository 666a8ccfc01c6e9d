"""GiGPO: credit per step (Group-in-Group Policy Optimization, arXiv 2505.10978).

An advantage estimator for `empo2.update`. The episodes of a group keep coming back to the same
states. There their actions can be compared with each other, not only the whole episodes:

    A_t = A^E + ω · A^S_t            ω = `step_weight`

A^E is GRPO's advantage of the episode. A^S is the same formula over all turns that the group took
in one state, each with its return R_t = r_t + γ R_{t+1}; a state that was met once has A^S = 0.

This is what we do where the paper is silent or its authors' code does something else:

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
 6. `invalid_penalty` is off. (Authors: 1 point of 100, in GRPO as well.) It acts on A^S only, and
    on no earlier turn.
"""

from collections import Counter

from empo2 import group_advantages, grpo_advantages
from envs import UNKNOWN


def gigpo_advantages(episodes, s):
    """An estimator for `empo2.update`: (episodes, settings) -> a list per episode, one per turn."""
    returns = []
    for episode in episodes:
        returns += step_returns(episode, s)
    numbers = {}
    groups = [numbers.setdefault(state, len(numbers)) for state in states(episodes)]
    of_steps = iter(group_advantages(returns, groups, s.advantage_eps, s.fixed_std).tolist())
    advantages = []
    for of_episode in grpo_advantages(episodes, s):
        advantages.append([a + s.step_weight * next(of_steps) for a in of_episode])
    return advantages


def states(episodes):
    """What each turn is grouped by (1): its group, and the state that its action was taken in."""
    return [(episode.job.group, turn.anchor) for episode in episodes for turn in episode.turns]


def step_returns(episode, s):
    """R_t = r_t + γ R_{t+1} of each turn (4), less a penalty that no earlier turn shares (6)."""
    returns = []
    following = 0.0
    for turn in reversed(episode.turns):
        following = turn.reward + s.discount * following
        penalty = s.invalid_penalty if turn.next_observation == UNKNOWN else 0.0
        returns.append(following - penalty)
    return returns[::-1]


def shared_states(episodes):
    """Share of turns whose state their group met more than once: the others have A^S = 0."""
    met = Counter(states(episodes))
    return sum(count for count in met.values() if count > 1) / met.total()
