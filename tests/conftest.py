"""Shared by the tests: a small Qwen2 checkpoint on disk, with its own tokenizer in Qwen's chat format. No network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)  # Qwen2's


def write_checkpoint(
    folder,
    hidden=64,
    layers=2,
    vocab=400,
    pad="<|endoftext|>",
    template=CHATML,
    seed=0,
    corpus=None,
    scale=0.2,
):
    """A randomly initialised Qwen2 with a byte-level tokenizer, loadable like any hub checkpoint."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = (
        corpus
        or ["system user assistant go to the kitchen open the box take the radio look around.\n"]
        * 9
    )
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=pad,
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            initializer_range=scale,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen2"))


# What tests ask of the training rows, whatever their layout.
def score(policy, prompts, actions, **options):
    """Log-probs of each action after its prompt, each pair on its own."""
    rows = [p + a for p, a in zip(prompts, actions)]
    width = max(map(len, rows))
    mask = torch.tensor(
        [[len(p) <= i < len(r) for i in range(width)] for p, r in zip(prompts, rows)]
    )
    ids = torch.tensor([r + [policy.end_id] * (width - len(r)) for r in rows])
    logp, _ = policy.logprobs(ids, mask, **options)
    return [logp[b, len(p) : len(r)] for b, (p, r) in enumerate(zip(prompts, rows))]


def actions_of(row):
    """Indices of each trained action of a row, in the order of the turns (= of the trunk that they see)."""
    runs, previous = [], None
    for i, trained in enumerate(row.mask):
        if trained:
            if previous != i - 1 or row.branch[i] != row.branch[previous]:
                runs.append([])
            runs[-1].append(i)
            previous = i
    return sorted(runs, key=lambda run: row.trunk[run[0]])


def trained_actions(episode, advantage, settings):
    """[(prompt, action, old log-probs, advantage, to be recomputed?)] of an episode's turns: what the loss is made of."""
    import empo2

    row = empo2.training_row(episode, advantage, settings)
    visible = empo2.visibility(
        *(torch.tensor([getattr(row, n)]) for n in ("position", "branch", "trunk"))
    )[0]
    found = []
    for run in actions_of(row):
        seen = visible[run[0]].nonzero()[:, 0].tolist()
        assert [row.position[i] for i in seen] == list(range(len(seen))), (
            "positions run on from trunk to branch"
        )
        assert all(
            (visible[i].nonzero()[:, 0]).tolist() == seen + run[1 : run.index(i) + 1] for i in run
        )
        found.append(
            (
                [row.ids[i] for i in seen[:-1]],
                [row.ids[i] for i in run],
                [row.old_logp[i] for i in run],
                row.advantage,
                row.recompute[run[0]],
            )
        )
    return found


def numerators(policy, episode, settings):
    """The update's own log-probs of each turn's action, a list of [len(action)]."""
    import empo2

    row = empo2.training_row(episode, 1.0, settings)
    logp = empo2.score(policy, [row])[0][0]
    return [logp[run] for run in actions_of(row)]
