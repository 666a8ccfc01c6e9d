"""A policy of any shape with random weights, made where it shall be: nothing is loaded."""

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.integrations import replace_with_bnb_linear

from engine.plugins import ROOT
from engine.weights import four_bit, new_adapter
from policy import Policy

QWEN_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)


def skeleton(config, load_in_4bit=False, dtype=torch.bfloat16):
    """A model with its adapter, on the "meta" device: no numbers yet."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if load_in_4bit:
            model = replace_with_bnb_linear(model, ["lm_head"], four_bit(dtype))
        model.requires_grad_(False)
        return new_adapter(model, 16, 32, 0)


def fill(model, device="cpu", gradient_checkpointing=True):
    """Random numbers for a skeleton, made on the device -> a policy."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = 0.02 * torch.randn(parameter.shape, dtype=parameter.dtype, device=device)
            if "Norm" in type(module).__name__:
                weight += 1
            if name == "weight" and isinstance(module, bitsandbytes.nn.Linear4bit):
                pack_weight(module, weight)
            else:
                new = torch.nn.Parameter(weight, requires_grad=parameter.requires_grad)
                setattr(module, name, new)
    base = model.get_base_model()
    rotary = type(base.model.rotary_emb)
    base.model.rotary_emb = rotary(base.config).to(device)
    if gradient_checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return Policy(model, AutoTokenizer.from_pretrained(ROOT / "standin" / "scienceworld"))


def pack_weight(module, weight):
    """Give a Linear4bit its NF4 weight."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=False
    )
    # A plain parameter: bitsandbytes' own class cannot hold a tensor without numbers.
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    module.weight.quant_state = state
    module.quant_state = state
    module.support_avx512bf16_for_cpu = False
