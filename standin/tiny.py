"""What the makers of the stand-ins share: the model, how it learns, how it plays."""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import rollout
from empo2 import Algorithm, collate, score_tokens
from engine.packing import micro_batches, pack
from envs import EnvFault
from policy import Policy
from rollout import TIP_REQUEST, Turn
from settings import Settings

ALGORITHM = Algorithm(Settings())
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


def make_tokenizer(texts):
    """A byte-level tokenizer of at most 1,024 tokens, in Qwen2's manner."""
    raw = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
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


def make_model(vocabulary):
    """A Qwen2 of 0.7 M parameters with random weights."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def start_copying(model):
    """Start the first two layers as an induction circuit: "what followed this the last time?"

    Copying a name and following a tip need no more, and it would take longer to emerge than the
    rest takes to learn. Heads of layer 0 hear the token 1, 2 and 3 back. Those of layer 1 look
    where the token 1, 2, 3 back is the same as 0, 1, 2 back from here, and say what stands there.
    """
    model.model.embed_tokens.weight *= 3.0  # the untrained copies must be loud enough
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    d = model.config.hidden_size
    size = first.head_dim
    half = size // 2
    # A head's rotary pairs are (i, i + half), fast to slow. The fast ones tell neighbours apart.
    angles = model.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    strength = 5.0 * (torch.arange(half) < 5)
    # The slow half hardly turns: content can be compared at any distance.
    slow = torch.tensor([i for i in range(size) if i % half >= half // 2])
    content = orthogonal(d)[:half]  # [half, d]: what of a token is compared
    channels = [content, *orthogonal(d)[: 3 * half].split(half)]
    said = orthogonal(d)
    for head, back in enumerate((1, 2, 3)):
        mine = slice(head * size, (head + 1) * size)
        sine = -strength * (back * angles).sin()
        first.k_proj.bias[mine] = torch.cat([strength, 0 * strength])
        first.q_proj.bias[mine] = torch.cat([strength * (back * angles).cos(), sine])
        first.v_proj.weight[mine][:half] = content  # written into a channel of its own
        first.o_proj.weight[:, mine][:, :half] = 0.3 * channels[back].T
        second.q_proj.weight[head * size + slow] = 2.0 * channels[back - 1]
        second.k_proj.weight[head * size + slow] = 2.0 * channels[back]
        second.v_proj.weight[mine] = said[mine]
        second.o_proj.weight[:, mine] = 0.5 * said[mine].T


def orthogonal(d):
    """A random rotation [d, d]."""
    return torch.linalg.qr(torch.randn(d, d))[0]


def make_optimizers(model):
    """Of the parameters that can be trained.

    The circuit's rate is low, or it is lost before it is of use.
    """
    matrices, circuit, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or "layers" not in name:
            rest.append(parameter)
        elif re.search(r"layers\.[01]\.self_attn", name):
            circuit.append(parameter)
        else:
            matrices.append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.015, weight_decay=0.05),
        torch.optim.Muon(circuit, lr=0.0045, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.006, betas=(0.9, 0.95), weight_decay=0.0),
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


def make_player(folder, texts, play, minutes):
    """Write a model that imitates a scripted player to the folder.

    texts: what the tokenizer is made from. play: as in `imitation`.
    """
    tokenizer = make_tokenizer(texts)
    model = make_model(len(tokenizer))
    start_copying(model)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    policy = Policy.load(folder)
    model = policy.model.get_base_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" not in name)
    backward = imitation(policy, play, times=8, adapter=False)
    learn(make_optimizers(model), minutes, last_rate=0.01, backward=backward)
    model = policy.model.unload().requires_grad_(True)
    model.to(torch.bfloat16).save_pretrained(folder)


def imitation(policy, play, times, adapter):
    """`backward` of `learn`: the loss of fresh episodes, all their actions and tips together.

    play: policy -> episodes that share a row; the advantage of a turn is its weight in what is
    learnt. times: plays a step. adapter: is it in use, or the model alone?
    """
    fast = torch.cpu._is_avx512_bf16_supported()  # then bf16 pays

    def backward(step):
        rows = []
        for _ in range(times):
            rows.append(pack([pair for e in play(policy) for pair in weighted_pairs(e)]))
        spans = [span for row in rows for span in row.spans]
        total = sum(sum(pair.advantages) for _, pair in spans)
        loss_sum = 0.0
        for part in micro_batches(rows, 2048):
            batch = collate(part)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logp, _ = score_tokens(policy, batch, ALGORITHM.s, reference=not adapter)
            loss = -(logp * batch.advantages).sum() / total
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    return backward


def weighted_pairs(episode):
    """Its training pairs; the weight of each is its turn's `advantage`."""
    for turn, pair in zip(episode.turns, ALGORITHM.training_pairs(episode), strict=True):
        pair.advantages = [turn.advantage] * len(pair.action)
        yield pair


# --- Playing --------------------------------------------------------------------------------------
def start_episode(policy, env, job):
    """An episode that begins, laid out as in a rollout."""
    return rollout.start_episode(policy, env, job, None, 0, rollout.reset_env(env, job, EnvFault))


def write_turn(policy, playing, line, weight):
    """Act as the scripted player says. weight: of the turn in what is learnt."""
    turn = playing.episode.turns[-1]
    turn.action_ids = [*policy.encode(line), policy.end_id]
    turn.advantage = weight
    rollout.act(policy, [playing], EnvFault)


def end_episode(policy, playing, tip, weight):
    """The episode, with its tip as the last turn."""
    episode = playing.episode
    request = f"{playing.observation}\n\n{TIP_REQUEST.format(score=episode.score)}"
    asked = policy.message("user", request)
    tip_ids = [*policy.encode(tip), policy.end_id]
    episode.turns.append(Turn(request, asked, action_ids=tip_ids, advantage=weight))
    return episode


def play_all(policy, worlds, jobs, told, embed, s, seed):
    """Episodes of a policy, which writes tips. told: the memory that tips come from."""
    played = []
    rng = np.random.default_rng(seed)
    for batch in rollout.rollout(policy, worlds, jobs, told, embed, Algorithm(s), rng, EnvFault):
        rollout.write_tips(policy, batch, s)
        played += batch
    return played


# --- Command line ---
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
    add("--check", action="store_true", help="make nothing, only measure")
    return parser


def refuse_overwrite(parser, args):
    """End the program if the folder holds a model that is not to be replaced."""
    if any(Path(args.out).glob("*model.safetensors")) and not args.force:
        parser.error(f"{args.out} already holds a model; give another --out, or --force")


def main(doc, folder, minutes, make, check):
    """Make the player, and say what it can do."""
    parser = command_line(doc, folder, minutes)
    args = parser.parse_args()
    if not args.check:
        refuse_overwrite(parser, args)
        make(args.out, args.minutes, args.seed)
    show(check(args.out))


def show(found):
    """A line for each value."""
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
