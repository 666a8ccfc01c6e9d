"""Explore (§4.1): roll out in two modes, write tips, give intrinsic rewards.

A number in [n] is that of the choice at the top of empo2.py. Policy, environments,
memory and algorithm (`empo2.Algorithm`) are arguments here; none of them is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from engine import processes
from engine.simulators import reset_env, side_by_side


# --- What flows through ---------------------------------------------------------------------------
class Job(NamedTuple):
    """An episode to be played."""

    task: str
    variation: int
    group: int  # episodes with the same number are compared with each other
    member: int  # which one of its group


@dataclass
class Turn:
    """One turn, as token ids for the policy and as text for people and for the memory."""

    observation: str  # o_t
    observation_ids: list[int]  # the user message with o_t
    retrieved: list[str] = field(default_factory=list)  # tips, as many as the context has room for
    retrieved_ids: list[int] = field(default_factory=list)  # their message
    shown: list[str] = field(default_factory=list)  # the tips that the sampled prompt had
    shown_ids: list[int] = field(default_factory=list)  # their message; empty = without memory
    tips_left_out: int = 0  # the context had no room for them
    action_ids: list[int] = field(default_factory=list)  # as sampled, with the end of turn
    logps: list[float] = field(default_factory=list)  # of the sampler, under the prompt it had
    written: str = ""  # the action's text, with its reasoning
    action: str = ""  # what of it the environment was sent
    action_cut: bool = False  # the token limit came before the end of turn
    past_ids: list[int] = field(default_factory=list)  # what later prompts hold of it; no tips
    next_observation: str = ""  # o_{t+1}
    anchor: str = ""  # names the state that the action was taken in, if the algorithm needs it
    reward: float = 0.0  # r_t: difference of scores, so rewards add up to the final score
    novelty: float = 0.0  # r_int,t = 1/n of the state that the action led to, in (0, 1]
    offpolicy: bool = False  # update mode of a memory turn: True = off-policy, without tips
    pair: object = None  # set by `update`: an empo2.Pair, what is learnt
    advantage: float = 0.0  # set by `update`: the mean over its tokens


@dataclass
class Episode:
    """A dialogue between environment and policy."""

    job: Job
    rng: np.random.Generator  # its own, so results do not depend on parallel episodes
    env_index: int  # index of its environment, and of its dialogue in the key-value cache
    task_text: str  # u
    system_ids: list[int]  # the system message: task, formats, hints
    header_ids: list[int]  # opens every action
    turns: list[Turn] = field(default_factory=list)
    history: int = 0  # how many earlier turns are in a prompt; 0 = all, as a dialogue
    score: float = 0.0  # final score, -100...100
    ended: str = ""  # "completed", "failed", "step limit", "context full" or "lost"
    tip: str = ""  # the policy's own summary of the episode
    tip_cut: bool = False  # it was longer than may be

    def prompt(self, t, tip_ids=()):
        """Ids that action t is conditioned on: what went before, and a message of tips.

        >>> first = Turn("", [11], shown_ids=[91], past_ids=[11, 5, 21])
        >>> turns = [first, Turn("", [12])]
        >>> e = Episode(None, None, 0, "", system_ids=[1], header_ids=[5], turns=turns)
        >>> e.prompt(1), e.prompt(1, [92])  # [9] the tips of turn 0 are in neither
        ([1, 11, 5, 21, 12, 5], [1, 11, 5, 21, 12, 92, 5])
        """
        ids = list(self.system_ids)
        for turn in self.turns[:t][-self.history :]:  # -0: all of them
            ids += turn.past_ids
        return [*ids, *self.turns[t].observation_ids, *tip_ids, *self.header_ids]


# --- Rolling out (§4.1) ---------------------------------------------------------------------------
PAST_TEXT = "{}\n\nYour action: {}"
TIPS_TEXT = "Tips from earlier attempts at this task:\n{}"
TIP_REQUEST = (
    "The episode is over. Your final score is {score:.0f} of 100. Write one tip for the next "
    "attempt, as one sentence on one line of fewer than 100 words: what happened, what was learnt, "
    "and how far the task was from being completed."
)
CUT = " [cut]"  # ends an observation that was too long for the tip request
LOST = "lost"  # the simulator died: the episode is dropped, never scored


def no_progress(phase, text=""):
    """Show nothing."""


def memory_slot(job, scope):
    """Name of the memory that an episode uses. [7]"""
    if scope == "variation":
        return f"{job.task}/{job.variation}"
    return job.task if scope == "task" else "all"


def memory_text(episode, observation, key):
    """What a state is stored under and looked up by. [6]"""
    return f"{episode.task_text}\n{observation}" if key == "state" else episode.task_text


@dataclass
class Playing:
    """An episode under way."""

    episode: Episode
    env: object
    observation: str  # o_t
    memory_mode: bool  # the mode, where it is drawn for the whole episode or batch


def rollout(
    policy, envs, jobs, memory, embed, algorithm, rng, env_fault, progress=no_progress
) -> Iterator[list[Episode]]:
    """Play an episode per job, `len(envs)` side by side; yield each such batch, in the jobs' order.

    When a batch is yielded the policy's cache still holds its dialogues. memory: a store with
    `retrieve`. embed: texts -> [n, d] unit rows. rng: an episode's draws come from a generator
    spawned from it, so neither the number of environments nor their order changes them.
    env_fault: the exception of a simulator that died; its episode is left out.
    Raises RuntimeError when a simulator cannot be started five times in a row.
    """
    s = algorithm.s
    batch_mode = algorithm.memory_mode(rng)  # [1]
    rngs = processes.share(rng.spawn(len(jobs)))
    jobs = processes.share(jobs)
    policy.forget()  # the weights have changed
    for env_index, env in enumerate(envs):
        env.env_index = env_index
    for first in range(0, len(jobs), len(envs)):
        progress("rollout", "reset")
        live = []
        openings = side_by_side(reset_env, envs, jobs[first : first + len(envs)], env_fault)
        for env, job, own_rng, opening in zip(envs, jobs[first:], rngs[first:], openings):
            playing = start_episode(policy, env, job, own_rng, len(live), opening, s.history)
            playing.memory_mode = batch_mode
            if s.mode_level == "episode":
                playing.memory_mode = algorithm.memory_mode(own_rng)
            live.append(playing)
        batch = [playing.episode for playing in live]
        while live:
            progress("rollout", f"turn {len(live[0].episode.turns) + 1}")
            open_turns(policy, live, memory, embed, algorithm)
            live = [playing for playing in live if not playing.episode.ended]
            sample_actions(policy, live, s)
            act(policy, live, env_fault, algorithm.needs_anchors)
            live = [playing for playing in live if not playing.episode.ended]
        yield [episode for episode in batch if episode.ended != LOST]


def gather(episodes):
    """The episodes that all processes have played, in the jobs' order."""
    return sorted(processes.gather(episodes), key=lambda e: (e.job.group, e.job.member))


def start_episode(policy, env, job, rng, env_index, opening, history=0):
    """The episode that `reset_env` has opened."""
    observation, info = opening
    system_ids = policy.message("system", info["prompt"])
    episode = Episode(job, rng, env_index, info["task"], system_ids, policy.header, history=history)
    return Playing(episode, env, observation, False)


def open_turns(policy, live, memory, embed, algorithm):
    """Draw the rollout mode of each next turn, and retrieve tips for those with memory."""
    s = algorithm.s
    asking = []
    for playing in live:
        if s.mode_level == "turn":  # [1]
            playing.memory_mode = algorithm.memory_mode(playing.episode.rng)
        if playing.memory_mode:
            asking.append(playing)
    keys = []
    if asking:
        keys = embed([memory_text(p.episode, p.observation, s.memory_key) for p in asking])
    retrieved = {}
    for playing, key in zip(asking, keys, strict=True):
        episode = playing.episode
        retrieved[episode.env_index] = memory.retrieve(
            key, memory_slot(episode.job, s.memory_scope)
        )
    for playing in live:
        open_turn(policy, playing, retrieved.get(playing.episode.env_index, []), algorithm)


def open_turn(policy, playing, tips, algorithm):
    """Add the next turn, with as many of the tips as the context has room for; or end the episode.

    Raises ValueError if there is no room for even the first turn.
    """
    s = algorithm.s
    episode = playing.episode
    turn = Turn(playing.observation, policy.message("user", playing.observation))
    episode.turns.append(turn)
    room = s.context - s.action_tokens - len(episode.prompt(-1))
    if room < 0:
        episode.turns.pop()
        if not episode.turns:
            raise ValueError(
                f"--context {s.context} has no room for even one turn of {episode.job.task} "
                f"({-room} tokens short); raise it"
            )
        episode.ended = "context full"
        return
    turn.retrieved = list(tips)
    while len(tips_message(policy, turn.retrieved)) > room:
        turn.retrieved.pop()  # the lowest-ranked give way
    turn.tips_left_out = len(tips) - len(turn.retrieved)
    turn.retrieved_ids = tips_message(policy, turn.retrieved)
    turn.shown = algorithm.shown_tips(turn.retrieved)
    turn.shown_ids = tips_message(policy, turn.shown)


def tips_message(policy, tips):
    """Ids of the message that shows the tips; none without any."""
    if not tips:
        return []
    return policy.message("user", TIPS_TEXT.format("\n".join(f"- {tip}" for tip in tips)))


def sample_actions(policy, live, s):
    """Sample the action of each open turn."""
    episodes = [playing.episode for playing in live]
    prompts = [episode.prompt(-1, episode.turns[-1].shown_ids) for episode in episodes]
    actions, logps = sample(policy, episodes, prompts, s.action_tokens, s.temperature)
    for episode, action_ids, action_logps in zip(episodes, actions, logps, strict=True):
        turn = episode.turns[-1]
        turn.action_ids = action_ids
        turn.logps = action_logps
        turn.action_cut = action_ids[-1] not in policy.stop_ids


def sample(policy, episodes, prompts, max_tokens, temperature):
    """Continue the dialogues of these episodes: ids and log-probs of each."""
    uniforms = [episode.rng.random(max_tokens) for episode in episodes]
    env_indexes = [episode.env_index for episode in episodes]
    return policy.sample(prompts, uniforms, temperature, env_indexes)


def step(env, action, env_fault, anchored=False):
    """What the environment answers; None if the episode is lost. anchored: info has the anchor."""
    try:
        anchor = env.anchor() if anchored else ""
        *answer, info = env.step(action)
        return *answer, {**info, "anchor": anchor}
    except env_fault:
        return None


def act(policy, live, env_fault, anchored=False):
    """Send the sampled actions to the environments. anchored: note the states they are taken in."""
    actions = [policy.decode(playing.episode.turns[-1].action_ids) for playing in live]
    call = partial(step, anchored=anchored)
    answers = side_by_side(call, [playing.env for playing in live], actions, env_fault)
    for playing, action, answer in zip(live, actions, answers, strict=True):
        episode = playing.episode
        turn = episode.turns[-1]
        turn.written = action
        if answer is None:
            episode.ended = LOST
            continue
        playing.observation, turn.reward, terminated, truncated, info = answer
        turn.anchor = info["anchor"]
        turn.action = info["action"]
        turn.next_observation = playing.observation
        turn.past_ids = past(policy, turn, episode.history)
        episode.score = info["score"]
        if terminated:
            episode.ended = "failed" if episode.score < 0 else "completed"
        elif truncated:
            episode.ended = "step limit"


def past(policy, turn, history=0):
    """What later prompts hold of a turn: its part of the dialogue, or with `history` a message."""
    if history:
        return policy.message("user", PAST_TEXT.format(turn.observation, turn.action))
    return turn.observation_ids + policy.past(turn.action_ids)


# --- Tips and intrinsic reward (§4.1) -------------------------------------------------------------
def write_tips(policy, episodes, s, progress=no_progress):
    """The same policy sums each whole episode up in one sentence [8]; the dialogue is tip-free.

    At most 99 words are kept. The text is not trained on.
    """
    progress("tips", f"{len(episodes)} episodes")
    prompts = [tip_prompt(policy, episode, s.context - s.tip_tokens) for episode in episodes]
    answers, _ = sample(policy, episodes, prompts, s.tip_tokens, s.temperature)
    for episode, answer in zip(episodes, answers, strict=True):
        words = policy.decode(answer).split()
        episode.tip = " ".join(words[:99])
        episode.tip_cut = len(words) > 99 or answer[-1] not in policy.stop_ids


def tip_prompt(policy, episode, context):
    """The tip-free episode and the request, in at most `context` tokens.

    If it is too long, first turns go until one is left (with `history`, as many as an action sees),
    then the end of the last observation, then these turns as well.
    Raises ValueError if there is no room for the request alone.
    """
    request = TIP_REQUEST.format(score=episode.score)
    turns = episode.turns
    last = turns[-1].next_observation if turns else ""
    most = min(len(turns), max(1, episode.history))
    ways = [(kept, last) for kept in range(len(turns), most, -1)]  # turns, last observation
    for kept in range(most, -1, -1):
        observation = last
        while observation:
            ways.append((kept, observation))
            observation = observation.removesuffix(CUT)
            observation = observation[: len(observation) // 2]
            observation += CUT if observation else ""
        ways.append((kept, ""))
    for kept, observation in ways:
        dialogue = [token for turn in turns[len(turns) - kept :] for token in turn.past_ids]
        message = policy.message("user", f"{observation}\n\n{request}")
        prompt = episode.system_ids + dialogue + message + policy.header
        if len(prompt) <= context:
            return prompt
    raise ValueError(
        f"--context has no room to ask for a tip after {episode.job.task} "
        f"({len(prompt) - context} tokens short); raise it, or lower --tip-tokens"
    )


def store_tips(episodes, memory, embed, algorithm):
    """Add the admitted tips to M, once all episodes of the iteration are over (Alg. 1).

    An episode's score is added to the totals of the tips that led it [5].
    """
    s = algorithm.s
    for episode in episodes:
        memory.judge(leading(episode), episode.score, memory_slot(episode.job, s.memory_scope))
    writers = list(algorithm.admitted([episode for episode in episodes if episode.tip]))
    keys = embed([memory_text(e, e.turns[-1].next_observation, s.memory_key) for e in writers])
    for episode, key in zip(writers, keys, strict=True):
        slot = memory_slot(episode.job, s.memory_scope)
        memory.add(key, episode.tip, episode.score, slot)


def leading(episode):
    """The tips that stood first in the list at some turn of the episode."""
    return {turn.shown[0] for turn in episode.turns if turn.shown}


def give_intrinsic_rewards(episodes, novelty, embed, algorithm):
    """Give each turn r_int of the state that its action led to [4]; then store the states.

    The initial state is stored, too, but gives no reward.
    """
    visited = []
    for episode in episodes:
        states = [episode.turns[0].observation]
        states += [turn.next_observation for turn in episode.turns]
        slot = memory_slot(episode.job, algorithm.s.memory_scope)
        visited.append((embed(states), slot))
    for episode, (keys, slot) in zip(episodes, visited, strict=True):
        counts = novelty.visits(keys, slot)
        for turn, n in zip(episode.turns, counts[1:], strict=True):
            turn.novelty = algorithm.intrinsic_reward(n)
    for keys, slot in visited:
        novelty.add(keys, slot)
