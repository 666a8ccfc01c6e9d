"""Keys and values of many dialogues, kept from turn to turn.

Infrastructure: skip it on a first reading.
"""

import math
from itertools import chain

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.packing import groups, shared_length

PREFILL_TOKENS = 8192  # padded tokens in one forward pass, unless a single prompt is longer
ALIGNED = 16  # keys: else CUDA's attention copies the mask to pad it
BLOCK = 256  # room for a dialogue, and the keys that a step looks at, are multiples of this


class DialogueCache:
    """Passed to the model as `past_key_values`.

    Token i of a dialogue lies at position i, so "a query at position p sees positions 0...p" is the
    whole mask: later positions may hold anything (tips of an earlier turn, a longer action) and are
    overwritten when their turn comes.
    """

    def __init__(self):
        self.layers = {}  # layer -> [keys, values], each [dialogues, positions, heads, d]
        self.dialogues = 0  # how many fit
        self.positions = 0  # most tokens of each
        self.dialogue_ids = []  # of the dialogue at each index
        self.held = []  # its ids
        self.steps = {}  # of decode.py; what is recorded holds while the tensors stay in place
        self.adapter = None  # of decode.py, too
        self.tokens_needed = 0  # of prompts; what they share with what was held is not counted
        self.tokens_computed = 0  # the same with padding

    def extend(self, model, prompts, dialogue_ids):
        """Make each dialogue hold its prompt -> states [B, d] of the last tokens.

        What a prompt shares with what its dialogue holds is not computed again, and of prompts that
        are equal, as the first ones of a group are, one is computed.
        """
        self.bring_to_front(dialogue_ids)
        self.grow(0, max(map(len, prompts)))
        firsts = {}  # prompt -> the first dialogue that is to hold it
        for b, prompt in enumerate(prompts):
            firsts.setdefault(tuple(prompt), b)
        new = {}  # dialogue -> (the first position to compute, the ids from there on)
        for b in firsts.values():
            most = len(prompts[b]) - 1  # the state of the last token is wanted
            start = min(shared_length(self.held[b], prompts[b]), most)
            new[b] = (start, prompts[b][start:])
        self.held[: len(prompts)] = [list(prompt) for prompt in prompts]
        states = {}
        own = list(new)
        lengths = [len(ids) for _, ids in new.values()]
        for group in groups(lengths, PREFILL_TOKENS):
            chosen = [own[i] for i in group]
            ids = pad_sequence([torch.tensor(new[b][1]) for b in chosen], batch_first=True)
            spans = [torch.arange(new[b][0], len(prompts[b])) for b in chosen]
            positions = pad_sequence(spans, batch_first=True, padding_value=-1)
            indexes = torch.tensor(chosen).to(model.device, non_blocking=True)
            width = multiple(ALIGNED, int(positions.max()) + 1)
            hidden = self.forward(model, ids, positions, width, indexes, indexes)  # [b, n, d]
            for b, row_states in zip(chosen, hidden, strict=True):
                states[b] = row_states[len(new[b][1]) - 1]
            self.tokens_computed += ids.numel()
        self.tokens_needed += sum(lengths)
        origins = [firsts[tuple(prompt)] for prompt in prompts]
        self.copy(origins, max(map(len, prompts)))
        return torch.stack([states[origin] for origin in origins])

    def copy(self, origins, width):
        """Give dialogue b the first `width` positions of dialogue origins[b], for all b at once."""
        copies = [(b, origin) for b, origin in enumerate(origins) if b != origin]
        indexes = torch.tensor(copies)  # [copies, 2]
        for store in chain.from_iterable(self.layers.values() if copies else ()):
            indexes = indexes.to(store.device, non_blocking=True)  # once, not for each store
            store[indexes[:, 0], :width] = store[indexes[:, 1], :width]

    def append(self, model, tokens, positions, width):
        """Add a token [B] to each of the first B dialogues -> states [B, d]. Never waits.

        positions [B]: where it goes, below `width` - 1; -1 = nowhere.
        """
        indexes = torch.arange(len(tokens), device=tokens.device)
        every = slice(len(tokens))  # a view where an index would make a copy
        return self.forward(model, tokens[:, None], positions[:, None], width, indexes, every)[:, 0]

    def forward(self, model, ids, positions, width, indexes, select):
        """States [B, n, d] of new tokens [B, n] at the given positions [B, n]; -1 = padding.

        indexes [B]: of the dialogues; select: the same, or the slice that they are.
        """
        # Padding is stored at the last position, which no query is ever allowed to see.
        self.targets = positions.to(model.device, non_blocking=True)
        self.width = width
        self.indexes = indexes
        self.select = select
        queries = self.targets.clamp(min=0)
        visible = torch.arange(width, device=model.device) <= queries[..., None]  # [B, n, width]
        return model(
            input_ids=ids.to(model.device, non_blocking=True),
            position_ids=queries,
            attention_mask=visible[:, None],
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state

    def update(self, keys, values, layer):
        """Called by the attention layers: store [B, heads, n, d], return those of all positions."""
        _, heads, _, d = keys.shape
        if layer not in self.layers:  # zeros: what is masked may be anything but NaN
            shape = (self.dialogues, self.positions, heads, d)
            self.layers[layer] = [keys.new_zeros(shape), values.new_zeros(shape)]
        seen = []
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            store[self.indexes[:, None], self.targets] = new.transpose(1, 2)
            seen.append(store[self.select, : self.width].transpose(1, 2))
        return tuple(seen)

    def grow(self, dialogues, tokens):
        """Make room for so many dialogues of so many tokens."""
        more_dialogues = max(0, dialogues - self.dialogues)
        more_positions = max(0, key_width(tokens) - self.positions)
        if more_dialogues or more_positions:
            self.steps.clear()
            padding = (0, 0, 0, 0, 0, more_positions, 0, more_dialogues)
            for stores in self.layers.values():  # one tensor after another: never two whole caches
                stores[0] = torch.nn.functional.pad(stores[0], padding)
                stores[1] = torch.nn.functional.pad(stores[1], padding)
            self.dialogues += more_dialogues
            self.positions += more_positions

    def bring_to_front(self, dialogue_ids):
        """Order the dialogues so that a batch is a view, and finished ones cost nothing."""
        for dialogue_id in dialogue_ids:
            if dialogue_id not in self.dialogue_ids:
                self.dialogue_ids.append(dialogue_id)
                self.held.append([])
        self.grow(batch_size(len(self.dialogue_ids)), 0)
        order = list(range(len(self.held)))
        for i, dialogue_id in enumerate(dialogue_ids):
            j = self.dialogue_ids.index(dialogue_id)
            for each in (order, self.dialogue_ids, self.held):
                each[i], each[j] = each[j], each[i]
        self.copy(order, self.positions)


def key_width(tokens):
    """Positions for so many tokens, in blocks; there is always one more, for padding."""
    return multiple(BLOCK, tokens + 1)


def multiple(of, least):
    """The smallest multiple that is at least so much."""
    return math.ceil(least / of) * of


def batch_size(dialogues):
    """The power of two that has room for them."""
    return 2 ** math.ceil(math.log2(dialogues))
