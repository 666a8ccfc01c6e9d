"""Every number of README.md and results/*/README.md is in a record beside it.

The claims of a text are its table rows and sentences, written anew from the records. Each must
stand in the text as it is, and what is left of the text must have no number. A failure prints the
lines that the records give.

python -m pytest -n 0 tests/test_results.py
"""

import itertools
import json
import re

import numpy as np
import pytest
from conftest import ROOT

import envs
from experiments import report
from settings import PRESETS
from standin.make_stages import STAGES

RESULTS = ROOT / "results"
# What has a number in it and is no result
NAMES = (
    r"```.*?```|`[^`\n]*`|\]\([^)\n]*\)"  # code, commands, links
    r"|identify-life-stages-2|SmolLM2-135M-Instruct|SmolLM2|Qwen2.5-7B|Python 3.11|arXiv 2602.23008"
    r"|ICLR 2026|Figure 3|Algorithm 1|Eq. 2|§[\d.]+|4-bit|24 GB|15 GB|fp32|choice 5"
)
SUCCESS = ".3f"


# --- Reading the records, writing as the texts do -------------------------------------------------
def record(path):
    return json.loads((RESULTS / path).read_text())


def cells(path):
    """{preset: {seed: cell}} of the finished runs, means over tasks."""
    rows = next(iter(record(path)["tasks"].values()))
    return {
        preset: {seed: cell for seed, cell in row.items() if cell["state"] == "finished"}
        for preset, row in rows.items()
    }


def each(row, name):
    return [cell[name] for cell in row.values()]


def same(rows, name):
    """What all cells have in common."""
    (value,) = {value for row in rows.values() for value in each(row, name)}
    return int(value)


def points(row):
    """All evaluations of a preset."""
    return [point for cell in row.values() for point in cell["curve"]]


def at(cell, iteration):
    (point,) = (point for point in cell["curve"] if point["iteration"] == iteration)
    return point


def until(cell, last):
    """A cell's figures, had its run ended with this iteration."""
    found = [point for point in cell["curve"] if 0 < point["iteration"] <= last][-3:]
    assert found[-1]["iteration"] == last
    return {name: np.mean([point[name] for point in found]) for name in found[0]}


def number(value, form=".1f"):
    return f"{value:{form}}".replace("-", "−")


def numbers(values, form=".1f"):
    """a, b and c"""
    *first, last = (number(value, form) for value in values)
    return f"{', '.join(first)} and {last}"


def line(*entries):
    """A row of a table."""
    return re.sub(" +", " ", f"| {' | '.join(map(str, entries))} |")


def bold(text, really):
    return f"**{text}**" if really else text


def minutes(rows):
    found = [value for row in rows.values() for value in each(row, "minutes")]
    return f"{min(found):.0f} to {max(found):.0f} minutes"


def house(folder):
    """Its rooms, and the containers in each."""
    options = record(f"{folder}/results.json")["settings"]["env_options"]
    options = dict(option.split("=") for option in options)
    return int(options["rooms"]), int(options["containers"])


# --- The claims of README.md ----------------------------------------------------------------------
def stages_rows(figures):
    """The score by seed, its mean, and as many of the other figures."""

    def row(label, row, last, best=False):
        found = [until(cell, last) for cell in row.values()]
        means = {name: np.mean([one[name] for one in found]) for name in found[0]}
        scores = [number(one["score"]) for one in found]
        rest = [number(means[name]) for name in ("clipped", "best")]
        rest += [number(means[name], ".2f") for name in ("success", "minus_100")]
        scores += [""] * (5 - len(scores))
        return line(label, *scores, bold(number(means["score"]), best), *rest[:figures])

    short = cells("stages/results.json")
    for last, preset in itertools.product((36, 54), ("grpo", "empo2")):
        runs = short[preset] if last == 36 else cells(f"stages/long-{preset}.json")[preset]
        yield row(f"`{preset}`, {last}", runs, last, best=preset == "empo2")
    if not figures:
        return
    yield row("`no-offpolicy` (q = 0), 36", short["no-offpolicy"], 36)
    yield row("`no-intrinsic`, 36", short["no-intrinsic"], 36)
    yield row("`mode-turn`, 36", short["mode-turn"], 36)
    yield row("shuffled tips, 36", cells("stages/shuffled.json")["empo2"], 36)
    yield row("`reflexion` (frozen), 36", short["reflexion"], 36)
    for rate in ("3e-4", "1.5e-4"):
        path = f"stages/rate-{rate}.json"
        assert record(path)["settings"]["learning_rate"] == float(rate)
        yield row(f"`grpo`, learning rate {rate}, 36", cells(path)["grpo"], 36)


def of_readme():
    yield line("preset, iterations", *(f"seed {seed}" for seed in range(5)), "mean")
    yield from stages_rows(figures=0)
    yield "ends the episode at −100"

    hours = re.findall(r"\| (\d+) h \|", (ROOT / "docs" / "paper.md").read_text())
    yield f"200 iterations, {min(hours)} to {max(hours)} hours [by estimate]"

    smollm2 = cells("smollm2/results.json")
    empo2, grpo = (numbers(each(smollm2[preset], "score")) for preset in ("empo2", "grpo"))
    assert {smollm2[preset]["2"]["curve"][-1]["score"] for preset in smollm2} == {58}
    yield f"score, seeds 0 to 2: EMPO² {empo2}, GRPO {grpo}. On seed 2 both stop after two"
    yield f"{minutes(smollm2)} a run, after"

    laptop = cells("laptop/results.json")
    empo2 = numbers(each(laptop["empo2"], "success"), SUCCESS)
    assert not any(each(laptop["grpo"], "success") + each(laptop["no-offpolicy"], "success"))
    yield f"Tip-free success, seeds 0 to 2: EMPO² {empo2}; GRPO, and"
    yield "off-policy update, 0 on each."
    yield f"{minutes(laptop)} a run. Where luck"
    yield f"lie in two of {np.prod(house('laptop'))} closed containers"


# --- The claims of results/*/README.md ------------------------------------------------------------
def of_house(folder, columns):
    """What the two texts about it have in common."""
    whole, rows = record(f"{folder}/results.json"), cells(f"{folder}/results.json")
    s, (run,) = whole["settings"], whole["runs"]
    tested = s["eval_variations"] * s["eval_episodes"] * len(s["tasks"])
    yield f"on {tested} unseen variations of the two tasks, mean of a run's last three evaluations"
    last = [int(point["iteration"]) for point in rows["grpo"]["0"]["curve"][-3:]]
    yield f"(iterations {', '.join(map(str, last))})"
    yield f"commit {run['commit']}, torch {run['torch'].removesuffix('+cpu')}, two runs"

    means = {preset: np.mean(each(row, "success")) for preset, row in rows.items()}
    heads = {
        "score": "mean score",
        "minutes": "minutes per run",
        "solved": f"of {same(rows, 'episodes'):,} episodes solved, by seed",
    }
    yield line("preset | seed 0 | seed 1 | seed 2 | mean", *(heads[name] for name in columns))
    for preset, row in rows.items():
        found = {name: number(np.mean(each(row, name))) for name in ("score", "minutes")}
        found["solved"] = ", ".join(f"{count:,.0f}" for count in each(row, "solved"))
        yield line(
            f"`{preset}`{' (q = 0)' * (preset == 'no-offpolicy')}",
            *(number(success, SUCCESS) for success in each(row, "success")),
            bold(number(means[preset], SUCCESS), means[preset] == max(means.values())),
            *(found[name] for name in columns),
        )


def of_laptop():
    yield from of_house("laptop", ["minutes", "solved"])
    rows, s = cells("laptop/results.json"), record("laptop/results.json")["settings"]
    assert PRESETS["no-offpolicy"]["offpolicy_prob"] == 0
    yield "With q = 0 the player solves"
    radio = record("laptop/results.json")["tasks"]["radio"]["empo2"]
    assert not any(each({"1": radio["1"]}, "success"))
    yield "On seed 1 most episodes with tips solved the radio, until"
    (rooms, containers), count = house("laptop"), same(rows, "episodes")
    places = rooms * containers
    yield f"a house of {rooms} rooms with {containers} closed containers each"
    yield f"lie in two of these {places} places"
    yield f"(1/{places})² of its episodes: {count / places**2:.2f} times in the {count:,} episodes"
    yield f"p = {s['memory_prob']}, β = {s['beta']}, δ = {s['min_prob']}, which lies well below"
    yield f"the 1/{rooms} that the right word has"
    yield f"ε = {s['advantage_eps']:.0f} points"
    yield f"gradient is clipped at {s['max_grad_norm']}."


def of_credit():
    yield from of_house("credit", ["score", "solved", "minutes"])
    rows, whole = cells("credit/results.json"), record("credit/results.json")
    discount = whole["settings"]["discount"]
    yield f"(ω = {PRESETS['gigpo-std']['step_weight']:.0f}, γ = {discount})"
    env = envs.make("house", **envs.parse_options(whole["settings"]["env_options"]))
    env.reset("fan", 0)
    yield f"{env.share} points each for opening a right container and for taking what lies in it"
    fan, radio = whole["tasks"]["fan"], whole["tasks"]["radio"]
    assert not any(point["score"] for point in points(radio["grpo"]))
    late = {
        (seed, point["iteration"]): point["score"]
        for seed, cell in fan["grpo"].items()
        for point in cell["curve"]
        if point["iteration"] >= 12
    }
    assert late.pop(("0", 30)) == 0 and set(late.values()) == {2 * env.share}
    yield (
        f"it takes the plug ({2 * env.share} points) in all evaluations from iteration 12 on, but "
        "for one: seed 0 at iteration 30."
    )
    assert each(fan["gigpo-std"], "success") == [0, 0, 1]
    assert not any(each(radio["gigpo-std"], "success"))
    pairs = zip(*(each(rows[preset], "success") for preset in ("empo2", "empo2-gigpo")))
    assert [one > other for one, other in pairs] == [False, False, True]
    yield "on seed 2 `empo2` was better than `empo2-gigpo`"
    yield f"and {same(rows, 'iterations')} iterations: the curves"


def of_scienceworld():
    whole, rows = record("scienceworld/results.json"), cells("scienceworld/results.json")
    s = whole["settings"]
    yield (
        f"one seed, {same(rows, 'iterations')} iterations of "
        f"{s['group_size'] * s['tasks_per_iteration']} episodes, tip-free evaluation on "
        f"{s['eval_variations'] * s['eval_episodes']} test episodes each"
    )
    assert s["variations"] == 5
    yield f"measured at commit {whole['runs'][0]['commit']} with five"
    took = [number(each(row, "minutes")[0], ".0f") for row in rows.values()]
    yield f"{took[0]} (`grpo`) and {took[1]} minutes a run"
    yield line(f"score before → after {same(rows, 'episodes')} episodes", "`grpo`", "`empo2`")
    tasks = {task: rows for task, rows in whole["tasks"].items() if "mean" not in task}
    for task, rows in tasks.items():
        curves = [rows[preset]["0"]["curve"] for preset in ("grpo", "empo2")]
        yield line(task, *(" → ".join(number(c[at]["score"]) for at in (0, -1)) for c in curves))
    played = [cell for rows in tasks.values() for row in rows.values() for cell in row.values()]
    assert not any(cell["solved"] for cell in played)
    count = sum(cell["episodes"] for cell in played)
    yield f"None of the {count} training episodes was solved."


def of_stages():
    whole, short = record("stages/results.json"), cells("stages/results.json")
    long = {name: cells(f"stages/long-{name}.json")[name] for name in ("empo2", "grpo")}
    shuffled = cells("stages/shuffled.json")["empo2"]
    s = whole["settings"]
    heads = [*(f"seed {seed}" for seed in range(5)), "mean score | clipped at 0 | best"]
    yield line("preset, iterations", *heads, "share at 100 | share at −100")
    yield from stages_rows(figures=4)
    # where they come from
    (commit,) = {record(f"stages/long-{name}.json")["made_by"][-7:] for name in long}
    yield "`empo2`, 54 iterations |"
    yield f"[`grpo`](long-grpo.json), [`empo2`](long-empo2.json) | {commit} |"
    yield f"[shuffled.json](shuffled.json) | {record('stages/shuffled.json')['made_by'][-7:]} |"
    rates = [record(f"stages/rate-{rate}.json")["runs"] for rate in ("3e-4", "1.5e-4")]
    (commit,) = {run["commit"] for runs in rates for run in runs}
    assert s["learning_rate"] == 5e-4
    yield "learning rates (the others: 5e-4)"
    yield f"[3e-4](rate-3e-4.json), [1.5e-4](rate-1.5e-4.json) | {commit} |"
    for preset, seed in itertools.product(long, "01"):
        for point in short[preset][seed]["curve"]:
            assert point["score"] == at(long[preset][seed], point["iteration"])["score"]
    yield "Up to iteration 36 the longer runs have the scores of the shorter ones."
    versions = {(run["environment"], run["torch"]) for run in whole["runs"]}
    assert versions == {("scienceworld 1.2.3", "2.13.0+cpu")}
    yield "scienceworld 1.2.3, torch 2.13.0"
    yield f"A run of 36 iterations took {minutes(short)}"

    words, count = len(STAGES), same(short, "episodes")
    by_luck = words * (words - 1) * (words - 2) * (words - 3)
    yield f"By luck it solves 1 of {by_luck:,} episodes: {count / by_luck:.2f} of the {count} of a"
    yield f"run of {same(short, 'iterations')} iterations."
    yield "ends the episode at −100"
    outside, *right = np.cumsum(REWARDS)[:4]
    yield f"{outside} points for going there, then {numbers(right, 'd')} for each"
    tested = s["eval_variations"] * s["eval_episodes"]
    yield f"on {tested} test episodes at temperature {s['eval_temperature']}"
    yield "found on seeds 0 to 2 with an earlier player"

    gaps = np.subtract(*([short[name][seed]["score"] for seed in "01234"] for name in long))
    better, of = in_words(sum(gaps > 0)), in_words(len(gaps))
    yield f"yes on {better} seeds of {of}"
    yield (
        f"After 36 iterations EMPO² minus GRPO is {number(gaps.mean())} points in the mean, and "
        f"{numbers(gaps)} by seed"
    )
    assert {curve[-1]["success"] for curve in each(short["empo2"], "curve")} == {1}
    yield f"At iteration 36 EMPO² solves all {tested} test episodes on every seed"
    longer = [point for point in points(long["empo2"]) if point["iteration"] >= 36]
    assert {point["success"] for point in longer} == {1}
    assert not any(point["success"] for rows in (short, long) for point in points(rows["grpo"]))
    yield "in each of the evaluations up to iteration 54."
    assert whole["runs"][0]["command"].count(" 5 ") == 1
    yield "A seed 5 was asked for once; no run of it is in the record."
    empo2 = points(short["empo2"])
    yield "Two of the seeds, 0 and 1, had been looked at"

    first = min(point["iteration"] for point in empo2 if point["success"])
    yield f"Without tips nothing is solved in the evaluations up to iteration {first - 6}."
    caught = [at(cell, 12)["score"] for cell in short["grpo"].values() if cell["score"] < 20]
    yield "8 points instead of −100"
    yield f"At iteration 12 all its seeds score {min(caught):.1f} to {max(caught):.1f},"
    frozen = short["reflexion"]["0"]
    yield f"solves {frozen['solved']} of its {count} episodes."
    before, after = (number(frozen["curve"][place]["score"]) for place in (0, -1))
    yield f"Tip-free it is what it was: {before} before, {after} after."
    kept = short["no-offpolicy"]["1"]["solved"]
    yield f"on seed 1 the run without it solved {kept} of its {count} episodes"
    done = sum(each(shuffled, "solved"))
    yield f"the same sentences {done} of {sum(each(shuffled, 'episodes')):,} episodes were solved"
    by_turn = numbers(each(short["mode-turn"], "solved"), "")
    by_episode = numbers(each(short["empo2"], "solved")[:2], "")
    yield f"{by_turn} of {count} were solved, where `empo2` solved {by_episode}."
    for seed, iteration in itertools.product("01", (0, 6, 12, 18)):
        one, other = (at(short[preset][seed], iteration) for preset in ("empo2", "no-intrinsic"))
        assert one["score"] == other["score"]
    yield "up to iteration 18 all evaluations have the same score with and without it"
    yield "GRPO is caught at 8 points"


def in_words(count):
    return "no one two three four five six".split()[count]


def of_smollm2():
    whole, rows = record("smollm2/results.json"), cells("smollm2/results.json")
    s = whole["settings"]
    played = s["group_size"] * s["tasks_per_iteration"]
    assert played == 2 * s["minibatch_episodes"]
    yield f"{same(rows, 'iterations')} iterations of {played} episodes, two optimiser steps each."
    yield f"LoRA (r = {s['lora_r']})"
    yield "ends the episode at −100"
    yield "two episodes a plant, temperature 1:"
    yield from what_the_warm_start_taught()
    tested = s["eval_variations"] * s["eval_episodes"]
    yield f"on {tested} test episodes at temperature {s['eval_temperature']}, by iteration;"
    yield "in brackets the share at 100 and the share at −100."

    def share(value):
        return number(value, ".2f" if value % 1 else ".0f")

    yield line("", *(p["iteration"] for p in rows["grpo"]["0"]["curve"]), "mean of the last three")
    for preset, row in rows.items():
        for seed, cell in row.items():
            evaluations = [
                f"{number(p['score'])} ({share(p['success'])}, {share(p['minus_100'])})"
                for p in cell["curve"]
            ]
            score = bold(number(cell["score"]), cell["success"] > 0)
            yield line(f"`{preset}`, seed {seed}", *evaluations, score)
    assert [run["commit"] for run in whole["runs"]] == ["6a03493"] * 2 + ["3947d0d"] * 2
    yield "commit 6a03493 (seed 2: 3947d0d), scienceworld 1.2.3, torch 2.13.0"
    empo2, grpo = (numbers(each(rows[name], "minutes"), ".0f") for name in ("empo2", "grpo"))
    yield f"{empo2} minutes of EMPO², {grpo} of GRPO."
    assert all("--iterations 12 " in run["command"] for run in whole["runs"][:2])
    yield "it was 12, and the runs of seeds 0 and 1 were continued to 24 after they had been"
    yield "Seed 2 came last"

    assert [cell["success"] > 0 for cell in rows["empo2"].values()] == [True, True, False]
    yield "(on seed 2 also the second)"
    tops = {max(point["score"] for point in curve) for curve in each(rows["grpo"], "curve")}
    yield f"{' or '.join(f'{top:.0f}' for top in sorted(tops))} points."
    count = same(rows, "episodes")
    assert not any(each(rows["grpo"], "solved"))
    yield f"None of its {3 * count:,} training episodes solved the task"
    yield f"of EMPO²'s {count} on each seed {numbers(each(rows['empo2'], 'solved'), '')} did."

    def behind(seed):
        curves = (rows[preset][seed]["curve"] for preset in ("empo2", "grpo"))
        return max(one["iteration"] for one, gr in zip(*curves) if one["score"] < gr["score"])

    yield f"worse than GRPO up to iteration {behind('0')} on seed 0 and {behind('1')} on seed 1"
    yield "a wrong word costs 100 points and more"
    (end,) = {rows[preset]["2"]["curve"][-1]["score"] for preset in rows}
    yield f"**On seed 2 EMPO² fell into GRPO's trap**, at {end:.0f} points."
    yield "by EMPO² on seed 0."
    yield f'"Score {sum(REWARDS[:4])}: first seed, second seedling, third adult, fourth unknown."'
    yield f'"Score {sum(REWARDS)}: first seed, second seedling, third adult, fourth reproducing."'
    yield from (line(action, *what) for action, what in SOLUTION.items())


def what_the_warm_start_taught():
    """As `python -m standin.smollm2 --check` printed it, below a line on where it comes from."""
    made_by, *lines = (RESULTS / "smollm2" / "check.txt").read_text().splitlines()
    found = {name: float(value) for name, value in (entry.rsplit(": ", 1) for entry in lines)}
    yield line("told", "success", "score", "share at −100", "actions well-formed")
    for told in ("untold", "told the first", "told two", "told three", "told all"):
        success, score, worst, formed = (
            found[f"{told}: {name}"]
            for name in ("success", "score", "share at -100", "actions well-formed")
        )
        label = told.removeprefix("told ").replace("untold", "nothing")
        rest = (number(value, ".3f") for value in (worst, formed))
        yield line(label, number(success, ".3f"), number(score), *rest)
    count, true = found["claims in its own tips"], found["of them true"]
    yield f"{count:.0f} claims in its own tips, {true:.3f} of them true"
    yield f"[its output](check.txt), commit {made_by.split()[-1]})"


ADULT = "yes, first seed, second seedling, third adult"
TREE = "You focus on the apple tree."
SOLUTION = {  # {action: (answer, reward)}
    "teleport to outside": ("You teleport to the outside.", 8),
    "first seed: focus on apple seed": ("You focus on the apple seed.", 25),
    "yes, first seed, second seedling: focus on seedling apple tree": (TREE, 25),
    f"{ADULT}: focus on adult apple tree": (TREE, 25),
    f"{ADULT}, fourth reproducing: focus on reproducing apple tree": (TREE, 17),
}
REWARDS = [reward for _, reward in SOLUTION.values()]
CLAIMS = {
    "README.md": of_readme,
    "results/credit/README.md": of_credit,
    "results/laptop/README.md": of_laptop,
    "results/scienceworld/README.md": of_scienceworld,
    "results/smollm2/README.md": of_smollm2,
    "results/stages/README.md": of_stages,
}


# --- The tests ------------------------------------------------------------------------------------
def pattern(claim):
    """The claim, and no longer number."""
    return rf"(?<![\w.,−-]){re.escape(claim)}(?!\w|[.,]\d)"


def unrecorded(text, claims):
    """What the records say and the text does not; else the numbers of no record."""
    text = " ".join(text.split())
    missing = [claim for claim in claims if not re.search(pattern(claim), text)]
    if missing:
        return ["the records say:", *missing]
    for claim in sorted(claims, key=len, reverse=True):
        text = re.sub(pattern(claim), " ", text)
    left = re.findall(r".{,40}[\d…].{,40}", re.sub(NAMES, " ", text))
    return left and ["no record has:", *left]


TEXTS = [ROOT / "README.md", *RESULTS.glob("*/README.md")]


@pytest.mark.parametrize("path", [text.relative_to(ROOT).as_posix() for text in TEXTS])
def test_every_number_is_in_a_record(path):
    found = unrecorded((ROOT / path).read_text(encoding="utf-8"), list(CLAIMS[path]()))
    assert not found, "\n".join(found)


def test_the_episode_that_is_shown():
    env = envs.make("scienceworld", thoughts=True, step_limit=5)
    env.reset("identify-life-stages-2", 0)
    for action, what in SOLUTION.items():
        assert env.step(action)[:2] == what


@pytest.mark.parametrize("path", RESULTS.glob("*/results.json"), ids=lambda path: path.parent.name)
def test_the_iterations_of_a_cell_are_those_of_its_run(path):
    whole = record(path)
    s = whole["settings"]
    assert "iterations" not in s
    rows = [row for rows in whole["tasks"].values() for row in rows.values()]
    for cell in (cell for row in rows for cell in row.values()):
        assert cell["iterations"] == max([0, *(p["iteration"] for p in cell["curve"])])
        played = cell["iterations"] * s["group_size"] * s["tasks_per_iteration"]
        assert played == cell["episodes"]


def write_run(folder, iterations=4, **settings):
    """A finished run of one evaluation and a line of metrics an iteration."""
    folder.mkdir(parents=True)
    settings = {"tasks": ["radio"], "preset": "empo2", "iterations": iterations, **settings}
    (folder / "settings.json").write_text(json.dumps(settings))
    figures = dict.fromkeys(report.FIGURES.values(), 0.5)
    evaluation = {"iteration": iterations, "training_episodes": 8, "tasks": {"radio": figures}}
    evaluation |= {"seconds": 30, "seconds_training": 60}
    (folder / "evals.jsonl").write_text(json.dumps(evaluation) + "\n")
    played = {"episodes": 2, "success": 0.5}
    lines = [json.dumps(played | {"iteration": iteration}) for iteration in range(iterations)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_runs_that_no_sweep_made_are_recorded(tmp_path, capsys):
    for seed in (3, 4):
        write_run(tmp_path / str(seed), seed=seed, run_dir=str(seed), max_tips=4)
    argv = ["--made-by", "a command, commit abc1234", "--out", str(tmp_path / "out.json")]
    assert report.main([str(tmp_path / "3"), str(tmp_path / "4"), *argv]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["made_by"] == "a command, commit abc1234"
    assert found["settings"] == {"tasks": ["radio"], "preset": "empo2", "max_tips": 4}
    assert list(found["tasks"]["radio"]["empo2"]) == ["3", "4"]
    cell = found["tasks"]["radio"]["empo2"]["4"]
    assert (cell["iterations"], cell["episodes"], cell["solved"]) == (4, 8, 4)

    write_run(tmp_path / "5", seed=5, max_tips=2)
    for other, reason in (("5", "its settings are not those of"), ("6", "no finished run here")):
        assert report.main([str(tmp_path / "3"), str(tmp_path / other), *argv]) == 2
        assert capsys.readouterr().err.startswith(f"report: {tmp_path / other}: {reason}")


def test_a_sweep_records_the_iterations_of_each_run(tmp_path):
    """One was continued beyond what the sweep was asked for."""
    for seed, iterations in ((0, 4), (1, 6)):
        write_run(tmp_path / "radio" / "empo2" / str(seed), iterations)
    settings = {"env": "house", "model": "standin", "together": False, "iterations": 4}
    asked = {"tasks": ["radio"], "presets": ["empo2"], "seeds": [0, 1], "settings": settings}
    report.report(tmp_path, asked | {"failed": {}, "runs": []})
    found = json.loads((tmp_path / "results.json").read_text())
    assert "iterations" not in found["settings"]
    assert each(found["tasks"]["radio"]["empo2"], "iterations") == [4, 6]
