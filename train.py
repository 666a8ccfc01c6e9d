"""EMPO² training: `python train.py --env scienceworld`. The loop in `train` is Algorithm 1; the rest is bookkeeping.

A run leaves in its directory (default runs/ENV-TASK-SEED, or runs/ENV-TASK-PRESET-SEED):
  settings.json     every setting, with the defaults that the hardware decided
  metrics.jsonl     one line per iteration (README: metric glossary)
  evals.jsonl       one line per tip-free evaluation on the test variations (--eval-every)
  episodes.jsonl    every episode, readable: observations, tips, actions, modes, rewards, the tip written
  checkpoint-N/     the state at the top of iteration N: the LoRA adapter (loads with peft), optimizer.pt,
                    tips.npz, novelty.npz, state.json (with checksums); the newest ones, and the best evaluated one
  nonfinite-N/      if iteration N met a loss or gradient that is not finite: what reproduces it (see `keep_evidence`)

  python train.py --env scienceworld --tasks find-plant find-animal --iterations 100
  python train.py --env scienceworld --preset grpo --eval-every 10                        # a baseline, with its curve
  python train.py --env house --env-options rooms=2                                       # no Java, milliseconds
  python train.py --resume --run-dir runs/scienceworld-power-component-0                  # after a stop or crash

On --resume only --iterations may grow, and --rollout-batch, --micro-tokens, --load-in-4bit, --save-every,
--keep-checkpoints and --report-to may change (a smaller --rollout-batch draws other episodes).
"""

import argparse
import dataclasses
import difflib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

import empo2
import envs
import eval as evaluation
import memory
from runs import (
    LOGS,
    RESUMABLE,
    Parts,
    checkpoints,
    draw_jobs,
    hardware_defaults,
    load_checkpoint,
    load_policy,
    make_envs,
    read_settings,
    save_checkpoint,
    task_pool,
    verify,
)
from settings import PRESETS, Settings


def train(s, run_dir, start=None):
    """Run the iterations from checkpoint `start` on (None: a new run). Returns how many are done."""
    trackers = Accelerator(project_dir=run_dir)
    trackers.log_with = filter_trackers(s.report_to, run_dir)  # none without --report-to
    if s.report_to and not trackers.log_with:
        raise ValueError(f"--report-to {s.report_to}: not installed; pip install {s.report_to}")
    policy = load_policy(s, run_dir / f"checkpoint-{start}" if start is not None else None)
    simulators, pool = make_envs(s)
    eval_pool = task_pool(simulators[0], s.tasks, "test", s.eval_variations) if s.eval_every else []
    for task, variation in (
        pool + eval_pool
    ):  # a prompt that is too long shows now, not in the night
        empo2.open_turn(
            policy,
            empo2.begin(policy, simulators[0], (task, variation, 0), 0, envs.EnvFault),
            [],
            s,
        )
    embed = memory.embedder(s.embedder)
    tips = memory.TipMemory(s.memory_capacity, s.tip_threshold, s.tips, s.tip_rank)
    novelty = memory.NoveltyStore(s.novelty_threshold)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=s.learning_rate, weight_decay=0.0)
    parts = Parts(policy, optimizer, tips, novelty)
    if start is not None:
        load_checkpoint(run_dir, start, parts, s)
    start = start or 0
    run_dir.mkdir(
        parents=True, exist_ok=True
    )  # not before everything is loaded: bad input leaves nothing behind
    (run_dir / "settings.tmp").write_text(json.dumps(dataclasses.asdict(s), indent=1))
    os.replace(run_dir / "settings.tmp", run_dir / "settings.json")
    for log in LOGS if start == 0 else ():
        (run_dir / log).touch()
    trackers.init_trackers(
        "empo2", {k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(s).items()}
    )
    interrupted = finish_on_interrupt()
    shown = {}
    with tqdm(
        total=s.iterations, initial=start, desc="EMPO²", unit="it", dynamic_ncols=True
    ) as bar:
        for iteration in range(start, s.iterations + 1):
            stop = iteration == s.iterations or bool(
                interrupted
            )  # asked once: what stops has been saved
            evaluated = s.eval_every and (
                iteration % s.eval_every == 0 or iteration == s.iterations
            )
            if iteration % s.save_every == 0 or stop or evaluated:
                save_checkpoint(run_dir, iteration, parts, s)
            if evaluated and not interrupted:
                result = log_evaluation(policy, simulators, eval_pool, iteration, s, run_dir, bar)
                trackers.log(
                    {f"eval_{name}": result[name] for name in ("score", "success")}, step=iteration
                )
                shown["eval"] = f"{result['score']:.1f}, {result['success']:.0%} solved"
                bar.set_postfix(shown)
            if stop:
                break
            # Each iteration has its own seeds, so a resumed run draws what the uninterrupted one would have drawn.
            rng = np.random.default_rng([s.seed, iteration])
            torch.manual_seed(int(rng.integers(2**62)))
            clock = Clock(bar)
            # --- Algorithm 1 ---
            jobs, episodes, attempts = draw_jobs(pool, s, rng), [], 0
            while not episodes:  # once, unless the simulators lose every single episode
                attempts += 1
                if attempts > 5:
                    raise RuntimeError(
                        "all episodes were lost to simulator faults five times in a row"
                    )
                for played in empo2.rollout(
                    policy, simulators, jobs, tips, novelty, embed, s, rng, envs.EnvFault, clock
                ):
                    if s.memory_prob:
                        empo2.write_tips(policy, played, tips, embed, s, clock)
                    episodes += played
            try:
                learnt = (
                    empo2.update(policy, optimizer, episodes, s, rng, clock)
                    if s.learning_rate
                    else {}
                )
            except empo2.NotFinite as error:
                keep_evidence(run_dir, iteration, policy, s, error)
                raise
            # -------------------
            metrics = {
                "iteration": iteration,
                **rollout_metrics(episodes, attempts * len(jobs), tips, novelty),
                **learnt,
                **clock.split(),
            }
            append(run_dir / "metrics.jsonl", [metrics])
            trackers.log({k: v for k, v in metrics.items() if v is not None}, step=iteration)
            append(
                run_dir / "episodes.jsonl",
                [transcript(iteration, e, s.intrinsic_coef) for e in episodes],
            )
            bar.update()
            shown |= {
                "score": f"{metrics['score']:.1f}",
                "best": f"{metrics['score_best']:.0f}",
                "tips": len(tips),
                "kl": f"{metrics.get('approx_kl', 0):.4f}",
            }
            bar.set_postfix(shown)
    trackers.end_training()
    return iteration


# --- The record -------------------------------------------------------------------------------------------------
def rollout_metrics(episodes, jobs, tips, novelty):
    turns = [turn for e in episodes for turn in e.turns]
    with_tips = [turn for turn in turns if turn.tips]
    scores = [e.score for e in episodes]
    return {
        "score": float(np.mean(scores)),
        "score_best": max(scores),
        "score_std": float(np.std(scores)),
        "success": float(np.mean([score == 100 for score in scores])),
        "intrinsic": float(np.mean([sum(t.novelty for t in e.turns) for e in episodes])),
        "episodes": len(episodes),
        "episodes_dropped": jobs - len(episodes),
        "turns": len(turns),
        "context_full": sum(e.ended == "context full" for e in episodes),
        "memory_turns": len(with_tips),
        "tips_per_memory_turn": float(np.mean([len(t.texts["tips"]) for t in with_tips]))
        if with_tips
        else 0.0,
        "tips_left_out": sum(t.texts["tips_left_out"] for t in turns),
        "actions_cut": sum(t.texts["cut"] for t in turns),
        "tips_cut": sum(e.tip_cut for e in episodes),
        "memory_size": len(tips),
        "distinct_states": len(novelty),
        "score_with_memory": mean_or_none(
            [e.score for e in episodes if any(t.tips for t in e.turns)]
        ),
        "score_without_memory": mean_or_none(
            [e.score for e in episodes if not any(t.tips for t in e.turns)]
        ),
        "offpolicy_turns": sum(t.offpolicy for t in with_tips),
        "onpolicy_memory_turns": sum(not t.offpolicy for t in with_tips),
    }


def mean_or_none(values):
    return float(np.mean(values)) if values else None


def transcript(iteration, e, intrinsic_coef):
    return {
        "iteration": iteration,
        "task": e.task,
        "variation": e.variation,
        "group": e.group,
        "score": e.score,
        "advantage": round(e.advantage, 4),
        "return": round(empo2.intrinsic_return(e, intrinsic_coef), 4),
        "ended": e.ended,
        "tip": e.tip,
        "tip_cut": e.tip_cut,
        "task_text": e.task_text,
        "turns": [
            {
                **turn.texts,
                "reward": turn.reward,
                "intrinsic": round(turn.novelty, 4),
                "tokens": len(turn.action),
                "mode": "memory" if turn.tips else "plain",
                "update": "off-policy" if turn.offpolicy else "on-policy",
            }
            for turn in e.turns
        ],
    }


def log_evaluation(policy, simulators, pool, iteration, s, run_dir, bar):
    """Evaluate tip-free and add a line to evals.jsonl: five figures per task, their means over tasks, seconds it took,
    and the episodes and seconds of training so far. Each evaluation has its own seed, also after a resume."""
    since = time.perf_counter()
    seed = int(np.random.default_rng([s.seed, iteration, 1]).integers(2**62))
    table, _, dropped = evaluation.evaluate(
        policy,
        simulators,
        pool,
        s.eval_episodes,
        s.eval_temperature,
        s,
        seed,
        envs.EnvFault,
        lambda phase, text: bar.set_description(f"EMPO² evaluation: {text}"),
    )
    past = [json.loads(line) for line in open(run_dir / "metrics.jsonl")] if iteration else []
    result = {
        "iteration": iteration,
        "score": float(np.mean([row["mean"] for row in table.values()])),
        "success": float(np.mean([row["share_100"] for row in table.values()])),
        "tasks": table,
        "episodes_dropped": dropped,
        "training_episodes": sum(m["episodes"] for m in past),
        "seconds_training": round(
            sum(v for m in past for k, v in m.items() if k.startswith("seconds_")), 2
        ),
        "seconds": round(time.perf_counter() - since, 2),
    }
    append(run_dir / "evals.jsonl", [result])
    return result


class Clock:
    """Seconds spent in each phase; called with (phase, text), it shows both in the progress bar."""

    def __init__(self, bar):
        self.bar, self.seconds, self.phase, self.since = bar, {}, "", time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, phase, text=""):
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0) + now - self.since
        self.phase, self.since = phase, now
        self.bar.set_description(f"EMPO² {phase}: {text}" if phase else "EMPO²")

    def split(self):
        self("")
        peak = (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return {f"seconds_{phase}": round(t, 2) for phase, t in self.seconds.items() if phase} | {
            "peak_memory_gb": round(peak / 1e9, 3)
        }


def append(path, records):
    with open(
        path, "r+", encoding="utf-8"
    ) as file:  # not "a": a file that was removed shall be missed
        file.seek(0, os.SEEK_END)
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def keep_evidence(run_dir, iteration, policy, s, error):
    """What reproduces a loss or gradient that is not finite: the adapter of that moment, the rows of that
    micro-batch, and their episodes for `python view.py RUN/nonfinite-N`. To reproduce it:

        s = train.read_settings(run_dir)
        policy = train.load_policy(s, run_dir / "nonfinite-N")
        rows = [empo2.Row(**row) for row in json.loads((run_dir / "nonfinite-N/rows.json").read_text())]
        empo2.accumulate_gradient(policy, rows, s)  # its loss or grad_norm is not finite
    """
    folder = run_dir / f"nonfinite-{iteration}"
    error.args = (f"iteration {iteration}: {error}; its episodes are in {folder}",)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    policy.save(folder)
    (folder / "rows.json").write_text(json.dumps([dataclasses.asdict(row) for row in error.rows]))
    (folder / "episodes.jsonl").touch()
    append(
        folder / "episodes.jsonl",
        [transcript(iteration, e, s.intrinsic_coef) for e in error.episodes],
    )


# --- Command line -----------------------------------------------------------------------------------------------
def names(argv):
    """The settings that a command line gives."""
    return {a.lstrip("-").split("=")[0].replace("-", "_") for a in argv if a.startswith("--")}


def parse(argv):
    """(settings, run directory, checkpoint to start from, lines of what was decided) from the command line, where a
    setting goes before the preset; on --resume from the run, which may only be made longer."""
    parser = HfArgumentParser(
        Settings,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    s, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        close = difflib.get_close_matches(
            unknown[0], list(parser._option_string_actions), cutoff=0.75
        )
        raise ValueError(
            f"unknown setting {unknown[0]}; "
            + (f"did you mean {close[0]}?" if close else "see --help")
        )
    given = names(argv)
    preset = {name: value for name, value in PRESETS[s.preset].items() if name not in given}
    s, reasons = hardware_defaults(dataclasses.replace(s, **preset))
    notes = [f"preset {s.preset}:"] * bool(PRESETS[s.preset]) + [
        f"  {name} = {value}"
        if getattr(s, name) == value
        else f"  {name} is not {value}: it was given as {getattr(s, name)}"
        for name, value in PRESETS[s.preset].items()
    ]
    notes += ["decided by the hardware:", *reasons] if reasons else []
    run_dir = Path(s.run_dir)
    if not s.resume:
        if run_dir.exists() and {path.name for path in run_dir.iterdir()} - {
            "settings.tmp",
            "error.log",
        }:
            raise ValueError(
                f"{run_dir} exists; --resume continues it, --run_dir NAME starts another run"
            )
        return s, run_dir, None, notes
    saved = read_settings(run_dir)
    free = {name: getattr(s, name) for name in given & {"iterations", *RESUMABLE}}
    changed = sorted(
        n
        for n in given - {"resume", "run_dir", *free}
        if getattr(s, n, None) != getattr(saved, n, None)
    )
    if changed:
        raise ValueError(
            f"--resume continues with the run's own settings; {', '.join(changed)} cannot change"
        )
    start, notes = (checkpoints(run_dir) or [None])[-1], []
    s = dataclasses.replace(saved, resume=True, run_dir=str(run_dir), **free)
    if start is not None:
        before = verify(run_dir / f"checkpoint-{start}", saved)["settings"]
        notes = [
            f"since checkpoint-{start}: {name} = {getattr(s, name)}, it was {before[name]}"
            for name in ("iterations", *RESUMABLE)
            if getattr(s, name) != before[name]
        ]
    elif any((run_dir / log).exists() and (run_dir / log).stat().st_size for log in LOGS):
        raise ValueError(f"{run_dir} has no checkpoint; nothing to resume")
    if s.iterations < (start or 0):
        raise ValueError(
            f"{run_dir} has {start} iterations already; --iterations can only make it longer"
        )
    return s, run_dir, start, notes


def finish_on_interrupt():
    """A list that becomes non-empty on Ctrl-C, so that the running iteration can finish; a second one stops now."""
    pressed = []

    def handler(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)
        tqdm.write(
            "Ctrl-C: finishing this iteration, then saving. Again to stop now (this iteration is lost)."
        )

    signal.signal(signal.SIGINT, handler)
    return pressed


def main(argv=None):
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run_dir = None
    try:
        s, run_dir, start, notes = parse(sys.argv[1:] if argv is None else argv)
        if notes:
            print(*notes, sep="\n")
        done = train(s, run_dir, start)
        print(
            f"{done} of {s.iterations} iterations are in {run_dir}; python eval.py {run_dir} evaluates it"
        )
    except KeyboardInterrupt:
        print(
            f"\nstopped; continue with: python train.py --resume --run_dir {run_dir}",
            file=sys.stderr,
        )
        return 130
    except torch.OutOfMemoryError:
        print(
            "train.py: out of GPU memory; lower --micro_tokens (update) or --rollout_batch (rollout), or use "
            f"--load_in_4bit, then: python train.py --resume --run_dir {run_dir}",
            file=sys.stderr,
        )
        return 1
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        with suppress(OSError):  # for what nobody foresaw; the disk may be full
            if run_dir and run_dir.exists():
                (run_dir / "error.log").write_text(traceback.format_exc())
        return 2
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
