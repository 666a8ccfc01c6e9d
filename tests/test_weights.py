"""What is loaded is what was asked for: all of its weights, or one line that says what is wrong.

python -m pytest tests/test_weights.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, check_as_plain_transformers, write_checkpoint
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_train import SMALL
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

import eval as evaluation
import train
from policy import Policy

IDS = torch.arange(5, 25)[None]
UP = "model.layers.1.mlp.up_proj.weight"
WORDS = "its weights are not those that its configuration describes: "


def changed(checkpoint, folder, change=dict, **config):
    """A copy with other tensors, as `change` makes them of a dict, and another config."""
    shutil.copytree(checkpoint, folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return str(folder)


def without(name):
    return lambda tensors: {key: tensors[key] for key in tensors if key != name}


def with_other(**tensors):
    return lambda old: old | {key.replace("__", "."): value for key, value in tensors.items()}


def renamed(tensors):
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
DEEPER = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
SHALLOWER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


@pytest.mark.parametrize(
    "change, config, message",
    [
        (renamed, {}, "27 missing, such as lm_head.weight"),
        (without(UP), {}, f"1 missing, such as {UP}"),
        (with_other(v_head__weight=torch.ones(3)), {}, "1 unexpected, such as v_head.weight"),
        (dict, {"tie_word_embeddings": False}, "1 missing, such as lm_head.weight"),
        (dict, DEEPER, "12 missing, such as model.layers.2."),
        (dict, SHALLOWER, "12 unexpected, such as model.layers.1."),
        (with_other(model__norm__weight=torch.ones(3)), {}, "1 of another shape, such as model.n"),
        (dict, {"quantization_config": GPTQ}, "could not be loaded .*optimum"),
        (dict, {"quantization_config": AWQ}, "could not be loaded .*gptqmodel"),
    ],
)
def test_other_weights_than_the_model_has_are_refused(
    change, config, message, checkpoint, tmp_path
):
    name = changed(checkpoint, tmp_path / "m", change, **config)
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        Policy.load(name)


def test_what_is_only_computed_may_be_stored(checkpoint, tmp_path):
    key = "model__layers__0__self_attn__rotary_emb__inv_freq"
    Policy.load(changed(checkpoint, tmp_path / "m", with_other(**{key: torch.ones(3)})))


def test_a_classifier_is_no_language_model(checkpoint, tmp_path):
    name = str(shutil.copytree(checkpoint, tmp_path / "m"))
    AutoModelForSequenceClassification.from_pretrained(checkpoint).save_pretrained(name)
    with pytest.raises(ValueError, match="1 unexpected, such as score.weight"):
        Policy.load(name)


def test_neither_a_run_nor_an_evaluation_begins_with_other_weights(tmp_path, capsys):
    """The whole way, as a user meets it."""
    name = changed(ROOT / "standin" / "house", tmp_path / "m", renamed)
    run_dir = tmp_path / "run"
    assert train.main([*SMALL, "--model", name, "--run-dir", str(run_dir)]) == 2
    out = str(tmp_path / "out.json")
    command = ["--model", name, "--tasks", "fan", "--out", out, "--", "--env", "house"]
    assert evaluation.main(command) == 2
    said = capsys.readouterr().err
    assert f"train.py: {name}: {WORDS}" in said and f"eval.py: {name}: {WORDS}" in said
    assert not Path(out).exists() and not list(run_dir.glob("checkpoint-*"))


def logits(policy):
    with torch.no_grad(), policy.autocast():
        return policy.model(IDS).logits.float()


def plain_logits(name):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(name)(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_checkpoint_loads_with_and_without_being_asked_for(
    dtype, checkpoint, tmp_path, capsys
):
    quantised = Policy.load(checkpoint, load_in_4bit=True, dtype=dtype)
    assert not capsys.readouterr().err
    name = str(shutil.copytree(checkpoint, tmp_path / "m"))
    quantised.model.unload().save_pretrained(name)
    quantised = Policy.load(checkpoint, load_in_4bit=True, dtype=dtype)
    for asked in (False, True):
        policy = Policy.load(name, load_in_4bit=asked, dtype=dtype)
        layer = policy.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
        assert type(layer).__name__ == "Linear4bit"
        assert layer.compute_dtype == getattr(torch, dtype)
        torch.testing.assert_close(logits(policy), logits(quantised), atol=1e-5, rtol=0)
        assert (f"{name} holds quantised weights (nf4)" in capsys.readouterr().err) is not asked


# --- Adapters -------------------------------------------------------------------------------------
def fine_tuned(base, folder, config=None, **options):
    """An adapter as supervised fine-tuning leaves it -> the model that it makes of its base."""
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    config = config or LoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}]
)
def test_an_adapter_is_merged_into_its_base(options, checkpoint, tmp_path, capsys):
    name = str(tmp_path / "sft")
    tuned = fine_tuned(checkpoint, name, **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            tuned.base_model.lm_head.modules_to_save.default.weight += 0.1
        tuned.save_pretrained(name)
    policy = Policy.load(name)
    assert f"{name} is an adapter: merged into {checkpoint}, in float32" in capsys.readouterr().err
    with torch.no_grad():
        expected = tuned(IDS).logits
    torch.testing.assert_close(logits(policy), expected, atol=1e-4, rtol=0)
    assert (expected - plain_logits(checkpoint)).abs().max() > 1
    assert {p.dtype for p in policy.trainable()} == {torch.float32}


def test_an_adapter_of_an_adapter_is_merged_into_both(checkpoint, tmp_path, capsys):
    """A run that went on from an SFT adapter, and a run that goes on from that one's checkpoint."""
    fine_tuned(checkpoint, tmp_path / "sft")
    first = Policy.load(str(tmp_path / "sft"))
    for parameter in first.trainable():
        torch.nn.init.normal_(parameter, std=0.1)
    first.save(tmp_path / "run")
    torch.testing.assert_close(
        logits(Policy.load(str(tmp_path / "run"))), logits(first), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "options, said, bound",
    [({"dtype": "bfloat16"}, "bfloat16", 0.1), ({"load_in_4bit": True}, "4-bit", 0.75)],
)
def test_merging_in_few_bits_is_said(options, said, bound, checkpoint, tmp_path, capsys):
    """What is merged is nearer to the tuned model than its base is; NF4 rounds it a second time."""
    tuned = fine_tuned(checkpoint, tmp_path / "sft")
    policy = Policy.load(str(tmp_path / "sft"), **options)
    assert f"merged into {checkpoint}, in {said}" in capsys.readouterr().err
    with torch.no_grad():
        expected = tuned(IDS).logits
    error = (logits(policy) - expected).std()
    assert error < bound * (plain_logits(checkpoint) - expected).std()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_tied_embeddings_is_not_merged(target, checkpoint, tmp_path):
    """The sum would change both ends of the shared weight."""
    fine_tuned(checkpoint, tmp_path / "sft", target_modules=[target])
    with pytest.raises(ValueError, match="merged, it is another model"):
        Policy.load(str(tmp_path / "sft"))


def test_an_adapter_that_is_no_plain_lora_is_not_trained(checkpoint, tmp_path):
    tuned = fine_tuned(checkpoint, tmp_path, use_dora=True)
    for name, parameter in tuned.named_parameters():
        if "magnitude" in name:  # as first made, they change nothing
            parameter.data *= 2
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="differs from the model's own log-probs"):
        Policy.load(checkpoint, adapter=tmp_path)


def test_replaced_layers_are_cast(checkpoint, tmp_path):
    fine_tuned(checkpoint, tmp_path / "sft", modules_to_save=["embed_tokens", "lm_head"])
    Policy.load(str(tmp_path / "sft"), dtype="bfloat16")


def test_the_checksum_tells_adapters_and_configurations_apart(checkpoint, tmp_path):
    fine_tuned(checkpoint, tmp_path / "sft", lora_alpha=8)
    config = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    found = {Policy.load(checkpoint).base_checksum}
    for alpha in (8, 16):
        text = json.dumps(config | {"lora_alpha": alpha})
        (tmp_path / "sft" / "adapter_config.json").write_text(text)
        found.add(Policy.load(str(tmp_path / "sft")).base_checksum)
    for number, other in enumerate(({"rms_norm_eps": 0.1}, {"hidden_act": "gelu"})):
        found.add(Policy.load(changed(checkpoint, tmp_path / str(number), **other)).base_checksum)
    assert len(found) == 5
    again = changed(checkpoint, tmp_path / "again", transformers_version="9")
    assert Policy.load(again).base_checksum in found
    script = "import sys; from engine.weights import load_model; "
    script += "print(load_model(sys.argv[1], 'cpu', __import__('torch').float32, False)[2])"
    env = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "sft")]
    told = subprocess.check_output(command, cwd=ROOT, env=env, text=True).strip()
    assert told in found, "the same in every process"


def test_a_checkpoint_whose_base_has_changed_is_not_merged(checkpoint, tmp_path):
    base = str(shutil.copytree(checkpoint, tmp_path / "base"))
    run_dir = tmp_path / "run"
    assert (
        train.main([*SMALL, "--model", base, "--run-dir", str(run_dir), "--iterations", "1"]) == 0
    )
    last = str(run_dir / "checkpoint-1")
    Policy.load(last)
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name: 1.1 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="base is not what it was trained on; its weights differ"):
        Policy.load(last)


def test_an_adapter_of_a_revision_is_left_to_the_user(checkpoint, tmp_path):
    fine_tuned(checkpoint, tmp_path / "sft")
    config = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    text = json.dumps(config | {"revision": "v2"})
    (tmp_path / "sft" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="names the revision v2 of .*: merge it yourself"):
        Policy.load(str(tmp_path / "sft"))


def damage_adapter(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_adapters_that_do_not_fit_are_refused(checkpoint, tmp_path):
    """As --model, and as a run's own."""
    sft = tmp_path / "sft"
    fine_tuned(checkpoint, sft)
    key = min(load_file(sft / "adapter_model.safetensors"))
    other = key.replace("layers.0", "layers.7")

    def moved(tensors):
        return without(key)(tensors) | {other: tensors[key]}

    def added(tensors):
        return tensors | {other: tensors[key].clone()}

    def stripped(tensors):
        return {name.removeprefix("base_model.model."): tensors[name] for name in tensors}

    cases = {"1 missing": moved, "1 unexpected": added, "28 missing": stripped}
    for message, change in cases.items():
        folder = shutil.copytree(sft, tmp_path / message)
        damage_adapter(folder, change)
        with pytest.raises(ValueError, match=f"cannot be merged into its base model: .*{message}"):
            Policy.load(str(folder))
        with pytest.raises(ValueError, match=f"^{folder}: {WORDS}{message}"):
            Policy.load(checkpoint, adapter=folder)

    both = str(shutil.copytree(checkpoint, tmp_path / "both"))
    shutil.copytree(sft, both, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds a model and an adapter; which is meant"):
        Policy.load(both)
    gone = shutil.copytree(sft, tmp_path / "gone")
    config = json.loads((gone / "adapter_config.json").read_text())
    (gone / "tokenizer.json").unlink(missing_ok=True)
    for place, message in (("/gone", "/gone: there is no such folder"), (None, "it names none")):
        text = json.dumps(config | {"base_model_name_or_path": place})
        (gone / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Policy.load(str(gone))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    fine_tuned(checkpoint, tmp_path / "prompt", prompt)
    with pytest.raises(ValueError, match="cannot be merged into its base model"):
        Policy.load(str(tmp_path / "prompt"))


# --- Damaged numbers ------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", UP, "model.norm.weight"])
def test_numbers_that_are_not_finite_are_told(name, value, checkpoint, tmp_path):
    def damage(tensors):
        tensors[name].view(-1)[60] = value
        return tensors

    with pytest.raises(ValueError, match=f"m: is damaged: {name} holds numbers that are not"):
        Policy.load(changed(checkpoint, tmp_path / "m", damage, tie_word_embeddings=True))


def test_an_adapter_that_is_not_finite_is_told(checkpoint, tmp_path, capsys):
    """At load; and when it becomes so later, greedy or sampled, instead of an index error."""
    policy = Policy.load(checkpoint)
    next(iter(policy.trainable())).data[0, 0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="or its adapter's, are damaged"):
            policy.sample([policy.header], [[0.5, 0.5]], temperature)
    policy.save(tmp_path)
    with pytest.raises(
        ValueError, match="is damaged: .*lora_A.* holds numbers that are not finite"
    ):
        Policy.load(checkpoint, adapter=tmp_path)


# --- Tokenizers and dropout -----------------------------------------------------------------------
def test_a_tokenizer_that_does_not_fit_is_refused(checkpoint, tmp_path):
    lost = shutil.copytree(checkpoint, tmp_path / "lost")
    (lost / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer loses text|no tokenizer could be loaded"):
        Policy.load(str(lost))
    name = write_checkpoint(tmp_path / "long", added=[f"word{i}" for i in range(9)])
    model = AutoModelForCausalLM.from_pretrained(name)
    rows = model.config.vocab_size - 3
    model.resize_token_embeddings(rows)
    model.save_pretrained(name)
    with pytest.raises(ValueError, match=f"has {rows + 3} tokens, its model only {rows}"):
        Policy.load(name)


def test_dropout_of_a_configuration_is_off(checkpoint, tmp_path):
    """What is trained on is what was sampled."""
    policy = Policy.load(changed(checkpoint, tmp_path / "m", attention_dropout=0.5))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 0] = False
    logp, _ = policy.logprobs(IDS, mask, 1.0)
    with torch.no_grad():
        expected, _ = policy.logprobs(IDS, mask, 1.0)
    torch.testing.assert_close(logp, expected, atol=1e-6, rtol=0)


# --- Architectures --------------------------------------------------------------------------------
NEXT = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "layers": 4,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}


@pytest.mark.parametrize(
    "config_class, options, message",
    [
        (Gemma2Config, {"head_dim": 16}, "do not attend to all tokens .*sliding window"),
        (Qwen2Config, WINDOW, "do not attend to all tokens .*sliding window"),
        (MistralConfig, {"sliding_window": 16}, "do not attend to all tokens .*sliding window"),
        (Qwen3NextConfig, NEXT, "do not attend to all tokens .*linear_attention"),
        (GraniteConfig, {"logits_scaling": 4.0}, "differs from the model's own log-probs by"),
        (CohereConfig, {}, "differs from the model's own log-probs by"),
        (Qwen2Config, {"rope_parameters": DYNAMIC}, "positions change with the length .dynamic"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(
    config_class, options, message, tmp_path
):
    name = write_checkpoint(tmp_path, config_class=config_class, **options)
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        Policy.load(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_models_with_full_attention_are_accepted(config_class, dtype, tmp_path):
    Policy.load(write_checkpoint(tmp_path, config_class=config_class, layers=4), dtype=dtype)


def test_a_mask_that_hides_one_token_is_noticed(checkpoint, monkeypatch):
    """A cache that sees one token too few, as a window would have it."""
    from engine.cache import DialogueCache

    forward = DialogueCache.forward

    def narrow(self, model, ids, positions, width, rows, select):
        def hide(**inputs):
            inputs["attention_mask"] = inputs["attention_mask"].clone()
            inputs["attention_mask"][..., 1:, 0] = False
            return model(**inputs)

        hide.device = model.device
        return forward(self, hide, ids, positions, width, rows, select)

    monkeypatch.setattr(DialogueCache, "forward", narrow)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match="differs from the model's own log-probs"):
            Policy.load(checkpoint, dtype=dtype)


# --- Layouts --------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_checkpoint_with_a_large_vocabulary(tied, tmp_path):
    """The same greedy tokens and log-probs as plain transformers, from the same files."""
    name = write_checkpoint(tmp_path / "m", tie_word_embeddings=tied, layers=3)
    model = AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(2)
    model.resize_token_embeddings(model.config.vocab_size + 53)
    (tmp_path / "m" / "model.safetensors").unlink()
    model.save_pretrained(name, max_shard_size="100KB")
    assert len(list(Path(name).glob("*.safetensors"))) > 2
    check_as_plain_transformers(name)


def test_the_checkpoint_is_what_peft_loads_onto_the_merged_model(checkpoint, tmp_path):
    """docs/runs.md, "Take the policy elsewhere"."""
    policy = Policy.load(checkpoint)
    for parameter in policy.trainable():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    with torch.no_grad():
        expected = plain.eval()(IDS).logits
    torch.testing.assert_close(logits(policy), expected, atol=1e-5, rtol=0)
