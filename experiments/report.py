"""Runs beside each other: their tip-free scores in a table, their curves in a picture.

  python -m experiments.report runs/scienceworld-power-component-0 runs/mine --out curves.png

The picture is as each run's own curve.png, with a colour for each run.

A sweep has a report of its own, which sweep.py writes whenever a run has ended, from what all runs
have left so far: summary.md, curves.png and results.json, beside the paper's numbers. Below, a
preset is what a column of the sweep is called: with --grid also empo2,memory_prob=0.4.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from engine import paper, runs
from engine.arguments import Parser
from engine.tables import DRAWN, draw_runs, markdown, new_figure, table
from settings import is_standin

# --- The cells of a sweep, as results.json has them ---
# What eval.py calls the five figures of an evaluation: success is 0...1, scores are -100...100.
FIGURES = {
    "success": "share_100",
    "score": "mean",
    "clipped": "mean_clipped",
    "best": "best_reached",
    "minus_100": "share_minus_100",
}


def mean(values):
    values = list(values)
    return float(np.mean(values)) if values else None


def finished(run_dir):
    """Is there the last thing that a run writes, the evaluation after its last iteration?"""
    evals = runs.records(run_dir / "evals.jsonl")
    if not evals:
        return False
    try:
        settings = runs.read_settings(run_dir)
    except (OSError, ValueError):  # lost or damaged: resuming the run writes it again
        return False
    return evals[-1]["iteration"] == settings["iterations"]


def minutes(metrics, evals):
    """Of training and evaluation."""
    seconds = sum(line["seconds"] for line in evals)
    for line in metrics:
        seconds += sum(value for name, value in line.items() if name.startswith("seconds_"))
    return round(seconds / 60, 2)


def cell(state, curve, costs):
    """The paper's five figures are of the last three evaluations, never untrained."""
    last = [point for point in curve if point["iteration"] > 0][-3:]
    figures = {name: mean(point[name] for point in last) for name in FIGURES}
    return {"state": state, **figures, **costs, "curve": curve}


def measure(run_dir, task):
    """The cell of a run and one of its tasks; what it cost is that of the whole run."""
    evals = runs.records(run_dir / "evals.jsonl")
    metrics = runs.records(run_dir / "metrics.jsonl")
    curve = []
    for line in evals:
        if task not in line["tasks"]:  # simulator faults lost all its episodes
            continue
        figures = line["tasks"][task]
        point = {"iteration": line["iteration"], "episodes": line["training_episodes"]}
        curve.append(point | {name: figures[key] for name, key in FIGURES.items()})
    state = f"{len(metrics)} iterations" if metrics else "missing"
    if finished(run_dir) and any(point["iteration"] for point in curve):
        state = "finished"
    costs = {
        "iterations": len(metrics),
        "minutes": minutes(metrics, evals),
        "episodes": sum(line["episodes"] for line in metrics),
        "solved": round(sum(line["success"] * line["episodes"] for line in metrics)),
    }
    return cell(state, curve, costs)


def mean_over_tasks(cells):
    """One cell from those of several tasks, at the evaluations that all of them have."""
    curves = [{point["iteration"]: point for point in one["curve"]} for one in cells]
    shared = [iteration for iteration in curves[0] if all(iteration in other for other in curves)]
    curve = [
        {name: mean(other[iteration][name] for other in curves) for name in curves[0][iteration]}
        for iteration in shared
    ]
    first, *others = {one["state"] for one in cells}
    state = "unfinished" if others else first
    names = ("iterations", "minutes", "episodes", "solved")
    costs = {name: mean(one[name] for one in cells) for name in names}
    return cell(state, curve, costs)


def measure_all(out, sweep):
    """{task: {preset: {seed: cell}}}, with several tasks their mean first."""
    tasks, seeds = sweep["tasks"], [str(seed) for seed in sweep["seeds"]]
    results = {task: {} for task in tasks}
    means = {}
    for preset in sweep["presets"]:
        for task in tasks:
            folder = out / ("together" if sweep["settings"]["together"] else task) / preset
            results[task][preset] = {seed: measure(folder / seed, task) for seed in seeds}
        means[preset] = {
            seed: mean_over_tasks([results[task][preset][seed] for task in tasks]) for seed in seeds
        }
    return results if len(tasks) == 1 else {f"mean of {len(tasks)} tasks": means} | results


# --- The report of a sweep ---
SUMMARY = """\
# Tip-free success: {title}

Success (0 to 1) and score (-100 to 100) are means of a run's last three evaluations on the test
variations, without the one before training. Means are over finished runs: of the score, of the
score clipped at 0, of the best score reached in an episode, and of the share that ends at -100.

![curves](curves.png)

A panel per preset. Line: tip-free {what}, mean over seeds (and over tasks; each of several tasks is
a thin grey line). Band: from the lowest to the highest seed; it is no confidence interval. Curves
have unfinished runs, too; "1 of 2 seeds" counts those that are finished.
"""
BESIDE = """\
## Beside the paper's Table 1

Score of the last evaluation of finished runs, tip-free: first {eval_variations} test variations x
{eval_episodes} episodes, temperature {eval_temperature}, model {model}, step limit {step_limit}
(None = the paper's).
"""


MEANS = {  # of a preset: the column's name, and how its numbers are written
    "score": ("mean score", ".1f"),
    "clipped": ("clipped", ".1f"),
    "best": ("best", ".1f"),
    "minus_100": ("at -100", ".2f"),
    "minutes": ("minutes per run", ".1f"),
    "episodes": ("episodes per run", ".0f"),
    "solved": ("of them solved", ".0f"),
}


def report(out, sweep):
    """Write summary.md, curves.png and results.json; `sweep` is what sweep.json holds."""
    settings = sweep["settings"]
    results = measure_all(out, sweep)
    content = {
        "runs": sweep["runs"],
        # A run may have been continued beyond the sweep's iterations: each cell has its own.
        "settings": {name: settings[name] for name in settings if name != "iterations"},
        "failed": sweep["failed"],
        "tasks": results,
    }
    (out / "results.json").write_text(json.dumps(content, indent=1))
    what = "score" if settings["env"] == "scienceworld" else "success"
    seeds = f"seeds {', '.join(map(str, sweep['seeds']))}"
    if len(sweep["seeds"]) > 5:
        seeds = f"{len(sweep['seeds'])} seeds"  # or it would be wider than the picture
    title = f"{settings['model']} in {settings['env']}, {seeds}"
    lines = SUMMARY.format(title=title, what=what).splitlines()
    head = ["preset", *(f"seed {seed}" for seed in sweep["seeds"]), "mean", "max - min"]
    head += [name for name, _ in MEANS.values()]
    for task, rows in results.items():
        summary_rows = [summary_row(preset, list(row.values())) for preset, row in rows.items()]
        lines += ["", f"## {task}", "", *markdown([head, *summary_rows])]
    # The score of a stand-in for a language model says nothing about the paper's.
    if not is_standin(settings["model"]) and not paper.TABLE_1.keys().isdisjoint(sweep["tasks"]):
        scores = {task: map(last_score, results[task].values()) for task in sweep["tasks"]}
        lines += ["", *BESIDE.format(**settings).splitlines(), "", *table(sweep["presets"], scores)]
    lines += ["", *(f"- {name} failed with {why}" for name, why in sweep["failed"].items())]
    for run in sweep["runs"]:
        rest = ", ".join(f"{name} {value}" for name, value in run.items() if name != "command")
        lines.append(f"- run with `{run['command']}`: {rest}")
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    draw_curves(out / "curves.png", results, what, title)


def summary_row(preset, cells):
    row = [preset]
    for one in cells:
        text = one["state"]
        if one["success"] is not None:
            remark = "" if text == "finished" else f" ({text})"
            text = f"{one['success']:.3f}{remark}"
        row.append(text)
    done = [one for one in cells if one["state"] == "finished"]
    if not done:
        return row + ["missing"] * (2 + len(MEANS))
    success = [one["success"] for one in done]
    row += [f"{mean(success):.3f}{of_how_many(cells)}", f"{max(success) - min(success):.3f}"]
    return row + [format(mean(one[key] for one in done), form) for key, (_, form) in MEANS.items()]


def of_how_many(cells):
    """Words for it if not all cells are finished."""
    done = sum(one["state"] == "finished" for one in cells)
    return "" if done == len(cells) else f" ({done} of {len(cells)} seeds)"


def last_score(row):
    """Mean over the finished cells of a preset, {seed: cell}; None if there are none."""
    done = [one for one in row.values() if one["state"] == "finished"]
    return mean(one["curve"][-1]["score"] for one in done)


def of_seeds(row, name):
    """At each evaluation, the values from those of a preset's cells {seed: cell} that have it."""
    values = {}
    for one in row.values():
        for point in one["curve"]:
            values.setdefault(point["iteration"], []).append(point[name])
    return [values[iteration] for iteration in sorted(values)]


def means(row, name):
    return [mean(values) for values in of_seeds(row, name)]


def draw_curves(path, results, what, title):
    """A panel per preset, all with the same axes, so that coinciding curves are told apart."""
    overall, *tasks = results
    columns = min(3, len(results[overall]))
    rows = math.ceil(len(results[overall]) / columns)
    figure = new_figure(3 * columns + 1, 2.2 * rows + 0.8)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(results[overall]) :]:
        panel.set_visible(False)
    for panel, (preset, row) in zip(panels, results[overall].items(), strict=False):
        for task in tasks:
            thin = means(results[task][preset], "episodes"), means(results[task][preset], what)
            panel.plot(*thin, color="grey", linewidth=0.6)
        episodes = means(row, "episodes")
        values = of_seeds(row, what)
        panel.plot(episodes, means(row, what), marker=".", clip_on=False)
        panel.fill_between(episodes, list(map(min, values)), list(map(max, values)), alpha=0.25)
        name = preset.replace(",", "\n")  # with --grid it may be long
        panel.set_title(name + of_how_many(row.values()), fontsize="small")
    panels[0].set_ylim((0, 1) if what == "success" else (-100, 100))
    figure.suptitle(title)
    figure.supxlabel("training episodes")
    figure.supylabel(f"tip-free {what}")
    figure.savefig(path, dpi=120)


# --- Single runs ---
def compare(folders):
    """The lines of a table of runs: what each is, its first and its last evaluation, its cost."""
    rows = [["run", "what", "tip-free score", "solved", "iterations", "minutes"]]
    for folder in folders:
        evals, metrics = (runs.records(folder / log) for log in ("evals.jsonl", "metrics.jsonl"))
        *_, method = runs.about(runs.read_settings(folder))
        ends = [evals[0], evals[-1]] if evals else []
        score = " -> ".join(f"{end['score']:.1f}" for end in ends) or "missing"
        solved = " -> ".join(f"{end['success']:.0%}" for end in ends) or "missing"
        cost = f"{minutes(metrics, evals):.1f}"
        rows.append([str(folder), method, score, solved, str(len(metrics)), cost])
    return markdown(rows)


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    parser = Parser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of train.py")
    parser.add_argument("--out", type=Path, default="curves.png", help="the picture [curves.png]")
    try:
        args = parser.parse_args(argv)
        if args.out.suffix != ".png":
            raise ValueError(f"--out {args.out}: its name must end in .png")
        if args.out.exists() and DRAWN.encode() not in args.out.read_bytes():
            raise ValueError(f"{args.out} exists, another picture; name a new one with --out")
        print(*compare(args.runs), sep="\n")
        draw_runs(args.out, args.runs)
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
