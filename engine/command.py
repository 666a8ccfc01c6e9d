"""The command line of train.py around the training itself: errors, interrupts, resume.

Torch is imported only where it is needed, so typos are reported at once.
"""

import os
import shlex
import signal
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

import settings
from engine import arguments
from engine.errors import unknown

ROOT = Path(__file__).parent.parent
EXPECTED = (ValueError, RuntimeError, FloatingPointError, OSError)  # their text says it all
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopNow(BaseException):
    """Not KeyboardInterrupt: py4j's handling of that one is broken."""


def handle(signals, handler):
    """Set the handler of signals, but not of those that are ignored: nohup wants them ignored."""
    for signum in signals:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def quit_at_once(signum, frame):
    """Exit at once: there is nothing to clean up yet."""
    print("\nstopped before anything was saved", file=sys.stderr)
    os._exit(130)


def refuse(argv, description, make):
    """End the program with one line if the command line is wrong; from here on also on Ctrl-C.

    make: envs.make.
    """
    handle([signal.SIGINT], quit_at_once)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "FATAL"
    )  # else a lost process prints a page of C++
    try:
        s, _ = arguments.parse(argv, description)
        known = make(s.env).tasks()
        for task in s.tasks:
            if task not in known:
                raise unknown("task", task, known)
    except (ValueError, RuntimeError) as error:
        if os.environ.get("RANK", "0") == "0":  # one of several processes says it
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def command(script, *words):
    """A command line that works from the working directory."""
    path = ROOT / script
    shorter = min(str(path), os.path.relpath(path), key=len)
    return shlex.join(["python", shorter, *map(str, words)])


def resume_command(run_dir):
    """The command that goes on with a run."""
    return command("train.py", "--resume", "--run-dir", run_dir)


def stop_now(signum, frame):
    raise StopNow


def finish_on_interrupt():
    """A list that fills on a signal of STOPS: the iteration can finish; a second one stops now."""
    from tqdm import tqdm

    from engine import processes

    received = []

    def handler(signum, frame):
        if received:
            raise StopNow
        received.append(signum)
        if processes.rank == 0:
            tqdm.write(
                "Finishing this iteration, then saving. Ctrl-C again stops now and loses it."
            )

    handle(STOPS, handler)
    return received


def run(argv, parse, train):
    """Parse, hold the run's directory, train -> exit code: 0, 1 out of memory, 2, 130 stopped.

    parse: argv -> (settings, lines to print). train: (settings, run_dir, first iteration or None)
    -> how many iterations are done.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from engine import plugins, processes, runs

    handle(STOPS, stop_now)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run_dir = None
    try:
        processes.start()
        s, notes = parse(argv)
        run_dir = Path(s.run_dir)
        with ExitStack() as stack:
            asked = [*arguments.config_words(s.config), *argv] if s.config else argv
            found = processes.from_first(runs.open_run, s, notes, arguments.given(asked), stack)
            s, start = found
            done = train(s, run_dir, start)
        if done < s.iterations:
            raise StopNow
        summarise(s, run_dir)
    except StopNow:
        if run_dir and run_dir.is_dir() and runs.checkpoints(run_dir):
            processes.say(f"\nstopped; {resume_command(run_dir)} continues")
        else:
            processes.say("\nstopped before anything was saved")
        return 130
    except torch.OutOfMemoryError:
        processes.say(
            "train.py: out of GPU memory; use --gradient-checkpointing or lower --micro-tokens "
            "(update), lower --rollout-batch (rollout), or use --load-in-4bit, then: "
            + resume_command(run_dir),
            sys.stderr,
        )
        return 1
    except Exception as error:  # whatever a fork's file leads to
        kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        said = processes.say(f"train.py: {kind}{error}{plugins.where(error)}", sys.stderr)
        with suppress(OSError):  # the disk may be full
            if said and run_dir and run_dir.exists():
                (run_dir / "error.log").write_text(traceback.format_exc())
        return 2
    finally:
        handle([signal.SIGINT], signal.default_int_handler)
        handle([signal.SIGTERM, signal.SIGHUP], signal.SIG_DFL)
    return 0


def summarise(s, run_dir):
    """Say what a finished run leads to: did it learn, where to look, how to go on."""
    from engine import processes, runs

    if processes.rank:
        return
    evals = runs.records(run_dir / "evals.jsonl")
    if evals:
        before, after = evals[0], evals[-1]
        print(
            f"tip-free score {before['score']:.1f} -> {after['score']:.1f}, "
            f"solved {before['success']:.0%} -> {after['success']:.0%}, "
            f"after {after['training_episodes']} episodes"
            + (" (not to be compared with the paper's)" if settings.is_standin(s.model) else "")
        )
    if (run_dir / "curve.png").exists():
        print("picture:", run_dir / "curve.png")
    print("look at its episodes:", command("experiments/view.py", run_dir))
    print("go on:", resume_command(run_dir), "--iterations", 2 * s.iterations)
