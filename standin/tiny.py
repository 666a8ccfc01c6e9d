"""What the makers of the stand-ins share: tokenizer, model, a start that copies, learning loop."""

import argparse
import re
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from empo2 import Algorithm, collate, score_tokens
from engine.packing import micro_batches, pack
from policy import Policy

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(texts, size):
    """A byte-level tokenizer of at most `size` tokens, in Qwen2's manner."""
    raw = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def make_model(vocabulary, layers, heads, size, width, theta):
    """A Qwen2 with random weights. size: dimensions of a head; width: of the hidden layers."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=heads * size,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def start_copying(model, loudness, sharpness, fast, volume, lookups):
    """Start the first two layers as an induction circuit: "what followed this the last time?"

    Copying a name and following a tip need no more, and it would take longer to emerge than the
    rest takes to learn. loudness: factor of the embeddings. sharpness, fast: strength and number of
    the rotary pairs that tell neighbours apart. volume: of what a token hears of those before it.
    lookups: for each head of layer 1 that takes part (i, j): it looks where the token j back is the
    same as i back from here, and says what stands there.
    """
    model.model.embed_tokens.weight *= loudness
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    d = model.config.hidden_size
    size = first.head_dim
    half = size // 2
    # A head's rotary pairs are (i, i + half), fast to slow.
    angles = model.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    strength = sharpness * (torch.arange(half) < fast)
    # The slow half hardly turns: content can be compared at any distance.
    slow = torch.tensor([i for i in range(size) if i % half >= half // 2])
    content = orthogonal(d)[:half]  # [half, d]: what of a token is compared
    channels = [content, *orthogonal(d)[: 3 * half].split(half)]
    said = orthogonal(d)
    for head, back in enumerate((1, 2, 3)):  # layer 0: heads that look so many tokens back
        mine = slice(head * size, (head + 1) * size)
        sine = -strength * (back * angles).sin()
        first.k_proj.bias[mine] = torch.cat([strength, 0 * strength])
        first.q_proj.bias[mine] = torch.cat([strength * (back * angles).cos(), sine])
        if any(back == j for _, j in lookups):  # and write what they see into their own channel
            first.v_proj.weight[mine][:half] = content
            first.o_proj.weight[:, mine][:, :half] = volume * channels[back].T
    for head, (i, j) in enumerate(lookups):
        mine = slice(head * size, (head + 1) * size)
        second.q_proj.weight[head * size + slow] = 2.0 * channels[i]
        second.k_proj.weight[head * size + slow] = 2.0 * channels[j]
        second.v_proj.weight[mine] = said[mine]
        second.o_proj.weight[:, mine] = 0.5 * said[mine].T


def orthogonal(d):
    """A random rotation [d, d]."""
    return torch.linalg.qr(torch.randn(d, d))[0]


def make_optimizers(model, copying, rates, weight_decay):
    """Of the parameters that can be trained. copying: pattern of the names of the circuit's layers.

    rates: of the matrices, of the circuit's (low, or it is lost before it is of use), of the rest.
    """
    matrices, circuit, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or "layers" not in name:
            rest.append(parameter)
        elif re.search(copying, name):
            circuit.append(parameter)
        else:
            matrices.append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=weight_decay),
        torch.optim.Muon(circuit, lr=rates[1], weight_decay=0.0),
        torch.optim.AdamW(rest, lr=rates[2], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learn(optimizers, minutes, last_rate, backward):
    """Train until time is up; the rates fall to `last_rate` of their peak.

    backward: number of the step -> the loss, a float, after its gradient was added.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    step = 0
    passed = 0.0  # share of the time
    start = time.time()
    bar = tqdm(desc="learn", unit="step")
    while passed < 1:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 30, (1 - passed) / 0.6 + last_rate)
        loss = backward(step)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        passed = (time.time() - start) / (60 * minutes)
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {passed:.0%} of the time")
    bar.close()


def make_player(folder, texts, play, s, minutes):
    """Write a model of 0.7 M parameters that imitates a scripted player to the folder.

    texts: what the tokenizer is made from. play, s: as in `imitation`.
    """
    tokenizer = make_tokenizer(texts, 1024)
    model = make_model(len(tokenizer), layers=3, heads=4, size=32, width=384, theta=1e5)
    # After "battery in": what followed "battery in" before?
    lookups = [(0, 1), (1, 2), (2, 3)]
    start_copying(model, 3.0, sharpness=5.0, fast=5, volume=0.3, lookups=lookups)
    policy = load_policy(model, tokenizer, folder)
    model = policy.model.get_base_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" not in name)
    optimizers = make_optimizers(
        model, r"layers\.[01]\.self_attn", rates=(0.015, 0.0045, 0.006), weight_decay=0.05
    )
    backward = imitation(policy, play, s, times=8, adapter=False)
    learn(optimizers, minutes, last_rate=0.01, backward=backward)
    save(policy.model.unload().requires_grad_(True), folder)


def imitation(policy, play, s, times, adapter):
    """`backward` of `learn`: the loss of fresh episodes, all their actions and tips together.

    play: policy -> episodes that share a row; the advantage of a turn is its weight in what is
    learnt. s: settings. times: plays a step. adapter: is it in use, or the model alone?
    """

    def backward(step):
        rows = []
        for _ in range(times):
            rows.append(pack([pair for e in play(policy) for pair in weighted_pairs(e, s)]))
        spans = [span for row in rows for span in row.spans]
        total = sum(sum(pair.advantages) for _, pair in spans)
        loss_sum = 0.0
        for part in micro_batches(rows, 2048):
            batch = collate(part)
            with autocast():
                logp, _ = score_tokens(policy, batch, s, reference=not adapter)
            loss = -(logp * batch.advantages).sum() / total
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    return backward


def weighted_pairs(episode, s):
    """Its training pairs; the weight of each is its turn's `advantage`."""
    for turn, pair in zip(episode.turns, Algorithm(s).training_pairs(episode), strict=True):
        pair.advantages = [turn.advantage] * len(pair.action)
        yield pair


def autocast():
    """bf16 where the processor is fast at it."""
    fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def load_policy(model, tokenizer, folder):
    """The policy of a model that is still to be trained; both are written to the folder."""
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return Policy.load(folder)


def save(model, folder):
    """Write the trained model, in bf16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")


def command_line(doc, folder, minutes):
    """A parser with the options that all makers have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default=folder, help="folder (default: %(default)s)")
    add("--minutes", type=float, default=minutes, help="time to learn (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    add("--force", action="store_true", help="replace the model in the folder")
    return parser


def refuse_overwrite(parser, args):
    """End the program if the folder holds a model that is not to be replaced."""
    if any(Path(args.out).glob("*model.safetensors")) and not args.force:
        parser.error(f"{args.out} already holds a model; give another --out, or --force")
