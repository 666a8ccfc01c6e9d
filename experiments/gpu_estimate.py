"""What operations would take on a GPU: an estimate, computed without one.

Each operation on tensors without numbers (gpu_memory.py) is given a time: the bytes it moves at the
card's bandwidth, or its FLOPs at the card's rate, whichever takes longer. Kernels that do not reach
the rates are not in it. That Python takes 10 us to launch a kernel is a guess.
"""

from math import prod
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

LAUNCH = 1e-5  # seconds
aten = torch.ops.aten


class Card(NamedTuple):
    """Rates that large kernels reach, and what is run."""

    bandwidth: float  # TB/s
    bf16: float  # TFLOP/s
    fp32: float
    gigabytes: float
    load_in_4bit: bool
    dialogues: int  # side by side
    micro_tokens: int


# Bandwidth and bf16 of the H200 were measured; the others are guesses, 66 to 91 % of data sheets.
CARDS = {
    "4090": Card(0.92, 150, 60, 24, True, 32, 2048),
    "A100": Card(1.8, 260, 17, 80, False, 128, 8192),
    "H100": Card(2.9, 650, 50, 80, False, 128, 8192),
    "H200": Card(4.3, 790, 50, 141, False, 128, 8192),
}


class Cost(TorchDispatchMode):
    """Adds up what operations on tensors without numbers would take on a card."""

    def __init__(self, card):
        super().__init__()
        self.card = card
        self.seconds = 0.0
        self.kernels = 0

    @classmethod
    def _should_skip_dynamo(cls):  # nothing is compiled, and this is twice as fast
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        if outputs and any(isinstance(x, FakeTensor) for x in inputs + outputs):
            moved = traffic(func, args, inputs, outputs)
            rate = self.card.fp32 if inputs and inputs[0].dtype == torch.float32 else self.card.bf16
            work = flops(func, args, kwargs, out) / rate
            self.kernels += moved > 0
            self.seconds += max(moved / self.card.bandwidth, work) / 1e12
        return out

    def time(self, run, prepare=lambda: None, launched=False):
        """Seconds of `run`, in the place of gpu.seconds. launched: by Python, kernel by kernel."""
        for _ in range(2):  # the first one makes room in the cache
            prepare()
            seconds, kernels = self.seconds, self.kernels
            run()
        return LAUNCH * (self.kernels - kernels) if launched else self.seconds - seconds


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def traffic(func, args, inputs, outputs):
    """Bytes that an operation reads and writes; 0: a view, or memory that is not written yet."""
    storages = [x.untyped_storage()._cdata for x in inputs]
    is_view = outputs[0].untyped_storage()._cdata in storages and not func._schema.is_mutable
    if is_view or "empty" in str(func):
        return 0
    if func.overloadpacket in (aten.index, aten.embedding, aten.gather):  # reads what it takes
        return 2 * size(outputs[0])
    if func is aten.index_put_.default:
        return 2 * size(args[2])
    moved = sum(map(size, inputs + outputs))
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        rows, (n, k) = args[0].numel() // args[0].shape[-1], args[2]
        # As bitsandbytes chooses for these shapes on a 4090: others are dequantised first.
        if rows > 4 and not (rows <= 128 and n > 4 * k):
            moved += 2 * args[0].itemsize * n * k
    return moved


def size(x):
    """Bytes of a tensor; those that it repeats are read once."""
    return x.itemsize * prod(n for n, stride in zip(x.shape, x.stride()) if stride)


def flops(func, args, kwargs, out):
    """Of matrix products and attention."""
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        return 2 * args[0].numel() * args[2][0]
    shapes = [x.shape for x in args if isinstance(x, torch.Tensor)]
    share = 0.5 if any(x is True for x in args) else 1.0  # causal, without a mask
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return share * sdpa_flop_count(*shapes)
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return share * sdpa_backward_flop_count(*shapes[:4])
    return 0
