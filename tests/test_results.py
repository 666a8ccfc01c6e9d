"""Every number of README.md, docs/claims.md and results/*/README.md is in a record, as it is
rounded there.

In a table a row that names a preset has numbers of that preset, and those under "seed 1" or under
an iteration are of that run or evaluation. Elsewhere a number is any of the folder's records, or
one of those in `OTHERS`.

python -m pytest -n 0 tests/test_results.py
"""

import json
import re

import numpy as np
import pytest
from conftest import ROOT

import envs
from engine import paper

RESULTS = ROOT / "results"
TEXTS = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", ROOT / "docs/claims.md", *sorted(RESULTS.glob("*/README.md")))
}
NUMBER = r"(?<![\w.,−/-])−?\d[\d,]*(?:\.\d+)?(?!\w|\.\d)"
NAMES = (  # what has a number in it and is no result
    r"```.*?```|`[^`\n]*`|\]\([^)\n]*\)|commit \w+|seeds? \d(?:(?:,| and| to) \d)*"
    r"|identify-life-stages-2|SmolLM2-135M-Instruct|SmolLM2|Qwen2.5-7B|Python 3.11|arXiv 2602.23008"
    r"|ICLR 2026|Figure 3|Algorithm 1|Eq. 2|§[\d.]+|scienceworld 1.2.3|torch 2.13.0|choice 5"
)
OTHERS = {  # derived, or no result
    "README.md": [200],  # iterations, the default on a GPU
    # of the paper; seeds 0 and 1 of older code; p; the penalty of a wrong word
    "docs/claims.md": [
        *(len(paper.TABLE_1), *np.mean([*paper.TABLE_1.values()], 0)),
        *paper.TABLE_1["identify-life-stages-2"],
        *(number for row in paper.WEBSHOP.values() for number in row),
        *(number for row in paper.OOD.values() for number in row[1:]),
        *((74.6 + 95.8) / 2, (5.75 + 8.52) / 2, 0.1, 100),
    ],
    "results/laptop/README.md": [72, 1920 / 72**2],  # places; solved by luck
    # GRPO's episodes; points of three stages; the rewards that the slow test checks
    "results/smollm2/README.md": [3 * 384, 83, 8, 25, 17],
    # the orders of four stages of twelve; solved by luck; episodes of two runs; minutes
    "results/stages/README.md": [11880, 864 / 11880, 2 * 864, 261 / 60, 358 / 60, 367 / 60],
}


# --- The numbers of the records -------------------------------------------------------------------
def rows_of(path, task=0):
    """{preset: {seed: cell}} of the finished runs of a record, of its first task or mean."""
    rows = list(json.loads(path.read_text())["tasks"].values())[task]
    return {
        preset: {seed: cell for seed, cell in row.items() if cell["state"] == "finished"}
        for preset, row in rows.items()
    }


def numbers(figures):
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}


def until(cell, last):
    """The figures of a cell, had its run ended with this iteration; None: its own."""
    if last is None:
        return numbers(cell)
    curve = [point for point in cell["curve"] if 0 < point["iteration"] <= last][-3:]
    return {name: np.mean([point[name] for point in curve]) for name in curve[-1]}


def means(row, last=None):
    """The means over the runs of a preset."""
    ends = [until(cell, last) for cell in row.values()]
    return [np.mean([end[name] for end in ends]) for name in ends[0]] if ends else []


def in_a_cell(folder, label, column):
    """The numbers that a cell of a table may have, in the row of a preset."""
    preset = re.search(r"`([\w-]+)`|$", label)[1] or "empo2"
    rate, last = (
        re.search(r"rate ([\w.-]+)|$", label)[1],
        re.search(r", (\d+)( iterations)?$|$", label)[1],
    )
    seed = re.search(r"seed (\d+)|$", f"{column} {label}")[1]
    file = "shuffled" if "shuffled" in label else f"rate-{rate}" if rate else "results"
    if last == "54":
        file = f"long-{preset}"
    files = [file]
    if (folder / "older.json").exists():
        files.insert(0 if last == "36" and file == "results" else 1, "older")
    known = [rows_of(folder / f"{name}.json").get(preset, {}) for name in files]
    row = next((row for row in known if row and (seed is None or seed in row)), {})
    if seed in row and "at the end" in label:
        return numbers(row[seed]["curve"][-1]).values()
    last = last and int(last)
    if column.isdigit():
        (point,) = (p for p in row[seed]["curve"] if p["iteration"] == int(column))
        return numbers(point).values()
    if seed:
        return until(row[seed], last).values() if seed in row else []
    return [
        *means(row, last),
        *(value for cell in row.values() for value in numbers(cell).values()),
    ]


def in_the_text(folder):
    """All numbers of a folder's records."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        found += numbers(record["settings"]).values()
        found += [
            float(n) for n in re.findall(r"=([\d.]+)", str(record["settings"]["env_options"]))
        ]
        for task in range(len(record["tasks"])):
            rows = rows_of(path, task)
            for row in rows.values():
                found += means(row)
                for cell in row.values():
                    for point in (cell, *cell["curve"]):
                        found += numbers(point).values()
            if {"grpo", "empo2"} <= rows.keys():  # by how much EMPO² is better
                seeds = [seed for seed in rows["empo2"] if seed in rows["grpo"]]
                gaps = [rows["empo2"][n]["score"] - rows["grpo"][n]["score"] for n in seeds]
                found += [*gaps, np.mean(gaps)]
    for path in folder.glob("check.txt"):
        found += [float(line.rsplit(": ", 1)[1]) for line in path.read_text().splitlines()[1:]]
    return found


# --- The texts ------------------------------------------------------------------------------------
def unrecorded(text, values):
    """The numbers of a text that are none of these, rounded as they are."""

    def known(number):
        digits = len(number.partition(".")[2])
        number = number.replace(",", "").replace("−", "-")
        return number in {f"{value:.{digits}f}" for value in values}

    found = re.findall(NUMBER, re.sub(NAMES, " ", text, flags=re.DOTALL))
    return [number for number in found if not known(number)]


def check(name, text):
    """All numbers of a text that are in no record, or in no record of their row."""
    folder = TEXTS[name].parent
    values = list(OTHERS.get(name, []))
    for path in [folder] if folder.parent == RESULTS else RESULTS.iterdir():
        values += in_the_text(path)
    left = unrecorded(text, values)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        for label, *cells in rows:
            if linked := re.search(r"\((results/\w+)/", label):  # and for the rows below it
                folder = ROOT / linked[1]
            if head[0] in ("preset", "preset, iterations", "") and len(head) > 2:
                for column, cell in zip(head[1:], cells, strict=True):
                    left += unrecorded(cell, in_a_cell(folder, label, column))
    return left


@pytest.mark.parametrize("name", TEXTS)
def test_every_number_is_in_a_record(name):
    text = TEXTS[name].read_text(encoding="utf-8")
    assert not check(name, text)


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("README.md", "| 80.1 | 83.0 |", "| 83.0 | 80.1 |"),
        ("results/stages/README.md", "11.4 (0.50) | −62.5", "11.4 (0.50) | 62.5"),
        ("README.md", "| 87.5 | 57.0 |", "| 75.0 | 57.0 |"),
        ("results/smollm2/README.md", "−8.6 (0, 0.31)", "8.6 (0, 0.31)"),
        ("results/stages/README.md", "`empo2`, 54 | 100.0", "`empo2`, 54 | 10.0"),
        ("results/stages/README.md", "3.8 by seed", "3.7 by seed"),
    ],
)
def test_a_wrong_number_would_be_noticed(name, right, wrong):
    text = TEXTS[name].read_text(encoding="utf-8")
    assert right in text and check(name, text.replace(right, wrong))


@pytest.mark.slow
def test_the_episode_that_is_shown():
    env = envs.make("scienceworld", thoughts=True, step_limit=5)
    env.reset("identify-life-stages-2", 0)
    text = TEXTS["results/smollm2/README.md"].read_text()
    rows = re.findall(r"^\| (.*focus on.*|teleport.*) \| (.*) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for action, answer, reward in rows:
        assert env.step(action)[:2] == (answer, int(reward))


@pytest.mark.parametrize("path", RESULTS.glob("*/results.json"), ids=lambda path: path.parent.name)
def test_the_iterations_of_a_cell_are_those_of_its_run(path):
    record = json.loads(path.read_text())
    s = record["settings"]
    rows = [row for rows in record["tasks"].values() for row in rows.values()]
    for cell in (cell for row in rows for cell in row.values()):
        assert cell["iterations"] == max([0, *(p["iteration"] for p in cell["curve"])])
        played = cell["iterations"] * s["group_size"] * s["tasks_per_iteration"]
        assert played == cell["episodes"]
