"""view.py: what is shown of hand-made episodes in the terminal and in the page, hostile texts included.

pytest tests/test_view.py
"""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

import view

BAD = "<b>&amp;</b></pre></script><script>alert(1)</script>\"'$x \x1b[31m\r\x07 \u202e\u2066 \0 \ud800 \x9b"
SHOWN = r"""<b>&amp;</b></pre></script><script>alert(1)</script>"'$x \x1b[31m\r\x07 \u202e\u2066 \x00 \ud800 \x9b"""


def turn(mode="plain", update="on-policy", tips=(), **more):
    return {
        "observation": "a kitchen\n\ta box",
        "tips": list(tips),
        "action": "open box",
        "next": "opened",
        "reward": 3.0,
        "intrinsic": 0.25,
        "tokens": 4,
        "mode": mode,
        "update": update,
        **more,
    }


def episode(iteration=0, task="radio", score=0.0, **more):
    return {
        "iteration": iteration,
        "task": task,
        "variation": 0,
        "group": 0,
        "score": score,
        "ended": "step limit",
        "tip": "look in the box",
        "task_text": "find it",
        "advantage": -0.5,
        "return": 3.25,
        "turns": [turn()],
        **more,
    }


# Lines 1 to 9: in each iteration scores 0, 50 and -100.
PLAIN = [
    episode(i, task, score)
    for i in range(3)
    for task, score in (("radio", 0.0), ("fan", 50.0), ("radio", -100.0))
]


@pytest.fixture
def run(tmp_path):
    def write(episodes, tail=b""):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "episodes.jsonl").write_bytes(
            "".join(json.dumps(e) + "\n" for e in episodes).encode() + tail
        )
        return str(folder)

    return write


def shown(capsys, *argv):
    assert view.main(list(argv)) == 0
    return capsys.readouterr().out


def numbers(capsys, *argv):
    return [
        int(line.split()[1])
        for line in shown(capsys, *argv).splitlines()
        if line.startswith("episode ")
    ]


def refused(capsys, *argv):
    assert view.main(list(argv)) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    return error


class Page(HTMLParser):
    """What a browser would see: texts by tag, and the tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, name):
        return sum(tag == name for tag, _ in self.tags)


def test_modes_tips_and_figures_in_the_terminal(run, capsys):
    turns = [
        turn(),
        turn("memory", "on-policy", ["tip A", "tip B"]),
        turn("memory", "off-policy", ["tip B", "tip C"]),
    ]
    out = shown(capsys, run([episode(turns=turns, advantage=1.25)]))
    for text in (
        "turn 1 · plain · on-policy · reward +3.00 · intrinsic 0.250 · 4 tokens",
        "▲+1.250",
        "return +3.25",
        "turn 2 · memory · on-policy with tips",
        "turn 3 · memory · off-policy",
        "│ numbers 2 3",
        "3, 2 with tips",
        "ended step limit",
        "observation │ a kitchen\n             │ \ta box",
        "led to │ opened",
        "tip written │ look in the box",
    ):
        assert text in out
    assert out.count("│ tip B") == 1, "a tip is written out once"
    assert "\x1b" not in out, "colour is for terminals"


def test_colour_on_a_terminal_unless_no_color(run, capsys, monkeypatch):
    folder = run([episode()])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36mplain · on-policy\x1b[0m" in shown(capsys, folder)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(capsys, folder)


@pytest.mark.parametrize(
    "filters, wanted",
    [
        ("", [8, 9]),
        ("--list", [7, 8, 9]),
        ("--task radio", [7, 9]),
        ("--iteration 1", [5, 6]),
        ("--iteration 0 1 --list", [1, 2, 3, 4, 5, 6]),
        ("--best 2", [2, 5]),
        ("--worst 1", [9]),
        ("--last --best 1", [8]),
        ("--best 1 --worst 1 --task radio --iteration 0", [1, 3]),
        ("--best 99 --worst 99", list(range(1, 10))),
        ("--episode 4 7", [4, 7]),
    ],
)
def test_filters(run, capsys, filters, wanted):
    folder = run(PLAIN)
    assert numbers(capsys, folder, *filters.split()) == wanted
    assert f"{len(wanted)} of 9 episodes, {9 - len(wanted)} left out" in shown(
        capsys, folder, *filters.split()
    )


def test_page_holds_what_the_filters_leave(run, capsys, tmp_path, monkeypatch):
    out = tmp_path / "out.html"
    monkeypatch.setattr(view, "PAGE_LIMIT", 5)
    shown(capsys, run(PLAIN), "--html", str(out))
    page = Page(out.read_text(encoding="utf-8"))
    details = [attrs for tag, attrs in page.tags if tag == "details"]
    assert [d["data-iteration"] for d in details] == ["1", "1", "2", "2", "2"]
    assert [d["data-rank"] for d in details] == ["0", "3", "2", "1", "4"]
    assert "5 of 9 episodes, 4 left out" in out.read_text(encoding="utf-8")
    assert "--force" in refused(capsys, run(PLAIN), "--html", str(out))
    shown(capsys, run(PLAIN), "--html", str(out), "--force", "--best", "1")
    assert Page(out.read_text(encoding="utf-8")).count("details") == 1
    assert "must end in .html" in refused(
        capsys, run(PLAIN), "--html", run(PLAIN) + "/episodes.jsonl", "--force"
    )


def hostile():
    return episode(
        task=BAD,
        variation=BAD,
        group=BAD,
        ended=BAD,
        tip=BAD,
        task_text=BAD,
        turns=[
            turn(
                "memory",
                "on-policy",
                [BAD, "x" * 100_000],
                observation="\n" + BAD,
                action=BAD,
                next=BAD,
                reward=BAD,
                intrinsic=BAD,
                tokens=BAD,
            ),
            turn(BAD, BAD),
        ],
    )


def test_hostile_text_is_shown_as_text_in_the_terminal(run, capsys):
    out = shown(capsys, run([hostile()]))
    assert out.count(SHOWN) == 12 and "x" * 100_000 in out
    assert all(c.isprintable() or c in "\n\t" for c in out)
    assert numbers(capsys, run([hostile()]), "--task", BAD, "--list") == [1]


def test_hostile_text_is_shown_as_text_in_the_page(run, capsys, tmp_path):
    pages = []
    harmless = episode(turns=[turn("memory", "on-policy", ["a", "b"]), turn("x")])
    for name, e in {"bad": hostile(), "good": harmless}.items():
        shown(capsys, run([e]), "--html", str(tmp_path / f"{name}.html"))
        pages.append((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
    bad, good = map(Page, pages)
    assert [tag for tag, _ in bad.tags] == [tag for tag, _ in good.tags], (
        "no text makes or ends an element"
    )
    assert [sorted(a) for _, a in bad.tags] == [sorted(a) for _, a in good.tags]
    assert "".join(bad.texts).count(SHOWN) == 12 and "x" * 100_000 in pages[0]
    assert dict(bad.tags)["details"].get("data-task", SHOWN) == SHOWN
    assert '<pre class="text">\n\n&lt;b&gt;' in pages[0], (
        "the empty first line of the observation survives"
    )
    assert all(c.isprintable() or c in "\n\t" for c in pages[0])


def test_page_needs_nothing_from_outside(run, capsys, tmp_path):
    shown(capsys, run(PLAIN), "--html", str(tmp_path / "out.html"))
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    policy = next(
        a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    nonces = {a["nonce"] for tag, a in page.tags if tag in ("style", "script")}
    assert len(nonces) == 1 and policy.count(f"'nonce-{nonces.pop()}'") == 2
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not any(
        {"src", "href", "style"} & set(a) or any(n.startswith("on") for n in a)
        for _, a in page.tags
    )


def test_a_transcript_without_the_newer_fields(run, capsys, tmp_path):
    old = {
        k: v
        for k, v in episode().items()
        if k not in ("advantage", "return", "group", "variation", "tip")
    }
    old["turns"] = [{"observation": "a kitchen", "action": "wait"}]
    out = shown(capsys, run([old]))
    assert (
        "mode not recorded" in out
        and "advantage –" in out
        and "return –" in out
        and "│ wait" in out
    )
    shown(capsys, run([old]), "--html", str(tmp_path / "out.html"))


@pytest.mark.parametrize("tail", [b'{"iteration": 9, "ta', b"\xc3", b"\0\0\0"])
def test_half_a_line_at_the_end_is_skipped_with_a_remark(run, capsys, tail):
    out = shown(capsys, run(PLAIN, tail), "--list")
    assert "3 of 9 episodes" in out and "line 10 is half written" in out


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"turns": [1]}',
        json.dumps(episode(advantage="1")).encode(),
    ],
)
def test_a_damaged_line_is_named(run, capsys, line):
    whole = json.dumps(PLAIN[0]).encode() + b"\n"
    error = refused(capsys, run(PLAIN, line + b"\n" + whole), "--list")
    assert "episodes.jsonl, line 10: damaged" in error


def test_other_bad_input(run, capsys, tmp_path):
    assert "no run with episodes" in refused(capsys, str(tmp_path / "none"))
    assert "no run with episodes" in refused(capsys, str(tmp_path))
    assert "no episodes yet" in refused(capsys, run([]))
    assert "no such episode" in refused(capsys, run(PLAIN), "--task", "nope")
    assert "positive" in refused(capsys, run(PLAIN), "--best", "-1")
    assert (
        "no such" in refused(capsys, run(PLAIN), "--html", str(tmp_path / "no" / "x.html")).lower()
    )


def test_head_and_help(run):
    head = subprocess.run(
        f"{sys.executable} {ROOT}/view.py {run(PLAIN * 3000)} --best 9999 | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert head.stderr == ""
    shown = subprocess.run(
        [sys.executable, str(ROOT / "view.py"), "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "python view.py" in shown.stdout and "\\x1b" in shown.stdout
