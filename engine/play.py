"""Play an environment by hand: `python envs.py --env house`."""

import argparse
import sys


def play(env, task: str, variation: int) -> None:
    """Play one episode on the terminal."""
    observation, info = env.reset(task, variation)
    print(f"{info['prompt']}\n\n{observation}")
    terminated = truncated = False
    while not terminated and not truncated:
        action = input(f"\n[score {info['score']}] > ")
        if action.strip() == "valid":
            print("\n".join(env.valid_actions()))
        elif action.strip() == "gold":
            print("\n".join(env.gold_path()))
        else:
            observation, reward, terminated, truncated, info = env.step(action)
            print(f"{observation}\n(reward {reward:+g})")
    reason = "step limit" if truncated else "finished"
    print(f"The episode is over: {reason}, score {info['score']}.")


def main(make, parse_options, names) -> int:
    """Play by hand. Exit code 2 for wrong arguments, 1 for a lost simulator."""
    parser = argparse.ArgumentParser(
        description="Play an environment by hand: type one action per line.",
        epilog="While playing, 'valid' lists the valid actions and 'gold' a solution; "
        "Ctrl-D or Ctrl-C ends. Example: python envs.py --env house --task radio",
    )
    parser.add_argument(
        "--env", default="scienceworld", help=f"{', '.join(names)}, or path/to/file.py"
    )
    parser.add_argument(
        "--env-options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of the environment, such as rooms=2 of house or data=FOLDER of webshop",
    )
    parser.add_argument("--task", help="task name; without it the tasks are listed")
    parser.add_argument("--variation", type=int, default=0, help="of the task (default: 0)")
    args = parser.parse_args()
    try:
        env = make(args.env, **parse_options(args.env_options))
        if args.task is None:
            print("\n".join(env.tasks()))
        else:
            play(env, args.task, args.variation)
    except (EOFError, KeyboardInterrupt):
        print()
    except (ValueError, RuntimeError) as error:
        print(f"envs.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0
