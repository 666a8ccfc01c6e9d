"""A run on disk: hardware defaults, loading, checkpoints."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

import envs
import memory
from policy import Policy, card_memory, first_line
from settings import Settings

STANDIN = Path(__file__).parent / "standin"


@dataclasses.dataclass
class Parts:
    """What a checkpoint holds."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    tips: memory.TipMemory
    novelty: memory.NoveltyStore


# --- Setting up -------------------------------------------------------------------------------------------------
def hardware_defaults(s):
    """Fill in what was left to the hardware; returns (settings, one line of reason per value)."""
    cuda = torch.cuda.is_available()
    where = f"{torch.cuda.get_device_name()}, {card_memory():.0f} GB" if cuda else "no GPU"
    # Beside 7B in 4-bit on a 24 GB card; in bf16 on 48 GB; in bf16 on 80 GB and more.
    rollout_batch, micro_tokens = (
        (64, 16384)
        if not cuda
        else (
            (32, 6144) if card_memory() < 30 else (64, 6144) if card_memory() < 60 else (128, 16384)
        )
    )
    choices = {
        "model": ("Qwen/Qwen2.5-7B-Instruct", "the paper's model")
        if cuda
        else (
            "standin",
            "a tiny stand-in for a language model, to see the loop work; its scores are no result",
        ),
        "tasks_per_iteration": (16, "the paper's") if cuda else (1, "a small iteration for a CPU"),
        "iterations": (200, "the paper's 200-250") if cuda else (10, "a few minutes"),
        "learning_rate": (1e-5, "usual for LoRA at 7B") if cuda else (1e-3, "for a tiny model"),
        "rollout_batch": (rollout_batch, "as many dialogues as fit"),
        "micro_tokens": (micro_tokens, "as many tokens as fit"),
        "load_in_4bit": (
            cuda and card_memory() < 30,
            "4-bit is slower, and needed up to 24 GB only",
        ),
        "run_dir": (
            f"runs/{s.env}-{'+'.join(s.tasks[:3])}{'' if s.preset == 'empo2' else '-' + s.preset}-{s.seed}",
            "from environment, tasks, preset and seed",
        ),
    }
    chosen = {name: value for name, (value, _) in choices.items() if getattr(s, name) is None}
    reasons = [
        f"  {name} = {value}  ({where}: {choices[name][1]})" for name, value in chosen.items()
    ]
    return dataclasses.replace(s, **chosen), reasons


def load_policy(s, adapter=None):
    standin = STANDIN / "house" if s.env == "house" else STANDIN
    policy = Policy.load(
        str(standin) if s.model == "standin" else s.model,
        adapter=adapter,
        load_in_4bit=s.load_in_4bit,
        lora_r=s.lora_r,
        lora_alpha=s.lora_alpha,
        temperature=s.temperature,
        seed=s.seed,
    )
    longest = s.context + 2 * s.tip_tokens + 256  # a tip is written after the whole dialogue
    if longest > policy.max_positions:
        raise ValueError(
            f"--context {s.context} and a tip need {longest} positions, {s.model} has "
            f"{policy.max_positions}; lower --context"
        )
    return policy


def env_options(s):
    """The environment's options: the three named settings where given, and name=value pairs."""
    options = {
        name: getattr(s, name)
        for name in ("step_limit", "shots", "action_correction")
        if getattr(s, name)
    }
    for pair in s.env_options:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env_options {pair}: write name=value")
        try:
            options[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            options[name] = value
    return options


def make_envs(s, split="train"):
    """(one environment per episode played side by side, the (task, variation) pairs that are trained on)"""
    options = env_options(s)
    first = envs.make(s.env, **options)
    pool = task_pool(first, s.tasks, split, s.variations)
    rows = min(s.rollout_batch, (s.tasks_per_iteration or len(pool)) * s.group_size)
    return [first] + [envs.make(s.env, **options) for _ in range(rows - 1)], pool


def task_pool(env, tasks, split, variations):
    return [(task, v) for task in tasks for v in env.variations(task, split)[:variations]]


def draw_jobs(pool, s, rng):
    """B tasks, N episodes of each; every task of the pool once before any comes again."""
    order = [
        i for _ in range(-(-s.tasks_per_iteration // len(pool))) for i in rng.permutation(len(pool))
    ]
    return [
        (*pool[i], group)
        for group, i in enumerate(order[: s.tasks_per_iteration])
        for _ in range(s.group_size)
    ]


# --- Checkpoints ------------------------------------------------------------------------------------------------
LOGS = ("metrics.jsonl", "episodes.jsonl", "evals.jsonl")
# What may change on --resume.
RESUMABLE = (
    "rollout_batch",
    "micro_tokens",
    "load_in_4bit",
    "save_every",
    "keep_checkpoints",
    "report_to",
)


def save_checkpoint(run_dir, iteration, parts, s):
    """Write checkpoint-N whole or not at all, then drop the oldest ones, but not the best evaluated one."""
    final, folder = run_dir / f"checkpoint-{iteration}", run_dir / f"checkpoint-{iteration}.tmp"
    if final.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        parts.policy.save(folder)
        torch.save(parts.optimizer.state_dict(), folder / "optimizer.pt")
        parts.tips.save(folder / "tips.npz")
        parts.novelty.save(folder / "novelty.npz")
        logs = {log: ((run_dir / log).stat().st_size, sha256(run_dir / log)) for log in LOGS}
        (folder / "state.json").write_text(
            json.dumps(
                {
                    "iteration": iteration,
                    "logs": logs,
                    "files": {path.name: sha256(path) for path in folder.iterdir()},
                    "settings": dataclasses.asdict(s),
                    "tokenizer": parts.policy.fingerprint(),
                }
            )
        )
        os.rename(folder, final)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # each library has its own words for a full disk
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{final} could not be written; is the disk full? Those before it are intact "
            f"({first_line(error)})"
        ) from error
    keep = {best_evaluated(run_dir), *checkpoints(run_dir)[-s.keep_checkpoints :]}
    for old in set(checkpoints(run_dir)) - keep:
        shutil.rmtree(run_dir / f"checkpoint-{old}")


def best_evaluated(run_dir):
    """The iteration with the best tip-free score, the later one of equals; None without evaluations."""
    evals = map(json.loads, (run_dir / "evals.jsonl").read_text(encoding="utf-8").splitlines())
    return max(((e["score"], e["iteration"]) for e in evals), default=(0, None))[1]


def sha256(path, size=None):
    """Checksum of the first `size` bytes of a file (None: of all)."""
    checksum, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (part := file.read(min(left, 2**20))):
            checksum.update(part)
            left -= len(part)
    return checksum.hexdigest()


def checkpoints(run_dir):
    """Iterations of the run's checkpoints, oldest first."""
    return sorted(
        int(p.name.split("-")[1])
        for p in run_dir.glob("checkpoint-*")
        if p.name.split("-")[1].isdigit()
    )


def read_settings(run_dir):
    """Settings of a run. ValueError if the file is missing, damaged or of another version."""
    try:
        saved = json.loads((run_dir / "settings.json").read_text(encoding="utf-8"))
        other = saved.keys() ^ {f.name for f in dataclasses.fields(Settings)}
        if other:
            raise ValueError(f"of another version: {', '.join(sorted(other))}")
        return Settings(**saved)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run_dir}/settings.json cannot be read ({error}); nothing to resume"
        ) from error


def verify(folder, s):
    """The state of a checkpoint. ValueError unless its files are what was saved, by a run with the settings s."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, checksum in state["files"].items():
            if sha256(folder / name) != checksum:
                raise ValueError(f"{name} is not what was saved")
        if (
            not {"adapter_model.safetensors", "optimizer.pt", "tips.npz", "novelty.npz"}
            <= state["files"].keys()
        ):
            raise ValueError("state.json names too few files")
        if folder.name != f"checkpoint-{state['iteration']}":
            raise ValueError(f"it is of iteration {state['iteration']}")
        free = {"resume", "run_dir", "iterations", *RESUMABLE}
        for name, value in dataclasses.asdict(s).items():
            if name not in free and state["settings"][name] != value:
                raise ValueError(
                    f"made with --{name} {state['settings'][name]}, settings.json says {value}"
                )
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: the checkpoint is damaged or of another run ({first_line(error)}); "
            "delete it to resume from the one before"
        ) from error


def load_checkpoint(run_dir, iteration, parts, s):
    """Optimizer and memories of checkpoint-N, and the logs cut back to where they were then."""
    folder = run_dir / f"checkpoint-{iteration}"
    state = verify(folder, s)
    if state["tokenizer"] != parts.policy.fingerprint():
        raise ValueError(f"{s.model}: its tokenizer is not the one that {folder} was made with")
    for log, (size, checksum) in state["logs"].items():
        if not (run_dir / log).exists() or sha256(run_dir / log, size) != checksum:
            raise ValueError(
                f"{run_dir / log}: damaged, its beginning is not what it was at {folder.name}"
            )
    parts.tips.load(folder / "tips.npz")
    parts.novelty.load(folder / "novelty.npz")
    try:
        parts.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(
            f"{folder / 'optimizer.pt'} cannot be read ({first_line(error)})"
        ) from error
    for log, (size, _) in state["logs"].items():
        os.truncate(run_dir / log, size)
