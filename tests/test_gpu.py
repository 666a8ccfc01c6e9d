"""What a GPU is asked, seen without one; its benchmark, which runs on a CPU, too; its estimate."""

import ctypes
import dataclasses
import math
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import bitsandbytes
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig

from empo2 import Algorithm, accumulate_gradient
from engine import activations
from engine.packing import pack
from experiments import gpu, gpu_checks, gpu_memory
from experiments.gpu_estimate import Card, Cost
from policy import Policy
from settings import Settings

LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"


class OnGPU(TorchDispatchMode):
    """Tensors of the GPU are shapes, those of the CPU real; mixing them raises, as it would there.

    Every answer of the GPU is False or 77, and each mask has five True. `questions`: how many there
    were. `on_cpu`: operations on the CPU.
    """

    def __init__(self, fakes):
        super().__init__()
        self.fakes = fakes
        self.questions = 0
        self.on_cpu = 0

    @classmethod
    def _should_skip_dynamo(cls):  # nothing is compiled, and this is faster
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = [x.type for x in leaves if isinstance(x, torch.device)]
        if "cuda" not in devices and not any(isinstance(x, FakeTensor) for x in leaves):
            self.on_cpu += 1
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            self.questions += 1
            return False if args[0].dtype == torch.bool else 77
        if func is torch.ops.aten.index.Tensor:
            args = args[0], [i for index in args[1] for i in self.positions(index)]
        args, kwargs = tree_map_only(torch.Tensor, self.fake, (args, kwargs))
        return func(*args, **kwargs)

    def fake(self, x):
        return x if isinstance(x, FakeTensor) else self.fakes.from_tensor(x, static_shapes=True)

    def positions(self, index):
        """The indices that a mask stands for. (To know how many they are is a question, too.)"""
        if index is None or index.dtype != torch.bool:
            return [index]
        self.questions += 1
        return [torch.zeros(5, dtype=torch.long, device=index.device)] * index.ndim

    def record(self, step):
        """In the place of CudaGraphs: nothing may wait for the GPU, or be made on the CPU."""

        def replay():
            before = self.questions, self.on_cpu
            step()
            assert (self.questions, self.on_cpu) == before

        return replay


@contextmanager
def on_gpu():
    """In here cuda:0 can be used without a GPU -> its OnGPU."""
    # A build for the CPU has no guard of CUDA devices: as one for CUDA does without a GPU, take the
    # one that does nothing. (The backward pass wants more, and is left out.)
    guards = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(LIBRARY)), guards)
    before = guards[1]
    guards[1] = before or guards[0]
    answers = patch.object(FakeTensor, "tolist", lambda x: torch.full(x.shape, 77).tolist())
    autocast = patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    in_bf16 = patch("torch.cuda.is_bf16_supported", lambda: True)
    backward = patch.object(torch.Tensor, "backward", lambda loss: None)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with answers, autocast, in_bf16, backward, fakes, OnGPU(fakes) as mode:
        yield mode
    guards[1] = before


@pytest.mark.skipif(not LIBRARY.exists(), reason="needs torch for Linux")
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_no_step_of_sampling_waits_for_the_gpu(monkeypatch, load_in_4bit):
    model = gpu_memory.skeleton(gpu_memory.shape(64, 128, 1, 4, 2, 2000), load_in_4bit)
    with on_gpu() as mode:
        policy = gpu_memory.fill(model, "cuda:0")
        prompts = [[77] * 30, [77] * 30, [77] * 300]
        # Have all stopped?
        for record, ids, tokens, questions in (
            (None, [0, 1, 2], 3, 2),
            (None, [2, 0], 2, 1),
            (mode.record, [0, 1, 2], 9, 1),
        ):
            policy.record = record
            mode.questions = 0
            uniforms = np.full((len(ids), tokens), 0.5)
            actions, _ = policy.sample(prompts[: len(ids)], uniforms, 1.0, ids)
            assert [len(action) for action in actions] == [tokens] * len(ids)
            assert mode.questions == questions
        policy.choose_checkpointing(None)
        monkeypatch.setattr(activations, "free_bytes", lambda: 1e9)
        s = Settings(beta=0.1)
        episode = gpu_memory.make_episode(policy, np.random.default_rng(0), context=500)
        pairs = gpu_memory.learnt_pairs(episode, s)
        pairs[0].old_logps = None
        mode.questions = 0
        accumulate_gradient(policy, [pack(pairs)], Algorithm(s), 1)
        # What two masks choose, twice, and eight metrics.
        assert mode.questions == 12 and policy.checkpointing.of_token > 0


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_random_policies_have_the_layers_of_loaded_ones(checkpoint, load_in_4bit):
    loaded = Policy.load(checkpoint, dtype="bfloat16", load_in_4bit=load_in_4bit)
    config = AutoConfig.from_pretrained(checkpoint)
    model = gpu_memory.fill(gpu_memory.skeleton(config, load_in_4bit)).model
    kinds = [{name: type(m) for name, m in of.named_modules()} for of in (loaded.model, model)]
    assert kinds[0] == kinds[1]


# --- The benchmark ---

# One dialogue: nothing is padded.
ALONE = gpu.Scale(gpu_memory.TINY, torch.float32, 1, (0, 2), 2, 1024, 64, context=700)
RATES = {"flops": 1e9, "bytes": 1e9}


def test_all_pieces_are_measured_and_none_computes_more_than_is_needed():
    found = {}
    gpu.measure(ALONE, False, "cpu", RATES, found.__setitem__)
    checks = [found.pop(name) for name in ("sampler gap", "two steps, top", "micro-batch, top")]
    assert checks[0]["gap"] < 1e-4 and 0 < checks[0]["gradient"] < math.inf
    assert all(len(top["top"]) == 10 and top["top"][0][1] > 0 for top in checks[1:])
    assert {*found} == {"prefill", "decode", "tips", "pre-pass", "update"}
    assert all("seconds" in piece and piece["floor"] > 0 for piece in found.values())
    for name in ("prefill", "pre-pass", "update"):
        assert found[name]["computed"] == found[name]["needed"]
    assert found["pre-pass"]["needed"] == 7 / 8 * found["update"]["needed"]  # of 8 steps
    *_, total = gpu.table({"weights": {"float32": found}})
    seconds = sum(piece["seconds"] for piece in found.values())
    assert total.startswith(f"| float32 | all, without the environment | {seconds:.3g} |")


@pytest.mark.parametrize(
    "fault, equal, difference", [(0.0, 16, 0.0), (0.5, 16, 0.5), (None, 8, 0.0)]
)
def test_steps_that_sample_otherwise_are_found(monkeypatch, fault, equal, difference):
    """fault: of the log-probs when steps are recorded; None: other tokens at the second turn."""
    scale = dataclasses.replace(ALONE, dialogues=8)
    model = gpu_memory.skeleton(gpu_memory.TINY, dtype=torch.float32)
    bench = gpu.Bench(gpu_memory.fill(model), scale, RATES)
    sample = bench.policy.sample

    def faulty(prompts, uniforms, *args):
        recorded = bench.policy.record is not None
        if recorded and fault is None and len(prompts[0]) > 400:
            uniforms = 1 - uniforms
        bench.policy.record = None
        actions, logps = sample(prompts, uniforms, *args)
        if recorded and fault:
            logps = [[logp + fault for logp in of_action] for of_action in logps]
        bench.policy.record = "a recorder" if recorded else None
        return actions, logps

    monkeypatch.setattr(bench.policy, "sample", faulty)
    found = gpu_checks.with_and_without_graphs(bench, "a recorder")
    assert found["actions"] == 16 and found["equal"] == equal
    assert found["largest difference"] == pytest.approx(difference)


def test_turns_that_were_not_measured_are_interpolated():
    model = gpu_memory.skeleton(gpu_memory.TINY, dtype=torch.float32)
    bench = gpu.Bench(gpu_memory.fill(model), ALONE, RATES)
    bench.turns = 5
    assert bench.all_turns([1.0, 3.0]) == pytest.approx(1 + 2 + 3 + 3 + 3)


# --- The estimate ---
# A byte, two FLOPs in bf16 and one in fp32 a second; no room for activations.
SLOW = Card(1e-12, 2e-12, 1e-12, 0, True, 1, 1024)


@pytest.mark.parametrize(
    "dtype, operation, seconds",
    [
        (torch.bfloat16, lambda a, b: a @ b, 2 * 8 * 16 * 4 / 2),
        (torch.float32, lambda a, b: a @ b, 2 * 8 * 16 * 4),
        (torch.float32, lambda a, b: a[:1] @ b, 4 * (16 + 16 * 4 + 4)),  # bytes take longer
        (torch.float32, lambda a, b: a.T.view(16, 8)[1:].expand(15, 8), 0),
        (torch.float32, lambda a, b: a + a[:1].expand(8, 16), 4 * (128 + 16 + 128)),
        (torch.float32, lambda a, b: a[torch.tensor([1, 2])], 4 * 2 * 2 * 16),
        (torch.float32, lambda a, b: a.add_(1), 4 * 2 * 128),
    ],
)
def test_time_of_an_operation(dtype, operation, seconds):
    with gpu_memory.imagined(), Cost(SLOW) as cost:
        a, b = torch.randn(8, 16, dtype=dtype), torch.randn(16, 4, dtype=dtype)
        assert cost.time(lambda: operation(a, b)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "rows, wide, unpacked", [(4, 64, 0), (5, 64, 1), (5, 512, 0), (129, 512, 1)]
)
def test_4bit_weights_are_unpacked_unless_few_rows_or_wide(rows, wide, unpacked):
    with gpu_memory.imagined(), Cost(SLOW._replace(bf16=1.0)) as cost:
        weight = torch.randn(wide, 64, dtype=torch.bfloat16)
        weight, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        packed = 64 * wide / 2 + 4 * wide + 2 * rows * (64 + wide)  # with a scale for 64 weights
        seconds = cost.time(lambda: bitsandbytes.matmul_4bit(x, weight, quant_state=state))
        assert seconds == pytest.approx(packed + unpacked * 2 * 2 * 64 * wide)


def test_each_further_layer_costs_what_the_second_does(monkeypatch, capsys):
    for name in ("prefill", "decode", "tips"):  # they take longer
        monkeypatch.setattr(gpu.Bench, name, lambda bench: {"seconds": 1.0, "floor": 1.0})
    config = gpu_memory.shape(64, 128, 3, 4, 2, 2000)
    scale = dataclasses.replace(ALONE, config=config, context=400)
    direct = gpu.computed(SLOW, scale, 3)
    for name, result in gpu.estimate(SLOW, scale).items():
        assert result["seconds"] == pytest.approx(gpu_memory.EPISODES * direct[name]["seconds"])
    monkeypatch.setattr(gpu, "estimate", lambda card, scale: direct)
    gpu.main(["--estimate", "4090", "--rates", "1", "2", "3"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "An estimate for one iteration on 4090 (1.0 TB/s, 2.0 TFLOP/s in bf16"
    )
    assert "\n| NF4 | update | " in printed
