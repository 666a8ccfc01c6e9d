"""Every setting, grouped by topic, and the presets. The command line is made from them."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.errors import unknown


def setting(default, text, **options):
    """A field of `Settings`: its default and its line in --help."""
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(text):
    """A field that is true, false, or decided by the hardware."""
    return setting(None, text, nargs="?", const=True)


@dataclass
class Settings:
    """What can be set; the command line is made from it. None = decided by the hardware.

    A number in [n] is that of the choice at the top of empo2.py.
    """

    # What is run
    config: str | None = setting(None, "YAML file of settings, such as configs/stages.yaml")
    preset: str = setting("empo2", "named settings (docs/paper.md); explicit flags override them")
    algorithm: str = setting("empo2", "a file of algorithms/, or path/to/file.py (docs/forks.md)")
    env: str = setting("scienceworld", "scienceworld, house, webshop, or path/to/file.py")
    tasks: list[str] = setting([], "names of the tasks to train on [the environment's own choice]")
    variations: int | None = setting(None, "training variations per task [GPU: 5, CPU: 2]")
    iterations: int | None = setting(None, "number of iterations [GPU: 200, CPU: 10]")
    step_limit: int | None = setting(None, "actions per episode [the environment's, by task]")
    env_options: list[str] = setting(
        [], "name=value, as in the docstring of the environment's class"
    )
    # Policy
    model: str | None = setting(
        None, "hub id, folder, standin/NAME, smollm2 [Qwen2.5 by the GPU's memory, else a stand-in]"
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "number type [bfloat16 on a GPU that has it, else float32]"
    )
    load_in_4bit: bool | None = switch("4-bit (NF4) frozen weights [by the card's memory]")
    gradient_checkpointing: bool | None = switch(
        "compute activations twice in updates [on a GPU in as many layers as its memory needs]"
    )
    decode_graph: bool | None = switch("sample with CUDA graphs [false]")
    lora_r: int = setting(16, "rank of the adapter")
    lora_alpha: int = setting(32, "the adapter's scale is alpha / rank")
    # Rolling out (§4.1)
    group_size: int = setting(8, "N: episodes of a task, which are compared with each other")
    tasks_per_iteration: int | None = setting(None, "B: tasks per iteration [GPU: 16, CPU: 1]")
    rollout_batch: int | None = setting(None, "parallel episodes [by the card's memory]")
    temperature: float = setting(1.0, "sampling temperature, also in the loss")
    action_tokens: int = setting(32, "most tokens of an action")
    tip_tokens: int = setting(160, "most tokens of a tip")
    context: int = setting(4500, "most tokens of prompt and answer; the episode ends there")
    history: int = setting(0, "earlier turns in a prompt; 0 = all, as a dialogue")
    memory_prob: float = setting(0.25, "p: probability that a turn is prompted with tips; 0 = none")
    mode_level: Literal["turn", "episode", "batch"] = setting("turn", "[1] draw modes once per")
    # Memory (§4.1)
    embedder: str = setting("hashing", "hashing, or sentence-transformers/all-MiniLM-L6-v2 (paper)")
    max_tips: int = setting(10, "most tips per turn")
    tip_threshold: float = setting(0.5, "least cosine similarity of a retrieved tip")
    tip_rank: Literal["score", "similarity"] = setting(
        "score", "[5] of similar tips take the best by"
    )
    memory_key: Literal["state", "task"] = setting(
        "state", "[6] key: observation and task, or task"
    )
    memory_scope: Literal["variation", "task", "all"] = setting("variation", "[7] one memory per")
    memory_capacity: int = setting(1000, "[7] tips per memory, the oldest are dropped")
    novelty_threshold: float = setting(
        0.5, "[4] cosine similarity of states that count as the same"
    )
    intrinsic_coef: float = setting(1.0, "[4] points of return per unit of intrinsic reward")
    # Update (§4.2)
    offpolicy_prob: float = setting(2 / 3, "q: probability that a memory turn is off-policy")
    denominator: Literal["no-tips", "tips"] = setting(
        "no-tips", "[2] off-policy π_old is with or without"
    )
    learning_rate: float | None = setting(None, "of AdamW [GPU: 1e-5, CPU: 1e-3]")
    lr_decay: float = setting(0.0, "over the last share of the iterations it falls linearly to 0")
    minibatch_episodes: int = setting(16, "episodes per optimiser step")
    micro_tokens: int | None = setting(
        None, "padded tokens per forward pass [by the card's memory]"
    )
    pack: Literal["episode", "group"] = setting(
        "episode", "share computation within an episode or group"
    )
    clip_low: float = setting(0.2, "lower bound of the ratio: 1 - clip_low")
    clip_high: float = setting(0.3, "upper bound of the ratio: 1 + clip_high")
    clip_c: float = setting(10.0, "[13] dual clip: for A < 0 the term is at least clip_c * A")
    min_prob: float = setting(math.exp(-5), "delta: [3] less likely tokens get no gradient")
    beta: float = setting(0.0, "weight of KL(pi_theta || pi_ref)")
    advantage_eps: float = setting(1e-6, "added to the standard deviation of returns")
    fixed_std: float = setting(0.0, "points to divide by instead of sigma; 0 = sigma")
    max_grad_norm: float = setting(1.0, "gradient clip")
    # Tip-free evaluation during training (§5)
    eval_every: int | None = setting(
        None, "iterations between evaluations; 0 = never [GPU: 50, CPU: ends]"
    )
    eval_variations: int | None = setting(None, "test variations per task [GPU: 20, CPU: 4]")
    eval_episodes: int | None = setting(None, "episodes per variation [GPU: 4, CPU: 2]")
    eval_temperature: float = setting(0.4, "temperature of evaluations; 0 = greedy")
    # The run
    run_dir: str | None = setting(None, "new directory for the results [runs/ENV-TASK-SEED]")
    resume: bool = setting(False, "continue the run in run_dir from its last checkpoint")
    save_every: int = setting(1, "iterations between checkpoints")
    report_to: str | None = setting(None, "tensorboard or wandb (which you install)")
    verbose: bool = setting(False, "print what the preset and the hardware decided, and why")
    seed: int = setting(0, "seed of everything that is drawn")

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise unknown("preset", self.preset, PRESETS)
        for names, fits, what in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag} is {value}; it must {what}")
        if self.history and self.pack == "group":
            raise ValueError("--history leaves prompts little to share; use --pack episode")


RANGES = (
    (
        "memory_prob offpolicy_prob lr_decay min_prob tip_threshold novelty_threshold",
        lambda value: 0 <= value <= 1,
        "lie between 0 and 1",
    ),
    (
        "variations iterations step_limit lora_r lora_alpha group_size tasks_per_iteration"
        " rollout_batch temperature action_tokens tip_tokens context max_tips memory_capacity"
        " minibatch_episodes micro_tokens clip_c max_grad_norm eval_variations eval_episodes"
        " save_every",
        lambda value: value > 0,
        "be positive",
    ),
    (
        "history intrinsic_coef learning_rate clip_low clip_high beta advantage_eps fixed_std"
        " eval_every eval_temperature seed",
        lambda value: value >= 0,
        "not be negative",
    ),
)


def is_standin(model):
    """Is it one of the small players in standin/? Their scores do not compare with the paper's.

    >>> [is_standin(name) for name in ("standin/stages", "smollm2", "Qwen/Qwen2.5-7B-Instruct")]
    [True, True, False]
    """
    return "standin" in Path(model).parts or model.startswith("smollm2")


GRPO = {"memory_prob": 0.0, "intrinsic_coef": 0.0, "min_prob": 0.0}
# What the paper compares, each as what it sets differently.
PRESETS = {
    "empo2": {},
    # Baselines
    "grpo": GRPO,
    "gigpo": GRPO | {"algorithm": "gigpo", "fixed_std": 10.0},
    "gigpo-std": GRPO | {"algorithm": "gigpo"},
    "reflexion": {"memory_prob": 1.0, "learning_rate": 0.0, "intrinsic_coef": 0.0},
    # Not in the paper: its exploration with another credit
    "empo2-gigpo": {"algorithm": "gigpo"},
    "empo2-modes": {"algorithm": "mode_credit"},
    # Ablations
    "no-offpolicy": {"offpolicy_prob": 0.0},
    "no-onpolicy-tips": {"offpolicy_prob": 1.0},
    "no-intrinsic": {"intrinsic_coef": 0.0},
    "no-mask": {"min_prob": 0.0},
    "mode-turn": {"mode_level": "turn"},  # [1] the default, but not in every experiment
    "mode-batch": {"mode_level": "batch"},
    "denominator-tips": {"denominator": "tips"},  # [2]
}
