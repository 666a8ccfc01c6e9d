"""Keys and values of many dialogues, kept from turn to turn.

It changes no number: skip it on a first reading.
"""

import math

import torch

from rows import shared_length

PREFILL_CHUNK = 512  # new tokens per dialogue in one forward pass
POSITION_BLOCK = 512  # the cache grows by so many tokens per dialogue


class DialogueCache:
    """Passed to the model as `past_key_values`.

    Token i of a dialogue lies at position i, so "a query at position p sees positions 0...p" is the
    whole mask: later positions may hold anything (tips of an earlier turn, a longer action) and are
    overwritten when their turn comes.
    """

    def __init__(self):
        self.layers = {}  # layer -> [keys, values], each [dialogues, positions, heads, d]
        self.dialogues = 0  # how many there is room for
        self.positions = 0  # how long each of them may be
        self.lanes = []  # which dialogue is at each index
        self.held = []  # the ids that it holds

    def extend(self, model, prompts, lanes):
        """Make each lane's dialogue hold its prompt -> states [B, d] of the last tokens.

        What a prompt shares with what its dialogue holds is not computed again.
        """
        self.bring_to_front(lanes)
        starts = []
        for held, prompt in zip(self.held, prompts, strict=False):
            most = len(prompt) - 1  # the state of the last token is wanted
            starts.append(min(shared_length(held, prompt), most))
        self.held[: len(prompts)] = [list(prompt) for prompt in prompts]
        new = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        states = [None] * len(new)
        for first in range(0, max(map(len, new)), PREFILL_CHUNK):
            part = [ids[first : first + PREFILL_CHUNK] for ids in new]
            width = max(map(len, part))
            ids = torch.zeros(len(part), width, dtype=torch.long)
            positions = torch.full((len(part), width), -1)
            for b, piece in enumerate(part):
                ids[b, : len(piece)] = torch.tensor(piece, dtype=torch.long)
                positions[b, : len(piece)] = starts[b] + first + torch.arange(len(piece))
            hidden = self.forward(model, ids, positions)  # [B, width, d]
            for b, piece in enumerate(part):
                if piece and first + len(piece) == len(new[b]):
                    states[b] = hidden[b, len(piece) - 1]
        return torch.stack(states)

    def append(self, model, tokens, done):
        """Add a sampled token [B] to each dialogue that is not done [B] -> states [B, d]."""
        positions = torch.full((len(tokens), 1), -1)
        for b, (token, stopped) in enumerate(zip(tokens.tolist(), done.tolist(), strict=True)):
            if not stopped:
                positions[b] = len(self.held[b])
                self.held[b].append(token)
        return self.forward(model, tokens[:, None], positions)[:, 0]

    def forward(self, model, ids, positions):
        """States [B, n, d] of new tokens [B, n] at the given positions [B, n]; -1 = padding."""
        device = model.device
        self.width = int(positions.max()) + 1
        self.grow(0, self.width + 1)
        # Padding is stored at the last position, which no query is ever allowed to see.
        self.targets = positions.to(device)
        queries = self.targets.clamp(min=0)
        visible = torch.arange(self.width, device=device) <= queries[..., None]  # [B, n, width]
        return model(
            input_ids=ids.to(device),
            position_ids=queries,
            attention_mask=visible[:, None],
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state

    def update(self, keys, values, layer):
        """Called by the attention layers: store [B, heads, n, d], return those of all positions."""
        batch, heads, _, d = keys.shape
        if layer not in self.layers:  # zeros: what is masked may be anything but NaN
            shape = (self.dialogues, self.positions, heads, d)
            self.layers[layer] = [keys.new_zeros(shape), values.new_zeros(shape)]
        index = torch.arange(batch, device=keys.device)[:, None]
        seen = []
        for store, new in zip(self.layers[layer], (keys, values), strict=True):
            store[index, self.targets] = new.transpose(1, 2)
            seen.append(store[:batch, : self.width].transpose(1, 2))
        return tuple(seen)

    def grow(self, dialogues, positions):
        """Make room for so many dialogues of so many tokens."""
        positions = math.ceil(positions / POSITION_BLOCK) * POSITION_BLOCK
        more_dialogues = max(0, dialogues - self.dialogues)
        more_positions = max(0, positions - self.positions)
        if more_dialogues or more_positions:
            padding = (0, 0, 0, 0, 0, more_positions, 0, more_dialogues)
            for pair in self.layers.values():  # one tensor after another: never two whole caches
                pair[0] = torch.nn.functional.pad(pair[0], padding)
                pair[1] = torch.nn.functional.pad(pair[1], padding)
            self.dialogues += more_dialogues
            self.positions += more_positions

    def bring_to_front(self, lanes):
        """Order the dialogues so that a batch is a view, and finished ones cost nothing."""
        for lane in lanes:
            if lane not in self.lanes:
                self.lanes.append(lane)
                self.held.append([])
        self.grow(len(self.lanes), 0)
        for i, lane in enumerate(lanes):
            j = self.lanes.index(lane)
            if i != j:
                for pair in self.layers.values():
                    for store in pair:
                        store[[i, j]] = store[[j, i]]
                self.lanes[i], self.lanes[j] = self.lanes[j], self.lanes[i]
                self.held[i], self.held[j] = self.held[j], self.held[i]
