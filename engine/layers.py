"""LoRA layers, norms and the head, with fewer casts, copies and kernels than peft, transformers and
torch need.

Infrastructure: skip it on a first reading.
"""

from functools import cache, partial

import torch
from peft.tuners import lora
from torch.nn.functional import rms_norm

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class FusedAdapter:
    """Inside `with`, a LoRA layer is its base layer and two products: W x + (s B) (A x).

    For sampling: the adapter is cast once, and the casts hold as long as the weights do.
    """

    def __init__(self, model, dtype):
        self.forwards = {}
        for layer in model.modules():
            if isinstance(layer, lora.LoraLayer):
                self.forwards[layer] = partial(fused, layer.base_layer, *cast(layer, dtype))

    def __enter__(self):
        for layer, forward in self.forwards.items():
            layer.forward = forward

    def __exit__(self, *error):
        for layer in self.forwards:
            del layer.forward


class Fused:
    """The same product for training, so that sampling and training round alike.

    peft's own casts x to fp32 for the adapter, and autocast casts it back. Nothing is kept between
    calls (a layer is called once in a pass): a recomputation, too, uses the weights as they are.
    """

    def forward(self, x):
        if self.disable_adapters:
            return self.base_layer(x)
        return fused(self.base_layer, *cast(self, computed_in(self.base_layer)), x)


class FusedNorm:
    """RMSNorm by torch: on a GPU one kernel in the place of eight; on a CPU equal in fp32."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # it would cast to fp32
            return rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def fuse(model, dtype=torch.bfloat16):
    """Let norms be `FusedNorm`, and each LoRA layer that computes in bf16 `Fused`: others have no
    such casts."""
    for layer in model.modules():
        if isinstance(layer, lora.LoraLayer) and computed_in(layer.base_layer) == dtype:
            layer.__class__ = fused_class(Fused, layer.__class__)
        elif type(layer).__name__ in NORMS:
            layer.__class__ = fused_class(FusedNorm, layer.__class__)


@cache
def fused_class(fused, kind):
    """A subclass of a class of peft or transformers with another `forward`."""
    return type(f"Fused{kind.__name__}", (fused, kind), {})


def computed_in(linear):
    """What a linear layer computes in: of a 4-bit one it is not the type of its weights."""
    return getattr(linear, "compute_dtype", linear.weight.dtype)


def cast(layer, dtype):
    """The adapter of a LoRA layer: A [d_in, r], s B [r, d_out]."""
    (name,) = layer.active_adapters
    a = layer.lora_A[name].weight.T
    b = layer.scaling[name] * layer.lora_B[name].weight.T
    return a.to(dtype), b.to(dtype)


def fused(base_layer, a, b, x):
    """x [..., d_in] -> [..., d_out]."""
    result = base_layer(x)
    low = (x.to(a.dtype) @ a).flatten(0, -2)  # [n, r]
    return torch.addmm(result.flatten(0, -2), low, b).view(result.shape)


def head(states, weight):
    """States [n, d], weight [vocab, d] -> logits [n, vocab] in fp32.

    In bf16, those near 20 would be 0.125 apart. On a CPU the weights are copied each time: for
    152,000 x 3,584 in bf16, 2.2 GB for a moment.
    """
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return HeadWithoutCopy.apply(states, weight)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.nn.functional.linear(states.float(), weight.float())


class HeadWithoutCopy(torch.autograd.Function):
    """bf16 states [n, d] and frozen weight [vocab, d] -> logits [n, vocab] in fp32."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(weight)
        return product(states, weight.T)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        high = gradient.to(weight.dtype)
        low = (gradient - high).to(weight.dtype)  # what that rounding lost
        return product(high, weight) + product(low, weight), None


def product(x, y):
    """bf16 matrices -> fp32: their products are exact, and are summed in fp32. On CUDA alone."""
    return torch.mm(x, y, out_dtype=torch.float32)
