"""The same training by TRL's GRPOTrainer and by train.py, each in a process of its own.

  python -m venv trl && trl/bin/pip install -r experiments/peer.txt
  python -m experiments.peer --trl-python trl/bin/python

GRPO in the house: 2 tasks x 8 episodes an iteration, actions of at most 16 tokens, an optimiser
step per 8 episodes, LoRA r = 16 on all linear layers, fp32, no KL term. The weights are random:
random actions are not understood, so every episode has all its turns
and both sides train on as many tokens. Points are given for the letters of the last action; else
all returns were equal, and train.py leaves episodes without advantage out of the update.

TRL plays turns in two ways. With `environment_factory` the model acts by JSON tool calls, and the
first text that is none ends the episode; an action here is free text. So this is the other one,
`rollout_func`: a turn is a call of the method that TRL's own tool loop calls, which gives the
dialogues so far to transformers' `generate` (the faster vLLM needs a GPU), and the observation is
appended as ids, outside the loss. Gradient checkpointing, TRL's default, is off on both sides.

TRL reads the whole dialogue again at every turn; here keys and values are kept. TRL scores
observations, too, and masks them; here only actions meet the vocabulary. Both pad the episodes of a
step, and compute old log-probs before the first step. Only TRL: several GPUs by FSDP and DeepSpeed,
vLLM, continuous batching, vision, JSON tools, async environments, reward models, full fine-tuning,
other losses, several passes, kernels of the Hub. Only here: memory, tips that one turn sees,
off-policy turns, intrinsic rewards.

generation: from the first prompt to the last action. update: old log-probs and two optimiser steps.
tokens: those that entered the model, with padding and with what was read again.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from worlds.house import House

TASKS = ("radio", "fan")
GROUP = 8
STEP_EPISODES = 8
ACTION_TOKENS = 16
LEARNING_RATE = 1e-5


class Letters(House):
    """The house, with points for how many different letters the last action has."""

    def act(self, action):
        observation, _, solved, action = super().act(action)
        return observation, min(100, len(set(action))), solved, action


class Meter:
    """Seconds and tokens by iteration and phase; called when a phase begins."""

    def __init__(self):
        from torch import nn

        self.iterations = []
        self.phase = ""
        self.tokens = 0
        self.hook = nn.modules.module.register_module_forward_pre_hook(self.count)

    def count(self, module, inputs):
        """Called before each module's forward pass."""
        if type(module).__name__ == "Embedding":
            self.tokens += inputs[0].numel()

    def __call__(self, phase):
        if phase == self.phase:
            return
        if self.phase:
            seconds = time.perf_counter() - self.since
            self.iterations[-1][self.phase] = seconds, self.tokens
        if phase == "rollout":
            self.iterations.append({})
        self.phase = phase
        self.tokens = 0
        self.since = time.perf_counter()

    def table(self, turns, action_tokens):
        """What is printed, by name: medians over the iterations, of which the first warms up."""
        table = {}
        for phase, name in (("rollout", "generation"), ("update", "update")):
            seconds, tokens = zip(*(iteration[phase] for iteration in self.iterations[1:]))
            table[f"{name}, s"] = statistics.median(seconds)
            table[f"{name}, tokens"] = statistics.median(tokens)
        table["an iteration, s"] = table["generation, s"] + table["update, s"]
        table["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        table["turns"] = turns / len(self.iterations)
        table["action tokens"] = action_tokens / len(self.iterations)
        return table


# --- The two sides, each in a process of its own --------------------------------------------------
def run_ours(model, turns, iterations, folder):
    """train.py, with a meter in its clock."""
    import train
    from engine import logs, runs

    meter = Meter()

    class Clock(logs.Clock):
        def __call__(self, phase, text=""):
            meter(phase)
            super().__call__(phase, text)

    logs.Clock = Clock
    argv = (
        f"--env {__file__} --preset grpo --tasks {' '.join(TASKS)} --variations 1 --model {model} "
        f"--tasks-per-iteration {len(TASKS)} --group-size {GROUP} --step-limit {turns} "
        f"--minibatch-episodes {STEP_EPISODES} --action-tokens {ACTION_TOKENS} --eval-every 0 "
        f"--learning-rate {LEARNING_RATE} --iterations {iterations} --save-every {iterations} "
        f"--run-dir {folder}/run"
    )
    if train.main(argv.split()):
        raise SystemExit("train.py failed")
    episodes = runs.records(Path(folder) / "run" / "episodes.jsonl")
    played = [turn["tokens"] for episode in episodes for turn in episode["turns"]]
    return meter.table(len(played), sum(played))


def run_trl(model, turns, iterations, folder):
    """GRPOTrainer with a `rollout_func` that plays the house."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    house = Letters(step_limit=turns)
    openings = {task: opening(house, task) for task in TASKS}
    meter = Meter()
    masks = []

    def rollout_func(prompts, trainer):
        meter("rollout")
        tasks = [task for prompt in prompts for task in TASKS if openings[task] == prompt]
        output = play(trainer, tokenizer, tasks, turns)
        masks.extend(output["env_mask"])
        meter("update")
        return output

    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}
    silent = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, score, **_: score,
        args=GRPOConfig(
            output_dir=f"{folder}/run",
            num_generations=GROUP,
            per_device_train_batch_size=STEP_EPISODES,
            steps_per_generation=GROUP * len(TASKS) // STEP_EPISODES,
            max_steps=iterations * GROUP * len(TASKS) // STEP_EPISODES,
            max_completion_length=ACTION_TOKENS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            epsilon_high=0.3,
            **plain,
            **silent,
        ),
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in openings.values()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"
        ),
        rollout_func=rollout_func,
    )
    trainer.train()
    meter("")
    actions = sum(sum(1 for a, b in zip([0, *mask], mask) if b > a) for mask in masks)
    return meter.table(actions, sum(map(sum, masks)))


def opening(house, task):
    """The messages before the first action."""
    observation, info = house.reset(task, 0)
    texts = {"system": info["prompt"], "user": observation}
    return [{"role": role, "content": text} for role, text in texts.items()]


def play(trainer, tokenizer, tasks, turns):
    """An episode per task, side by side -> what TRL wants of a `rollout_func`."""
    houses = [Letters(step_limit=turns) for _ in tasks]
    dialogues = [opening(house, task) for house, task in zip(houses, tasks)]
    prompts = tokenizer.apply_chat_template(
        dialogues, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    completions = [[] for _ in tasks]
    masks = [[] for _ in tasks]  # 1 = an action's token
    live = list(range(len(tasks)))
    while live:
        dialogues = [prompts[i] + completions[i] for i in live]
        actions, _ = trainer._generate_single_turn(dialogues, None, {}, 1)
        playing = []
        for i, action in zip(live, actions):
            completions[i] += action
            masks[i] += [1] * len(action)
            text = tokenizer.decode(action, skip_special_tokens=True)
            observation, _, terminated, truncated, _ = houses[i].step(text)
            if not terminated and not truncated:
                message = f"\n<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n"
                if action[-1] != tokenizer.eos_token_id:
                    message = "<|im_end|>" + message
                ids = tokenizer(message, add_special_tokens=False).input_ids
                completions[i] += ids
                masks[i] += [0] * len(ids)
                playing.append(i)
        live = playing
    return {
        "prompt_ids": prompts,
        "completion_ids": completions,
        "logprobs": None,  # of the sampler: TRL computes those of its trainer
        "env_mask": masks,
        "score": [float(house.score) for house in houses],
    }


def make_model(model):
    """Random weights in which the network dominates, with the stand-in's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 768}
    config = AutoConfig.from_pretrained("standin/house", dtype="float32", **shape, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    AutoTokenizer.from_pretrained("standin/house").save_pretrained(model)


# --- The table ------------------------------------------------------------------------------------
SIDES = {"train.py": run_ours, "trl": run_trl}


def worker(python, side, *args):
    """Run a side -> what it printed last."""
    command = [python, "-m", "experiments.peer", "--worker", side, *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed: {' '.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trl-python", default=sys.executable, help="python of an environment with TRL")
    add("--turns", nargs="+", default=["7", "30"])
    add("--iterations", type=int, default=4, help="the first one warms up (default 4)")
    add("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, model, turns, iterations = args.worker
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(SIDES[side](model, int(turns), int(iterations), folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        make_model(model)
        for turns in args.turns:
            ours = worker(sys.executable, "train.py", model, turns, args.iterations)
            trl = worker(args.trl_python, "trl", model, turns, args.iterations)
            print(f"\n{turns + ' turns':28}{'TRL':>12}{'train.py':>12}{'ratio':>9}")
            for name, value in ours.items():
                digits = 2 if name.endswith((", s", "GB")) else 0
                cells = f"{trl[name]:12,.{digits}f}{value:12,.{digits}f}"
                print(f"{name:28}{cells}{trl[name] / value:8.1f}x", flush=True)


if __name__ == "__main__":
    main()
