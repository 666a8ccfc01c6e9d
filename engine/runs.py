"""A run on disk: loading policy and environments, checkpoints, logs."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

import envs
import memory
from engine import processes
from engine.hardware import find_place
from engine.weights import first_line
from policy import Policy
from settings import Settings

try:
    import fcntl
except ImportError:
    raise SystemExit("Linux or macOS is needed; on Windows use WSL") from None

ROOT = Path(__file__).parent.parent
LOGS = ("metrics.jsonl", "episodes.jsonl", "evals.jsonl")
STORED = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "tips.npz",
    "novelty.npz",
)
# What may change on --resume, beside a larger --iterations.
RESUMABLE = (
    "rollout_batch",
    "micro_tokens",
    "dtype",
    "load_in_4bit",
    "gradient_checkpointing",
    "decode_graph",
    "save_every",
    "keep_checkpoints",
    "report_to",
)


# --- Setting up -----------------------------------------------------------------------------------
def load_policy(s, adapter=None):
    """The policy of the settings. Raises ValueError if it cannot hold --context.

    adapter: a folder with that of a run, whose base model may have moved since.
    """
    name = s.model
    if name == "standin":
        name = str(ROOT / "standin" / s.env)
        if not os.path.isdir(name):
            raise ValueError(f"there is no stand-in for {s.env}; give a --model")
    elif name.startswith("smollm2"):
        from standin import smollm2  # it needs policy.py, and its maker the environments

        name = smollm2.folder(name)
    try:
        policy = Policy.load(
            name,
            adapter=adapter,
            device=find_place().device,
            dtype=s.dtype or "float32",
            load_in_4bit=s.load_in_4bit,
            gradient_checkpointing=s.gradient_checkpointing,
            decode_graph=s.decode_graph,
            lora_r=s.lora_r,
            lora_alpha=s.lora_alpha,
            seed=s.seed,
        )
    except ValueError as error:
        if adapter and str(error).startswith((name, str(adapter))):
            raise ValueError(
                f"{error}; if the model has moved, give its new place with --model"
            ) from error
        raise
    most = policy.max_positions
    if s.context > most:
        raise ValueError(f"{s.model} has {most} positions; lower --context ({s.context})")
    return policy


def make_env(s):
    """One environment, with the options that the settings give."""
    options = {}
    for name in ("step_limit", "shots", "action_correction"):
        if getattr(s, name):
            options[name] = getattr(s, name)
    options |= envs.parse_options(s.env_options)
    return envs.make(s.env, **options)


def task_pool(env, tasks, split, variations):
    """[(task, variation)]: the first variations of a split, of each task.

    Raises ValueError where there is nothing to play.
    """
    if not tasks:
        raise ValueError("name the tasks: --tasks NAME ...")
    pool = []
    for task in tasks:
        chosen = env.variations(task, split)[:variations]
        if not chosen:
            raise ValueError(f"{task} has no {split} variations")
        pool += [(task, variation) for variation in chosen]
    return pool


def make_memory(s):
    """An empty tip memory."""
    return memory.TipMemory(s.memory_capacity, s.tip_threshold, s.max_tips, s.tip_rank)


# --- Checkpoints ----------------------------------------------------------------------------------
@dataclasses.dataclass
class Learner:
    """All that learns or remembers: what a checkpoint holds."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    tip_memory: memory.TipMemory
    novelty: memory.NoveltyStore
    episodes: int = 0  # played in training so far
    seconds: float = 0.0  # of training so far
    best: tuple = (None, None)  # score and iteration of the best evaluation, the later of equals


def make_learner(s, checkpoint=None):
    """A new learner, or that of a checkpoint folder."""
    policy = load_policy(s, checkpoint)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=s.learning_rate, weight_decay=0.0)
    novelty = memory.NoveltyStore(s.novelty_threshold)
    learner = Learner(policy, optimizer, make_memory(s), novelty)
    if checkpoint:
        load_checkpoint(checkpoint, learner, s)
    return learner


@contextmanager
def locked(run_dir):
    """Create the directory if need be, and hold it for this process.

    Raises ValueError if another process holds it. A directory that stays empty is removed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run_dir}: another process is at work here") from None
        try:
            yield
        finally:
            with suppress(OSError):
                run_dir.rmdir()
    finally:
        os.close(descriptor)


def checkpoints(run_dir):
    """Iterations of the run's checkpoints, oldest first."""
    numbers = [path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


@processes.only_first
def save_checkpoint(run_dir, iteration, learner, s):
    """Write checkpoint-N whole or not at all, then drop old ones.

    The newest `keep_checkpoints` are kept, and the one that was evaluated best.
    """
    final = run_dir / f"checkpoint-{iteration}"
    folder = run_dir / f"checkpoint-{iteration}.tmp"
    if final.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        learner.policy.save(folder)
        torch.save(learner.optimizer.state_dict(), folder / "optimizer.pt")
        learner.tip_memory.save(folder / "tips.npz")
        learner.novelty.save(folder / "novelty.npz")
        state = {
            "iteration": iteration,
            "settings": dataclasses.asdict(s),
            "tokenizer": learner.policy.fingerprint(),
            "weights": learner.policy.base_checksum,
            "episodes": learner.episodes,
            "seconds": learner.seconds,
            "best": learner.best,
            "logs": {log: sha256(run_dir / log) for log in LOGS},
            "files": {path.name: sha256(path) for path in folder.iterdir()},
        }
        (folder / "state.json").write_text(json.dumps(state))
        flush(*folder.iterdir(), folder)
        os.rename(folder, final)
        flush(run_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # words for a full disk
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{final} could not be written; is the disk full? Those before it are intact "
            f"({first_line(error)})"
        ) from error
    keep = {learner.best[1], *checkpoints(run_dir)[-s.keep_checkpoints :]}
    for old in set(checkpoints(run_dir)) - keep:
        shutil.rmtree(run_dir / f"checkpoint-{old}")


def flush(*paths):
    """Have files and folders on the disk before anything older is removed: power may fail."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems cannot do that with a folder
            if error.errno != errno.EINVAL or not os.path.isdir(path):
                raise
        finally:
            os.close(descriptor)


def sha256(path):
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(folder):
    """(settings, state) of a checkpoint. Raises ValueError if a file of it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name in STORED:
            if sha256(folder / name) != state["files"][name]:
                raise ValueError(f"{name} is not what was saved")
        if folder.name != f"checkpoint-{state['iteration']}":
            raise ValueError(f"it is of iteration {state['iteration']}")
        other = state["settings"].keys() ^ {f.name for f in dataclasses.fields(Settings)}
        other |= {"tokenizer", "weights"} - state.keys()
        if other:
            raise ValueError(f"made by another version: {', '.join(sorted(other))}")
        return Settings(**state["settings"]), state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: the checkpoint is damaged or of another version ({first_line(error)})"
        ) from error


def newest_checkpoint(run_dir):
    """(settings, iteration) of the newest checkpoint that is whole; damaged ones are put aside.

    Raises ValueError if there is none.
    """
    problem = f"{run_dir} has no checkpoint; nothing to resume"
    for iteration in reversed(checkpoints(run_dir)):
        folder = run_dir / f"checkpoint-{iteration}"
        try:
            settings, _ = read_checkpoint(folder)
        except ValueError as error:
            problem = str(error)
            print(f"{error}; going back to the one before", file=sys.stderr)
            continue
        for newer in checkpoints(run_dir):
            if newer > iteration:
                aside = free_name(run_dir / f"damaged-{newer}")
                os.rename(run_dir / f"checkpoint-{newer}", aside)
        return settings, iteration
    raise ValueError(problem)


def free_name(path):
    """The path, or with -2, -3, ... at the end of its name where something has that name."""
    free = path
    for number in itertools.count(2):
        if not os.path.lexists(free):
            return free
        free = path.with_stem(f"{path.stem}-{number}")


def require_same_model(state, policy, s):
    """The base model may be in another place than when the checkpoint was made, but no other model.

    Raises ValueError.
    """
    if state["weights"] != policy.base_checksum:
        raise ValueError(
            f"{s.model} is another model than the run was trained on (its weights differ); "
            "give that one's place with --model"
        )
    if state["tokenizer"] != policy.fingerprint():
        raise ValueError(f"{s.model}: its tokenizer is not the one that the run was trained with")


def load_checkpoint(folder, learner, s):
    """Put optimizer, memories and counters back."""
    _, state = read_checkpoint(folder)
    require_same_model(state, learner.policy, s)
    learner.tip_memory.load(folder / "tips.npz")
    learner.novelty.load(folder / "novelty.npz")
    try:
        weights = torch.load(folder / "optimizer.pt", "cpu", weights_only=True)
        learner.optimizer.load_state_dict(weights)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(f"{folder / 'optimizer.pt'}: unreadable ({first_line(error)})") from error
    learner.episodes = state["episodes"]
    learner.seconds = state["seconds"]
    learner.best = tuple(state["best"])


# --- Logs -----------------------------------------------------------------------------------------
def was_evaluated(run_dir, iteration):
    """Has the run an evaluation of this iteration, which a resume has to repeat?"""
    return any(line["iteration"] == iteration for line in records(run_dir / "evals.jsonl"))


@processes.only_first
def open_logs(run_dir, start):
    """Make the logs of a new run; of one that goes on keep what came before iteration `start`.

    They are records, not state: the run goes on without what is lost or damaged, and says so.
    """
    for log in LOGS:
        (run_dir / log).touch()
    if start is None:
        return
    _, state = read_checkpoint(run_dir / f"checkpoint-{start}")
    for log in LOGS:
        path = run_dir / log
        kept = run_dir / f"{log}.tmp"
        with open(kept, "wb") as file:
            file.writelines(line for line, record in lines(path) if record["iteration"] < start)
        if sha256(kept) != state["logs"][log]:
            put_aside(path, start)
        os.replace(kept, path)
    settings = run_dir / "settings.json"  # about to be written again, from the checkpoint
    try:
        if settings.exists():
            json.loads(settings.read_bytes())
    except ValueError:
        put_aside(settings, start)


def put_aside(path, start):
    """Keep a damaged file under another name, and say so."""
    aside = free_name(path.with_name(f"damaged-{start}-{path.name}"))
    os.rename(path, aside)
    print(f"{path}: a part of it is lost; the run goes on, see {aside}", file=sys.stderr)


@processes.only_first
def append(path, lines):
    """Add dicts to a JSON-lines file, which must exist: one that was removed shall be missed."""
    with open(path, "r+", encoding="utf-8") as file:
        file.seek(0, os.SEEK_END)
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@processes.only_first
def write_json(path, data):
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    os.replace(temporary, path)


def lines(path):
    """(bytes, dict) of each whole line of a JSON-lines file, which may be growing.

    A damaged line is left out, and said. Every record has its iteration.
    """
    with open(path, "rb") as file:  # bytes: U+2028 ends no line here
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                intact = isinstance(record["iteration"], int)
            except (ValueError, KeyError, TypeError):
                intact = False
            if intact:
                yield line, record
            else:
                print(f"{path}: line {number} is damaged, and left out", file=sys.stderr)


def records(path):
    """The records in a JSON-lines file; [] if it is absent."""
    if not path.exists():
        return []
    return [record for _, record in lines(path)]
