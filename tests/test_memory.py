"""Tip memory, novelty store and embedder.     pytest tests/test_memory.py"""

import numpy as np
import pytest

from memory import NoveltyStore, TipMemory, embed, embedder


def unit(*values):
    return np.array(values) / np.linalg.norm(values)


def filled(**options):
    """Four tips around the query (1, 0): cosines 1, 0.8, 0.6 and 0.4, scores 1, 2, 3 and 4."""
    memory = TipMemory(**options)
    for i, cosine in enumerate((1.0, 0.8, 0.6, 0.4)):
        memory.add(unit(cosine, np.sqrt(1 - cosine**2)), f"cos {cosine}", i + 1, "slot")
    return memory


def test_retrieval_takes_similar_tips_by_score_or_by_similarity():
    query = unit(1, 0)
    assert filled().retrieve(query, "slot") == ["cos 0.6", "cos 0.8", "cos 1.0"]
    assert filled(rank="similarity").retrieve(query, "slot") == ["cos 1.0", "cos 0.8", "cos 0.6"]
    assert filled(k=1).retrieve(query, "slot") == ["cos 0.6"]
    assert filled(threshold=0.7, k=1).retrieve(query, "slot") == ["cos 0.8"], (
        "filtered first, then the k best"
    )
    assert filled().retrieve(unit(-1, 0), "slot") == [] == filled().retrieve(query, "other")
    with pytest.raises(ValueError, match="rank"):
        TipMemory(rank="best")


def test_capacity_duplicates_and_ties():
    memory = TipMemory(capacity=3, k=9)
    for i in range(5):
        memory.add(unit(1, 0), f"tip {i}", 0, "slot")
        memory.add(unit(1, 0), f"tip {i}", 99, "slot")
    assert memory.retrieve(unit(1, 0), "slot") == ["tip 4", "tip 3", "tip 2"], (
        "oldest dropped, newer first"
    )
    memory.add(unit(1, 0), "elsewhere", 0, "other")
    assert len(memory) == 4 and memory.retrieve(unit(1, 0), "other") == ["elsewhere"]


def test_novelty_is_one_over_visits_to_similar_states_per_slot():
    novelty = NoveltyStore(threshold=0.5)
    a, like_a, b = unit(1, 0), unit(1, 0.5), unit(0, 1)
    assert [novelty.visit(x, "s") for x in (a, like_a, b, a, b)] == [1, 1 / 2, 1, 1 / 3, 1 / 2]
    assert novelty.visit(a, "t") == 1 and len(novelty) == 3
    assert [novelty.visit(np.zeros(2), "s") for _ in range(3)] == [1, 1 / 2, 1 / 3], (
        "texts without words are alike"
    )


@pytest.mark.parametrize("kind", [TipMemory, NoveltyStore])
def test_saved_and_loaded_unchanged_and_damage_is_named(kind, tmp_path):
    path, store = tmp_path / "store.npz", kind()
    store.save(path)
    kind().load(path)  # an empty one
    texts = ["a\nb\0", "ünï 中 <|im_end|>", "x" * 5000]
    for i, key in enumerate(np.eye(3)):
        store.add(key, texts[i], i, "s") if kind is TipMemory else store.visit(key, "s")
    store.save(path)
    other = kind()
    other.load(path)
    if kind is TipMemory:
        assert other.slots["s"]["texts"] == texts and other.retrieve(np.eye(3)[1], "s") == [
            texts[1]
        ]
    assert (other.slots["s"]["keys"] == store.slots["s"]["keys"]).all() and len(other) == 3
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="store.npz: damaged"):
            kind().load(path)


def test_embedding_is_unit_rows_and_like_texts_are_alike():
    vectors = embed(
        ["You move to the kitchen.", "You move to the kitchen!", "A picture of a dog", ""]
    )
    assert vectors.shape == (4, 1024) and np.linalg.norm(vectors[:3], axis=1) == pytest.approx(1)
    assert vectors[0] @ vectors[1] > 0.99 and vectors[0] @ vectors[2] < 0.5 and not vectors[3].any()
    assert embed([]).shape == (0, 1024)


def test_a_sentence_encoder_is_mean_pooled_and_a_missing_one_is_one_line(tmp_path, checkpoint):
    encode = embedder(checkpoint)  # any transformer encodes; this one is at hand
    short, padded = (
        encode(["a box"]),
        encode(["a box", "a much longer sentence about a kitchen and a radio"]),
    )
    assert np.linalg.norm(padded, axis=1) == pytest.approx(1) and padded[0] == pytest.approx(
        short[0], abs=1e-5
    )
    with pytest.raises(ValueError, match="could not be loaded"):
        embedder(str(tmp_path / "nothing"))
