"""What an agent keeps between episodes (§4.1): its own tips, and the states it has met.

Both stores are divided into *slots* (one per task variation, per task, or one for all) and compare
unit vectors made by an embedder, so that cosine similarity is a matrix product. NumPy and
scikit-learn only.
"""

from dataclasses import dataclass

import numpy as np

from engine.storage import read, write

ROUNDING = 1e-6  # a float32 unit vector times itself may be 0.9999999


def with_room(keys, count):
    """`keys` [room, d] with room for one more than `count`: doubled when full."""
    if count < len(keys):
        return keys
    return np.vstack([keys, np.zeros((count + 1, keys.shape[1]), np.float32)])


@dataclass
class TipSlot:
    """Tips, oldest first."""

    keys: np.ndarray  # [room, d] float32, of which the first len(texts) are used
    texts: list[str]
    scores: list[float]
    totals: list[float]  # the sum of the scores of the episodes that wrote a tip or were led by it
    trials: list[int]  # the number of these episodes


def best_first(slot, similarity, threshold=0.5, max_tips=10, rank="score"):
    """Indexes of the tips of a slot to retrieve, best first; similarity: [n] cosines to the query.

    threshold: least similarity. max_tips: most at once. rank: which of the similar ones, by "score"
    or by "similarity". Ties: the higher mean score of the episodes that wrote the tip or were led
    by it (one that did both counts twice) and one of the slot's mean, then the newer.
    """
    value = np.array(slot.scores) if rank == "score" else similarity
    prior = sum(slot.totals) / sum(slot.trials)
    served = (np.array(slot.totals) + prior) / (np.array(slot.trials) + 1)
    age = -np.arange(len(value))  # the newest is 1 - n
    order = np.lexsort((age, -served, -value))
    return order[similarity[order] >= threshold - ROUNDING][:max_tips]


class TipMemory:
    """M: tips with the key of the state they belong to and the score of their episode.

    capacity: tips per slot, the oldest are dropped. order: (TipSlot, cosines [n]) -> indexes of the
    tips to retrieve, best first.
    """

    def __init__(self, capacity=1000, order=best_first):
        self.capacity = capacity
        self.order = order
        self.slots = {}

    def __len__(self):
        return sum(len(slot.texts) for slot in self.slots.values())

    def add(self, key, text, score, slot):
        """Store a tip. key: [d] unit vector, score: -100...100.

        A text that the slot already holds is not stored again, but the score is added to its total.
        """
        if slot not in self.slots:
            self.slots[slot] = TipSlot(np.empty((0, len(key)), np.float32), [], [], [], [])
        stored = self.slots[slot]
        if text in stored.texts:
            self.judge([text], score, slot)
            return
        if len(stored.texts) == self.capacity:  # the oldest goes
            stored.keys[: self.capacity - 1] = stored.keys[1 : self.capacity]
            del stored.texts[0], stored.scores[0], stored.totals[0], stored.trials[0]
        stored.keys = with_room(stored.keys, len(stored.texts))
        stored.keys[len(stored.texts)] = key
        stored.texts.append(text)
        stored.scores.append(float(score))
        stored.totals.append(float(score))
        stored.trials.append(1)

    def judge(self, texts, score, slot):
        """Count the score of an episode in whose list these tips of the slot stood first."""
        stored = self.slots.get(slot)
        for text in texts:
            if stored and text in stored.texts:
                index = stored.texts.index(text)
                stored.totals[index] += score
                stored.trials[index] += 1

    def retrieve(self, key, slot):
        """Texts of the tips of the slot for `key` [d], best first.

        >>> memory, (x, y) = TipMemory(), np.eye(2)
        >>> for text, score in [("low", 0), ("high", 50), ("middle", 20)]:
        ...     memory.add(x, text, score, "task/0")
        >>> memory.retrieve(x, "task/0"), memory.retrieve(y, "task/0"), memory.retrieve(x, "task/1")
        (['high', 'middle', 'low'], [], [])
        """
        if slot not in self.slots:
            return []
        stored = self.slots[slot]
        similarity = stored.keys[: len(stored.texts)] @ np.float32(key)  # [n]
        order = np.array(self.order(stored, similarity))
        if order.dtype == bool or len(set(order.tolist())) < len(order):
            raise ValueError("order_tips must return distinct indexes")
        return [stored.texts[i] for i in order]

    def save(self, path):
        """Write the content to a .npz file."""
        keys = {name: slot.keys[: len(slot.texts)] for name, slot in self.slots.items()}
        rest = {}
        for name, slot in self.slots.items():
            rest[name] = [slot.texts, slot.scores, slot.totals, slot.trials]
        write(path, keys, rest)

    def load(self, path):
        """Replace the content by that of a file. Raises ValueError if it is damaged."""
        self.slots = {
            name: TipSlot(keys, texts, scores, totals, trials)
            for name, keys, (texts, scores, totals, trials) in read(path)
        }


@dataclass
class StateSlot:
    """Distinct states."""

    keys: np.ndarray  # [room, d] float32, of which the first len(counts) are used
    counts: list[int]  # visits of each

    def visit(self, key, threshold, capacity):
        """Count a visit to the state `key` [d] -> its visits so far.

        The visit goes to the most similar known state at or above the threshold, else to a new one.
        At capacity the least visited state is replaced (ties: the oldest).
        """
        keys = self.keys[: len(self.counts)]
        similarity = keys @ key  # [m]
        if not key.any():  # a text without words matches only another one
            similarity = 1.0 - keys.any(axis=1)
        if len(similarity) and similarity.max() >= threshold - ROUNDING:
            index = int(similarity.argmax())
        elif len(self.counts) < capacity:
            index = len(self.counts)
            self.keys = with_room(self.keys, index)
            self.keys[index] = key
            self.counts.append(0)
        else:
            index = int(np.argmin(self.counts))
            self.keys[index] = key
            self.counts[index] = 0
        self.counts[index] += 1
        return self.counts[index]


class NoveltyStore:
    """Distinct states and the visits of each.

    threshold: cosine similarity from which two states count as the same. capacity: states per slot.
    """

    def __init__(self, threshold=0.5, capacity=10_000):
        self.threshold = threshold
        self.capacity = capacity
        self.slots = {}

    def __len__(self):
        return sum(len(slot.counts) for slot in self.slots.values())

    def visits(self, keys, slot):
        """n of visits to the states `keys` [t, d], one after another; nothing is stored.

        n = 1 + earlier visits to a similar state: those stored, and those before it in `keys`.

        >>> novelty, (x, y) = NoveltyStore(), np.eye(2)
        >>> novelty.add([x], "task/0")
        >>> novelty.visits([x, y, x], "task/0"), novelty.visits([x], "task/0")
        ([2, 1, 3], [2])
        """
        scratch = StateSlot(np.zeros((0, len(keys[0])), np.float32), [])
        if slot in self.slots:
            stored = self.slots[slot]
            scratch = StateSlot(stored.keys[: len(stored.counts)].copy(), list(stored.counts))
        return [scratch.visit(key, self.threshold, self.capacity) for key in np.float32(keys)]

    def add(self, keys, slot):
        """Store visits to the states `keys` [t, d], one after another."""
        if slot not in self.slots:
            self.slots[slot] = StateSlot(np.zeros((0, len(keys[0])), np.float32), [])
        for key in np.float32(keys):
            self.slots[slot].visit(key, self.threshold, self.capacity)

    def save(self, path):
        """Write the content to a .npz file."""
        keys = {name: slot.keys[: len(slot.counts)] for name, slot in self.slots.items()}
        write(path, keys, {name: slot.counts for name, slot in self.slots.items()})

    def load(self, path):
        """Replace the content by that of a file. Raises ValueError if it is damaged."""
        self.slots = {name: StateSlot(keys, counts) for name, keys, counts in read(path)}


def embedder(name="hashing"):
    """A function `embed(texts) -> [n, d]` float32 of unit vectors (a text without words: zeros).

    "hashing": words, and pairs of words of a line, hashed into 1,024 dimensions; no download. Equal
    lines in another order give an equal vector: ScienceWorld lists the objects of an equal state in
    several orders. Otherwise a hub id or folder of a sentence encoder, mean-pooled (paper:
    sentence-transformers/all-MiniLM-L6-v2).
    """
    if name == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer

        # Single characters count, too: "5 degrees".
        parts = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b").build_analyzer()

        def analyzer(text):
            return [part for line in text.split("\n") for part in parts(line)]

        vectorizer = HashingVectorizer(
            n_features=1024, norm="l2", dtype=np.float32, analyzer=analyzer
        )

        def embed(texts):
            if not texts:
                return np.empty((0, 1024), np.float32)
            return vectorizer.transform(texts).toarray()

        return embed
    return sentence_encoder(name)


def sentence_encoder(name):
    """`embed` by a transformer. Raises ValueError if it cannot be loaded."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--embedder {name}: could not be loaded ({reason}); "
            "use hashing, or a hub id or folder of a sentence encoder"
        ) from error

    @torch.no_grad()
    def embed(texts):
        if not texts:
            return np.empty((0, model.config.hidden_size), np.float32)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**batch).last_hidden_state  # [n, L, d]
        weight = batch["attention_mask"][..., None].float()  # [n, L, 1]
        mean = (states * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()

    return embed
