"""A run on disk: its directory, checkpoints, logs."""

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

from engine import arguments, hardware, plugins, processes
from engine.errors import first_line

try:
    import fcntl
except ImportError:
    raise SystemExit("Linux or macOS is needed; on Windows use WSL") from None

LOGS = ("metrics.jsonl", "episodes.jsonl", "evals.jsonl")
STORED = ("adapter_model.safetensors adapter_config.json optimizer.pt tips.npz novelty.npz").split()
# What may change on --resume, beside a larger --iterations.
RESUMABLE = (
    "rollout_batch micro_tokens dtype load_in_4bit gradient_checkpointing decode_graph save_every"
    " report_to verbose"
).split()
KEPT = 2  # how many of the newest checkpoints are kept, beside the best evaluated


# --- The directory --------------------------------------------------------------------------------
def open_run(s, notes, names, stack):
    """Hold the run's directory -> (settings, the checkpoint to go on from or None).

    notes: lines to print for a new run. names: the settings that the command line gives. stack: an
    ExitStack.
    """
    run_dir = Path(s.run_dir)
    if s.resume and not run_dir.is_dir():
        raise ValueError(f"{run_dir} does not exist; nothing to resume")
    stack.enter_context(locked(run_dir))
    start = None
    if s.resume:
        s, start = continue_run(run_dir, s, names)
    elif checkpoints(run_dir) or records(run_dir / "metrics.jsonl"):
        raise ValueError(f"{run_dir} exists; --resume continues it, --run-dir takes another")
    episodes = s.tasks_per_iteration * s.group_size
    if processes.count > episodes:
        raise ValueError(
            f"{processes.count} processes, but {episodes} episodes an iteration; lower "
            "--num_processes, or raise --group-size or --tasks-per-iteration"
        )
    device = hardware.find_device().name
    since = "" if start is None else f"from iteration {start}; "
    what = "; ".join(about(vars(s)))
    new = notes if start is None else []
    print(*new, f"{what}; {device}; {since}in {run_dir}", sep="\n", flush=True)
    return s, start


def read_settings(run_dir):
    """The dict in settings.json. Raises OSError or ValueError."""
    try:
        return json.loads((run_dir / "settings.json").read_text())
    except ValueError as error:
        raise ValueError(f"{run_dir / 'settings.json'} is damaged") from error


def about(settings):
    """What is run, of a dict of settings: (environment and tasks, model, method and seed)."""
    tasks = ", ".join(settings["tasks"][:3])
    if len(settings["tasks"]) > 3:
        tasks += f" and {len(settings['tasks']) - 3} more"
    names = dict.fromkeys([Path(settings["algorithm"]).stem, settings["preset"]])
    method = "-".join(name for name in names if name != "empo2") or "empo2"
    where = f"{Path(settings['env']).stem}: {tasks}"
    return where, settings["model"], f"{method}, seed {settings['seed']}"


def continue_run(run_dir, s, names):
    """(the run's own settings, its newest checkpoint); `names` are those given on --resume."""
    saved, start = newest_checkpoint(run_dir)
    names = {name if hasattr(s, name) else name.removeprefix("no_") for name in names}  # --no-x
    given = {name: getattr(s, name) for name in names & {"iterations", "model", *RESUMABLE}}
    for name in names - {"resume", "run_dir", *given}:
        if getattr(s, name) != getattr(saved, name, None):
            raise ValueError(
                f"--resume continues with the run's own settings; {name} cannot change"
            )
    for name, file in changed_sources(run_dir / f"checkpoint-{start}").items():
        if name not in names:
            raise ValueError(
                f"{file} has changed since the checkpoint; --{name} {file} goes on with the new one"
            )
    if given.get("iterations", start) < start:
        raise ValueError(
            f"{run_dir} has {start} iterations already; --iterations can only make it longer"
        )
    return dataclasses.replace(saved, resume=True, run_dir=str(run_dir), **given), start


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


# --- Checkpoints ----------------------------------------------------------------------------------
def checkpoints(run_dir):
    """Iterations of the run's checkpoints, oldest first."""
    numbers = [path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


@processes.only_first
def save_checkpoint(run_dir, iteration, learner, s):
    """Write checkpoint-N whole or not at all, then drop old ones.

    The newest ones are kept, and the one that was evaluated best.
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
            "sources": sources(s),
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
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk raises
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{final} could not be written; is the disk full? Those before it are intact "
            f"({first_line(error)})"
        ) from error
    keep = {learner.best[1], *checkpoints(run_dir)[-KEPT:]}
    for old in set(checkpoints(run_dir)) - keep:
        shutil.rmtree(run_dir / f"checkpoint-{old}")


def flush(*paths):
    """Write files and folders to the disk before anything older is removed: power may fail."""
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


def sources(s):
    """{file: checksum} of the algorithm and the environment, where these were loaded from one."""
    return {
        name: plugins.checksums[name] for name in (s.algorithm, s.env) if name in plugins.checksums
    }


def changed_sources(folder):
    """{"algorithm" or "env": its file}, where it is another than when the checkpoint was made."""
    s, state = read_checkpoint(folder)
    return {
        option: name
        for option, name in (("algorithm", s.algorithm), ("env", s.env))
        if name in state["sources"]
        and state["sources"][name] != sha256(plugins.place(name, "algorithms"))
    }


def read_checkpoint(folder):
    """(settings, state) of a checkpoint. Raises ValueError if a file of it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name in STORED:
            if sha256(folder / name) != state["files"][name]:
                raise ValueError(f"{name} is not what was saved")
        if folder.name != f"checkpoint-{state['iteration']}":
            raise ValueError(f"it is of iteration {state['iteration']}")
        saved = state["settings"]
        cls, _ = arguments.of_algorithm(saved["algorithm"])
        other = saved.keys() ^ {f.name for f in dataclasses.fields(cls)}
        other |= {"tokenizer", "weights", "sources"} - state.keys()
        if other:
            raise ValueError(f"made by another version: {', '.join(sorted(other))}")
        return cls(**saved), state
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
            saved, _ = read_checkpoint(folder)
        except ValueError as error:
            problem = str(error)
            print(f"{error}; going back to the one before", file=sys.stderr)
            continue
        for newer in checkpoints(run_dir):
            if newer > iteration:
                aside = free_name(run_dir / f"damaged-{newer}")
                os.rename(run_dir / f"checkpoint-{newer}", aside)
        return saved, iteration
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
        for line in lines:  # a fork's numbers may be NumPy's or a tensor
            file.write(json.dumps(line, ensure_ascii=False, default=float) + "\n")


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
