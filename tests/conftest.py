# ruff: noqa: E402
"""Shared by the tests: a small Qwen2 checkpoint on disk with its own tokenizer. No network."""

import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and two tests run at a time
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers are compared in fp32, on the CPU
for stop in (signal.SIGINT, signal.SIGHUP):  # ignored in the background, and so by what tests start
    if signal.getsignal(stop) == signal.SIG_IGN:
        signal.signal(stop, signal.SIG_DFL)
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from policy import Policy

# A GPU is only a place: all else that is other there can be had on a CPU.
FP32 = {"dtype": "float32"}
AS_ON_A_GPU = {"dtype": "bfloat16", "gradient_checkpointing": True}
CHATML = (
    "{% for m in messages %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
SPLIT = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = ["system user assistant go to the kitchen open the box take the radio look around.\n"] * 9


def write_checkpoint(
    folder,
    hidden=64,
    layers=2,
    vocab=400,
    pad="<|endoftext|>",
    template=CHATML,
    seed=0,
    corpus=None,
    scale=0.2,
    config_class=Qwen2Config,
    added=(),
    **options,
):
    """A randomly initialised Qwen2 with a byte-level tokenizer, loaded like any hub checkpoint.

    added: further tokens, which are not special. options: of the model's configuration.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus or CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=pad,
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": scale,
    }
    config = config_class(**(shape | options))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def check_as_plain_transformers(name):
    """Greedy tokens and log-probs: sampled as `generate` does, scored as a forward pass does.

    (Those two differ from each other: by 4e-5 with SmolLM2.)
    """
    policy = Policy.load(name)
    prompt = policy.message("user", "look around") + policy.header
    (action,), (logps,) = policy.sample([prompt], [[0.0] * 12], 0.0)
    scored = policy.logprobs(
        torch.tensor([prompt + action]),
        torch.tensor([[False] * len(prompt) + [True] * len(action)]),
        1.0,
    )[0][0, len(prompt) :]
    plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": policy.stop_ids}
    with torch.no_grad():
        forward = plain(torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1]
        generated = plain.generate(
            torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **options
        )
    assert generated.sequences[0, len(prompt) :].tolist() == action and len(action) > 2
    for ours, logits in ((logps, torch.cat(generated.logits)), (scored, forward)):
        best = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.as_tensor(ours), best, atol=1e-5, rtol=0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen2"))
