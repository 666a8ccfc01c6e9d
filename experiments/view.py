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
import os
import sys
from pathlib import Path

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Episodes</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; color: #1d2129 }
details { border: 1px solid #d0d6de; border-radius: 6px; margin: .5rem 0; padding: .3rem .8rem }
summary { cursor: pointer }
h2 { font-size: 1rem; border-top: 1px solid #d0d6de; padding-top: .6rem }
pre { background: #f2f4f7; padding: .4rem .6rem; margin: .1rem 0 .4rem; white-space: pre-wrap }
pre.action { font-weight: bold }
</style>
"""


def visible(text, keep=""):
    """The text with what could steer a terminal or reorder a line written as an escape."""
    shown = []
    for c in str(text):
        safe = c.isprintable() or c in keep
        shown.append(c if safe else c.encode("unicode_escape").decode())
    return "".join(shown)


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
    found = episodes
    if args.task:
        found = [e for e in found if e["task"] in args.task]
    if args.episode:
        found = [e for e in found if e["number"] in args.episode]
    if args.iteration:
        first, last = min(args.iteration), max(args.iteration)
        found = [e for e in found if first <= e["iteration"] <= last]
    if not found:
        raise ValueError(
            "no such episode in this run" if episodes else "no episode in this run yet"
        )
    best, worst = args.best, args.worst
    if not (best or worst or args.episode or args.iteration):
        found = [e for e in found if e["iteration"] == found[-1]["iteration"]]
    if not (best or worst or args.episode or args.list or args.html):
        best = worst = 1  # all of them would flood the terminal
    if not (best or worst):
        return found
    ranked = sorted(found, key=lambda e: (e["score"], e["return"]), reverse=True)
    chosen = ranked[:best] + ranked[max(best, len(ranked) - worst) :]
    return sorted(chosen, key=lambda e: e["number"])


def show_episodes(args):
    """Print those that are asked for, or write the page."""
    path = args.run / "episodes.jsonl"
    if not path.exists():
        raise ValueError(f"{args.run} is no run with episodes: there is no {path}")
    if args.html and args.html.exists() and not args.force:
        raise ValueError(f"{args.html} exists; --force overwrites it")
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
    import memory

    for name, value in vars(args).items():
        if value and name not in ("run", "tips"):
            raise ValueError(f"--tips lists the whole memory; leave out --{name}")
    numbers = [path.name.removeprefix("checkpoint-") for path in args.run.glob("checkpoint-*")]
    numbers = [int(number) for number in numbers if number.isdigit()]
    if not numbers:
        raise ValueError(f"{args.run} is no run with a checkpoint")
    path = args.run / f"checkpoint-{max(numbers)}" / "tips.npz"
    slots = sorted((slot, columns) for slot, _, columns in memory.read(path))
    count = 0
    for slot, columns in slots:
        tips = []
        for age, (text, score, total, trials) in enumerate(zip(*columns)):
            tips.append((score, total / trials, age, trials, text))
        print(f"── {visible(slot)} · {len(tips)} tips")
        for score, mean, _, trials, text in sorted(tips, reverse=True):
            print(f"score {score:g} · mean {mean:.1f} of {trials} trials │ {visible(text)}")
        count += len(tips)
    print(f"{count} tips in {len(slots)} memories of {path}")


def home(path):
    """A path with ~ replaced: a shell leaves it in --html=~/x."""
    return Path(path).expanduser()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python experiments/view.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=home, help="run directory")
    parser.add_argument("--task", nargs="+", help="only these tasks")
    parser.add_argument(
        "--iteration", type=int, nargs="+", metavar="N", help="only this one, or first and last"
    )
    parser.add_argument("--episode", type=int, nargs="+", metavar="N", help="only these")
    parser.add_argument("--best", type=int, default=0, metavar="K", help="of those, the K best")
    parser.add_argument("--worst", type=int, default=0, metavar="K", help="the K worst, as well")
    parser.add_argument("--list", action="store_true", help="one line per episode")
    parser.add_argument("--html", type=home, metavar="FILE", help="write a page")
    parser.add_argument("--force", action="store_true", help="let --html overwrite FILE")
    parser.add_argument(
        "--tips",
        action="store_true",
        help="list the tips in the memory: score of the episode that wrote it, mean score of the "
        "episodes that wrote it or were shown it (trials)",
    )
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    try:
        if args.tips:
            show_tips(args)
        else:
            show_episodes(args)
        sys.stdout.flush()
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"view: {visible(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
