"""Activation checkpointing, in as few layers as the GPU's memory allows.

Infrastructure: skip it on a first reading.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks

SPARE = 1.2  # a sixth of the memory stays free
MORE = 2  # a layer that computes twice needs its own activations for a while, and their gradients


class Checkpointing:
    """In an update some decoder layers keep their activations; the others compute them twice.

    always: all of them compute twice, however much memory there is.
    """

    def __init__(self, model, always):
        base = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": False})
        self.model = base.model
        self.always = always
        self.of_token = 0.0  # bytes that a layer keeps of a token, without masks
        self.of_layer = 0.0  # bytes that a layer keeps of the micro-batch

    def plan(self, rows, width, masked):
        """For a micro-batch [rows, width]: the last layers keep, as many as fit.

        masked: its rows branch. Then a layer keeps the mask, too, a number for each pair of tokens.
        """
        self.of_token = self.of_token or bytes_of_token(self.model)
        mask = width * self.model.dtype.itemsize if masked else 0
        self.of_layer = rows * width * (self.of_token + mask)
        keeping = 0 if self.always else how_many_keep(free_bytes(), self.of_layer)
        for number, layer in enumerate(reversed(self.model.layers)):
            layer.gradient_checkpointing = number >= keeping


def how_many_keep(free, of_layer):
    """How many layers can keep their activations, of so many bytes each."""
    return int(free / SPARE / of_layer) - MORE


def room_for(layers, of_layer):
    """Bytes that must be free if so many keep them."""
    return SPARE * (layers + MORE) * of_layer


def free_bytes():
    """What tensors can still take of the GPU's memory."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused


def bytes_of_token(model):
    """Bytes that a decoder layer keeps of a token for the backward pass, with masked attention."""
    for layer in model.layers:
        layer.gradient_checkpointing = False
    kept = [kept_bytes(model, tokens) for tokens in (64, 128)]
    return (kept[1] - kept[0]) / 64 / len(model.layers)


def kept_bytes(model, tokens):
    """Bytes of what a forward pass of so many tokens keeps, besides weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor):  # returns nothing: a tensor in its own graph would never be freed
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage

    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    visible = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=model.device).tril()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=visible, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
