r"""Look at a run's episodes turn by turn, in the terminal or as one HTML page.

  python experiments/view.py runs/house-radio-0               # best and worst of the last iteration
  python experiments/view.py runs/house-radio-0 --list        # all of it, one line each
  python experiments/view.py runs/house-radio-0 --episode 17  # by its line in episodes.jsonl
  python experiments/view.py runs/house-radio-0 --task radio --iteration 10 20 --best 3 --worst 3
  python experiments/view.py runs/house-radio-0 --iteration 0 20 --html run.html
  python experiments/view.py runs/house-radio-0 --tips        # the memory of the newest checkpoint

Best and worst go by score, then return. What could steer a terminal is shown as \x1b, \u202e, ...
"""

import argparse
import html
import json
import math
import os
import sys
from pathlib import Path

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Episodes</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto }
details { border: 1px solid #d0d6de; margin: .5rem 0; padding: .3rem .8rem }
h2 { font-size: 1rem; border-top: 1px solid #d0d6de; padding-top: .6rem }
pre { background: #f2f4f7; padding: .4rem .6rem; white-space: pre-wrap }
pre.action { font-weight: bold }
</style>
"""


def visible(text, keep=""):
    """The text with what could steer a terminal or reorder a line written as an escape."""
    escaped = (
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )
    return "".join(escaped)


def read(path):
    """The episodes of a file, numbered by line; without runs.py, which loads torch for seconds."""
    episodes = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # the last line of a running run may be half written
                break
            try:
                episodes.append({"number": number, **json.loads(line)})
            except (ValueError, TypeError):
                print(f"view: line {number} is damaged, and left out", file=sys.stderr)
    return episodes


def headline(e):
    """An episode in one line."""
    with_tips = sum(turn["mode"] == "memory" for turn in e["turns"])
    return visible(
        f"episode {e['number']} · iteration {e['iteration']} · {e['task']}/{e['variation']}"
        f" · group {e['group']} · score {e['score']} · return {e['return']}"
        f" · {len(e['turns'])} turns, {with_tips} with tips · ended {e['ended']}"
    )


def blocks(e):
    """An episode as (name, text) pairs; a text of None makes the name a heading."""
    yield "task", e["task_text"]
    numbers = {}  # of the tips: each is written out once
    for t, turn in enumerate(e["turns"], 1):
        how = f"{turn['mode']} · {turn['update']} · {turn['tokens']} tokens"
        reward = f"reward {turn['reward']} · novelty {turn['novelty']}"
        yield f"turn {t} · {how} · {reward} · advantage {turn['advantage']}", None
        yield "observation", turn["observation"]
        for tip in turn["tips"]:
            if tip in numbers:
                yield f"tip {numbers[tip]}", "(as above)"
            else:
                numbers[tip] = len(numbers) + 1
                yield f"tip {numbers[tip]}", tip
        if turn["tips_left_out"]:
            yield "tips", f"{turn['tips_left_out']} more did not fit"
        if turn["written"] != turn["action"]:
            yield "written", turn["written"]
        yield "action, cut" if turn["action_cut"] else "action", turn["action"]
    if e["turns"]:
        yield "led to", e["turns"][-1]["next_observation"]
    if e["tip"]:
        yield "tip written, cut" if e["tip_cut"] else "tip written", e["tip"]


def print_episode(e):
    print(f"\n{headline(e)}")
    for name, text in blocks(e):
        if text is None:
            print(f"── {visible(name)}")
            continue
        for line in visible(text, "\n\t").split("\n"):  # behind the bar no text can pose as ours
            print(f"{name:>16} │ {line}")
            name = ""


def page(episodes):
    """A page of closed episodes; every text is escaped."""
    lines = [PAGE]
    for e in episodes:
        lines.append(f"<details><summary>{html.escape(headline(e))}</summary>")
        for name, text in blocks(e):
            if text is None:
                lines.append(f"<h2>{html.escape(visible(name))}</h2>")
                continue
            kind = "action" if name.startswith("action") else "text"
            # a line break right behind <pre> belongs to the tag
            escaped = html.escape(visible(text, "\n\t"))
            lines.append(f'{name}<pre class="{kind}">\n{escaped}</pre>')
        lines.append("</details>")
    return "\n".join(lines)


def choose(episodes, args):
    """The episodes that the command line asks for, in their order."""
    first, last = min(args.iteration or [0]), max(args.iteration or [math.inf])
    found = [
        e
        for e in episodes
        if (not args.task or e["task"] in args.task)
        and (not args.episode or e["number"] in args.episode)
        and first <= e["iteration"] <= last
    ]
    if not found:
        raise ValueError(f"no {'such episode' if episodes else 'episode yet'} in this run")
    best, worst = args.best, args.worst
    if not (best or worst or args.episode or args.iteration):
        found = [e for e in found if e["iteration"] == found[-1]["iteration"]]
    if not (best or worst or args.episode or args.list or args.html):
        best = worst = 1  # all of them would flood the terminal
    if not (best or worst):
        return found
    ranked = sorted(found, key=lambda e: (e["score"], e["return"]), reverse=True)
    ranked[best : max(best, len(ranked) - worst)] = []
    return sorted(ranked, key=lambda e: e["number"])


def show_episodes(args):
    """Print those that are asked for, or write the page."""
    path = args.run / "episodes.jsonl"
    if not path.exists():
        raise ValueError(f"{args.run} is no run with episodes: there is no {path}")
    if args.html and args.html.exists():
        raise ValueError(f"{args.html} exists; give another name")
    episodes = read(path)
    chosen = choose(episodes, args)
    if args.html:
        args.html.write_text(page(chosen), encoding="utf-8")
    elif args.list:
        print(*map(headline, chosen), sep="\n")
    else:
        for e in chosen:
            print_episode(e)
    print(f"{len(chosen)} of {len(episodes)} episodes; --help tells how to choose others")


def show_tips(args):
    """Print the memory of the newest checkpoint, slot by slot; the best first, as in retrieval.

    Score: of the episode that wrote the tip. Trials: the episodes that wrote it or were shown it.
    """
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # absent where this is a script
    import numpy as np

    import memory

    for name, value in vars(args).items():
        if value and name not in ("run", "tips"):
            raise ValueError(f"--tips lists the whole memory; leave out --{name}")
    names = [path.name for path in args.run.glob("checkpoint-*") if path.name[11:].isdigit()]
    if not names:
        raise ValueError(f"{args.run} is no run with a checkpoint")
    path = args.run / max(names, key=lambda name: int(name[11:])) / "tips.npz"
    store = memory.TipMemory()
    store.load(path)
    for name, slot in sorted(store.slots.items()):
        print(f"── {visible(name)} · {len(slot.texts)} tips")
        for i in memory.best_first(slot, np.ones(len(slot.texts)), max_tips=None):
            mean = slot.totals[i] / slot.trials[i]
            served = f"mean {mean:.1f} of {slot.trials[i]} trials"
            print(f"score {slot.scores[i]:g} · {served} │ {visible(slot.texts[i])}")
    print(f"{len(store)} tips in {len(store.slots)} memories of {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python experiments/view.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def home(path):  # a shell leaves ~ in --html=~/x
        return Path(path).expanduser()

    add("run", type=home, help="run directory")
    add("--task", nargs="+", help="only these tasks")
    add("--iteration", type=int, nargs="+", metavar="N", help="only this one, or first and last")
    add("--episode", type=int, nargs="+", metavar="N", help="only these")
    add("--best", type=int, default=0, metavar="K", help="of those, the K best")
    add("--worst", type=int, default=0, metavar="K", help="the K worst, as well")
    add("--list", action="store_true", help="one line per episode")
    add("--html", type=home, metavar="FILE", help="write a page")
    add("--tips", action="store_true", help="list the tips: score of the episode that wrote it, "
        "mean score of the episodes that wrote it or were shown it (trials)")  # fmt: skip
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    try:
        show_tips(args) if args.tips else show_episodes(args)
        sys.stdout.flush()
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"view: {visible(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
