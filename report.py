"""The report of a sweep: summary.md, curves.png and results.json, from what its runs have left so far.

Tip-free success and score are those of a run's last three evaluations (--eval-every), on the test variations.
`python sweep.py --out OUT --report` writes it at any time.
"""
import itertools
import json

import numpy as np
from matplotlib.figure import Figure


def records(path):
    """The whole lines of a JSON-lines file: it may be growing, or have been cut in a line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def progress_of(run_dir):
    """(settings or None, evaluations, is it finished?) of a cell's run."""
    if not (run_dir / "settings.json").exists():
        return None, [], False
    s, evals = json.loads((run_dir / "settings.json").read_text()), records(run_dir / "evals.jsonl")
    return s, evals, bool(evals) and evals[-1]["iteration"] == s["iterations"]  # the last thing that a run writes


def measure(run_dir, task):
    """Numbers of a run for one of its tasks: success in 0...1, score in -100...100; minutes, training episodes and how
    many of them were solved are of the whole run."""
    s, evals, finished = progress_of(run_dir)
    metrics = records(run_dir / "metrics.jsonl")
    curve = [{"iteration": e["iteration"], "episodes": e["training_episodes"], "success": e["tasks"][task]["share_100"],
              "score": e["tasks"][task]["mean"]} for e in evals if task in e["tasks"]]
    seconds = sum(v for m in metrics for k, v in m.items() if k.startswith("seconds_"))
    seconds += sum(e["seconds"] for e in evals)
    return {"state": "missing" if s is None else "finished" if finished else f"{len(metrics)} of {s['iterations']}",
            **{name: float(np.mean([p[name] for p in curve[-3:]])) if curve else None for name in ("success", "score")},
            "minutes": round(seconds / 60, 2), "episodes": sum(m["episodes"] for m in metrics),
            "solved": round(sum(m["success"] * m["episodes"] for m in metrics)), "curve": curve}


def mean_of_tasks(cells):
    """The same numbers as means over tasks, at the evaluations that all of them have."""
    curves = [{p["iteration"]: p for p in cell["curve"]} for cell in cells]
    curve = [{name: float(np.mean([c[i][name] for c in curves])) for name in curves[0][i]}
             for i in sorted(set.intersection(*map(set, curves)))]
    states = {cell["state"] for cell in cells}
    return {"state": states.pop() if len(states) == 1 else "missing" if "missing" in states else "unfinished",
            **{name: float(np.mean([cell[name] for cell in cells])) if curve else None
               for name in ("success", "score", "minutes", "episodes", "solved")}, "curve": curve}


def report(out, sweep):
    """Write summary.md, curves.png and results.json from what the cells have left so far."""
    tasks, presets, seeds = sweep["tasks"], sweep["presets"], sweep["seeds"]
    home = "together" if sweep["settings"]["together"] else ""
    results = {task: {p: {str(s): measure(out / (home or task) / p / str(s), task) for s in seeds} for p in presets}
               for task in tasks}
    if len(tasks) > 1:
        results = {f"mean of {len(tasks)} tasks": {
            p: {str(s): mean_of_tasks([results[task][p][str(s)] for task in tasks]) for s in seeds} for p in presets}
        } | results
    (out / "results.json").write_text(json.dumps(
        {"runs": sweep["runs"], "settings": sweep["settings"], "failed": sweep["failed"], "tasks": results}, indent=1))
    lines = ["# Tip-free success (mean of the last three evaluations)", ""]
    for task, rows in results.items():
        columns = ["preset", *(f"seed {s}" for s in seeds), "mean", "max - min", "mean score", "minutes per run",
                   "episodes per run", "of them solved"]
        lines += [f"## {task}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for preset, row in rows.items():
            shown = ["missing" if c["success"] is None else f"{c['success']:.3f}" if c["state"] == "finished" else
                     f"{c['success']:.3f} ({c['state']})" for c in row.values()]
            there = [c for c in row.values() if c["state"] == "finished"]
            success, score, minutes, episodes, solved = (
                [c[name] for c in there] for name in ("success", "score", "minutes", "episodes", "solved"))
            shown += [f"{np.mean(success):.3f}", f"{max(success) - min(success):.3f}", f"{np.mean(score):.1f}",
                      f"{np.mean(minutes):.1f}", f"{np.mean(episodes):.0f}", f"{np.mean(solved):.0f}"] if there else [
                      "missing"] * 6
            if len(there) < len(row):
                shown[len(row)] += f" ({len(there)} of {len(row)} seeds)"
            lines.append(f"| {preset} | {' | '.join(shown)} |")
        lines.append("")
    lines += [f"- {name} failed with {why}" for name, why in sweep["failed"].items()]
    lines += ["", "Run with " + "; ".join(", ".join(f"`{value}`" if key == "command" else f"{key} {value}"
                                                    for key, value in run.items()) for run in sweep["runs"]) + ".", "",
              "Means are over finished runs.", ""]
    (out / "summary.md").write_text("\n".join(lines))
    draw(out / "curves.png", results, "score" if sweep["settings"]["env"] == "scienceworld" else "success")


def draw(path, results, what):
    """A panel per task: the mean over seeds of each preset, shaded from the lowest to the highest seed."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (task, table) in itertools.zip_longest(panels, results.items(), fillvalue=("", {})):
        for preset, row in table.items():
            curves = [{p["iteration"]: p for p in cell["curve"]} for cell in row.values()]
            points = [[c[i] for c in curves if i in c] for i in sorted(set().union(*curves))]  # of each evaluation
            x = [np.mean([p["episodes"] for p in seeds]) for seeds in points]
            y = [[p[what] for p in seeds] for seeds in points]
            finished = sum(cell["state"] == "finished" for cell in row.values())
            label = preset if finished == len(row) else f"{preset} ({finished} of {len(row)} seeds finished)"
            line, = panel.plot(x, [np.mean(v) for v in y], marker=".", label=label)
            panel.fill_between(x, [min(v) for v in y], [max(v) for v in y], alpha=0.2, color=line.get_color())
        panel.set(title=task, xlabel="training episodes", ylabel=f"tip-free {what}", visible=bool(table))
        if what == "success":
            panel.set_ylim(-0.03, 1.03)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
