"""The report of a sweep: tables and pictures of its runs, beside the paper's.

`python -m experiments.sweep laptop --report` writes a sweep's report at any time, from what its
runs have left so far: summary.md, curves.png and results.json. For runs that no sweep made:

  python -m experiments.report runs/a runs/b --made-by "COMMAND, commit abc1234" --out FILE.json
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from engine import paper, runs
from engine.tables import markdown, table
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
        settings = json.loads((run_dir / "settings.json").read_text())
    except (OSError, ValueError):  # lost or damaged: resuming the run writes it again
        return False
    return evals[-1]["iteration"] == settings["iterations"]


def cell(state, curve, costs):
    """The paper's five figures are of the last three evaluations, never untrained."""
    last = [point for point in curve if point["iteration"] > 0][-3:]
    figures = {name: mean(point[name] for point in last) for name in FIGURES}
    return {"state": state, **figures, **costs, "curve": curve}


def measure(run_dir, task):
    """The cell of a run and one of its tasks; what it cost is that of the whole run."""
    evals = runs.records(run_dir / "evals.jsonl")
    metrics = runs.records(run_dir / "metrics.jsonl")
    state = f"{len(metrics)} iterations" if metrics else "missing"
    if finished(run_dir):
        state = "finished"
    curve = []
    for line in evals:
        if task not in line["tasks"]:  # simulator faults lost all its episodes
            continue
        figures = line["tasks"][task]
        point = {"iteration": line["iteration"], "episodes": line["training_episodes"]}
        curve.append(point | {name: figures[key] for name, key in FIGURES.items()})
    seconds = sum(line["seconds"] for line in evals)
    if evals:
        seconds += evals[-1]["seconds_training"]
    costs = {
        "iterations": len(metrics),
        "minutes": round(seconds / 60, 2),
        "episodes": sum(line["episodes"] for line in metrics),
        "solved": round(sum(line["success"] * line["episodes"] for line in metrics)),
    }
    return cell(state, curve, costs)


def mean_over_tasks(cells):
    """One cell from those of several tasks, at the evaluations that all of them have."""
    curves = [{point["iteration"]: point for point in one["curve"]} for one in cells]
    curve = []
    for iteration in curves[0]:
        if all(iteration in other for other in curves):
            points = [other[iteration] for other in curves]
            curve.append({name: mean(point[name] for point in points) for name in points[0]})
    states = {one["state"] for one in cells}
    state = states.pop() if len(states) == 1 else "unfinished"
    names = ("iterations", "minutes", "episodes", "solved")
    costs = {name: mean(one[name] for one in cells) for name in names}
    return cell(state, curve, costs)


def measure_all(out, sweep):
    """{task: {preset: {seed: cell}}}, with several tasks their mean first."""
    results = {}
    for task in sweep["tasks"]:
        folder = out / ("together" if sweep["settings"]["together"] else task)
        for preset in sweep["presets"]:
            row = {str(seed): measure(folder / preset / str(seed), task) for seed in sweep["seeds"]}
            results.setdefault(task, {})[preset] = row
    if len(results) == 1:
        return results
    means = {preset: {} for preset in sweep["presets"]}
    for preset in sweep["presets"]:
        for seed in map(str, sweep["seeds"]):
            of_tasks = [results[task][preset][seed] for task in sweep["tasks"]]
            means[preset][seed] = mean_over_tasks(of_tasks)
    return {f"mean of {len(results)} tasks": means} | results


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
    seeds = ", ".join(map(str, sweep["seeds"]))
    title = f"{settings['model']} in {settings['env']}, seeds {seeds}"
    lines = SUMMARY.format(title=title, what=what).splitlines()
    head = ["preset", *(f"seed {seed}" for seed in sweep["seeds"]), "mean", "max - min"]
    head += ["mean score", "clipped", "best", "at -100"]
    head += ["minutes per run", "episodes per run", "of them solved"]
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
        return row + ["missing"] * 9
    success = [one["success"] for one in done]
    seeds = "" if len(done) == len(cells) else f" ({len(done)} of {len(cells)} seeds)"
    row += [f"{mean(success):.3f}{seeds}", f"{max(success) - min(success):.3f}"]
    for name, form in (
        ("score", ".1f"),
        ("clipped", ".1f"),
        ("best", ".1f"),
        ("minus_100", ".2f"),
        ("minutes", ".1f"),
        ("episodes", ".0f"),
        ("solved", ".0f"),
    ):
        row.append(format(mean(one[name] for one in done), form))
    return row


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


def draw_curves(path, results, what, title):
    """A panel per preset, all with the same axes, so that coinciding curves are told apart."""
    overall, *tasks = results
    columns = min(3, len(results[overall]))
    rows = math.ceil(len(results[overall]) / columns)
    figure = Figure(figsize=(3 * columns + 1, 2.2 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(results[overall]) :]:
        panel.set_visible(False)
    for panel, (preset, row) in zip(panels, results[overall].items(), strict=False):
        for task in tasks:
            row_of_task = results[task][preset]
            episodes = map(mean, of_seeds(row_of_task, "episodes"))
            scores = map(mean, of_seeds(row_of_task, what))
            panel.plot(list(episodes), list(scores), color="grey", linewidth=0.6)
        episodes = list(map(mean, of_seeds(row, "episodes")))
        values = of_seeds(row, what)
        panel.plot(episodes, list(map(mean, values)), marker=".", clip_on=False)
        panel.fill_between(episodes, list(map(min, values)), list(map(max, values)), alpha=0.25)
        done = sum(one["state"] == "finished" for one in row.values())
        seeds = "" if done == len(row) else f" ({done} of {len(row)} seeds)"
        panel.set_title(preset + seeds, fontsize="small")
    panels[0].set_ylim((0, 1) if what == "success" else (-100, 100))
    figure.suptitle(title)
    figure.supxlabel("training episodes")
    figure.supylabel(f"tip-free {what}")
    figure.savefig(path, dpi=120)


# --- Runs that no sweep made ---
def record(run_dirs, made_by):
    """What results.json has, of runs that differ in their seed alone. ValueError if they do not."""
    own = ("seed", "run_dir", "resume", "iterations", *runs.RESUMABLE)
    shared, tasks = [], {}
    for run_dir in run_dirs:
        if not finished(run_dir):
            raise ValueError(f"{run_dir}: no finished run here")
        settings = json.loads((run_dir / "settings.json").read_text())
        for task in settings["tasks"]:
            row = tasks.setdefault(task, {}).setdefault(settings["preset"], {})
            row[str(settings["seed"])] = measure(run_dir, task)
        shared.append({name: settings[name] for name in settings if name not in own})
        if shared[-1] != shared[0]:
            raise ValueError(f"{run_dir}: its settings are not those of {run_dirs[0]}")
    return {"made_by": made_by, "settings": shared[0], "tasks": tasks}


def main(argv=None):
    """Record runs in a JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, help="finished runs, a seed each")
    parser.add_argument("--made-by", required=True, help="the command and commit that made them")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    try:
        content = record(args.run_dirs, args.made_by)
        args.out.write_text(json.dumps(content, indent=1))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
