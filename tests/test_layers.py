"""LoRA layers and the head compute what peft and torch do.     pytest tests/test_layers.py"""

import copy
import importlib
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import AS_ON_A_GPU, FP32, write_checkpoint
from test_policy import gradients, load, played_episode, score, tolerances
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parameters_to_vector
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import empo2
from engine import attention, layers
from settings import Settings


def with_pefts_layers(policy):
    """A copy."""
    plain = copy.deepcopy(policy)
    fused = [m for m in plain.model.modules() if isinstance(m, layers.Fused)]
    for layer in fused:
        layer.__class__ = layer.__class__.__bases__[1]
    assert len(fused) == 14
    return plain


@pytest.mark.parametrize(
    "options",
    [FP32, {"gradient_checkpointing": True}, AS_ON_A_GPU, AS_ON_A_GPU | {"load_in_4bit": True}],
)
def test_fused_layers_learn_as_pefts_do(checkpoint, options):
    """Log-probs, gradients, and the change of the weights in three steps.

    With π_ref, but in NF4: there it is so near that k3's gradient, 1 - π_ref / π_θ, is rounding.
    """
    policy = load(checkpoint, **options)
    assert policy.in_bf16() == any(isinstance(m, layers.Fused) for m in policy.model.modules())
    if not policy.in_bf16():
        layers.fuse(policy.model, torch.float32)
    episodes = [played_episode(policy, seed) for seed in range(3)]
    turns = [(e.prompt(t), turn.action_ids) for e in episodes for t, turn in enumerate(e.turns)]
    beta = 0.0 if "load_in_4bit" in options else 0.1
    s = Settings(minibatch_episodes=1, beta=beta, min_prob=0.0, max_grad_norm=1e6)
    found = []
    for learner in (policy, with_pefts_layers(policy)):
        logp = torch.cat(score(learner, *zip(*turns, strict=True)))
        gradient = parameters_to_vector(gradients(learner, logp))
        before = parameters_to_vector(learner.trainable()).detach()
        sgd = torch.optim.SGD(learner.trainable(), lr=0.01)
        rng = np.random.default_rng(0)
        empo2.update(learner, sgd, copy.deepcopy(episodes), empo2.Algorithm(s), rng)
        found.append((logp, gradient, parameters_to_vector(learner.trainable()) - before))
    atol, rtol = tolerances(policy) if policy.in_bf16() else (1e-6, 1e-6)
    (logp, *ours), (expected, *pefts) = found
    torch.testing.assert_close(logp, expected, atol=atol, rtol=0)
    for a, b in zip(ours, pefts, strict=True):
        assert 0 < b.norm() and (a - b).norm() <= rtol * b.norm()


@torch.no_grad()
def test_sampling_and_training_round_alike(checkpoint):
    """In bf16; what is left of the gap comes from attention, over other shapes."""
    policy = load(checkpoint, **AS_ON_A_GPU)
    prompts = [policy.message("user", "look " * n) + policy.header for n in (1, 40, 7, 90)]
    actions, sampled = policy.sample(prompts, np.random.default_rng(0).random((4, 40)), 1.0)
    gap, pefts_gap = (
        np.abs(np.concatenate(sampled) - torch.cat(score(p, prompts, actions)).numpy()).mean()
        for p in (policy, with_pefts_layers(policy))
    )
    assert gap < 0.1 * pefts_gap
    policy.model(torch.tensor(prompts[:1]))  # without autocast: nothing is left to be cast


@pytest.mark.parametrize("head", [layers.head, layers.HeadWithoutCopy.apply])
def test_the_head_is_exact_to_rounding_with_and_without_a_copy(monkeypatch, head):
    """Products of bf16 numbers are exact in fp32. A sum of n is right to n roundings of 2^-24; of
    the gradient 2^-8 of 2^-8 is lost on the way, and 2^-8 of the result, which is bf16."""

    def product(x, y):  # no CPU has it
        assert x.dtype == y.dtype == torch.bfloat16
        return x.float() @ y.float()

    monkeypatch.setattr(layers, "product", product)
    torch.manual_seed(0)
    states = torch.randn(5, 64).bfloat16().requires_grad_()
    weight = torch.randn(300, 64).bfloat16()
    upstream = torch.randn(5, 300)
    logits = head(states, weight)
    (gradient,) = torch.autograd.grad(logits, states, upstream)
    assert (logits.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    x, w, g = states.detach().double(), weight.double(), upstream.double()
    assert ((logits - x @ w.T).abs() <= 64 * 2**-24 * (x.abs() @ w.abs().T)).all()
    lost = (2**-16 + 300 * 2**-24) * (g.abs() @ w.abs())
    assert ((gradient - g @ w).abs() <= lost + 2**-8 * (g @ w).abs()).all()


@pytest.mark.parametrize("dtype, calls", [(torch.bfloat16, 1), (torch.float32, 0)])
def test_on_a_gpu_no_head_is_copied(monkeypatch, dtype, calls):
    """On tensors without numbers. (An fp32 head needs no cast.)"""
    product = mock.Mock(wraps=layers.product)
    monkeypatch.setattr(layers, "product", product)
    with FakeTensorMode():
        states = torch.zeros(5, 64, dtype=dtype, device="cuda")
        logits = layers.head(states, torch.zeros(300, 64, dtype=dtype, device="cuda"))
    assert (logits.dtype, logits.shape) == (torch.float32, (5, 300))
    assert product.call_count == calls


@pytest.mark.parametrize("news, rows", [(15, 60), (16, None)], ids=["few queries", "more"])
def test_a_shared_head_gets_more_queries(tmp_path, monkeypatch, news, rows):
    """What is sampled in dialogues that are held is the same, to rounding, as with copied keys.

    Where the mask would be larger than the copies, heads * d = 64 a key, the keys are copied.
    """
    policy = load(write_checkpoint(tmp_path, num_attention_heads=8, num_key_value_heads=2))
    shapes = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, mask, **options):
        shapes.append((query.shape[2], key.shape[2] % 16))
        return kernel(query, key, value, mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    prompts = [policy.message("user", "look " * n) + policy.header for n in (150, 130, 150)]
    longer = [prompt + policy.encode("go" * news) for prompt in prompts]
    uniforms = np.random.default_rng(0).random((3, 2))
    found = []
    for implementation in (None, "sdpa"):
        if implementation:
            policy.model.get_base_model().set_attn_implementation(implementation)
        policy.forget()
        policy.sample(prompts, uniforms[:, :1], 1.0, range(3))
        assert shapes == []
        found.append((policy.sample(longer, uniforms, 1.0, range(3)), shapes[:]))
        shapes.clear()
    ((actions, logps), ours), ((expected, expected_logps), copied) = found
    assert ours == ([(rows, 0)] * 2 if rows else []) and copied == []
    assert actions == expected
    np.testing.assert_allclose(np.concatenate(logps), np.concatenate(expected_logps), atol=1e-6)


def test_attention_has_the_models_scale():
    query, key, value = (torch.randn(2, heads, n, 8) for heads, n in ((4, 2), (2, 9), (2, 9)))
    mask = torch.ones(2, 1, 2, 9, dtype=torch.bool).tril(7)
    module = SimpleNamespace(num_key_value_groups=2)
    ours, expected = (
        function(module, query, key, value, mask, scaling=0.5)[0]
        for function in (attention.attend, attention.sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"])
def test_a_norm_in_one_kernel_is_the_same(name):
    """Bit for bit in fp32. In bf16 it rounds once: what it differs by is the other's roundings."""
    kind = name.removesuffix("RMSNorm").lower()
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    torch.manual_seed(0)
    for dtype, roundings in ((torch.float32, 0), (torch.bfloat16, 2)):
        plain = getattr(module, name)(96, eps=1e-5).requires_grad_(False).to(dtype)
        plain.weight.uniform_(0.5, 1.5)
        fused = copy.deepcopy(plain)
        layers.fuse(fused)
        x = torch.randn(3, 7, 96, dtype=dtype, requires_grad=True)
        found = []
        for norm in (fused, plain):
            y = norm(x)
            of_y = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
            found += [y, *torch.autograd.grad(y, x, of_y)]
        y, gradient, expected, expected_gradient = found
        assert isinstance(fused, layers.FusedNorm) and y.dtype == dtype
        bound = roundings * 2**-8
        assert ((y - expected).abs() <= bound * expected.abs()).all()
        assert (gradient - expected_gradient).norm() <= bound * expected_gradient.norm()


@torch.no_grad()
def test_no_norm_is_cast_to_fp32():
    """On a GPU autocast would do so, and what follows would be in fp32, too."""
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        torch.set_autocast_enabled("cuda", True)  # refused without a GPU
        norm = Qwen2RMSNorm(96)
        norm.weight = torch.nn.Parameter(torch.ones(96, dtype=torch.bfloat16, device="cuda"))
        layers.fuse(norm)
        x = torch.ones(3, 96, dtype=torch.bfloat16, device="cuda")
        assert norm(x).dtype == torch.bfloat16
        plain = torch.nn.functional.rms_norm(x, (96,), norm.weight)
        assert plain.dtype == torch.float32
