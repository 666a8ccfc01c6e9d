"""Load the weights that were asked for, all of them, or refuse in one line.

It changes no number: skip it on a first reading.
"""

import hashlib
import math
import os
import sys

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

# What loading damaged files raises.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
COMPUTED = ("rotary_emb.inv_freq",)  # stored by older versions of transformers; not weights


def load_model(name, device, dtype, load_in_4bit):
    """(model, tokenizer, checksum of the weights) of a hub id or a folder; the model is frozen.

    If it is an adapter, as supervised fine-tuning leaves one, it is merged into its base model.
    A quantised checkpoint stays as it is, but computes in `dtype`.
    Raises ValueError with one line, also if the checkpoint holds other weights than the model has.
    """
    try:
        adapter = find_adapter_config_file(name)
    except UNREADABLE:  # no such place: the tokenizer's error says it
        adapter = None
    if adapter:
        return merged(name, device, dtype, load_in_4bit)
    tokenizer = load_tokenizer(name)
    options = {}
    if load_in_4bit:  # not None otherwise: that would erase what the checkpoint says of itself
        options["quantization_config"] = four_bit(dtype)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{name}: the model could not be loaded ({first_line(error)})") from error
    other = {
        "missing": found["missing_keys"],
        "unexpected": [key for key in found["unexpected_keys"] if not key.endswith(COMPUTED)],
        "of another shape": [key for key, *_ in found["mismatched_keys"]],
    }
    refuse_other_weights(name, other)
    if getattr(model, "is_loaded_in_4bit", False) and not load_in_4bit:
        print(f"{name} holds 4-bit weights", file=sys.stderr)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # repacks weights; training raises
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "compute_dtype"):  # of a 4-bit layer: a checkpoint may name another
            module.compute_dtype = dtype
    return model.requires_grad_(False), tokenizer, checksum(model.named_parameters())


def load_tokenizer(name):
    """The tokenizer of a hub id or a folder. Raises ValueError with one line."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what tokenizers raises for a damaged file has no class
        if not os.path.isdir(name):
            raise ValueError(
                f"{name}: there is no such folder, and no such model could be had from the hub"
            ) from error
        raise ValueError(
            f"{name}: no tokenizer could be loaded; give a hub id or a folder that holds "
            f"tokenizer.json and a model ({first_line(error)})"
        ) from error


def merged(name, device, dtype, load_in_4bit):
    """As `load_model`: the adapter `name` merged into its base model, and said."""
    if os.path.exists(os.path.join(name, "config.json")):
        raise ValueError(
            f"{name}: holds a model and an adapter; which is meant? Give each a folder of its own"
        )
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        if not base:
            raise ValueError("it names none")
        model, tokenizer, base_checksum = load_model(base, device, dtype, load_in_4bit)
        if os.path.exists(os.path.join(name, "tokenizer.json")):
            tokenizer = load_tokenizer(name)
        model = load_adapter(model, name)
        # Of both parts, not of the sum, which is rounded otherwise in every precision.
        own = checksum((n, p) for n, p in model.named_parameters() if p.requires_grad)
        model = model.merge_and_unload(safe_merge=True)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ValueError(
            f"{name} is an adapter, and cannot be merged into its base model: {first_line(error)}"
        ) from error
    precision = "4-bit" if getattr(model, "is_loaded_in_4bit", False) else str(dtype)[6:]
    print(f"{name} is an adapter: merged into {base}, in {precision}", file=sys.stderr)
    return model.requires_grad_(False), tokenizer, base_checksum + own


def refuse_other_weights(place, found):
    """Raise ValueError if {what is wrong with them: names of weights} names any."""
    for wrong, names in found.items():
        if names:
            raise ValueError(
                f"{place}: its weights are not those that its configuration describes: "
                f"{len(names)} {wrong}, such as {min(names)}"
            )


def checksum(parameters):
    """Checksum of (name, weight) pairs: names, shapes and up to 64 numbers of each.

    The same in float32, bfloat16 and NF4: of a matrix it takes what NF4 keeps, the largest |weight|
    of 64 in a row, and rounds it to bfloat16.
    """
    seen = hashlib.sha256()
    for name, weight in parameters:
        packed = getattr(weight, "quant_state", None)
        shape = tuple(packed.shape if packed else weight.shape)
        blocks = math.prod(shape) // 64
        if packed:
            numbers = packed.absmax[:blocks][:: blocks // 64 + 1]
        elif len(shape) == 1:
            numbers = weight[:: blocks + 1]
        else:
            rows = weight.reshape(-1)[: blocks * 64].view(blocks, 64)
            numbers = rows[:: blocks // 64 + 1].abs().amax(1)
        seen.update(repr((name, shape)).encode())
        seen.update(repr(numbers.bfloat16().tolist()).encode())
    return seen.hexdigest()


def four_bit(dtype):
    """NF4 weights that compute in `dtype`. Raises ValueError where bitsandbytes cannot run."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            "4-bit was asked for but bitsandbytes cannot run here "
            f"({first_line(error)}); use --load-in-4bit false"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def new_adapter(model, lora_r, lora_alpha, seed):
    """The model with a new fp32 adapter on every linear layer, which changes nothing yet."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,  # dropout breaks the ratio
        target_modules="all-linear",
    )
    return in_fp32(get_peft_model(model, config))


def load_adapter(model, folder):
    """The model with the fp32 adapter of a folder. Raises ValueError if it does not fit."""
    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        model = get_peft_model(model, config)
        keys = model.load_adapter(folder, "default", is_trainable=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{folder}: the adapter does not fit the model or is damaged ({first_line(error)})"
        ) from error
    other = {"missing": keys.missing_keys, "unexpected": keys.unexpected_keys}
    refuse_other_weights(folder, other)
    return in_fp32(model)


def in_fp32(model):
    """At learning rates of 1e-5 a bf16 weight would not move."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def first_line(error):
    """The beginning of an exception's text, for a message of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
