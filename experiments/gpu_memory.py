"""What fits a GPU: the memory of Qwen2.5 in rollouts and updates, computed without a GPU.

  python -m experiments.gpu_memory

The project's own code runs, with the shape of the model, on tensors that have a shape but no
numbers (torch's FakeTensorMode); what is alive after each operation is added up. So the table
follows the code. It does not see what a kernel allocates for itself, gaps between blocks, and what
CUDA keeps: 0.6 GB and a tenth of the card are left for these. CARDS of engine/hardware.py is the
last table.

The policies with random weights and the episodes of random ids are also what gpu.py and speed.py
work on. The episodes have the lengths of real ones: lengths.json has the tokens of observation and
action at each turn of 12 dialogues that a tiny model held with ScienceWorld (power-component, 30
turns), counted with Qwen2.5's vocabulary.
"""

import argparse
import json
import weakref
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import bitsandbytes
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.integrations import replace_with_bnb_linear
from transformers.utils import logging as transformers_logging

from empo2 import Algorithm, accumulate_gradient
from engine.activations import room_for
from engine.layers import fuse
from engine.packing import pack
from engine.plugins import ROOT
from engine.weights import four_bit, new_adapter
from policy import Policy
from rollout import Episode, Job, Turn, past
from settings import Settings

CARDS = (6, 8, 12, 16, 24, 32, 40, 48, 80, 141)  # GB
# For each number type the models, the best one first: (size, 4-bit).
CANDIDATES = {
    "bfloat16": (
        *(("7B", False), ("7B", True), ("3B", False), ("3B", True)),
        *(("1.5B", False), ("0.5B", False)),
    ),
    "float32": (("7B", False), ("3B", False), ("1.5B", False), ("0.5B", False)),
}
EPISODES = 128  # of an iteration
ROLLOUT_BATCHES = (16, 32, 64, EPISODES)
MICRO_TOKENS = (2048, 4096, 8192)
STEERING = (torch.bool, torch.int32, torch.int64)
ANY_TOKEN = 77  # no control token
ACTION = 3  # tokens that are sampled
NEWS = 512  # new tokens of a dialogue: a long observation and ten tips


# --- A policy with random weights -----------------------------------------------------------------
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size")  # fmt: skip


def shape(*sizes, tied=False):
    """A Qwen2 configuration with these `SIZES`. tied: the output layer is the embedding."""
    return Qwen2Config(**dict(zip(SIZES, sizes, strict=True)), tie_word_embeddings=tied)


QWEN_7B = shape(3584, 18944, 28, 28, 4, 152064)
QWEN = {
    "7B": QWEN_7B,
    "3B": shape(2048, 11008, 36, 16, 2, 151936, tied=True),
    "1.5B": shape(1536, 8960, 28, 12, 2, 151936, tied=True),
    "0.5B": shape(896, 4864, 24, 14, 2, 151936, tied=True),
}
TINY = shape(64, 128, 2, 4, 2, 2000)


def skeleton(config, load_in_4bit=False, dtype=torch.bfloat16):
    """A model with its adapter, on the "meta" device: no numbers yet."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if load_in_4bit:
            model = replace_with_bnb_linear(model, ["lm_head"], four_bit(dtype))
            model.is_loaded_in_4bit = True  # else peft takes its layers for plain ones
        model.requires_grad_(False)
        return new_adapter(model, 16, 32, 0)


def fill(model, device="cpu", gradient_checkpointing=True):
    """Random numbers for a skeleton, made on the device -> a policy.

    gradient_checkpointing: as of Policy.load.
    """
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
    base.tie_weights()
    fuse(model)
    policy = Policy(model, AutoTokenizer.from_pretrained(ROOT / "standin" / "stages"))
    policy.choose_checkpointing(gradient_checkpointing)
    return policy


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


# --- Episodes of random ids -----------------------------------------------------------------------
LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text())
SYSTEM = 235  # tokens of ScienceWorld's system message
TIPS = 400  # of ten tips of 40
MESSAGE = 10  # control tokens, role and header of a turn


def total(lengths):
    """Tokens of a dialogue."""
    return SYSTEM + sum(observation + action + MESSAGE for observation, action in lengths)


TYPICAL = sum(map(total, LENGTHS)) // len(LENGTHS)  # tokens of a dialogue


def make_episode(policy, rng, number=0, context=None):
    """An episode with the lengths of a recorded dialogue; its actions are random, too.

    Tips are shown at every fourth turn, and two thirds of those are learnt off-policy (the default
    p and q). context: turns are left out, or observations lengthened, until it has so many tokens.
    """
    lengths = LENGTHS[number % len(LENGTHS)]
    while context and total(lengths) > context:
        lengths = lengths[:-1]
    longer = (context - total(lengths)) // len(lengths) if context else 0
    system = message(policy, rng, "system", SYSTEM)
    episode = Episode(Job("", 0, number, 0), rng, number, "", system, policy.header)
    for t, (observation, action) in enumerate(lengths):
        ids = message(policy, rng, "user", observation + longer)
        turn = Turn("", ids, action_ids=[*some_ids(rng, action), policy.end_id])
        turn.past_ids = past(policy, turn)
        turn.logps = [-1.0] * len(turn.action_ids)
        turn.advantage = 1.0 - 2.0 * (number % 2)
        if (t + number) % 4 == 3:
            turn.shown_ids = message(policy, rng, "user", TIPS)
            turn.offpolicy = (t // 4 + number) % 3 > 0
        episode.turns.append(turn)
    return episode


def learnt_pairs(episode, s):
    """Its training pairs; their old log-probs are the sampler's, whatever the prompt."""
    pairs = list(Algorithm(s).training_pairs(episode))
    for turn, pair in zip(episode.turns, pairs, strict=True):
        pair.old_logps = turn.logps
        pair.advantages = [turn.advantage] * len(pair.action)
    return pairs


def message(policy, rng, role, n):
    """A message of n random ids."""
    empty = policy.message(role, "")
    return empty[:-2] + some_ids(rng, n) + empty[-2:]


def some_ids(rng, n):
    """Random ids that are no control tokens, of any vocabulary."""
    return rng.integers(100, 300, n).tolist()


# --- Tensors without numbers ----------------------------------------------------------------------
class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive; to be entered inside a FakeTensorMode.

    Floats are shapes alone. Whole numbers and truth values are real, as code branches on them and
    indexes with them; one that depends on a float is always `ANY_TOKEN`, or False.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = WeakIdKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls):  # nothing is compiled, and this is twice as fast
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        out = self.run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def count(self, storage):
        """Add a storage, until it dies."""
        if storage not in self.known:
            size = storage.nbytes()
            self.known[storage] = size
            self.live += size
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.live -= size

    def reset(self):
        """Forget the peak."""
        self.peak = self.live

    def run(self, func, args, kwargs):
        """The result of an operation: real if whole numbers alone decide it, else a shape."""
        inputs = [x for x in arg_tree_leaves(*args, **kwargs) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, FakeTensor) for x in inputs):
            if inputs:
                with unset_fake_temporarily():
                    out = func(*args, **kwargs)
                if not is_float(out):
                    return out
            out = func(*args, **kwargs)
            if is_float(out) or not isinstance(out, torch.Tensor):
                return out
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], whole_numbers(args[1]))
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype in STEERING:
            fill = 0 if out.dtype == torch.bool else ANY_TOKEN
            with unset_fake_temporarily():
                return torch.full(out.shape, fill, dtype=out.dtype)
        return out


def is_float(out):
    """Is it a tensor whose numbers are not needed? (uint8: packed 4-bit weights)"""
    return isinstance(out, torch.Tensor) and out.dtype not in STEERING


def whole_numbers(indices):
    """The indices of a tensor, with masks as positions: how many they are gives the shape."""
    found = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


@contextmanager
def imagined():
    """In here floats are shapes alone -> their LiveBytes. The code does what it does on a GPU."""
    on_gpu = patch.object(FakeTensor, "is_cuda", True)
    # No CPU has a kernel for all of RMSNorm; one of LayerNorm reads, writes and keeps as much.
    norm = patch("engine.layers.rms_norm", lambda x, n, w, eps: layer_norm(x, n, w, None, eps))
    with on_gpu, norm, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        yield memory


# --- Peaks ----------------------------------------------------------------------------------------
def rollout_peaks(policy, memory, dialogues, context):
    """Bytes at the peak of so many dialogues of this length -> {"prefill": ..., "decode": ...}.

    Prefill: one dialogue is read from its beginning, the others' last `NEWS` tokens.
    memory: has `reset()` and `peak`.
    """
    dialogue_ids = range(dialogues)
    # No two are the same: of equal ones one would be computed.
    prompts = [[ANY_TOKEN] * (context - ACTION - 1) + [dialogue_id] for dialogue_id in dialogue_ids]
    uniforms = np.full((dialogues, ACTION), 0.5)
    policy.forget()
    policy.cache.bring_to_front(dialogue_ids)
    policy.cache.held = [[]] + [prompt[:-NEWS] for prompt in prompts[1:]]
    memory.reset()
    policy.sample(prompts, uniforms[:, :1], 1.0, dialogue_ids)
    peaks = {"prefill": memory.peak}
    memory.reset()
    policy.sample(prompts, uniforms, 1.0, dialogue_ids)
    peaks["decode"] = memory.peak
    policy.forget()
    return peaks


def update_peak(policy, optimizer, memory, rows, context):
    """Bytes at the peak of a step on a micro-batch: rows of dialogues of this length, with tips."""
    rng = np.random.default_rng(0)
    s = Settings()
    episodes = [make_episode(policy, rng, context=context) for _ in range(rows)]
    batch = [pack(learnt_pairs(episode, s)) for episode in episodes]
    memory.reset()
    accumulate_gradient(policy, batch, Algorithm(s), 1)
    optimizer.step()
    return memory.peak


def longest_rows(policy, micro_tokens, context):
    """(rows, context) of a micro-batch of so many tokens; a longer row stands alone."""
    episode = make_episode(policy, np.random.default_rng(0), context=context)
    longest = len(pack(learnt_pairs(episode, Settings())).ids)  # with the turns that have tips
    rows = max(1, micro_tokens // longest)
    return rows, context + max(0, micro_tokens // rows - longest)


def all_peaks(policy, memory, context):
    """Bytes: {("weights",): ..., ("update", tokens): ..., ("prefill", dialogues): ..., ...}."""
    peaks = {("weights",): memory.live}
    optimizer = torch.optim.AdamW(policy.trainable())
    update_peak(policy, optimizer, memory, 1, TYPICAL)  # gradients and moments stay
    peaks["with gradients and moments",] = memory.live
    layers = policy.model.get_base_model().model.layers
    for tokens in MICRO_TOKENS:
        rows, longest = longest_rows(policy, tokens, context)
        peaks["update", tokens] = update_peak(policy, optimizer, memory, rows, longest)
        half = room_for(len(layers) / 2, policy.checkpointing.of_token * tokens)
        peaks["update, half of the activations kept", tokens] = memory.live + half
    for dialogues in ROLLOUT_BATCHES:
        for piece, peak in rollout_peaks(policy, memory, dialogues, context).items():
            peaks[piece, dialogues] = peak
    return peaks


def what_fits(peaks, card):
    """(dialogues, tokens of a micro-batch) for a card of so many GB; None: not even the least fits.

    As many dialogues as fit. As many tokens as let half of the layers keep their activations: more
    in a micro-batch gain less than what is computed twice then. 0.6 GB and a tenth of the card stay
    free.
    """
    room = (0.9 * card - 0.6) * 1e9

    def fit(piece):
        return {sizes[0] for name, *sizes in peaks if name == piece and peaks[name, *sizes] <= room}

    dialogues = max(fit("prefill") & fit("decode"), default=None)
    least = min(fit("update"), default=None)
    return dialogues, max(fit("update, half of the activations kept"), default=least)


# --- Command line ---------------------------------------------------------------------------------
def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    transformers_logging.set_verbosity_error()
    print(f"torch {torch.__version__}\n")
    print("| model | peak of | dialogues or tokens | GB |\n|---|---|---|---|")
    chosen = []
    for dtype, candidates in CANDIDATES.items():
        computed = {}
        for size, load_in_4bit in candidates:
            model = skeleton(QWEN[size], load_in_4bit, getattr(torch, dtype))
            with imagined() as memory:
                peaks = all_peaks(fill(model), memory, Settings().context)
            name = f"{size} {'NF4' if load_in_4bit else dtype}"
            computed[name] = peaks
            for (piece, *tokens), peak in peaks.items():
                print(f"| {name} | {piece} |", *tokens, f"| {peak / 1e9:.1f} |", flush=True)
        for card in CARDS:
            fits = ((name, *what_fits(peaks, card)) for name, peaks in computed.items())
            best = next((row for row in fits if None not in row), ("nothing",))
            chosen.append((f"{card} GB, {dtype}", *best))
    print("\n| card | model | dialogues | micro-tokens |\n|---|---|---|---|")
    for row in chosen:
        print("|", *(f"{cell} |" for cell in row))


if __name__ == "__main__":
    main()
