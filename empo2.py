"""EMPO²: Exploratory Memory-Augmented On- and Off-Policy Optimization (arXiv 2602.23008), in the paper's order:
settings, rolling out in two modes, writing tips, intrinsic reward and advantages, update modes, loss, update,
evaluation.
This file is handed the policy, the environments and the memory, and imports none of them.

Where the paper is silent, contradicts itself, or its authors' code does something else, this is what we do; a
comment `# (n)` marks each place in the code. "Paper" is the text of the sections, "Alg. 1" its appendix, whose p
and q are the *complements* of the text's. Named settings select the other reading.

 1. The rollout mode is drawn at each turn (§4.2). `mode_level`: per `episode`, or once per `batch` (Alg. 1 and the
    authors' code). The update mode of memory turns is drawn at the same level.
 2. An off-policy ratio divides by π_old(a | s, u), without tips (§4.2, Alg. 1), evaluated before the update.
    `denominator="tips"` divides by the stored π_old(a | s, u, tips) (Table 3, authors' code); the ratio then starts
    near 0 on exactly those tokens that the tip decided, and their gradient with it.
 3. The low-probability mask is per token, under π_θ, in every mode (authors: off by default; by old log-probs it
    drops whole turns). Eq. 2 masks the policy term; the KL term is not masked.
 4. The intrinsic reward is 1/n over a store of distinct states, in every rollout, and part of the return (authors:
    1/(retrieved tips + 1), in memory rollouts only, and it never reaches the advantage). A state is compared by its
    observation, within its memory slot: the task text is the same in all states of an episode and would make
    any two of them similar.
 5. Retrieved tips: similarity >= 0.5, then the 10 best by score (authors). `tip_rank="similarity"` takes the most
    similar ones (paper). Equal values: the newer tip first.
 6. Memory key and query: task text and current observation; a tip is stored under the last state of its episode.
    `memory_key="task"`: task text alone. (Authors: the beginning of the prompt, cut by a 256-token encoder.)
 7. One memory per task variation, 1,000 tips each, oldest dropped, exact duplicates ignored (authors).
    `memory_scope`: one per `task`, or one for `all` (the paper's single buffer M).
 8. One tip per episode, with its final score (paper; authors: one entry per action, all with the same text).
 9. Tips belong to the turn they were retrieved for and are not in the history of later turns (authors: every past
    tip block stays). The tip-free sequence is *built* without tips, never stripped.
10. An action is sent as written. `action_correction`: the valid action with the highest word overlap (authors).
11. No solved examples in the prompt. `shots=2` shows solved development variations (paper: two examples).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from rows import micro_batches, pack, stack, visibility


# --- What flows through -----------------------------------------------------------------------------------------
@dataclass
class Turn:
    """One turn as token ids, each segment tokenised once; text fields are for people and for the memory."""

    observation: list[int]  # closes the previous action, then the user message with o_t
    tips: list[int]  # a user message with the retrieved tips; empty = mode (1), without memory
    action: list[int]  # as sampled, ending in a control token unless cut at the limit
    logps: list[
        float
    ]  # behaviour log-prob of each action token under the prompt it was sampled with
    texts: dict  # observation, tips (a list), tips_left_out, action as sent, cut (at the limit?), next (observation)
    reward: float = (
        0.0  # r_t: difference of scores, so rewards add up to the final score (-100...100)
    )
    novelty: float = 0.0  # r_int,t = 1/n of the state this action led to, in (0, 1]
    offpolicy: bool = (
        False  # update mode of a memory turn: True = (b) without tips, False = (a) with tips
    )


@dataclass
class Episode:
    task: str
    variation: int
    group: int  # episodes with the same number are compared with each other
    prompt: list[int]  # the system message: task, formats, hints
    header: list[int]  # opens every action
    task_text: str
    turns: list[Turn] = field(default_factory=list)
    score: float = 0.0  # final score, -100...100
    ended: str = ""  # "completed", "step limit" or "context full"
    tip: str = ""  # the policy's own summary of the episode
    tip_cut: bool = False  # it was longer than may be
    advantage: float = 0.0  # as it was learnt from; set by `update`
    row: int = 0  # number of its dialogue in the policy's key-value cache

    def dialogue(self, t, tips=False):
        """Ids of the prompt of action t: the dialogue so far, with the tips of turn t only if asked for.

        >>> a = Turn([11], [91], [21], [0.], {}); b = Turn([12], [92], [22], [0.], {})
        >>> e = Episode("", 0, 0, prompt=[1], header=[5], task_text="", turns=[a, b])
        >>> e.dialogue(1), e.dialogue(1, tips=True)  # (9) the tips of turn 0 are in neither
        ([1, 11, 5, 21, 12, 5], [1, 11, 5, 21, 12, 92, 5])
        """
        ids, turn = list(self.prompt), self.turns[t]
        for earlier in self.turns[:t]:
            ids += earlier.observation + self.header + earlier.action
        return ids + turn.observation + (turn.tips if tips else []) + self.header


def intrinsic_return(episode, coef):
    """R = Σ_t (r_t + c · r_int,t), §4.1."""
    return sum(turn.reward + coef * turn.novelty for turn in episode.turns)


# --- Rolling out (§4.1) -----------------------------------------------------------------------------------------
TIPS_TEXT = "Tips from earlier attempts at this task:\n{}"
TIP_REQUEST = (
    "The episode is over. Your final score is {score:.0f} of 100. Write one tip for the next attempt, as one "
    "sentence on one line of fewer than 100 words: what happened, what was learnt, and how far the task "
    "was from being completed."
)


def memory_slot(episode, scope):  # (7)
    return {"variation": f"{episode.task}/{episode.variation}", "task": episode.task, "all": "all"}[
        scope
    ]


def memory_text(episode, observation, key):  # (6)
    return f"{episode.task_text}\n{observation}" if key == "state" else episode.task_text


@dataclass
class Playing:
    """An episode under way."""

    episode: Episode
    env: object
    observation: str  # o_t as text
    with_memory: bool  # the mode drawn for the whole episode, used with mode_level="episode"


def rollout(
    policy, envs, jobs, memory, novelty, embed, s, rng, env_fault, progress=lambda phase, text: None
):
    """Play one episode per job, `len(envs)` at a time and in lock-step, drawing the rollout mode of each turn.
    A generator of finished episodes, a list for each time the environments were used.

    jobs: (task, variation, group) triples. memory, novelty: stores with `retrieve` and `visit`. embed: texts ->
    [n, d] unit rows. env_fault: the exception of a simulator that died; its episode is dropped, never scored.
    Raises RuntimeError when a simulator cannot be started five times in a row.
    """
    whole_batch = rng.random() < s.memory_prob  # (1)
    policy.forget()  # keys and values of other weights
    for first in range(0, len(jobs), len(envs)):
        progress("rollout", "loading")
        live = [
            begin(policy, env, job, row, env_fault)
            for row, (env, job) in enumerate(zip(envs, jobs[first:]))
        ]
        for p in live:
            p.with_memory = rng.random() < s.memory_prob
        visit_states(live, novelty, embed, s)  # the first states are seen, and nobody's merit
        finished = []
        while live:
            progress("rollout", f"turn {len(live[0].episode.turns) + 1}")
            modes = [
                {
                    "turn": rng.random() < s.memory_prob,
                    "episode": p.with_memory,
                    "batch": whole_batch,
                }[s.mode_level]
                for p in live
            ]
            keys = iter(
                embed(
                    [
                        memory_text(p.episode, p.observation, s.memory_key)
                        for p, m in zip(live, modes)
                        if m
                    ]
                )
            )
            for p, with_memory in zip(live, modes):
                tips = (
                    memory.retrieve(next(keys), memory_slot(p.episode, s.memory_scope))
                    if with_memory
                    else []
                )
                open_turn(policy, p, tips, s)
            live, full = (
                [p for p in live if not p.episode.ended],
                [p for p in live if p.episode.ended],
            )
            contexts = [p.episode.dialogue(-1, tips=True) for p in live]
            for p, action, logps in zip(
                live, *sample(policy, contexts, s.action_tokens, [p.episode for p in live])
            ):
                p.episode.turns[-1].action, p.episode.turns[-1].logps = action, logps
            live = [p for p in live if act(policy, p, env_fault)]
            visit_states(live, novelty, embed, s)
            finished += [p.episode for p in full + live if p.episode.ended]
            live = [p for p in live if not p.episode.ended]
        yield finished


def begin(policy, env, job, row, env_fault):
    task, variation, group = job
    for attempt in range(1, 6):
        try:
            observation, info = env.reset(task, variation)
            break
        except env_fault as fault:
            if attempt == 5:
                raise RuntimeError(
                    f"the simulator failed to start five times in a row: {fault}"
                ) from fault
    prompt = policy.message("system", info["prompt"])
    return Playing(
        Episode(task, variation, group, prompt, policy.header, info["task"], row=row),
        env,
        observation,
        False,
    )


def open_turn(policy, p, tips, s):
    """Add the turn that is to be played, with as many of the tips as the context has room for; or end the episode."""
    turns = p.episode.turns
    closing = policy.closing(turns[-1].action) if turns else []
    turn = Turn(
        closing + policy.message("user", p.observation), [], [], [], {"observation": p.observation}
    )
    turns.append(turn)
    room = s.context - s.action_tokens - len(p.episode.dialogue(-1))
    if room < 0:
        turns.pop()
        if not turns:
            raise ValueError(
                f"--context {s.context} has no room for even one turn of {p.episode.task} "
                f"({-room} tokens short); raise it"
            )
        p.episode.ended = "context full"
    retrieved = len(tips)
    while tips and len(tips_message(policy, tips)) > room:
        tips = tips[:-1]  # the lowest-ranked give way
    turn.tips = tips_message(policy, tips)
    turn.texts |= {"tips": tips, "tips_left_out": retrieved - len(tips)}


def act(policy, p, env_fault):
    """Send the sampled action to the environment. False if the simulator died."""
    turn = p.episode.turns[-1]
    try:
        p.observation, turn.reward, terminated, truncated, info = p.env.step(
            policy.decode(turn.action)
        )
    except env_fault:
        return False
    turn.texts |= {
        "action": info["action"],
        "cut": turn.action[-1] not in policy.stop_ids,
        "next": p.observation,
    }
    p.episode.score = info["score"]
    p.episode.ended = "completed" if terminated else "step limit" if truncated else ""
    return True


def sample(policy, contexts, max_tokens, episodes):
    """Actions and log-probs, continuing the dialogues of these episodes in the policy's cache."""
    return (
        policy.sample(contexts, max_tokens, rows=[e.row for e in episodes])
        if contexts
        else ([], [])
    )


def tips_message(policy, tips):
    return tips and policy.message("user", TIPS_TEXT.format("\n".join(f"- {tip}" for tip in tips)))


def visit_states(live, novelty, embed, s):
    """Intrinsic reward r_int = 1/n of the states just reached (4); goes to the turn whose action led there."""
    if live and novelty is not None:
        for p, key in zip(live, embed([p.observation for p in live])):
            reward = novelty.visit(key, memory_slot(p.episode, s.memory_scope))
            if p.episode.turns:
                p.episode.turns[-1].novelty = reward


def write_tips(policy, episodes, memory, embed, s, progress=lambda phase, text: None):
    """The same policy sums each whole episode up in one sentence, which goes to the memory (§4.1; 6, 8).

    The dialogue it is shown is the tip-free one. At most 99 words are kept; an empty tip is not stored.
    """
    progress("tips", f"{len(episodes)} episodes")
    requests = []
    for e in episodes:
        last = e.turns[-1]
        request = f"{last.texts['next']}\n\n{TIP_REQUEST.format(score=e.score)}"
        requests.append(
            e.dialogue(-1)
            + last.action
            + policy.closing(last.action)
            + policy.message("user", request)
            + policy.header
        )
    tips, _ = sample(policy, requests, s.tip_tokens, episodes)
    keys = embed([memory_text(e, e.turns[-1].texts["next"], s.memory_key) for e in episodes])
    for e, ids, key in zip(episodes, tips, keys):
        words = policy.decode(ids).split()
        e.tip, e.tip_cut = " ".join(words[:99]), len(words) > 99 or ids[-1] not in policy.stop_ids
        if e.tip:
            memory.add(key, e.tip, e.score, memory_slot(e, s.memory_scope))


# --- Advantages (§2) and update modes (§4.2) --------------------------------------------------------------------
def group_advantages(returns, group_ids, eps=1e-6):
    """A = (R - mean R) / (std R + eps) over the episodes of one task (§2), σ of the group itself (not n - 1).

    returns [N], group_ids [N] -> advantages [N], float32. A group whose returns are all equal (up to rounding), and
    a group of one, gets exactly zero.

    >>> group_advantages(torch.tensor([1., 3., 7., 7.]), torch.tensor([0, 0, 1, 1]), eps=0.)
    tensor([-1.,  1.,  0.,  0.])
    """
    returns = torch.as_tensor(returns, dtype=torch.float64)
    group_ids = torch.as_tensor(group_ids)
    advantages = torch.zeros_like(returns)
    for group in group_ids.unique():
        member = group_ids == group
        r = returns[member]
        # Sums of fractions leave a residue; divided by a tiny sigma it would become a full-size advantage.
        if r.max() - r.min() > 1e-6 * max(1.0, r.abs().max()):
            advantages[member] = (r - r.mean()) / (r.std(correction=0) + eps)
    return advantages.float()


def draw_update_modes(episodes, s, rng):
    """Memory turns are updated off-policy, without their tips, with probability q (§4.2); drawn as in (1)."""
    whole_batch = rng.random() < s.offpolicy_prob
    for episode in episodes:
        whole_episode = rng.random() < s.offpolicy_prob
        for turn in episode.turns:
            if turn.tips:
                turn.offpolicy = {
                    "turn": rng.random() < s.offpolicy_prob,
                    "episode": whole_episode,
                    "batch": whole_batch,
                }[s.mode_level]


@dataclass
class Pair:
    """What learning sees of a turn."""

    prompt: list[int]
    action: list[int]
    advantage: float
    old_logps: list[float] | None = None


def training_pairs(episode, s):
    for t, turn in enumerate(episode.turns):
        old = None if turn.offpolicy and s.denominator == "no-tips" else turn.logps
        yield Pair(
            episode.dialogue(t, tips=bool(turn.tips) and not turn.offpolicy),
            turn.action,
            episode.advantage,
            old,
        )


# --- Loss (Eq. 2) -----------------------------------------------------------------------------------------------
def hybrid_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.3,
    clip_c=10.0,
    min_prob=0.0067,
    ref_logp=None,
    beta=0.0,
    denominator=None,
):
    """Minus Eq. 2, with dual clip and the k3 estimate of KL(π_θ || π_ref).

    logp, old_logp, advantages, ref_logp: [B, L] float; mask: [B, L] bool, True on action tokens; values outside the
    mask are ignored. denominator: action tokens of the whole optimiser step (default: of this call), the same for
    each of its micro-batches. Returns (loss, metrics); the metrics are sums over action tokens divided by the same
    denominator, so those of micro-batches add up to those of the step.

    >>> one = torch.ones(1, 1)  # π_θ / π_old = 2, clipped at 1.3
    >>> loss, _ = hybrid_loss((.8 * one).log(), (.4 * one).log(), one, one.bool())
    >>> round(loss.item(), 6)
    -1.3
    """
    denominator = mask.sum() if denominator is None else denominator
    keep = mask & (logp.detach().exp() >= min_prob)  # (3): a constant, no gradient through it
    logratio = torch.where(
        keep, logp - old_logp, 0.0
    )  # before exp: a masked token may not overflow
    ratio = logratio.exp()
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    )
    surrogate = torch.where(
        advantages < 0, torch.maximum(surrogate, clip_c * advantages), surrogate
    )
    objective = torch.where(keep, surrogate, 0.0).sum()
    with torch.no_grad():
        logratio = torch.where(mask, logp - old_logp, 0.0)
        ratio = logratio.exp()
        outside = ((ratio > 1 + clip_high) & (advantages > 0)) | (
            (ratio < 1 - clip_low) & (advantages < 0)
        )
        sums = {
            "ratio": torch.where(mask, ratio, 0.0),
            "approx_kl": torch.where(mask, ratio - 1 - logratio, 0.0),
            "clipfrac": outside & keep,
            "masked_fraction": mask & ~keep,
        }
        metrics = {name: (value.sum() / denominator).item() for name, value in sums.items()}
    if ref_logp is not None and beta:
        log_ref_ratio = torch.where(mask, ref_logp - logp, 0.0)
        kl = (log_ref_ratio.exp() - 1 - log_ref_ratio).sum()  # k3 (Schulman), gradient included
        objective = objective - beta * kl
        metrics["kl_ref"] = (kl.detach() / denominator).item()
    return -objective / denominator, metrics


# --- Update (Alg. 1, lines of the policy update) ---
def token_logps(policy, batch, reference=False):
    """(logp, entropy, mask), each [B, L], of a micro-batch under the current policy or the reference."""
    mask, visible, positions = [], None, None
    for row in batch:
        mask.append([False] * len(row.ids))
        for start, pair in row.spans:
            mask[-1][start : start + len(pair.action)] = [True] * len(pair.action)
    mask = stack(mask, False, policy.device)
    if not all(row.is_sequence() for row in batch):
        positions = stack([row.positions for row in batch], 0, policy.device)
        visible = visibility(stack([row.ends for row in batch], mask.shape[1], policy.device))
    ids = stack([row.ids for row in batch], 0, policy.device)
    return *policy.logprobs(ids, mask, positions, visible, reference), mask


def accumulate_gradient(policy, batch, s, num_tokens):
    logp, entropy, mask = token_logps(policy, batch)
    old_logp, advantages = logp.detach().clone(), torch.zeros_like(logp)
    for b, row in enumerate(batch):
        for start, pair in row.spans:
            end = start + len(pair.action)
            advantages[b, start:end] = pair.advantage
            if pair.old_logps is not None:
                old_logp[b, start:end] = torch.tensor(pair.old_logps)
    ref_logp = None
    if s.beta:
        with torch.no_grad():
            ref_logp = token_logps(policy, batch, reference=True)[0]
    loss, metrics = hybrid_loss(
        logp,
        old_logp,
        advantages,
        mask,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
        clip_c=s.clip_c,
        min_prob=s.min_prob,
        ref_logp=ref_logp,
        beta=s.beta,
        denominator=num_tokens,
    )
    loss.backward()
    gap = torch.where(mask, (logp - old_logp).detach().abs(), 0.0).max().item()
    return metrics | {"loss": loss.item(), "entropy": (entropy.sum() / num_tokens).item(), "gap": gap}


class NotFinite(FloatingPointError):
    pass


def update(policy, optimizer, episodes, s, rng, progress=lambda phase, text: None):
    progress("update", "rows")
    policy.forget()
    draw_update_modes(episodes, s, rng)
    returns = [intrinsic_return(e, s.intrinsic_coef) for e in episodes]
    advantages = group_advantages(returns, [e.group for e in episodes], s.advantage_eps).tolist()
    for episode, advantage in zip(episodes, advantages):
        episode.advantage = advantage
    order = rng.permutation(len(episodes))
    pairs = [list(training_pairs(episodes[i], s)) for i in order]
    steps = []
    for first in range(0, len(pairs), s.minibatch_episodes):
        step = pairs[first : first + s.minibatch_episodes]
        n = sum(len(pair.action) for part in step for pair in part)
        step = [[pair for pair in part if pair.advantage or s.beta] for part in step]
        step = [pack(part) for part in step if part]
        if step:
            steps.append((step, n))
    policy.model.eval()
    with torch.no_grad():
        later = [r for step, _ in steps[1:] for r in step]
        again = [r for r in later if any(pair.old_logps is None for _, pair in r.spans)]
        for batch in micro_batches(again, s.micro_tokens):
            for row, values in zip(batch, token_logps(policy, batch)[0].tolist()):
                for start, pair in row.spans:
                    if pair.old_logps is None:
                        pair.old_logps = values[start : start + len(pair.action)]
    policy.model.train()
    totals, norms, gap = Counter(), [], None
    for number, (step, n) in enumerate(steps):
        optimizer.zero_grad()
        for batch in micro_batches(step, s.micro_tokens):
            metrics = accumulate_gradient(policy, batch, s, n)
            difference = metrics.pop("gap")
            if number == 0 and s.denominator == "no-tips":
                gap = max(gap or 0.0, difference)
            totals.update({name: value * n for name, value in metrics.items()})
        norms.append(torch.nn.utils.clip_grad_norm_(policy.trainable(), s.max_grad_norm).item())
        optimizer.step()
    learnt = max(sum(len(p.action) for step, _ in steps for r in step for _, p in r.spans), 1)
    groups = [
        [a for a, e in zip(advantages, episodes) if e.group == g] for g in {e.group for e in episodes}
    ]
    return {name: value / learnt for name, value in sorted(totals.items())} | {
        "grad_norm": float(np.mean(norms or [0.0])),
        "optimizer_steps": len(norms),
        "sampler_gap": gap,
        "return": float(np.mean(returns)),
        "zero_variance_groups": float(np.mean([not any(g) for g in groups])),
    }
