"""The policy: a Qwen2 / Qwen2.5 chat model with LoRA adapters, optionally in 4-bit (QLoRA).

`π_θ` is the model with its adapter, `π_ref` the same model with the adapter disabled. Everything that enters
the model is a list of token ids put together from *segments*, each tokenised exactly once:

    system message | observation | header, action | observation | tips | header, action | ...

A segment begins and ends at a control token, so no token can straddle two segments, and a dialogue without tips
is built by leaving the tips segment out: nothing is ever searched for or stripped. `check_chat_format` compares
this with the tokenizer's own chat template when the model is loaded.
"""

import hashlib
import logging
import warnings
from contextlib import nullcontext

# Said by these versions to every user without a GPU, and nothing that a user could act on.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from cache import DialogueCache

END_OF_TURN = "<|im_end|>"
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
)  # what loading damaged files raises
HEAD_CHUNK = 256  # action tokens whose [vocab] logits exist at the same time


class Policy:
    """A causal language model that writes actions and scores them.

    Attributes: `header` ids that open the assistant's turn; `stop_ids` every control token (each ends an action);
    `max_positions` the longest sequence the model was built for.
    """

    def __init__(self, model, tokenizer, temperature=1.0):
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.device = next(model.parameters()).device
        self.end_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.stop_ids = sorted(set(tokenizer.all_special_ids) | {self.end_id})
        self.header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
        self.max_positions = model.config.max_position_embeddings
        self.forget()
        check_chat_format(self)

    @classmethod
    def load(
        cls,
        name,
        *,
        adapter=None,
        load_in_4bit=None,
        lora_r=16,
        lora_alpha=32,
        temperature=1.0,
        seed=0,
    ):
        """Load a hub id or a folder, freeze it and put LoRA on every linear layer (or read `adapter`, a folder).

        `load_in_4bit=None` decides by the card: NF4 up to 24 GB, bf16 above, fp32 without a GPU (NF4 makes
        rollouts 1.5 to 2 times slower, so it is used only where it is needed). The adapter is always fp32: at
        learning rates of 1e-5 a bf16 weight would not move. Raises ValueError with one line saying what to do.
        """
        cuda = torch.cuda.is_available()
        if load_in_4bit is None:
            load_in_4bit = cuda and card_memory() < 30
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (
            Exception
        ) as error:  # what tokenizers raises for a damaged file has no class of its own
            raise ValueError(
                f"{name}: no tokenizer could be loaded; give a hub id or a folder that holds "
                f"tokenizer.json and a model ({first_line(error)})"
            ) from error
        quantization = None
        if load_in_4bit:
            try:
                import bitsandbytes  # noqa: F401
            except (ImportError, RuntimeError, OSError) as error:
                raise ValueError(
                    "4-bit was asked for but bitsandbytes cannot run here "
                    f"({first_line(error)}); use --load-in-4bit false"
                ) from error
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=torch.bfloat16 if cuda else torch.float32,
                quantization_config=quantization,
                device_map={"": 0} if cuda else {"": "cpu"},
            )
        except UNREADABLE as error:
            raise ValueError(
                f"{name}: the model could not be loaded ({first_line(error)})"
            ) from error
        for module in model.modules():
            if hasattr(
                module, "support_avx512bf16_for_cpu"
            ):  # repacks weights in eval mode; training then raises
                module.support_avx512bf16_for_cpu = False
        model.requires_grad_(False)
        if adapter:
            try:
                model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
            except UNREADABLE as error:
                raise ValueError(
                    f"{adapter}: the adapter does not fit {name} or is damaged "
                    f"({first_line(error)})"
                ) from error
        else:
            torch.manual_seed(seed)
            model = get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=lora_r,
                    lora_alpha=lora_alpha,
                    lora_dropout=0.0,  # dropout breaks the ratio
                    target_modules="all-linear",
                ),
            )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if cuda:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return cls(model, tokenizer, temperature)

    # --- text to segments -------------------------------------------------------------------------------------
    def encode(self, text):
        """Token ids of plain text. Control tokens spelt out in it become ordinary tokens: text cannot forge turns."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def message(self, role, text):
        """`<|im_start|>role\\ntext<|im_end|>\\n` as ids."""

        def control(piece):
            return self.tokenizer(piece, add_special_tokens=False).input_ids

        # The role's newline is tokenised with the text, as the template does: "\n" + "\n..." may be one token.
        return (
            control("<|im_start|>") + self.encode(f"{role}\n{text}") + control(f"{END_OF_TURN}\n")
        )

    def closing(self, action):
        """What the dialogue needs after an action: the newline, and the end of turn if it was cut off before it."""
        newline = self.encode("\n")
        return newline if action and action[-1] == self.end_id else [self.end_id] + newline

    def decode(self, ids):
        """The text of sampled ids, on one line, without control tokens."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    # --- the model --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(self, contexts, max_tokens, rows=None):
        """Sample one continuation for each context, at `self.temperature` (0 = greedy).

        contexts: lists of ids, any lengths. rows: the number of each one's dialogue in the key-value cache. What a
        context shares with the last one of its dialogue is not computed again and the rest is overwritten, so that
        any change of the context is exact. None: nothing is kept.
        Returns (actions, logps): for each context the sampled ids, ending in a control token unless cut at
        `max_tokens`, and their log-probs [len(action)] under the distribution they were drawn from.
        """
        self.model.eval()  # in train mode gradient checkpointing would recompute layers, and write the cache twice
        cache = DialogueCache() if rows is None else self.cache
        base, stop = self.model.get_base_model(), torch.tensor(self.stop_ids, device=self.device)
        done = torch.zeros(len(contexts), dtype=torch.bool, device=self.device)
        tokens, logps = [], []
        with self.autocast():
            hidden = cache.extend(
                base.model, contexts, range(len(contexts)) if rows is None else rows
            )  # [B, d]
            while True:
                logp = (base.lm_head(hidden).float() / (self.temperature or 1.0)).log_softmax(
                    -1
                )  # [B, vocab]
                token = (
                    logp.exp().multinomial(1) if self.temperature else logp.argmax(-1, keepdim=True)
                )  # [B, 1]
                tokens.append(token)
                logps.append(logp.gather(1, token))
                done |= torch.isin(token[:, 0], stop)
                if len(tokens) == max_tokens or done.all():
                    break
                hidden = cache.append(base.model, token, done)
        actions, behaviour = [], []
        for row, logp in zip(torch.cat(tokens, 1).tolist(), torch.cat(logps, 1).tolist()):
            # By position, not by value: what a finished row went on to draw is not part of its action.
            length = next(
                (i + 1 for i, token in enumerate(row) if token in self.stop_ids), len(row)
            )
            actions.append(row[:length])
            behaviour.append(logp[:length])
        return actions, behaviour

    def forget(self):
        """Free the key-value cache. Must follow every change of the weights."""
        self.cache = DialogueCache()

    def logprobs(self, ids, mask, positions=None, visible=None, reference=False):
        """Log-probs of given tokens at the training temperature.

        ids: [B, L] padded on the right; mask: bool [B, L], True where the token is an action's.
        positions [B, L] and visible [B, L, L] (bool: query, key) describe rows that branch; None = plain sequences.
        Returns (logp [B, L], entropy [B, L]), zero outside the mask; logp[b, i] = log π(ids[b, i] | what i-1 sees).
        The [vocab] logits are made for action tokens alone, `HEAD_CHUNK` at a time.
        """
        base = self.model.get_base_model()
        with self.autocast(), self.model.disable_adapter() if reference else nullcontext():
            # Padding on the right needs no mask: causality alone keeps it from everything that counts.
            hidden = base.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                attention_mask=(None if visible is None else visible[:, None]),
            ).last_hidden_state
            before = hidden[:, :-1][
                mask[:, 1:]
            ]  # [n, d]: the state that predicts each action token
            targets = ids[:, 1:][mask[:, 1:]]  # [n]

            def head(h, target):
                logp = (base.lm_head(h).float() / self.temperature).log_softmax(
                    -1
                )  # [chunk, vocab]
                with torch.no_grad():
                    entropy = -(logp.exp() * logp).sum(-1)
                return logp.gather(1, target[:, None])[:, 0], entropy

            run = (
                (lambda *a: checkpoint(head, *a, use_reentrant=False))
                if torch.is_grad_enabled()
                else head
            )
            parts = [run(h, t) for h, t in zip(before.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))]
        logp, entropy = (torch.cat(p) for p in zip(*parts))
        grid = torch.zeros(mask.shape, device=self.device)
        return grid.masked_scatter(mask, logp), grid.masked_scatter(mask, entropy)

    def autocast(self):
        """bf16 on a GPU, for sampling and training alike; nothing on the CPU."""
        return (
            torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        )

    def trainable(self):
        """The adapter's parameters (fp32)."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def fingerprint(self):
        """Checksum of the tokenizer: with another one the same text is other ids."""
        text = (
            self.tokenizer.backend_tokenizer.to_str()
            + str(self.tokenizer.chat_template)
            + str(self.stop_ids)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder):
        """Write the adapter so that `PeftModel.from_pretrained(base, folder)` loads it."""
        self.model.save_pretrained(folder)


def check_chat_format(policy):
    """The concatenated segments must be what the tokenizer's own template makes, or the model would see a
    format that it was not trained on. Raises ValueError."""
    turns = [
        ("system", "Be brief."),
        ("user", "A room."),
        ("assistant", "look around"),
        ("user", "A hall.\n"),
        ("user", "\nTips:\n1. go on\n\n"),
        ("assistant", "go to hall"),
    ]
    ours = []
    for role, text in turns:
        if role == "assistant":
            action = policy.encode(text) + [policy.end_id]
            ours += policy.header + action + policy.closing(action)
        else:
            ours += policy.message(role, text)
    name = policy.tokenizer.name_or_path
    try:
        theirs = policy.tokenizer.apply_chat_template(
            [{"role": r, "content": t} for r, t in turns + [("user", "x")]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # a damaged template raises whatever its code leads to
        raise ValueError(
            f"{name}: the tokenizer has no chat template that works ({first_line(error)}); "
            "use an instruction-tuned Qwen2/2.5"
        ) from error
    if ours + policy.message("user", "x") + policy.header != theirs:
        raise ValueError(
            f"{name}: its chat template is not the prefix-stable ChatML of Qwen2/2.5 Instruct "
            "(system, user, assistant between <|im_start|> and <|im_end|>); choose such a model"
        )


def card_memory():
    """GB of the first GPU. A "24 GB" card has 25.4."""
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
