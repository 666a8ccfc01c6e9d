"""What an agent keeps between episodes (§4.1): its own tips, and the states it has met. NumPy and scikit-learn only.

Both stores are divided into *slots* (one per task variation, per task, or one for all), and compare unit vectors
made by an embedder, so that cosine similarity is a matrix product.
"""

import json
import os
from zipfile import BadZipFile

import numpy as np


class TipMemory:
    """M: tips with the key of the state they belong to and the score of their episode.

    capacity: tips per slot, the oldest are dropped. threshold: least cosine similarity of a retrieved tip, k: most
    tips at once, rank: which k of the similar ones, by "score" or by "similarity" (ties: the newer first).
    """

    def __init__(self, capacity=1000, threshold=0.5, k=10, rank="score"):
        if rank not in ("score", "similarity"):
            raise ValueError(f"rank is {rank!r}; it must be 'score' or 'similarity'")
        self.capacity, self.threshold, self.k, self.rank = capacity, threshold, k, rank
        self.slots = {}  # slot -> {"keys": [n, d] float32, "texts": n strings, "scores": n numbers}, oldest first

    def __len__(self):
        return sum(len(slot["texts"]) for slot in self.slots.values())

    def add(self, key, text, score, slot):
        """Store a tip. key: [d] unit vector, score: -100...100. A text that the slot already holds is ignored."""
        key = np.asarray(key, np.float32)
        s = self.slots.setdefault(slot, {"keys": key[None, :][:0], "texts": [], "scores": []})
        if text in s["texts"]:
            return
        drop = max(0, len(s["texts"]) + 1 - self.capacity)
        s["keys"] = np.vstack([s["keys"][drop:], key])
        s["texts"] = s["texts"][drop:] + [text]
        s["scores"] = s["scores"][drop:] + [float(score)]

    def retrieve(self, key, slot):
        """The texts of at most k tips of the slot whose key is similar to `key` [d], best first.

        >>> memory, (x, y) = TipMemory(k=2), np.eye(2)
        >>> for text, score in [("low", 0), ("high", 50), ("middle", 20)]:
        ...     memory.add(x, text, score, "task/0")
        >>> memory.retrieve(x, "task/0"), memory.retrieve(y, "task/0"), memory.retrieve(x, "task/1")
        (['high', 'middle'], [], [])
        """
        s = self.slots.get(slot)
        if not s:
            return []
        similarity = s["keys"] @ np.asarray(key, np.float32)  # [n]
        value = np.array(s["scores"]) if self.rank == "score" else similarity
        best_first = np.argsort(
            -value[::-1], kind="stable"
        )  # of the reversed list, so that the newer wins a tie
        order = len(value) - 1 - best_first
        return [s["texts"][i] for i in order[similarity[order] >= self.threshold][: self.k]]

    def save(self, path):
        write(
            path,
            {slot: s["keys"] for slot, s in self.slots.items()},
            {slot: [s["texts"], s["scores"]] for slot, s in self.slots.items()},
        )

    def load(self, path):
        """Replace the content by that of a file. Raises ValueError if it is damaged."""
        self.slots = {
            slot: {"keys": keys, "texts": texts, "scores": scores}
            for slot, keys, (texts, scores) in read(path)
        }


class NoveltyStore:
    """Distinct states and how often each was met; the intrinsic reward of a visit is r_int = 1/n."""

    def __init__(self, threshold=0.5):
        self.threshold = threshold
        self.slots = {}  # slot -> {"keys": [m, d] distinct states, "counts": m visits}

    def __len__(self):
        return sum(len(slot["counts"]) for slot in self.slots.values())

    def visit(self, key, slot):
        """Count a visit to the state `key` [d] and return 1/n, n = 1 + earlier visits to a similar state.

        A visit counts for the most similar stored state if that reaches the threshold; else the state is new.

        >>> novelty, (x, y) = NoveltyStore(), np.eye(2)
        >>> [novelty.visit(key, "task/0") for key in (x, x, y, x)]
        [1.0, 0.5, 1.0, 0.3333333333333333]
        """
        key = np.asarray(key, np.float32)
        s = self.slots.setdefault(slot, {"keys": key[None, :][:0], "counts": []})
        # A text without words has a zero key, which is like nothing but another such text.
        similarity = s["keys"] @ key if key.any() else 1.0 - s["keys"].any(1)  # [m]
        nearest = int(similarity.argmax()) if len(similarity) else -1
        if nearest < 0 or similarity[nearest] < self.threshold:
            s["keys"] = np.vstack([s["keys"], key])
            s["counts"].append(0)
            nearest = -1
        s["counts"][nearest] += 1
        return 1.0 / s["counts"][nearest]

    def save(self, path):
        write(
            path,
            {slot: s["keys"] for slot, s in self.slots.items()},
            {slot: s["counts"] for slot, s in self.slots.items()},
        )

    def load(self, path):
        """Replace the content by that of a file. Raises ValueError if it is damaged."""
        self.slots = {slot: {"keys": keys, "counts": counts} for slot, keys, counts in read(path)}


def write(path, keys, values):
    """One .npz without pickle: the keys of all slots one after another, and the rest as JSON bytes."""
    meta = [[slot, len(k), values[slot]] for slot, k in keys.items()]
    blob = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    rows = np.vstack(list(keys.values())) if keys else np.zeros((0, 0), np.float32)
    with open(f"{path}.tmp", "wb") as file:
        np.savez_compressed(file, keys=rows, meta=blob)
    os.replace(f"{path}.tmp", path)  # a reader never sees half a file


def read(path):
    """Yield (slot, keys [n, d], values) of a file that `write` made."""
    try:
        with np.load(path, allow_pickle=False) as file:
            rows, meta = file["keys"], json.loads(file["meta"].tobytes())
        ends = np.cumsum([n for _, n, _ in meta], dtype=int)
        if len(rows) != (ends[-1] if meta else 0):
            raise ValueError("its parts do not fit together")
        return [(slot, rows[end - n : end], values) for (slot, n, values), end in zip(meta, ends)]
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{path}: damaged or missing memory file ({error}); resume from an older checkpoint"
        ) from error


def embedder(name="hashing"):
    """A function `embed(texts) -> [n, d]` float32 whose rows are unit vectors (a text without words: zeros).

    "hashing": words and word pairs hashed into 1,024 dimensions, no download. Otherwise a hub id or folder of a
    sentence encoder, mean-pooled; the paper uses sentence-transformers/all-MiniLM-L6-v2.
    """
    if name == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer

        vectorizer = HashingVectorizer(
            n_features=1024,
            ngram_range=(1, 2),
            norm="l2",
            dtype=np.float32,
            token_pattern=r"(?u)\b\w+\b",
        )  # single characters count: "5 degrees"
        return lambda texts: (
            vectorizer.transform(texts).toarray() if texts else np.zeros((0, 1024), np.float32)
        )

    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = (
            AutoTokenizer.from_pretrained(name),
            AutoModel.from_pretrained(name).eval(),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--embedder {name}: could not be loaded ({(str(error).splitlines() or [''])[0]}); "
            "use hashing, or a hub id or folder of a sentence encoder"
        ) from error

    @torch.no_grad()
    def embed(texts):
        if not texts:
            return np.zeros((0, model.config.hidden_size), np.float32)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        weight = batch["attention_mask"][..., None].float()  # [n, L, 1]
        mean = (model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()

    return embed


def embed(texts):
    """The default embedder: texts -> [n, 1024] unit rows."""
    return embedder()(texts)
