"""What a run shows of an iteration: progress, seconds, trackers."""

import resource
import sys
import time
import uuid

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from tqdm import tqdm

from engine import processes
from engine.errors import UNKNOWN, unknown


class Display:
    """Progress bar and trackers of a run. Says once why three iterations taught nothing."""

    def __init__(self, s, start, trackers):
        self.s = s
        self.trackers = trackers
        self.shown = {"score": None, "best": None, "tips shown": 0}
        self.idle = 0  # iterations in a row that taught nothing
        self.bar = tqdm(
            total=s.iterations,
            initial=start,
            dynamic_ncols=True,
            disable=processes.rank > 0 or None,  # None: where the output is no terminal
            bar_format="{desc} {n}/{total} [{elapsed}<{remaining}]{postfix}",
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def evaluation(self, result):
        """Show a line of evals.jsonl."""
        for name in ("score", "success"):
            self.trackers.log({f"eval_{name}": result[name]}, step=result["iteration"])
        self.shown["eval"] = f"{result['score']:.1f}, {result['success']:.0%} solved"
        self.bar.set_postfix(self.shown)

    def iteration(self, episodes, metrics):
        """Show a line of metrics.jsonl."""
        known = {name: value for name, value in metrics.items() if value is not None}
        self.trackers.log(known, step=metrics["iteration"])
        if self.idle < 3:
            self.idle = self.idle + 1 if metrics.get("zero_variance_groups") == 1 else 0
            if self.idle == 3 and processes.rank == 0:
                reason = why_idle(episodes, self.s)
                tqdm.write(f"3 iterations taught nothing: {reason}", file=sys.stderr)
        self.shown["score"] = f"{metrics['score']:.1f}"
        self.shown["best"] = f"{metrics['score_best']:.0f}"
        self.shown["tips shown"] = metrics["tips_shown"]
        self.bar.update()
        self.bar.set_postfix(self.shown)
        if self.bar.disable and processes.rank == 0:
            done = f"iteration {metrics['iteration'] + 1} of {self.s.iterations}"
            print(f"{done}: {self.shown}", file=sys.stderr)


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
        self.bar.set_description(f"{phase} {text}".strip())

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
