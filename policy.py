"""The policy: a Qwen2, 2.5 or 3 chat model with LoRA adapters, optionally in 4-bit (QLoRA).

`π_θ` is the model with its adapter, `π_ref` the same model with the adapter disabled. Everything
that enters the model is a list of token ids put together from *segments*, each tokenised once:

    system message | observation | action | observation | tips | header, action to be written

A segment begins and ends at a control token, so no token can straddle two segments, and a dialogue
without tips is built by leaving the tips out: nothing is ever searched for or stripped.
`chat_format` compares this with the tokenizer's own chat template when a model is loaded.
"""

# ruff: noqa: E402
import hashlib
import logging
import os
import warnings
from contextlib import nullcontext
from pathlib import Path

# Shown to every user without a GPU, who can do nothing about it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # peft imports it
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from engine import attention, layers, weights
from engine.activations import Checkpointing
from engine.cache import DialogueCache
from engine.chat import END_OF_THOUGHT, chat_format
from engine.decode import CudaGraphs, decode
from engine.hardware import find_device

ROOT = Path(__file__).parent
END_OF_TURN = "<|im_end|>"
OPTIONS = "load_in_4bit gradient_checkpointing decode_graph lora_r lora_alpha seed".split()
HEAD_CHUNK = 256  # action tokens whose [vocab] logits exist at the same time


class Policy:
    """A causal language model that writes actions and scores them.

    Attributes: `header` ids that open the turn to be written (Qwen3: with an empty thought);
    `past_header` those of a turn that is over; `drops_thoughts` whether the template drops the
    thoughts of such turns; `stop_ids` every control token (each ends an action); `max_positions`
    the longest sequence the model was built for; `base_checksum` tells base models apart; `record`
    what records a step of sampling, or None (decode.py); `checkpointing` which layers compute their
    activations twice in an update, or None.
    """

    record = None
    checkpointing = None

    def __init__(self, model, tokenizer, base_checksum=""):
        self.model = model
        self.base_checksum = base_checksum
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.end_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.stop_ids = sorted({*tokenizer.all_special_ids, self.end_id})
        self.past_header = self.control("<|im_start|>assistant\n")
        self.header, self.drops_thoughts = chat_format(self)
        self.max_positions = model.config.max_position_embeddings
        attention.use(model.get_base_model())
        self.forget()

    @classmethod
    def load(
        cls,
        name,
        *,
        adapter=None,
        device="cpu",
        dtype="float32",
        load_in_4bit=False,
        gradient_checkpointing=None,
        decode_graph=False,
        lora_r=16,
        lora_alpha=32,
        seed=0,
    ):
        """Load a hub id or a folder, freeze it, and put LoRA on every linear layer.

        adapter: a folder to read the LoRA weights from. dtype: of the frozen weights; with bfloat16
        the layers compute in it, too (autocast). load_in_4bit: NF4 weights; what is computed is of
        `dtype`. gradient_checkpointing: in updates, activations are computed twice, not kept; None:
        on a GPU, in as many layers as its memory needs.
        decode_graph: record the steps of sampling as CUDA graphs.
        The adapter is always fp32: at learning rates of 1e-5 a bf16 weight would not move.
        Raises ValueError with one line that says what to do.
        """
        if decode_graph and device == "cpu":
            raise ValueError("--decode-graph needs a GPU; leave it out")
        dtype = getattr(torch, dtype)
        model, tokenizer, checksum = weights.load_model(name, device, dtype, load_in_4bit)
        if adapter:
            model = weights.load_adapter(model, adapter)
        else:
            model = weights.new_adapter(model, lora_r, lora_alpha, seed)
        # What the saved adapter names as its base, also if that was an adapter or has moved.
        model.peft_config["default"].base_model_name_or_path = name
        policy = cls(model, tokenizer, checksum)
        weights.check_attention(policy)  # against peft's own layers
        layers.fuse(model)
        policy.choose_checkpointing(gradient_checkpointing)
        if decode_graph:
            policy.record = CudaGraphs()
        return policy

    def choose_checkpointing(self, asked):
        """asked: as gradient_checkpointing of `load`."""
        if asked or (asked is None and self.device.type == "cuda"):
            self.checkpointing = Checkpointing(self.model, always=bool(asked))

    # --- Text to segments ---
    def control(self, text):
        """Token ids of text in which control tokens count."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode(self, text):
        """Token ids of plain text: control tokens spelt out in it are text and forge no turn."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def message(self, role, text):
        """`<|im_start|>role\\ntext<|im_end|>\\n` as ids."""
        # The role's newline goes with the text, as in the template: "\n\n" may be one token.
        middle = self.encode(f"{role}\n{text}")
        return self.control("<|im_start|>") + middle + self.control(f"{END_OF_TURN}\n")

    def past(self, action_ids):
        """Ids of a turn that was written, in later prompts: header, action, end of turn, newline.

        Qwen3's template drops the thoughts of earlier turns; there the rest is encoded anew.
        """
        kept = action_ids
        if kept[-1] == self.end_id:
            kept = kept[:-1]
        if self.drops_thoughts:
            text = self.tokenizer.decode(kept)
            if END_OF_THOUGHT in text:
                kept = self.encode(text.rpartition(END_OF_THOUGHT)[2].lstrip("\n"))
        return self.past_header + kept + [self.end_id] + self.encode("\n")

    def decode(self, ids):
        """The text of sampled ids, on one line, without control tokens."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    # --- The model ---
    @torch.no_grad()
    def sample(self, prompts, uniforms, temperature, dialogue_ids=None):
        """Sample one continuation of each prompt.

        prompts: B lists of ids, any lengths. uniforms: [B, n] numbers in [0, 1), one for each token
        that may be sampled: the same numbers give the same tokens, regardless of the other prompts.
        temperature: 0 = greedy. dialogue_ids: which dialogue of the cache each continues;
        what a prompt shares with what its dialogue holds is not computed again. None: nothing is
        kept.
        Returns (actions, logps): for each prompt the sampled ids, ending in a control token unless
        cut after n, and their log-probs under the distribution they were drawn from.
        Raises FloatingPointError if these are not finite.
        """
        if not prompts:
            return [], []
        self.model.eval()  # gradient checkpointing, in train mode, would not keep keys and values
        cache = self.cache
        if dialogue_ids is None:
            cache = DialogueCache()
            dialogue_ids = range(len(prompts))
        uniforms = torch.tensor(np.stack(uniforms), device=self.device)
        lengths = [len(prompt) for prompt in prompts]
        if cache.adapter is None:
            cache.adapter = layers.FusedAdapter(self.model, self.model.dtype)
        with self.autocast(), cache.adapter:
            states = cache.extend(
                self.model.get_base_model().model, prompts, dialogue_ids
            )  # [B, d]
            tokens, logps = decode(self, cache, states, lengths, uniforms, temperature)  # [B, m]
        actions, behaviour = self.cut(tokens.tolist(), logps.tolist())
        if not all(np.isfinite(action_logps).all() for action_logps in behaviour):
            raise FloatingPointError(
                "the logits are not finite: the model's weights, or its adapter's, are damaged"
            )
        for held, action in zip(cache.held, actions, strict=False):
            held += action[: tokens.shape[1] - 1]  # the token that was drawn last is in no cache
        return actions, behaviour

    def draw(self, states, uniform, temperature):
        """Tokens [B] and their log-probs after states [B, d]. temperature: 0 = greedy."""
        logp = (self.logits(states) / (temperature or 1.0)).log_softmax(-1)  # [B, vocab]
        token = inverse_cdf(logp, uniform) if temperature else logp.argmax(-1)
        return token, logp.gather(1, token[:, None])[:, 0]

    def cut(self, tokens, logps):
        """Drop what was drawn after the first control token: it is not part of the action."""
        actions = []
        behaviour = []
        for ids, ids_logps in zip(tokens, logps, strict=True):
            length = next((i + 1 for i, t in enumerate(ids) if t in self.stop_ids), len(ids))
            actions.append(ids[:length])
            behaviour.append(ids_logps[:length])
        return actions, behaviour

    def forget(self):
        """Free the key-value cache. Must follow every change of the weights."""
        self.cache = DialogueCache()

    def logprobs(self, ids, mask, temperature, positions=None, visible=None, reference=False):
        """Log-probs of given tokens.

        ids: [B, L] padded on the right; mask: bool [B, L], True where the token is an action's.
        positions [B, L] and visible [B, L, L] (bool: query, key) describe rows that branch;
        None = plain sequences. reference: of π_ref instead of π_θ.
        Returns (logp, entropy), [B, L], zero outside the mask; logp[b, i] is that of ids[b, i]
        given what i - 1 sees. Logits exist for action tokens alone, `HEAD_CHUNK` at a time.
        """
        self.model.train(torch.is_grad_enabled())  # where checkpointing saves memory
        base = self.model.get_base_model()
        adapter = self.model.disable_adapter() if reference else nullcontext()
        # Padding on the right needs no mask: causal attention never looks at it.
        attention_mask = None if visible is None else visible[:, None]
        with self.autocast(), adapter:
            if self.checkpointing and torch.is_grad_enabled():
                self.checkpointing.plan(*ids.shape, masked=visible is not None)
            hidden = base.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=attention_mask,
                use_cache=False,
            ).last_hidden_state  # [B, L, d]
            before = hidden[:, :-1][mask[:, 1:]]  # [n, d]: the state that predicts each token
            targets = ids[:, 1:][mask[:, 1:]]  # [n]

            def head(states, target):
                logp = (self.logits(states) / temperature).log_softmax(-1)
                entropy = -(logp.exp() * logp).sum(-1)
                return logp.gather(1, target[:, None])[:, 0], entropy

            logps = []
            entropies = []
            chunks = zip(before.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
            for states, target in chunks:
                if torch.is_grad_enabled():  # the backward pass recomputes the logits
                    logp, entropy = checkpoint(head, states, target, use_reentrant=False)
                else:
                    logp, entropy = head(states, target)
                logps.append(logp)
                entropies.append(entropy)
        zeros = torch.zeros(mask.shape, device=self.device)
        logp = zeros.masked_scatter(mask, torch.cat(logps))
        return logp, zeros.masked_scatter(mask, torch.cat(entropies))

    def logits(self, states):
        """States [n, d] -> logits [n, vocab] in fp32."""
        return layers.head(states, self.model.get_base_model().lm_head.weight)

    def autocast(self, cache_enabled=True):
        """A bf16 model computes in bf16, for sampling and training alike; an fp32 model in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.in_bf16(), cache_enabled)

    def in_bf16(self):
        """Is the model computed in bf16?"""
        return self.model.get_input_embeddings().weight.dtype == torch.bfloat16

    def trainable(self):
        """The adapter's parameters (fp32)."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def fingerprint(self):
        """Checksum of the tokenizer, which decides what ids a text has."""
        parts = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template
        return hashlib.sha256(repr((*parts, self.stop_ids)).encode()).hexdigest()

    def save(self, folder):
        """Write the adapter so that `PeftModel.from_pretrained(base, folder)` loads it."""
        self.model.save_pretrained(folder, save_embedding_layers=False)


def inverse_cdf(logp, uniform):
    """The token whose part of [0, 1) a uniform number is in. logp [B, vocab], uniform [B] -> [B].

    >>> logp = torch.tensor([[0.25, 0.5, 0.25]] * 4).log()
    >>> inverse_cdf(logp, torch.tensor([0.0, 0.26, 0.74, 0.76]))
    tensor([0, 1, 1, 2])
    """
    cdf = logp.double().exp().cumsum(-1)  # fp64: 150,000 roundings would show in fp32
    uniform = uniform[:, None].double() * cdf[:, -1:]
    token = torch.searchsorted(cdf, uniform, right=True)[:, 0]
    return token.clamp(max=logp.shape[1] - 1)  # NaN: `sample` reports it


def load_policy(s, adapter=None):
    """The policy of the settings. Raises ValueError if it cannot hold --context.

    adapter: a folder with that of a run, whose base model may have moved since.
    """
    name = s.model
    if name.startswith("standin/"):
        torch.set_num_threads(1)  # the same sums, whatever the number of cores
        name = name if os.path.isdir(name) else str(ROOT / name)  # shipped beside the code
    elif name.startswith("smollm2"):
        from standin import smollm2  # it needs this module

        name = smollm2.folder(name)
    try:
        policy = Policy.load(
            name,
            adapter=adapter,
            device=find_device().device,
            dtype=s.dtype or "float32",
            **{name: getattr(s, name) for name in OPTIONS},
        )
    except ValueError as error:
        if adapter and str(error).startswith((name, str(adapter))):
            raise ValueError(
                f"{error}; if the model has moved, give its new place with --model"
            ) from error
        raise
    most = policy.max_positions
    if s.context > most:
        raise ValueError(f"{s.model} has {most} positions; lower --context ({s.context})")
    return policy
