"""What a run shows of an iteration: progress, the picture, seconds, trackers."""

import resource
import sys
import time
import uuid
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from tqdm import tqdm

from engine import processes
from engine.errors import UNKNOWN, first_line, unknown
from engine.tables import draw_runs

COLUMNS = ("iteration", "tip-free", "solved", "with tips", "without tips", "tips shown", "seconds")


class Display:
    """Progress bar (lines without a terminal), curve.png and trackers of a run.

    Says once why three iterations taught nothing.
    """

    def __init__(self, s, start, trackers):
        self.s = s
        self.trackers = trackers
        self.shown = {}  # the last of each kind
        self.drawing = processes.rank == 0
        self.idle = 0  # iterations in a row that taught nothing
        self.bar = tqdm(
            total=s.iterations,
            initial=start,
            dynamic_ncols=True,
            disable=processes.rank > 0 or None,  # None: where the output is no terminal
            bar_format="{n}/{total}, {remaining} left{postfix}{desc}",
        )
        self.line(*COLUMNS)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        if error is None:
            self.draw()

    def line(self, *texts):
        """Where there is no terminal, print a line of the columns."""
        if self.bar.disable and processes.rank == 0:
            padded = (text.rjust(len(name)) for text, name in zip(texts, COLUMNS, strict=True))
            print(*padded, sep="  ", file=sys.stderr)

    def draw(self):
        """Draw curve.png from the logs; training goes on without it."""
        path = Path(self.s.run_dir) / "curve.png"
        try:
            if self.drawing:
                draw_runs(path, [path.parent])
        except Exception as error:  # a broken matplotlib may raise anything
            self.drawing = False
            said = f"{path} is not drawn, the run goes on without it: {first_line(error)}"
            tqdm.write(said, file=sys.stderr)

    def evaluation(self, result):
        """Show a line of evals.jsonl."""
        for name in ("score", "success"):
            self.trackers.log({f"eval_{name}": result[name]}, step=result["iteration"])
        score, solved = result["score"], f"{result['success']:.0%}"
        self.shown["evaluation"] = f"tip-free {rounded(score, 0)} ({solved})"
        self.bar.set_description_str(refresh=False)
        self.bar.set_postfix_str(", ".join(self.shown.values()))
        done = f"{result['iteration']}/{self.s.iterations}"
        self.line(done, rounded(score, 1), solved, "", "", "", f"{result['seconds']:.1f}")
        if result["iteration"] < self.s.iterations:  # else it is drawn at the exit
            self.draw()

    def iteration(self, episodes, metrics):
        """Show a line of metrics.jsonl."""
        known = {name: value for name, value in metrics.items() if value is not None}
        self.trackers.log(known, step=metrics["iteration"])
        if self.idle < 3:
            solved = metrics.get("success") == 1  # there is nothing left to learn
            idle = metrics.get("zero_variance_groups") == 1 and not solved
            self.idle = self.idle + 1 if idle else 0
            if self.idle == 3 and processes.rank == 0:
                reason = why_idle(episodes, self.s)
                tqdm.write(f"3 iterations taught nothing: {reason}", file=sys.stderr)
        scores = metrics["score_with_memory"], metrics["score_without_memory"]
        short, long = ([rounded(score, digits) for score in scores] for digits in (0, 1))
        tips = metrics["tips_shown"]
        self.shown["iteration"] = f"with tips {short[0]}, without {short[1]}, {tips} tips"
        self.bar.update()
        self.bar.set_postfix_str(", ".join(self.shown.values()))
        done = f"{metrics['iteration'] + 1}/{self.s.iterations}"
        seconds = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
        self.line(done, "", "", *long, str(tips), f"{seconds:.1f}")


def rounded(score, digits):
    return "-" if score is None else f"{score:z.{digits}f}"


def why_idle(episodes, s):
    """Why no episode of an iteration has an advantage."""
    answers = [turn.next_observation for episode in episodes for turn in episode.turns]
    if s.group_size == 1:
        return "--group-size 1 leaves no episode to compare with"
    if all(answer == UNKNOWN for answer in answers):
        return f"none of the last {len(answers)} actions was understood; look at what is written"
    scores = sorted({f"{episode.score:g}" for episode in episodes})
    return f"in every group all episodes returned the same (the last scores: {', '.join(scores)})"


class Clock:
    """Seconds spent in each phase; called with (phase, text), it shows both in the progress bar."""

    def __init__(self, bar):
        self.bar = bar
        self.seconds = {}
        self.phase = ""
        self.since = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __call__(self, phase, text=""):
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0) + now - self.since
        self.phase = phase
        self.since = now
        self.bar.set_description_str(f"; {phase} {text}".rstrip("; "))

    def metrics(self):
        """Seconds by phase, and the peak of memory."""
        self("")
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = {f"seconds_{phase}": round(t, 2) for phase, t in self.seconds.items()}
        return {**seconds, "peak_memory_gb": round(peak / 1e9, 3)}


def make_trackers(s, run_dir):
    """accelerate's trackers: none without --report-to."""
    if s.report_to and s.report_to not in LOGGER_TYPE_TO_CLASS:
        raise unknown("tracker", s.report_to, LOGGER_TYPE_TO_CLASS)
    trackers = Accelerator(project_dir=run_dir)
    trackers.log_with = filter_trackers(s.report_to, run_dir)
    if s.report_to and not trackers.log_with:
        raise ValueError(f"--report-to {s.report_to}: not installed; pip install {s.report_to}")
    config = {}
    for name, value in vars(s).items():
        config[name] = value if isinstance(value, (int, float)) else str(value)
    if processes.rank == 0:
        options = {"wandb": wandb_run(run_dir)} if s.report_to == "wandb" else {}
        trackers.init_trackers("empo2", config, options)
    return trackers


def wandb_run(run_dir):
    """Options of `wandb.init`: the run's own id, so that a resume goes on with it; its folder."""
    path = run_dir / "wandb-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return {"id": path.read_text(), "resume": "allow", "dir": str(run_dir)}
