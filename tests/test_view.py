"""What is shown of hand-made episodes in the terminal and in the page, hostile texts included.

pytest tests/test_view.py
"""

import html
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from experiments import view
from memory import TipMemory

BAD = "<b>&amp;</b></pre></details><script>x</script>\"' \x1b[31m\r\x07 \u202e \0 \u2028 \x85 \x9b"
SHOWN = BAD[: BAD.index("\x1b")] + r"\x1b[31m\r\x07 \u202e \x00 \u2028 \x85 \x9b"


TURN = {"observation": "a kitchen\n\ta box", "tips": [], "tips_left_out": 0, "written": "open box",
        "action": "open box", "action_cut": False, "next_observation": "opened", "reward": 3.0,
        "novelty": 0.25, "advantage": -0.5, "tokens": 4, "mode": "plain",
        "update": "on-policy"}  # fmt: skip
EPISODE = {"iteration": 0, "task": "radio", "variation": 0, "group": 0, "member": 0, "score": 0.0,
           "return": 3.25, "ended": "step limit", "tip": "look in the box", "tip_cut": False,
           "task_text": "find it", "turns": [TURN]}  # fmt: skip
# Numbers 1 to 9: in each iteration scores 0, 50 and -100, with better returns in later ones.
NINE = []
for iteration in range(3):
    for task, score in (("radio", 0.0), ("fan", 50.0), ("radio", -100.0)):
        of_it = {"iteration": iteration, "task": task, "score": score, "return": iteration}
        NINE.append(EPISODE | of_it)


@pytest.fixture
def run(tmp_path):
    def write(episodes):
        lines = [json.dumps(e, ensure_ascii=False) + "\n" for e in episodes]
        (tmp_path / "episodes.jsonl").write_text("".join(lines) + '{"half a li')
        return str(tmp_path)

    return write


def shown(capsys, *argv):
    assert view.main(list(argv)) == 0
    return capsys.readouterr().out


def test_modes_tips_and_figures(run, capsys):
    memory = {"mode": "memory", "tips": ["tip A", "tip B"], "tips_left_out": 2}
    off = {"update": "off-policy", "tips": ["tip B", "tip C"], "tips_left_out": 0}
    off |= {"action_cut": True, "advantage": 1.25}
    turns = [TURN | {"written": "so: open box"}, TURN | memory, TURN | memory | off]
    out = shown(capsys, run([EPISODE | {"turns": turns}]))
    for text in (
        "radio/0 · group 0 · score 0.0 · return 3.25 · 3 turns, 2 with tips · ended step limit",
        "turn 1 · plain · on-policy · 4 tokens · reward 3.0 · novelty 0.25 · advantage -0.5",
        "turn 2 · memory · on-policy",
        "2 more did not fit",
        "turn 3 · memory · off-policy · 4 tokens · reward 3.0 · novelty 0.25 · advantage 1.25",
        "tip 2 │ (as above)",
        "tip 3 │ tip C",
        "     written │ so: open box",
        "action, cut │ open box",
        "observation │ a kitchen\n                 │ \ta box",
        "led to │ opened",
        "tip written │ look in the box",
    ):
        assert text in out
    assert out.count("│ tip B") == 1, "a tip is written out once"


@pytest.mark.parametrize(
    "filters, wanted",
    [
        ("", [8, 9]),
        ("--list", [7, 8, 9]),
        ("--task radio", [7, 9]),
        ("--iteration 1", [5, 6]),
        ("--iteration 0 1 --list", [1, 2, 3, 4, 5, 6]),
        ("--best 2", [5, 8]),
        ("--worst 1 --iteration 2", [9]),
        ("--best 1 --worst 1 --task radio --iteration 0", [1, 3]),
        ("--best 99 --worst 99", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("--episode 4 7", [4, 7]),
    ],
)
def test_filters(run, capsys, filters, wanted):
    lines = shown(capsys, run(NINE), *filters.split()).splitlines()
    assert [int(line.split()[1]) for line in lines if line.startswith("episode ")] == wanted
    assert f"{len(wanted)} of 9 episodes" in lines[-1]


def test_hostile_text_is_shown_as_text(run, capsys, tmp_path):
    """It ends no element and moves no cursor, wherever text of a model or a world stands."""
    texts = {"observation": "\n" + BAD, "written": BAD, "action": BAD, "next_observation": BAD}
    bad = EPISODE | dict.fromkeys(("task", "ended", "tip", "task_text"), BAD)
    bad |= {"turns": [TURN | texts | {"tips": [BAD]}]}
    out = shown(capsys, run([bad]))
    assert out.count(SHOWN) == 8
    pages = []
    for name, e in (("bad", bad), ("good", EPISODE | {"turns": [TURN | {"tips": ["tip"]}]})):
        shown(capsys, run([e]), "--html", str(tmp_path / name))
        pages.append((tmp_path / name).read_text(encoding="utf-8"))
    tags = [re.findall("<[^>]*>", text) for text in pages]
    assert '<pre class="text">\n\n&lt;b' in pages[0], "its empty first line survives"
    assert tags[0] == tags[1] and pages[0].count(html.escape(SHOWN)) == 8
    assert all(c.isprintable() or c in "\n\t" for c in out + pages[0])


def test_bad_input_is_refused_in_one_line(run, capsys, tmp_path):
    page = str(tmp_path / "page.html")
    assert "3 of 9" in shown(capsys, run(NINE), "--html", page)
    assert (tmp_path / "page.html").read_text().count("<details>") == 3
    for episodes, more, reason in (
        ([], [], "no episode yet in this run"),
        (NINE, ["--task", "nope"], "no such episode in this run"),
        (NINE, ["--html", page], "page.html exists"),
        (NINE, ["--html", str(tmp_path / "none" / "page.html")], "No such file or directory"),
        (NINE, ["--tips"], "is no run with a checkpoint"),
        (NINE, ["--tips", "--task", "radio"], "leave out --task"),
    ):
        assert view.main([run(episodes), *more]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert view.main([str(tmp_path / "none")]) == 2
    assert "no run with episodes" in capsys.readouterr().err


def test_the_commands_of_the_docstring(run, memory, capsys, tmp_path, monkeypatch):
    folder = run([EPISODE | {"iteration": iteration} for iteration in range(20)])
    monkeypatch.chdir(tmp_path)
    for line in view.__doc__.splitlines():
        if line.startswith("  python"):
            shown(capsys, folder, *shlex.split(line, comments=True)[3:])
    assert (tmp_path / "run.html").exists()


@pytest.fixture
def memory(tmp_path):
    """Two checkpoints; the newer one has two slots."""
    memory = TipMemory()
    for checkpoint, slots in (("checkpoint-9", ["old"]), ("checkpoint-10", ["fan/0", "a/1\x1b"])):
        memory.slots.clear()
        for slot in slots:
            for text, score in (("a", 50), ("b", 50), ("c", 50), ("low", 0), ("best\u202e", 99.5)):
                memory.add(np.eye(3)[0], text, score, slot)
            memory.judge(["a", "low"], 80, slot)
        (tmp_path / checkpoint).mkdir()
        memory.save(tmp_path / checkpoint / "tips.npz")
    (tmp_path / "checkpoint-11.tmp").mkdir()
    return memory


def test_tips_are_listed_by_slot_as_they_are_retrieved(memory, capsys, tmp_path):
    lines = shown(capsys, str(tmp_path), "--tips").splitlines()
    slot = [
        r"score 99.5 · mean 99.5 of 1 trials │ best\u202e",
        "score 50 · mean 65.0 of 2 trials │ a",
        "score 50 · mean 50.0 of 1 trials │ c",
        "score 50 · mean 50.0 of 1 trials │ b",
        "score 0 · mean 40.0 of 2 trials │ low",
    ]
    end = f"10 tips in 2 memories of {tmp_path / 'checkpoint-10' / 'tips.npz'}"
    assert lines == [r"── a/1\x1b · 5 tips", *slot, "── fan/0 · 5 tips", *slot, end]
    retrieved = memory.retrieve(np.eye(3)[0], "fan/0")
    assert [line.partition("│ ")[2] for line in slot] == [view.visible(tip) for tip in retrieved]


def test_a_damaged_memory_is_one_line_and_home_is_found(memory, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "checkpoint-10" / "tips.npz"
    path.write_bytes(b"no")
    assert view.main(["~", "--tips"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"view: {path}: damaged") and error.count("\n") == 1
    TipMemory().save(path)
    assert shown(capsys, "~", "--tips").startswith("0 tips in 0 memories")


def test_torch_is_not_loaded(run, memory, tmp_path):
    """It takes seconds, and a viewer is for a look."""
    code = "import sys; from experiments import view; view.main(sys.argv[1:]);"
    code += "assert 'torch' not in sys.modules"
    for more in ([], ["--tips"]):
        words = [sys.executable, "-c", code, run(NINE), *more]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


def test_head_does_not_make_it_fail(run):
    command = f"{sys.executable} experiments/view.py {run(NINE * 999)} --best 9999 | head -1"
    head = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert head.stderr == ""
