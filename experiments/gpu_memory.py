"""What fits a GPU: the memory of Qwen2.5-7B in rollouts and updates, computed without a GPU.

  python -m experiments.gpu_memory

The project's own code runs, with the shape of the model, on tensors that have a shape but no
numbers (torch's FakeTensorMode); what is alive after each operation is added up. So the table
follows the code. It does not see what a kernel allocates for itself, gaps between blocks, and what
CUDA keeps: a tenth of the card is left for these.
"""

import argparse
import weakref
from contextlib import contextmanager

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves, tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils import logging as transformers_logging

from empo2 import Algorithm, accumulate_gradient
from engine import hardware
from engine.packing import pack
from experiments.dialogues import TYPICAL, learnt_pairs, make_episode
from experiments.random_policy import QWEN_7B, fill, skeleton
from settings import Settings

CARDS = (24, 32, 40, 48, 80, 141)  # GB
RESERVE = 0.1  # of the card
ROLLOUT_BATCHES = (16, 32, 64, 128)  # 128 episodes are an iteration
MICRO_TOKENS = (4096, 6144, 8192, 16384, 32768)
STEERING = (torch.bool, torch.int32, torch.int64)
ANY_TOKEN = 77  # no control token
ACTION = 3  # tokens that are sampled
NEWS = 512  # new tokens of a dialogue: a long observation and ten tips
aten = torch.ops.aten


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
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func is aten.index.Tensor:
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
    """In here floats are shapes alone -> their LiveBytes."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        yield memory


# --- Peaks ----------------------------------------------------------------------------------------
def rollout_peaks(policy, memory, dialogues, context):
    """Bytes at the peak of so many dialogues of this length -> {"prefill": ..., "decode": ...}.

    Prefill: one dialogue is read from its beginning, the others' last `NEWS` tokens.
    memory: has `reset()` and `peak`.
    """
    lanes = range(dialogues)
    # No two are the same: of equal ones one would be computed.
    prompts = [[ANY_TOKEN] * (context - ACTION - 1) + [lane] for lane in lanes]
    uniforms = np.full((dialogues, ACTION), 0.5)
    policy.forget()
    policy.cache.bring_to_front(lanes)
    policy.cache.held = [[]] + [prompt[:-NEWS] for prompt in prompts[1:]]
    memory.reset()
    policy.sample(prompts, uniforms[:, :1], 1.0, lanes)
    peaks = {"prefill": memory.peak}
    memory.reset()
    policy.sample(prompts, uniforms, 1.0, lanes)
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
    accumulate_gradient(policy, batch, Algorithm(s), denominator=1)
    optimizer.step()
    return memory.peak


def row_length(policy, context):
    """Tokens of a row: the dialogue, and the turns that are learnt with their tips."""
    episode = make_episode(policy, np.random.default_rng(0), context=context)
    return len(pack(learnt_pairs(episode, Settings())).ids)


def longest_rows(policy, micro_tokens, context):
    """(rows, context) of a micro-batch of so many tokens; a longer row stands alone."""
    longest = row_length(policy, context)
    rows = max(1, micro_tokens // longest)
    return rows, context + max(0, micro_tokens // rows - longest)


def all_peaks(policy, memory, contexts, batches, micro_tokens):
    """Bytes: {("weights",): ..., ("update", tokens): ..., ("prefill", dialogues, context): ...}.

    memory: has `reset()`, `peak` and `live`.
    """
    peaks = {("weights",): memory.live}
    optimizer = torch.optim.AdamW(policy.trainable())
    update_peak(policy, optimizer, memory, 1, contexts[0])  # gradients and moments stay
    peaks["with gradients and moments",] = memory.live
    for tokens in micro_tokens:
        rows, context = longest_rows(policy, tokens, contexts[-1])
        peaks["update", tokens] = update_peak(policy, optimizer, memory, rows, context)
    for dialogues in batches:
        for context in contexts:
            for piece, peak in rollout_peaks(policy, memory, dialogues, context).items():
                peaks[piece, dialogues, context] = peak
    return peaks


def compute(config, load_in_4bit, dtype, *sizes):
    """The same without the weights."""
    model = skeleton(config, load_in_4bit, dtype)
    with imagined() as memory:
        return all_peaks(fill(model), memory, *sizes)


def what_fits(peaks, card, context):
    """(dialogues, tokens of a micro-batch): the most that leave a tenth of the card free, or None.

    card: its GB. context: the length of all the dialogues.
    """
    free = (1 - RESERVE) * card * 1e9
    dialogues = None
    micro_tokens = None
    for piece, peak in peaks.items():
        if piece[0] == "update" and peak <= free:
            micro_tokens = piece[1]
        elif piece[0] == "prefill" and piece[2] == context:
            if max(peak, peaks["decode", *piece[1:]]) <= free:
                dialogues = piece[1]
    return dialogues, micro_tokens


# --- Command line ---------------------------------------------------------------------------------
def show_peaks(weights, peaks):
    """Lines of the table of peaks."""
    for piece, peak in peaks.items():
        name, *sizes = piece
        sizes = " x ".join(f"{size:,}" for size in sizes)
        print(f"| {weights} | {name} | {sizes} | {peak / 1e9:.1f} |")


def show_fits(weights, peaks, contexts):
    """Lines of the table of what fits."""
    for card in CARDS:
        cells = [f"{card} GB", weights]
        for context in contexts:
            dialogues, micro_tokens = what_fits(peaks, card, context)
            cells.append(dialogues or "-")
        cells.append(micro_tokens or "-")
        default = next(values for limit, *values in hardware.CARDS if card < limit)
        print("|", *(f"{cell} |" for cell in [*cells, *default]))


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    transformers_logging.set_verbosity_error()
    contexts = TYPICAL, Settings().context
    sizes = contexts, ROLLOUT_BATCHES, MICRO_TOKENS
    computed = {}
    print(f"torch {torch.__version__}\n\n| weights | peak of | tokens | GB |\n|---|---|---|---|")
    for weights, load_in_4bit in (("NF4", True), ("bf16", False)):
        peaks = compute(QWEN_7B, load_in_4bit, torch.bfloat16, *sizes)
        computed[weights] = peaks
        show_peaks(weights, peaks)
    typical, worst = contexts
    most = f"dialogues of {typical:,} | of {worst:,} | micro-tokens"
    print(f"\n| card | weights | {most} | default --rollout-batch | --micro-tokens |")
    print("|---|---|---|---|---|---|---|")
    for weights, peaks in computed.items():
        show_fits(weights, peaks, contexts)


if __name__ == "__main__":
    main()
