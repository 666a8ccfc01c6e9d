r"""Look at a run's episodes turn by turn, in the terminal or as one HTML file that needs no network.

  python view.py runs/house-radio-0                      # the best and the worst episode of the last iteration
  python view.py runs/house-radio-0 --list               # all of the last iteration, one line each
  python view.py runs/house-radio-0 --episode 17         # by its number, which is its line in episodes.jsonl
  python view.py runs/house-radio-0 --task radio --iteration 10 20 --best 3 --worst 3
  python view.py runs/house-radio-0 --html run.html      # the whole run, at most its last 200 episodes

Best and worst go by score, then return. Whatever could steer a terminal or a page is shown as \x1b, \u202e, ...
"""

import argparse
import html
import json
import os
import secrets
import string
import sys
from pathlib import Path

PAGE_LIMIT = 200  # episodes; some 10 MB when they are long
LABELS = {
    "plain": "plain · on-policy",
    "on": "memory · on-policy with tips",
    "off": "memory · off-policy",
    "unknown": "mode not recorded",
}
COLOURS = {"bold": 1, "dim": 2, "down": 31, "up": 32, "off": 33, "on": 35, "plain": 36}


def visible(text, keep=""):
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in ("–" if text is None else str(text))
    )


def number(value, form="+.2f"):  # transcripts of older versions lack some
    return (
        format(value, form)
        if isinstance(value, (int, float)) and abs(value) < 1e15
        else visible(value)
    )


def facts(e):
    """What stands in the list and above an episode: (name, text, style) triples."""
    advantage, tips = e.get("advantage") or 0, sum(bool(turn.get("tips")) for turn in e["turns"])
    mark, style = ("▲", "up") if advantage > 0 else ("▼", "down") if advantage < 0 else ("", "dim")
    return [
        ("episode", f"{e['number']:<4}", "bold"),
        ("iteration", f"{e['iteration']:<3}", ""),
        ("task", visible(f"{e['task']}/{e.get('variation')}"), "bold"),
        ("group", visible(e.get("group")), ""),
        ("score", f"{number(e['score'], 'g'):<4}", "bold"),
        ("return", f"{number(e.get('return')):<7}", ""),
        ("advantage", f"{mark + number(e.get('advantage'), '+.3f'):<7}", style),
        ("turns", f"{len(e['turns'])}, {tips} with tips", ""),
        ("ended", visible(e.get("ended")), ""),
    ]


def blocks(e):
    """An episode as (kind, name, text) triples; a kind of LABELS opens a turn, "tips" brings a list."""
    yield "text", "task", e.get("task_text")
    for t, turn in enumerate(e["turns"], 1):
        kind = {
            ("plain", "on-policy"): "plain",
            ("memory", "on-policy"): "on",
            ("memory", "off-policy"): "off",
        }.get((str(turn.get("mode")), str(turn.get("update"))), "unknown")
        yield (
            kind,
            f"turn {t}",
            (
                f"reward {number(turn.get('reward'))} · intrinsic "
                f"{number(turn.get('intrinsic'), '.3f')} · {number(turn.get('tokens'), 'g')} tokens"
            ),
        )
        yield "text", "observation", turn.get("observation")
        if turn.get("tips"):
            left_out = ", others left out" * bool(turn.get("tips_left_out"))
            yield (
                "tips",
                f"{len(turn['tips'])} tip" + "s" * (len(turn["tips"]) > 1) + left_out,
                turn["tips"],
            )
        yield "action", "action" + ", cut" * bool(turn.get("cut")), turn.get("action")
    yield "text", "led to", e["turns"][-1].get("next") if e["turns"] else None
    yield "text", "tip written" + ", cut" * bool(e.get("tip_cut")), e.get("tip")


def index(path):
    """(episodes, remark); of their turns only what `facts` needs, as a long run has gigabytes: `read` has the rest."""
    entries, offset = [], 0
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                e = json.loads(line)
                turns = [{"tips": len(turn.get("tips", []))} for turn in e["turns"]]
                e |= {
                    "number": n,
                    "offset": offset,
                    "turns": turns,
                    "task": str(e["task"]),
                    "rank": (e["score"] + 0.0, (e.get("return") or 0) + 0.0),
                }
                (e.get("advantage") or 0) + 0.0 + e["iteration"]  # raises unless both are numbers
            except (
                ValueError,
                TypeError,
                KeyError,
                AttributeError,
                OverflowError,
                RecursionError,
            ) as error:
                if line.endswith(b"\n"):
                    raise ValueError(
                        f"{path}, line {n}: damaged, this is not an episode"
                    ) from error
                return (
                    entries,
                    f"; line {n} is half written and left out (the run goes on, or was killed)",
                )
            entries.append(e)
            offset += len(line)
    return entries, ""


def read(path, entry):
    with open(path, "rb") as file:
        file.seek(entry["offset"])
        return entry | {"turns": json.loads(file.readline())["turns"]}


def choose(entries, a):
    found = [
        e
        for e in entries
        if (not a.task or e["task"] in a.task)
        and (not a.episode or e["number"] in a.episode)
        and (not a.iteration or min(a.iteration) <= e["iteration"] <= max(a.iteration))
    ]
    if not found:
        raise ValueError(
            "no such episode in this run" if entries else "the run has no episodes yet"
        )
    asked = a.best or a.worst or a.episode or a.html
    if a.last or not (asked or a.iteration):
        found = [e for e in found if e["iteration"] == found[-1]["iteration"]]
    best, worst = (
        (a.best or 0, a.worst or 0) if asked or a.list else (1, 1)
    )  # everything would flood the terminal
    if best or worst:
        ranked = sorted(found, key=lambda e: e["rank"], reverse=True)
        found = sorted(
            ranked[:best] + ranked[max(best, len(ranked) - worst) :], key=lambda e: e["number"]
        )
    return found[-PAGE_LIMIT:] if a.html else found


def paint(text, style):
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or style not in COLOURS
    return text if plain else f"\x1b[{COLOURS[style]}m{text}\x1b[0m"


def print_episode(e):
    def out(name, text, style=""):
        for i, line in enumerate(
            visible(text, "\n\t").split("\n")
        ):  # behind the bar no text can pose as ours
            print(paint(f"{'' if i else name:>12} │ ", "dim") + paint(line, style))

    shown = {}
    for kind, name, text in blocks(e):
        if kind in LABELS:
            print(f"── {name} · {paint(LABELS[kind], kind)} · {text}")
        elif kind == "tips":  # each is written out once
            old, numbers = len(shown), [shown.setdefault(str(tip), len(shown) + 1) for tip in text]
            out(name, "numbers " + " ".join(map(str, numbers)))
            for tip in list(shown)[old:]:
                out(f"tip {shown[tip]}", tip)
        else:
            out(name, text, "bold" if kind == "action" else "")


def page(path, entries, remark):
    """view.html filled in; all text goes through `escaped`, and only what has the page's nonce may run."""

    def escaped(text, keep="\n\t"):
        return html.escape(visible(text, keep))

    out, ranks = [], [e["number"] for e in sorted(entries, key=lambda e: e["rank"], reverse=True)]
    for e in entries:
        out.append(
            f'<details class="episode" data-task="{escaped(e["task"], "")}" data-iteration="{e["iteration"]}" '
            f'data-rank="{ranks.index(e["number"])}"><summary>'
        )
        out += [
            f'<span>{name} <b class="{style}">{escaped(text)}</b></span> '
            for name, text, style in facts(e)
        ]
        out.append("</summary>")
        for kind, name, text in blocks(read(path, e)):
            if kind in LABELS:
                out.append(
                    f'<h2>{name} <b class="{kind}">{LABELS[kind]}</b> <small>{escaped(text)}</small></h2>'
                )
            elif kind == "tips":
                tips = "".join(f"<li>{escaped(tip)}</li>" for tip in text)
                out.append(f"<details><summary>{name}</summary><ol>{tips}</ol></details>")
            else:  # a line break right behind <pre> belongs to the tag
                out.append(f'<small>{name}</small><pre class="{kind}">\n{escaped(text)}</pre>')
        out.append("</details>\n")
    template = string.Template((Path(__file__).parent / "view.html").read_text(encoding="utf-8"))
    return template.substitute(
        nonce=secrets.token_hex(),
        title=escaped(path.parent.resolve().name, ""),
        remark=remark,
        episodes="".join(out),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--task", nargs="+", help="only these tasks")
    parser.add_argument(
        "--iteration", type=int, nargs="+", metavar="N", help="only this one, or first and last"
    )
    parser.add_argument("--episode", type=int, nargs="+", metavar="N", help="only these")
    parser.add_argument("--last", action="store_true", help="only the last iteration")
    parser.add_argument("--best", type=int, metavar="K", help="of those, the K best")
    parser.add_argument(
        "--worst", type=int, metavar="K", help="of those, the K worst; may stand beside --best"
    )
    parser.add_argument("--list", action="store_true", help="one line per episode")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page")
    parser.add_argument("--force", action="store_true", help="let --html overwrite FILE.html")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    try:
        path = Path(args.run) / "episodes.jsonl"
        if not path.is_file():
            raise ValueError(f"{args.run} is no run with episodes: there is no {path}")
        if min(args.best or 1, args.worst or 1) < 1:
            raise ValueError("--best and --worst take a positive number")
        if args.html and (args.html.suffix != ".html" or args.html.exists() and not args.force):
            raise ValueError(
                f"--html {args.html}: "
                + (
                    "the file exists; --force overwrites it"
                    if args.html.suffix == ".html"
                    else "the name must end in .html"
                )
            )
        entries, remark = index(path)
        chosen = choose(entries, args)
        remark = f"{len(chosen)} of {len(entries)} episodes, {len(entries) - len(chosen)} left out{remark}"
        if args.html:
            text = page(path, chosen, remark)
            with open(args.html, "w" if args.force else "x", encoding="utf-8") as file:
                file.write(text)
        for e in [] if args.html else chosen:
            print(
                ("" if args.list else "\n")
                + " · ".join(f"{n} {paint(text, style)}" for n, text, style in facts(e))
            )
            if not args.list:
                print_episode(read(path, e))
        print(f"{remark}; --help tells how to choose others", flush=True)
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"view.py: {visible(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
