"""All settings by concern, and the named sets of them that the paper compares."""

import difflib
from dataclasses import dataclass, field
from typing import Literal, Optional


def setting(default, text, **kwargs):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **kwargs})
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class Settings:
    """Everything that can be set; the command line is made from it. `None` = decided by the hardware, and printed."""

    # What is run
    preset: str = setting(
        "empo2",
        "a named set of settings (PRESETS), such as grpo; settings given beside it go first",
    )
    env: str = setting("scienceworld", "environment: scienceworld or house")
    tasks: list[str] = setting(["power-component"], "names of the tasks to train on")
    variations: int = setting(5, "how many training variations of each task (the first ones)")
    iterations: Optional[int] = setting(
        None, "how many times to roll out and update [200 on a GPU, 10 without]"
    )
    step_limit: Optional[int] = setting(
        None, "actions per episode [30; chemistry-mix 60, measure-melting-point-known-... 100]"
    )
    shots: int = setting(0, "(11) solved development variations shown in the prompt")
    action_correction: bool = setting(
        False, "(10) replace an invalid action by the most similar valid one"
    )
    env_options: list[str] = setting(
        [], "further options of the environment, as name=value (rooms=1 for house)"
    )
    # Policy
    model: Optional[str] = setting(
        None, "hub id or folder [Qwen/Qwen2.5-7B-Instruct on a GPU, ./standin without]"
    )
    load_in_4bit: Optional[bool] = setting(
        None, "NF4 weights [on cards up to 24 GB]", nargs="?", const=True
    )
    lora_r: int = setting(16, "rank of the adapter")
    lora_alpha: int = setting(32, "scale of the adapter, over its rank")
    # Rolling out (§4.1)
    group_size: int = setting(8, "N: episodes of one task, compared with each other")
    tasks_per_iteration: Optional[int] = setting(
        None, "B: tasks per iteration [16 on a GPU, 1 without]"
    )
    rollout_batch: Optional[int] = setting(
        None, "episodes played side by side [by the card's memory: 32 to 128]"
    )
    temperature: float = setting(1.0, "of sampling and of the log-probs in the loss")
    action_tokens: int = setting(32, "longest action")
    tip_tokens: int = setting(160, "longest tip")
    context: int = setting(
        4500, "longest dialogue in tokens; an episode that reaches it is cut there"
    )
    memory_prob: float = setting(
        0.25, "p: probability of prompting with tips; 0 = no memory (GRPO)"
    )
    mode_level: Literal["turn", "episode", "batch"] = setting(
        "turn", "(1) at what level the modes are drawn"
    )
    # Memory (§4.1)
    embedder: str = setting(
        "hashing", "hashing (scikit-learn), or e.g. sentence-transformers/all-MiniLM-L6-v2"
    )
    tips: int = setting(10, "most tips retrieved at a turn")
    tip_threshold: float = setting(0.5, "least cosine similarity of a retrieved tip")
    tip_rank: Literal["score", "similarity"] = setting(
        "score", "(5) which of the similar tips are shown"
    )
    memory_key: Literal["state", "task"] = setting(
        "state", "(6) what tips are stored under and looked up by"
    )
    memory_scope: Literal["variation", "task", "all"] = setting(
        "variation", "(7) what shares a memory"
    )
    memory_capacity: int = setting(1000, "(7) tips per memory, the oldest are dropped")
    novelty_threshold: float = setting(
        0.5, "(4) cosine similarity from which two states count as the same"
    )
    intrinsic_coef: float = setting(
        1.0, "(4) points of return per unit of intrinsic reward; 0 = none"
    )
    # Update (§4.2)
    offpolicy_prob: float = setting(
        2 / 3, "q: probability that a memory turn is updated off-policy"
    )
    denominator: Literal["no-tips", "tips"] = setting(
        "no-tips", "(2) prompt of the off-policy behaviour log-prob"
    )
    learning_rate: Optional[float] = setting(
        None, "of AdamW, constant [1e-5 on a GPU, 1e-3 for the stand-in]"
    )
    minibatch_episodes: int = setting(16, "episodes per optimiser step")
    micro_tokens: Optional[int] = setting(
        None, "padded tokens per forward pass [by the card's memory: 6144, 16384]"
    )
    clip_low: float = setting(0.2, "ratio clip 1 - clip_low")
    clip_high: float = setting(0.3, "ratio clip 1 + clip_high")
    clip_c: float = setting(10.0, "dual clip: for A < 0 the term is at least clip_c * A")
    min_prob: float = setting(
        0.0067, "delta: (3) tokens less likely than this are masked; 0 = no mask"
    )
    beta: float = setting(0.0, "weight of KL(pi_theta || pi_ref)")
    advantage_eps: float = setting(1e-6, "added to the standard deviation of returns")
    max_grad_norm: float = setting(1.0, "gradient clip")
    # Tip-free evaluation during training (§5)
    eval_every: int = setting(
        0, "iterations between evaluations, and one after the last; 0 = never"
    )
    eval_variations: int = setting(20, "how many test variations of each task (the first ones)")
    eval_episodes: int = setting(4, "episodes of each of them")
    eval_temperature: float = setting(0.4, "of their sampling; 0 = greedy")
    # The run
    run_dir: Optional[str] = setting(
        None, "where results go [runs/ENV-TASK-SEED]; must not exist, or --resume"
    )
    resume: bool = setting(False, "continue the run in run_dir from its last checkpoint")
    save_every: int = setting(1, "iterations between checkpoints")
    keep_checkpoints: int = setting(
        2, "how many of the newest checkpoints to keep; the best evaluated one is kept, too"
    )
    report_to: Optional[str] = setting(
        None, "tensorboard or wandb (which you install): metrics go there, too"
    )
    seed: int = setting(0, "seed of everything that is drawn")

    def __post_init__(self):
        if self.preset not in PRESETS:
            close = difflib.get_close_matches(self.preset, PRESETS, cutoff=0.5)
            raise ValueError(
                f"unknown preset {self.preset}; "
                + (
                    f"did you mean {' or '.join(close)}?"
                    if close
                    else f"there are: {', '.join(PRESETS)}"
                )
            )
        for name in (
            "memory_prob",
            "offpolicy_prob",
            "min_prob",
            "tip_threshold",
            "novelty_threshold",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name in (
            "group_size",
            "tasks_per_iteration",
            "action_tokens",
            "tip_tokens",
            "rollout_batch",
            "context",
            "minibatch_episodes",
            "variations",
            "save_every",
            "keep_checkpoints",
            "memory_capacity",
            "tips",
            "temperature",
            "lora_r",
            "lora_alpha",
            "micro_tokens",
            "clip_c",
            "max_grad_norm",
            "iterations",
            "eval_variations",
            "eval_episodes",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be positive")
        for name in (
            "shots",
            "clip_low",
            "clip_high",
            "beta",
            "advantage_eps",
            "learning_rate",
            "eval_every",
            "eval_temperature",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must not be negative")


# What the paper compares, each as what it sets differently.
PRESETS = {
    "empo2": {},
    # Baselines
    "grpo": {"memory_prob": 0.0, "intrinsic_coef": 0.0, "min_prob": 0.0},
    "reflexion": {
        "memory_prob": 1.0,
        "learning_rate": 0.0,
        "intrinsic_coef": 0.0,
    },  # tips, but no weight moves
    # Ablations
    "no-offpolicy": {"offpolicy_prob": 0.0},
    "no-onpolicy-tips": {"offpolicy_prob": 1.0},
    "no-intrinsic": {"intrinsic_coef": 0.0},
    "intrinsic-half": {"intrinsic_coef": 0.5},
    "intrinsic-double": {"intrinsic_coef": 2.0},
    "no-mask": {"min_prob": 0.0},
    "mode-turn": {"mode_level": "turn"},  # (1) the default; differs in the laptop experiment
    "mode-episode": {"mode_level": "episode"},  # (1)
    "mode-batch": {"mode_level": "batch"},  # (1)
    "denominator-tips": {"denominator": "tips"},  # (2)
    **{f"p-{p}": {"memory_prob": p} for p in (0.1, 0.4, 0.7)},
    **{f"q-{q}": {"offpolicy_prob": q} for q in (0.3, 0.5, 0.85, 0.95)},
}
