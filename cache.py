"""The key-value cache of dialogues."""

import torch

PREFILL_CHUNK = 512  # new tokens per row in one forward pass
SLOT_BLOCK = 512  # the cache grows by this many tokens per row


class DialogueCache:
    """Keys and values of many dialogues, kept from turn to turn; passed to the model as `past_key_values`.

    Token i of a dialogue lies in slot i, so "a query at position p sees slots 0...p" is the whole mask: slots beyond p
    may hold anything (tips of an earlier turn, a longer action) and are overwritten when their position comes.

    >>> DialogueCache.shared([1, 2, 3, 9], [1, 2, 3, 4, 5])
    3
    """

    def __init__(self):
        self.layers, self.size = (
            {},
            (0, 0),
        )  # layer -> [keys, values], each [rows, slots, heads, d]; (rows, slots)
        self.order, self.held = (
            [],
            [],
        )  # row number of the dialogue at each index, and the ids it holds

    @staticmethod
    def shared(held, context):
        """Length of the common prefix; at least the last token is left, whose state is wanted."""
        most = min(len(held), len(context) - 1)
        return next((i for i in range(most) if held[i] != context[i]), most)

    def extend(self, model, contexts, rows):
        """Make each dialogue hold its context -> states [B, d] of the last tokens."""
        self.arrange(rows)
        start = [self.shared(held, context) for held, context in zip(self.held, contexts)]
        new = [context[s:] for context, s in zip(contexts, start)]
        self.held[: len(contexts)] = [list(c) for c in contexts]
        last, states = torch.tensor([len(n) - 1 for n in new]), None
        for first in range(0, max(map(len, new)), PREFILL_CHUNK):
            part = [n[first : first + PREFILL_CHUNK] for n in new]
            width = max(map(len, part))
            hidden = self.forward(
                model,
                torch.tensor([p + [0] * (width - len(p)) for p in part]),
                torch.tensor(
                    [
                        [s + first + i if i < len(p) else -1 for i in range(width)]
                        for s, p in zip(start, part)
                    ]
                ),
            )
            here = hidden[torch.arange(len(part)), (last - first).clamp(0, width - 1)]
            inside = ((last >= first) & (last < first + width)).to(hidden.device)[:, None]
            states = here if states is None else torch.where(inside, here, states)
        return states

    def append(self, model, token, done):
        """Add one sampled token [B, 1] to each dialogue that is not done -> states [B, d]."""
        positions = torch.tensor(
            [[-1] if d else [len(h)] for h, d in zip(self.held, done.tolist())]
        )
        for held, value, d in zip(self.held, token[:, 0].tolist(), done.tolist()):
            if not d:
                held.append(value)
        return self.forward(model, token, positions)[:, 0]

    def forward(self, model, ids, positions):
        """States [B, n, d] of new tokens [B, n] at the given positions [B, n]; -1 = padding."""
        device = model.device
        self.width = int(positions.max()) + 1
        self.grow(0, self.width + 1)
        # Padding goes to the last slot, which no query is ever allowed to see.
        self.slots = torch.where(positions < 0, -1, positions).to(device)
        seen = torch.arange(self.width, device=device) <= self.slots[..., None].clamp(
            min=0
        )  # [B, n, width]
        return model(
            input_ids=ids.to(device),
            position_ids=self.slots.clamp(min=0),
            attention_mask=seen[:, None],
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state

    def update(self, keys, values, layer):
        """Called by the attention layers: store keys and values [B, heads, n, d], return those of all slots."""
        batch, heads, _, d = keys.shape
        if layer not in self.layers:  # zeros: what is masked may be anything but NaN
            self.layers[layer] = [
                torch.zeros(*self.size, heads, d, dtype=new.dtype, device=new.device)
                for new in (keys, values)
            ]
        row = torch.arange(batch, device=keys.device)[:, None]
        for store, new in zip(self.layers[layer], (keys, values)):
            store[row, self.slots] = new.transpose(1, 2)
        return tuple(store[:batch, : self.width].transpose(1, 2) for store in self.layers[layer])

    def grow(self, rows, slots):
        """Make room for so many dialogues of so many tokens."""
        old, self.size = (
            self.size,
            (max(rows, self.size[0]), max(-(-slots // SLOT_BLOCK) * SLOT_BLOCK, self.size[1])),
        )
        if self.size != old:
            more = (0, 0, 0, 0, 0, self.size[1] - old[1], 0, self.size[0] - old[0])
            for pair in self.layers.values():  # one tensor after another: never two whole caches
                for i in range(2):
                    pair[i] = torch.nn.functional.pad(pair[i], more)

    def arrange(self, rows):
        """Bring the dialogues of a batch to the front, so that the batch is a view and finished ones cost nothing."""
        for row in sorted(set(rows) - set(self.order)):
            self.order.append(row)
            self.held.append([])
        self.grow(len(self.order), 0)
        for i, row in enumerate(rows):
            j = self.order.index(row)
            if i != j:
                for store in (t for pair in self.layers.values() for t in pair):
                    store[[i, j]] = store[[j, i]]
                self.order[i], self.order[j] = self.order[j], self.order[i]
                self.held[i], self.held[j] = self.held[j], self.held[i]
