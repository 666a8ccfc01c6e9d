"""What is shown of results, and the paper's numbers to stand beside them.

The report of a sweep is summary.md, curves.png and results.json, from what its runs have left so far. Tip-free success
and score are those of a run's last three evaluations (--eval-every), on the test variations.
`python sweep.py --out OUT --report` writes it at any time.
"""

import itertools
import json

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

# Table 1 (§5): scores (-100...100), tip-free, in its order.
PAPER_COLUMNS = ("base", "Reflexion", "Retrospex", "GRPO", "EMPO²")
PAPER = {
    "chemistry-mix": (-42.0, 1.2, 20.8, 12.4, 42.7),
    "chemistry-mix-paint-secondary-color": (-33.0, 0.0, 27.8, 7.1, 33.3),
    "chemistry-mix-paint-tertiary-color": (-33.9, 36.9, 7.6, 42.6, 39.2),
    "find-animal": (-58.2, 39.5, 25.9, 72.4, 100.0),
    "find-living-thing": (-65.1, 36.6, 20.6, 68.7, 100.0),
    "find-non-living-thing": (-35.9, 4.8, 89.1, 24.7, 100.0),
    "find-plant": (-47.1, 15.1, 23.0, 46.2, 100.0),
    "identify-life-stages-1": (-48.9, 9.2, 19.0, 17.9, 36.2),
    "identify-life-stages-2": (-50.7, 33.8, 11.0, 39.5, 56.3),
    "lifespan-longest-lived": (-51.8, 44.6, 55.0, 78.2, 100.0),
    "lifespan-longest-lived-then-shortest-lived": (-56.2, 34.1, 38.0, 62.3, 100.0),
    "lifespan-shortest-lived": (-56.8, 6.1, 67.0, 20.6, 100.0),
    "power-component": (-90.0, 6.3, 8.2, 15.1, 94.3),
    "power-component-renewable-vs-nonrenewable-energy": (-85.0, 11.7, 10.0, 24.6, 92.6),
    "test-conductivity": (-86.9, 13.2, 60.0, 27.8, 89.5),
    "test-conductivity-of-unknown-substances": (-81.7, 2.6, 65.5, 9.5, 71.4),
    "measure-melting-point-known-substance": (-97.5, 11.4, 26.5, 19.8, 27.6),
    "use-thermometer": (-83.7, 0.9, 32.5, 7.6, 82.7),
}
# §6.1: new task: (the task it was trained on, best trial of EMPO², best trial of GRPO)
PAPER_OOD = {
    "lifespan-shortest-lived": ("identify-life-stages-2", 32.3, -6.2),
    "test-conductivity": ("lifespan-longest-lived", 88.1, 22.5),
    "chemistry-mix-paint-secondary-color": ("power-component", 18.9, -21.4),
}
COLOURS = (
    colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]
)  # as many as there are presets


def table(columns, rows):
    """Lines of a Markdown table of {name: numbers}, None = missing.

    If a name is one of the paper's tasks, all of those stand in the order of Table 1 beside its numbers, and the means
    are over the rows that we have.
    """
    beside = not PAPER.keys().isdisjoint(rows)
    names = [*PAPER, *(name for name in rows if name not in PAPER)] if beside else list(rows)
    lines = {
        name: [
            *rows.get(name, [None] * len(columns)),
            *(PAPER.get(name, "-" * len(PAPER_COLUMNS)) if beside else ()),
        ]
        for name in names
    }
    have = (
        [lines[name] for name in names if name in PAPER and None not in lines[name]]
        if beside
        else []
    )
    if have:
        lines[f"mean of {len(have)} rows"] = [
            float(np.mean(values)) if isinstance(values[0], float) else "" for values in zip(*have)
        ]
    cells = [["task", *columns, *(f"paper: {name}" for name in PAPER_COLUMNS * beside)]] + [
        [
            name,
            *(
                "missing" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)
                for v in values
            ),
        ]
        for name, values in lines.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in cells
    ]


def draw_trials(path, parts):
    """The score of each trial, a line per task."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for task in dict.fromkeys(part["task"] for part in parts):
        mine = [part for part in parts if part["task"] == task]
        axes.plot(
            [part["trial"] for part in mine],
            [part["mean"] for part in mine],
            marker=".",
            label=task,
        )
    axes.set(xlabel="trial (0 = without memory)", ylabel="mean score")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_scores(path, parts):
    """The score of each task, beside the paper's GRPO and EMPO²."""
    tasks = [part["task"] for part in parts]
    known = [task for task in tasks if task in PAPER]
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    axes.barh(tasks, [part["mean"] for part in parts], color="lightgrey", label="here")
    for column, mark in ((3, "x"), (4, "o")) if known else ():
        axes.plot(
            [PAPER[task][column] for task in known],
            known,
            mark,
            label=f"paper: {PAPER_COLUMNS[column]}",
        )
    axes.set(xlabel="mean score", xlim=(-105, 105), ylim=(len(tasks) - 0.5, -0.5))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def records(path):
    """The whole lines of a JSON-lines file: it may be growing, or have been cut in a line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def progress_of(run_dir):
    """(settings or None, evaluations, is it finished?) of a cell's run."""
    if not (run_dir / "settings.json").exists():
        return None, [], False
    s, evals = json.loads((run_dir / "settings.json").read_text()), records(run_dir / "evals.jsonl")
    return (
        s,
        evals,
        bool(evals) and evals[-1]["iteration"] == s["iterations"],
    )  # the last thing that a run writes


def measure(run_dir, task):
    """Numbers of a run for one of its tasks: success in 0...1, score in -100...100; minutes, training episodes and how
    many of them were solved are of the whole run."""
    s, evals, finished = progress_of(run_dir)
    metrics = records(run_dir / "metrics.jsonl")
    curve = [
        {
            "iteration": e["iteration"],
            "episodes": e["training_episodes"],
            "success": e["tasks"][task]["share_100"],
            "score": e["tasks"][task]["mean"],
        }
        for e in evals
        if task in e["tasks"]
    ]
    seconds = sum(v for m in metrics for k, v in m.items() if k.startswith("seconds_"))
    seconds += sum(e["seconds"] for e in evals)
    return {
        "state": "missing"
        if s is None
        else "finished"
        if finished
        else f"{len(metrics)} of {s['iterations']}",
        **{
            name: float(np.mean([p[name] for p in curve[-3:]])) if curve else None
            for name in ("success", "score")
        },
        "minutes": round(seconds / 60, 2),
        "episodes": sum(m["episodes"] for m in metrics),
        "solved": round(sum(m["success"] * m["episodes"] for m in metrics)),
        "curve": curve,
    }


def mean_of_tasks(cells):
    """The same numbers as means over tasks, at the evaluations that all of them have."""
    curves = [{p["iteration"]: p for p in cell["curve"]} for cell in cells]
    curve = [
        {name: float(np.mean([c[i][name] for c in curves])) for name in curves[0][i]}
        for i in sorted(set.intersection(*map(set, curves)))
    ]
    states = {cell["state"] for cell in cells}
    return {
        "state": states.pop()
        if len(states) == 1
        else "missing"
        if "missing" in states
        else "unfinished",
        **{
            name: float(np.mean([cell[name] for cell in cells])) if curve else None
            for name in ("success", "score", "minutes", "episodes", "solved")
        },
        "curve": curve,
    }


def last_score(cells):
    """Mean over the finished ones of a preset's cells {seed: cell}, or None."""
    scores = [cell["curve"][-1]["score"] for cell in cells.values() if cell["state"] == "finished"]
    return float(np.mean(scores)) if scores else None


def report(out, sweep):
    """Write summary.md, curves.png and results.json from what the cells have left so far."""
    tasks, presets, seeds = sweep["tasks"], sweep["presets"], sweep["seeds"]
    home = "together" if sweep["settings"]["together"] else ""
    results = {
        task: {
            p: {str(s): measure(out / (home or task) / p / str(s), task) for s in seeds}
            for p in presets
        }
        for task in tasks
    }
    if len(tasks) > 1:
        results = {
            f"mean of {len(tasks)} tasks": {
                p: {
                    str(s): mean_of_tasks([results[task][p][str(s)] for task in tasks])
                    for s in seeds
                }
                for p in presets
            }
        } | results
    (out / "results.json").write_text(
        json.dumps(
            {
                "runs": sweep["runs"],
                "settings": sweep["settings"],
                "failed": sweep["failed"],
                "tasks": results,
            },
            indent=1,
        )
    )
    lines = ["# Tip-free success (mean of the last three evaluations)", ""]
    for task, rows in results.items():
        columns = [
            "preset",
            *(f"seed {s}" for s in seeds),
            "mean",
            "max - min",
            "mean score",
            "minutes per run",
            "episodes per run",
            "of them solved",
        ]
        lines += [f"## {task}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for preset, row in rows.items():
            shown = [
                c["state"]
                if c["state"] == "missing"
                else "no evaluation"
                if c["success"] is None
                else f"{c['success']:.3f}"
                for c in row.values()
            ]
            shown = [
                text + f" ({c['state']})" * (c["state"] not in ("missing", "finished"))
                for text, c in zip(shown, row.values())
            ]
            there = [c for c in row.values() if c["state"] == "finished"]
            success, score, minutes, episodes, solved = (
                [c[name] for c in there]
                for name in ("success", "score", "minutes", "episodes", "solved")
            )
            shown += (
                [
                    f"{np.mean(success):.3f}",
                    f"{max(success) - min(success):.3f}",
                    f"{np.mean(score):.1f}",
                    f"{np.mean(minutes):.1f}",
                    f"{np.mean(episodes):.0f}",
                    f"{np.mean(solved):.0f}",
                ]
                if there
                else ["missing"] * 6
            )
            if len(there) < len(row):
                shown[len(row)] += f" ({len(there)} of {len(row)} seeds)"
            lines.append(f"| {preset} | {' | '.join(shown)} |")
        lines.append("")
    s, scores = (
        sweep["settings"],
        {task: [last_score(row) for row in results[task].values()] for task in tasks},
    )
    if not PAPER.keys().isdisjoint(tasks):
        limits = (
            s["step_limit"]
            or "the paper's (30; chemistry-mix 60, measure-melting-point-known-substance 100)"
        )
        lines += [
            "## Beside the paper's Table 1",
            "",
            "Score of the last evaluation of finished runs, tip-free: first "
            f"{s['eval_variations']} test variations x {s['eval_episodes']} episodes, temperature "
            f"{s['eval_temperature']}, step limits: {limits}, seeds: {', '.join(map(str, seeds))}.",
            "",
            *table(presets, scores),
            "",
        ]
    if "reflexion" in presets:
        lines += [
            "Reflexion is tips and no learning: with them it scores `score_with_memory` (in its metrics.jsonl), and "
            "trial by trial `python eval.py --protocol ood`; here it is evaluated without.",
            "",
        ]
    lines += [f"- {name} failed with {why}" for name, why in sweep["failed"].items()]
    lines += [
        "",
        "Run with "
        + "; ".join(
            ", ".join(
                f"`{value}`" if key == "command" else f"{key} {value}" for key, value in run.items()
            )
            for run in sweep["runs"]
        )
        + ".",
        "",
        "Means are over finished runs.",
        "",
    ]
    (out / "summary.md").write_text("\n".join(lines))
    draw(
        out / "curves.png",
        results,
        "score" if sweep["settings"]["env"] == "scienceworld" else "success",
    )


def draw(path, results, what):
    """A panel per task: the mean over seeds of each preset, shaded from the lowest to the highest seed."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    most = max(map(len, results.values()))
    figure = Figure(figsize=(5 * columns + 2, max(3.6 * rows, 0.25 * most)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (task, table) in itertools.zip_longest(panels, results.items(), fillvalue=("", {})):
        panel.set_prop_cycle(color=COLOURS)
        for style, (preset, row) in zip(
            itertools.cycle(("-", "--", ":", "-.")), table.items()
        ):  # a hidden line shows
            curves = [{p["iteration"]: p for p in cell["curve"]} for cell in row.values()]
            points = [
                [c[i] for c in curves if i in c] for i in sorted(set().union(*curves))
            ]  # of each evaluation
            x = [np.mean([p["episodes"] for p in seeds]) for seeds in points]
            y = [[p[what] for p in seeds] for seeds in points]
            finished = sum(cell["state"] == "finished" for cell in row.values())
            label = (
                preset
                if finished == len(row)
                else f"{preset} ({finished} of {len(row)} seeds finished)"
            )
            (line,) = panel.plot(
                x, [np.mean(v) for v in y], marker=".", linestyle=style, label=label
            )
            panel.fill_between(
                x,
                [min(v) for v in y],
                [max(v) for v in y],
                color=line.get_color(),
                alpha=0.2 if len(table) < 5 else 0.05,
            )
        panel.set(
            title=task, xlabel="training episodes", ylabel=f"tip-free {what}", visible=bool(table)
        )
        if what == "success":
            panel.set_ylim(-0.03, 1.03)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
    )
    figure.savefig(path, dpi=120)
