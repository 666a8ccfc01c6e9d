"""Tables and pictures of scores, beside the paper's."""

import os
import textwrap

import numpy as np

from engine import paper, runs
from settings import Settings, is_standin

# The five figures of an evaluation: scores are -100...100, shares 0...1.
FIGURES = ("mean", "mean_clipped", "best_reached", "share_100", "share_minus_100")


def markdown(rows):
    """The aligned lines of a Markdown table; `rows` are lists of strings, the first is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * width for width in widths]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return lines


def as_text(value):
    if value is None:
        return "missing"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def table(columns, rows):
    """The lines of a Markdown table of {name: numbers}, None = missing.

    If a name is one of the paper's tasks, all of those stand in the order of Table 1 beside its
    numbers, and the last line has the means over the tasks of which nothing is missing.
    """
    head = ["task", *columns]
    lines = dict(rows)
    if not paper.TABLE_1.keys().isdisjoint(rows):
        head += [f"paper: {name}" for name in paper.COLUMNS]
        missing = [None] * len(columns)
        lines = {task: [*rows.get(task, missing), *row] for task, row in paper.TABLE_1.items()}
        complete = [line for line in lines.values() if None not in line]
        for name in rows.keys() - paper.TABLE_1.keys():
            lines[name] = [*rows[name], *["-"] * len(paper.COLUMNS)]
        if complete:
            lines[f"mean of {len(complete)} rows"] = [
                float(np.mean(column)) if isinstance(column[0], float) else ""
                for column in zip(*complete, strict=True)
            ]
    return markdown([head, *([name, *map(as_text, line)] for name, line in lines.items())])


def new_figure(*size):
    """An empty figure of so many inches, which needs no display."""
    os.environ["MPLBACKEND"] = "agg"  # none is used, but matplotlib refuses names it does not know
    from matplotlib.figure import Figure  # only now: training goes on without it

    return Figure(figsize=size, layout="constrained")


# --- Runs of train.py ---
THIN = {"linewidth": 1, "marker": ".", "markersize": 3, "alpha": 0.7}
STYLES = {
    "tip-free evaluation": {"linewidth": 2, "marker": "."},
    "training, with tips": {"linestyle": "--", **THIN},
    "training, without tips": {"linestyle": ":", **THIN},
}
CURVES = (  # panel, log, what is drawn of it, how
    (0, "evals.jsonl", "score", "tip-free evaluation"),
    (0, "metrics.jsonl", "score_with_memory", "training, with tips"),
    (0, "metrics.jsonl", "score_without_memory", "training, without tips"),
    (1, "evals.jsonl", "success", "tip-free evaluation"),
)
DRAWN = "drawn by draw_runs"  # this stands in its files, which it may overwrite


def draw_runs(path, folders):
    """Draw the curves of runs, a colour each, from the files in their directories, as a PNG."""
    settings = [runs.read_settings(folder) for folder in folders]
    words = [runs.about(one) for one in settings]
    shared = [len({*parts}) == 1 for parts in zip(*words)]
    labels = [", ".join(word for word, all_ in zip(parts, shared) if not all_) for parts in words]
    if len({*labels}) < len(labels):
        labels = [str(folder) for folder in folders]
    figure = new_figure(7, 5)
    panels = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for number, folder in enumerate(folders):
        for panel, log, key, kind in CURVES:
            lines = [line for line in runs.records(folder / log) if line.get(key) is not None]
            points = [line["iteration"] for line in lines], [line[key] for line in lines]
            panels[panel].plot(*points, color=f"C{number}", **STYLES[kind])
    for kind, style in STYLES.items():
        panels[0].plot([], [], label=kind, color="C0" if len(folders) == 1 else "black", **style)
    if len(folders) > 1:
        for number, label in enumerate(labels):
            panels[0].plot([], [], label=label, color=f"C{number}")
    panels[0].set(ylim=(-105, 105), yticks=range(-100, 101, 50), ylabel="score")
    panels[1].set(ylim=(-0.05, 1.05), ylabel="share solved", xlabel="training iterations")
    last = max(one["iterations"] for one in settings)
    panels[1].set_xlim(-0.02 * last, 1.02 * last)
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    title = "; ".join(word for word, all_ in zip(words[0], shared) if all_)
    figure.suptitle(textwrap.fill(title, 80), fontsize="medium")
    columns = 3 if max(map(len, labels)) < 25 else 1
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=120, metadata={"Source": DRAWN})
    os.replace(temporary, path)


def draw_trials(path, parts):
    """The score of each trial, a line per task."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for task in dict.fromkeys(part["task"] for part in parts):
        mine = [part for part in parts if part["task"] == task]
        trials = [part["trial"] for part in mine]
        axes.plot(trials, [part["mean"] for part in mine], marker=".", label=task)
    axes.set(xlabel="trial (0 = without memory)", ylabel="mean score")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_scores(path, parts):
    """The score of each task, beside the paper's GRPO and EMPO²."""
    tasks = [part["task"] for part in parts]
    figure = new_figure(8, 1.5 + 0.3 * len(tasks))
    axes = figure.subplots()
    axes.barh(tasks, [part["mean"] for part in parts], color="lightgrey", label="here")
    known = [task for task in tasks if task in paper.TABLE_1]
    if known:
        for name, mark in (("GRPO", "x"), ("EMPO²", "o")):
            column = paper.COLUMNS.index(name)
            scores = [paper.TABLE_1[task][column] for task in known]
            axes.plot(scores, known, mark, label=f"paper: {name}")
    axes.set(xlabel="mean score", xlim=(-105, 105), ylim=(len(tasks) - 0.5, -0.5))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


# --- What eval.py shows ---
def show(protocol, parts, picture):
    """Print the protocol and the table, and draw the picture; ood has a row for every trial."""
    told = {k: v for k, v in protocol.items() if k not in ("checksums", "settings")}
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    default = vars(Settings())
    changed = {k: v for k, v in protocol["settings"].items() if v != default.get(k)}
    words = ", ".join(f"{name} {value}" for name, value in changed.items())
    print(f"settings other than the defaults: {words}")
    if is_standin(protocol["model"]):  # its numbers do not stand beside the paper's
        parts = [{**part, "task": f"{part['task']} (stand-in)"} for part in parts]
    columns = ("episodes", "turns", "memory_turns", *FIGURES)
    ood = protocol["protocol"] == "ood"
    rows = {}
    for part in parts:
        name = f"{part['task']}, trial {part['trial']}" if ood else part["task"]
        rows[name] = [part[column] for column in columns]
    print(*table(columns, rows), sep="\n")
    if not ood:
        draw_scores(picture, parts)
        for part in parts:
            if part["task"] == "webshop":
                print(*webshop_table(part, protocol["environment"]), sep="\n")
        return
    draw_trials(picture, parts)
    for task, (trained_on, ours, grpo) in paper.OOD.items():
        if task in protocol["tasks"]:
            print(
                f"the paper's best trial of {task}, trained on {trained_on}: "
                f"EMPO² {ours}, GRPO {grpo}"
            )


def webshop_table(part, version):
    """Score and success in percent, beside the paper's if the data are the official full set."""
    rows = {f"here: {version}": (part["mean"], 100 * part["share_100"])}
    remark = "The paper's scores are of the full set: these compare to none of them."
    if version.endswith("the full set"):
        rows |= {f"paper: {name}": row for name, row in paper.WEBSHOP.items()}
        remark = "The paper's rows are of a 7B model."
    return ["", *table(("score", "success %"), rows), remark]
