"""Load the weights that were asked for, all of them, or refuse in one line.

Infrastructure: skip it on a first reading.
"""

import hashlib
import json
import math
import os
import pickle
import struct
import sys

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from engine.errors import first_line

# What loading damaged files raises.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    *(EOFError, pickle.UnpicklingError, struct.error, SafetensorError),
)
OPTIONAL = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
# What a configuration says that changes no number, or is the loading's.
NO_NUMBERS = (
    "_name_or_path architectures dtype torch_dtype transformers_version quantization_config"
    " use_cache tie_word_embeddings"
).split()
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
    model = load_weights(name, device, dtype, load_in_4bit)
    entries = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > entries:
        raise ValueError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, its model only {entries}"
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # repacks weights; training raises
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "compute_dtype"):  # of a 4-bit layer: a checkpoint may name another
            module.compute_dtype = dtype
        if hasattr(module, "attention_dropout"):  # dropout breaks the ratio
            module.attention_dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    described = model.config.to_diff_dict() | dict.fromkeys(NO_NUMBERS)
    return model.requires_grad_(False), tokenizer, checksum(model.named_parameters(), described)


def load_weights(name, device, dtype, load_in_4bit):
    """The model with all the weights that its configuration describes. Raises ValueError."""
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
            trust_remote_code=False,
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
    refuse_not_finite(name, model)
    own = getattr(model.config, "quantization_config", None)
    kind = getattr(own, "bnb_4bit_quant_type", "other than 4-bit") if own else None
    if getattr(model, "is_loaded_in_8bit", False):
        raise ValueError(f"{name}: holds 8-bit weights; choose one in 16 bits, and --load-in-4bit")
    if kind and (not load_in_4bit or kind != "nf4"):
        print(f"{name} holds quantised weights ({kind})", file=sys.stderr)
    return model


def load_tokenizer(name):
    """The tokenizer of a hub id or a folder. Raises ValueError with one line."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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
    if cached_file(name, "config.json", **OPTIONAL):
        raise ValueError(
            f"{name}: holds a model and an adapter; which is meant? Give each a folder of its own"
        )
    try:
        config = PeftConfig.from_pretrained(name)
        base = config.base_model_name_or_path
        if not base:
            raise ValueError("it names none")
        if config.revision:
            raise ValueError(
                f"it names the revision {config.revision} of {base}: merge it yourself"
            )
        model, tokenizer, base_checksum = load_model(base, device, dtype, load_in_4bit)
        if os.path.exists(os.path.join(name, "state.json")):  # a run's checkpoint
            with open(os.path.join(name, "state.json")) as file:
                if json.load(file)["weights"] != base_checksum:
                    raise ValueError(f"{base} is not what it was trained on; its weights differ")
        if cached_file(name, "tokenizer_config.json", **OPTIONAL):
            tokenizer = load_tokenizer(name)
        described = config.to_dict() | {"base_model_name_or_path": None}
        # Of both parts, not of the sum, which is rounded otherwise in every precision.
        own = checksum(sorted(load_peft_weights(name, device="cpu").items()), described)
        model = merge(load_adapter(model, name), dtype)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ValueError(
            f"{name} is an adapter, and cannot be merged into its base model: {first_line(error)}"
        ) from error
    precision = "4-bit" if getattr(model, "is_loaded_in_4bit", False) else str(dtype)[6:]
    print(f"{name} is an adapter: merged into {base}, in {precision}", file=sys.stderr)
    return model.requires_grad_(False), tokenizer, base_checksum + own


def merge(model, dtype):
    """The model with its adapter added to its weights. Raises ValueError if it is another then."""
    before = some_logits(model, dtype)
    model = model.merge_and_unload(safe_merge=True)
    for parameter in model.parameters():  # some adapters replace whole layers, in fp32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    change = (some_logits(model, dtype) - before).std() / before.std()
    in_4bit = getattr(model, "is_loaded_in_4bit", False)  # NF4 rounds without a bound
    if not in_4bit and change > (0.1 if dtype == torch.bfloat16 else 0.001):
        raise ValueError("merged, it is another model; is it for embeddings that are tied?")
    return model


@torch.no_grad()
def some_logits(model, dtype):
    """Logits after a few arbitrary tokens, in fp32."""
    ids = torch.arange(16, device=model.device)[None]
    with torch.autocast(model.device.type, torch.bfloat16, dtype == torch.bfloat16):
        return model.eval()(input_ids=ids).logits.float()


def refuse_not_finite(place, model):
    """Raise ValueError if a number of the model is not finite."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"{place}: is damaged: {name} holds numbers that are not finite")


def refuse_other_weights(place, found):
    """Raise ValueError if {what is wrong with them: names of weights} names any."""
    for wrong, names in found.items():
        if names:
            raise ValueError(
                f"{place}: its weights are not those that its configuration describes: "
                f"{len(names)} {wrong}, such as {min(names)}"
            )


def checksum(parameters, described):
    """Checksum of a configuration and of (name, weight) pairs: names, shapes, up to 64 numbers.

    The same in float32, bfloat16 and NF4: of a matrix it takes what NF4 keeps, the largest |weight|
    of 64 in a row, and rounds it to bfloat16.
    """

    def plain(value):  # the order of a set changes from process to process
        return sorted(value) if isinstance(value, set) else str(value)

    seen = hashlib.sha256(json.dumps(described, default=plain, sort_keys=True).encode())
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
    base = model.name_or_path
    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        config.base_model_name_or_path = base  # it may have moved
        model = get_peft_model(model, config)
        keys = model.load_adapter(folder, "default", is_trainable=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{folder}: the adapter does not fit {base} or is damaged ({first_line(error)})"
        ) from error
    other = {"missing": keys.missing_keys, "unexpected": keys.unexpected_keys}
    refuse_other_weights(folder, other)
    refuse_not_finite(folder, model)
    return in_fp32(model)


def in_fp32(model):
    """At learning rates of 1e-5 a bf16 weight would not move."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def check_attention(policy):
    """Sampling must give the log-probs of the model's own forward pass. Raises ValueError.

    Each token is to see all that came before it, and `lm_head`'s product is to be the logits. A
    model with sliding windows, linear attention or scaled logits would be computed wrongly,
    without a word. Two sums of the same numbers differ by rounding: 2^-8 a layer's addition in
    bf16, 2^-14 in fp32 (of 2^10 products); with two additions a layer that is √(2 layers) as much,
    of logits as large as they spread. Twice that is allowed, in the mean.
    """
    config = policy.model.config
    name = config.name_or_path
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if getattr(config, "sliding_window", None):
        kinds.add("a sliding window")
    if kinds:
        raise ValueError(
            f"{name}: has layers that do not attend to all tokens ({', '.join(sorted(kinds))}); "
            "choose a model with full attention, such as Qwen2.5 or Qwen3"
        )
    positions = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if positions in ("dynamic", "longrope"):
        raise ValueError(
            f"{name}: its positions change with the length ({positions}), so keys cannot be kept; "
            "choose a model such as Qwen2.5 or Qwen3"
        )
    try:
        gap, spread = sampler_gap(policy)
    except (ArithmeticError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an unknown architecture raises whatever its code leads to
        raise ValueError(
            f"{name}: cannot be sampled here ({first_line(error)}); choose a model with "
            "full attention, such as Qwen2.5 or Qwen3"
        ) from error
    rounding = 2**-8 if policy.in_bf16() else 2**-14
    allowed = 2 * rounding * (2 * config.num_hidden_layers) ** 0.5 * spread
    if not gap <= allowed:
        raise ValueError(
            f"{name}: what is sampled differs from the model's own log-probs by {gap:.2g} nats in "
            f"the mean ({allowed:.2g} is rounding): its attention or its logits are not those of "
            "Qwen2.5 or Qwen3; choose such a model"
        )


@torch.no_grad()
def sampler_gap(policy):
    """(mean difference in nats, standard deviation of the logits) over a made-up dialogue."""
    rng = np.random.default_rng(0)
    dialogue = policy.message("system", "Be brief. " * 60)  # long, so that `attend` repeats masks
    gaps = []
    for tips in ([], policy.message("user", "Tips: go on."), []):
        dialogue = dialogue + policy.message("user", "A room. You see a door.")
        prompt = dialogue + tips + policy.header
        (action,), (logps,) = policy.sample([prompt], rng.random((1, 4)), 1.0, [0])
        ids = torch.tensor([prompt + action], device=policy.device)
        with policy.autocast():
            logits = policy.model(ids, use_cache=False, logits_to_keep=len(action) + 1).logits
        logits = logits[0, :-1].float()  # [n, vocab]
        own = logits.log_softmax(-1).gather(1, ids[0, -len(action) :, None])[:, 0]
        gaps += np.abs(np.subtract(own.tolist(), logps)).tolist()
        dialogue = dialogue + policy.past(action)
    policy.forget()
    return np.mean(gaps), logits.std().item()
