"""Tip memory, novelty store and embedder.     pytest tests/test_memory.py"""

from functools import partial

import numpy as np
import pytest

from memory import NoveltyStore, TipMemory, best_first, embedder


def unit(*values):
    return np.array(values) / np.linalg.norm(values)


X, Y = np.eye(2)


def filled(**options):
    """Tips whose cosines with X are 1, 0.8, 0.6 and 0.4, with scores 1, 2, 3 and 4."""
    memory = TipMemory(order=partial(best_first, **options))
    for score, cosine in enumerate((1.0, 0.8, 0.6, 0.4), 1):
        memory.add(unit(cosine, np.sqrt(1 - cosine**2)), f"cos {cosine}", score, "slot")
    return memory


def test_retrieval_takes_similar_tips_by_score_or_by_similarity():
    assert filled().retrieve(X, "slot") == ["cos 0.6", "cos 0.8", "cos 1.0"]
    similar = filled(rank="similarity").retrieve(X, "slot")
    assert similar == ["cos 1.0", "cos 0.8", "cos 0.6"]
    # Filtered first, then the best.
    assert filled(threshold=0.7, max_tips=1).retrieve(X, "slot") == ["cos 0.8"]
    assert filled().retrieve(-X, "slot") == [] == filled().retrieve(X, "other")
    assert filled(threshold=1.0).retrieve(X, "slot") == ["cos 1.0"]
    many = TipMemory()
    for i in range(12):
        many.add(X, str(i), -i, "slot")
    assert many.retrieve(X, "slot") == [str(i) for i in range(10)]


def test_capacity_duplicates_ties_and_slots():
    memory = TipMemory(capacity=3)
    for i in range(5):
        memory.add(X, f"tip {i}", 0, "slot")
        memory.add(X, f"tip {i}", 99, "slot")  # ignored, with its score
    assert memory.slots["slot"].scores == [0, 0, 0]
    assert memory.retrieve(X, "slot") == ["tip 4", "tip 3", "tip 2"]  # the newer first
    memory.add(X, "tip 4", 0, "other")
    memory.add(Y, "another", 5, "slot")
    assert len(memory) == 4 and memory.retrieve(X, "other") == ["tip 4"]
    assert memory.retrieve(X, "slot") == ["tip 4", "tip 3"] and memory.slots["slot"].scores[-1] == 5
    memory = TipMemory(capacity=2)
    for key, text in zip(np.eye(3), "xyz", strict=True):
        memory.add(key, text, 0, "slot")
    assert [memory.retrieve(key, "slot") for key in np.eye(3)] == [[], ["y"], ["z"]]
    many = TipMemory()
    for i in range(1001):
        many.add(X, str(i), 0, "slot")
    assert len(many) == 1000


def test_a_new_tip_goes_behind_one_that_served_well_and_before_one_that_did_not():
    """Although its own mean is higher than that of the known one, 93 and 53."""
    for others, expected in (([100, 80], ["known", "new"]), ([0, 60], ["new", "known"])):
        memory = TipMemory()
        memory.add(X, "known", 100, "slot")
        for score in others:
            memory.judge(["known"], score, "slot")
        memory.add(X, "bad", -160, "slot")
        memory.judge(["bad"], -20, "slot")
        memory.add(X, "new", 100, "slot")
        assert memory.retrieve(X, "slot")[:2] == expected


def test_of_tips_with_equal_scores_the_one_that_served_better_goes_first():
    memory = TipMemory(capacity=3)
    for text, score in (("true", 100), ("false", 100), ("worse", 83)):
        memory.add(X, text, score, "slot")
    assert memory.retrieve(X, "slot") == ["false", "true", "worse"], "the newer"
    memory.judge({"true", "false", "worse"}, -100, "slot")
    assert memory.retrieve(X, "slot") == ["false", "true", "worse"], "both served as badly"
    memory.add(X, "true", 100, "slot")  # told again
    assert memory.retrieve(X, "slot") == ["true", "false", "worse"]
    for _ in range(4):
        memory.judge({"false", "forgotten"}, 40, "slot")
    held = memory.slots["slot"]
    assert (held.totals, held.trials) == ([100, 160, -17], [3, 6, 2])
    assert memory.retrieve(X, "slot") == ["true", "false", "worse"], "means (33, 27), no sums"
    memory.judge({"true"}, -100, "slot")
    assert memory.retrieve(X, "slot") == ["false", "true", "worse"]
    memory.add(X, "new", 0, "slot")  # the oldest goes, and the others keep what is theirs
    memory.add(X, "good", 100, "slot")
    assert memory.retrieve(X, "slot") == ["good", "worse", "new"]
    assert (memory.slots["slot"].totals, memory.slots["slot"].trials) == ([-17, 0, 100], [2, 1, 1])


def test_novelty_is_one_over_the_visits_to_similar_states_of_the_slot():
    novelty = NoveltyStore()
    visits = [X, unit(1, 1.7), unit(1, 1.8), X, Y]  # cosines with X: 0.507, 0.486
    assert novelty.visits(visits, "s") == [1, 2, 1, 3, 2]
    assert len(novelty) == 0  # asking stores nothing
    novelty.add(visits, "s")
    assert novelty.visits([X, Y, X], "s") == [4, 3, 5]
    assert novelty.visits([unit(1, 1.2)], "s") == [3]  # like both, more like the second
    assert novelty.visits([X], "t") == [1] and len(novelty) == 2
    assert NoveltyStore(0.6).visits([X, np.array([0.6, 0.8])], "s") == [1, 2]
    novelty.add([np.zeros(2)] * 2, "s")  # texts without words are like nothing but each other
    assert novelty.visits([np.zeros(2), X], "s") == [3, 4]


@pytest.mark.parametrize("kind", [TipMemory, NoveltyStore])
def test_saved_and_loaded_unchanged_and_damage_is_named(kind, tmp_path):
    path = tmp_path / "store.npz"
    store = kind()
    store.save(path)
    kind().load(path)  # an empty one
    for i, text in enumerate(["a\nb\0", "ünï 中 <|im_end|>", "x" * 5000]):
        for slot in ("s", "t")[: i + 1]:
            if kind is TipMemory:
                store.add(np.eye(3)[i], text, i, slot)
            else:
                store.add([np.eye(3)[i]] * (i + 1), slot)
    store.save(path)
    again = kind()
    again.load(path)
    assert list(again.slots) == ["s", "t"] and len(again) == len(store) == 5
    for slot, held in again.slots.items():
        saved = store.slots[slot]
        assert len(held.keys) == len(saved.counts if kind is NoveltyStore else saved.texts)
        if kind is NoveltyStore:
            assert held.counts == saved.counts
        else:
            assert (held.texts, held.scores) == (saved.texts, saved.scores)
            assert (held.totals, held.trials) == (saved.totals, saved.trials)
        assert (held.keys == saved.keys[: len(held.keys)]).all() and held.keys.dtype == np.float32
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="store.npz: damaged"):
            kind().load(path)
    np.savez_compressed(path, keys=np.eye(3), meta=np.frombuffer(b'[["s", 2, []]]', np.uint8))
    with pytest.raises(ValueError, match="do not fit together"):
        kind().load(path)


def test_embedding_is_unit_rows_and_like_texts_are_alike():
    embed = embedder()
    texts = ["Move to the kitchen.", "move to the KITCHEN!", "kitchen the to move", "A 5 dog", ""]
    vectors = embed(texts)
    assert vectors.shape == (5, 1024) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors[:4], axis=1) == pytest.approx(1) and not vectors[4].any()
    assert vectors[0] @ vectors[1] == pytest.approx(1) and vectors[0] @ vectors[3] == 0
    assert vectors[0] @ vectors[2] == pytest.approx(4 / 7)  # 4 words of 7 parts; pairs have order
    assert embed(["A 7 dog"])[0] @ vectors[3] < 0.7  # a digit is a word
    assert embed([]).shape == (0, 1024)
    listed = ["In it, you see:", "soil", "a dead bee", "an axe"]
    lines, others = embed(["\n".join(listed), "\n\t".join(listed[::-1])])
    assert (lines == others).all(), "Java lists equal things in any order"
    joined = embed([" ".join(listed)])[0] @ lines  # 10 words and 6 pairs of 10 and 9
    assert joined == pytest.approx((16 / 19) ** 0.5)


def test_a_sentence_encoder_is_mean_pooled_and_a_missing_one_is_one_line(tmp_path, checkpoint):
    encode = embedder(checkpoint)  # any transformer encodes; this one is at hand
    (alone,) = encode(["a box"])
    padded = encode(["a box", "a much longer sentence about a kitchen and a radio"])
    assert np.linalg.norm(padded, axis=1) == pytest.approx(1)
    assert padded[0] == pytest.approx(alone, abs=1e-5) and encode([]).shape == (0, 64)
    with pytest.raises(ValueError, match="--embedder .*could not be loaded"):
        embedder(str(tmp_path / "nothing"))


def test_at_a_threshold_of_1_a_text_is_still_like_itself():
    texts = [f"the {word} is in the box {n}" for n in range(20) for word in ("radio", "fan")]
    tips, novelty = (
        TipMemory(order=partial(best_first, threshold=1.0, max_tips=1)),
        NoveltyStore(1.0),
    )
    for key, text in zip(embedder()(texts), texts, strict=True):
        tips.add(key, text, 0, "task")
        novelty.add([key], "task")
        assert tips.retrieve(key, "task") == [text]
        assert novelty.visits([key], "task") == [2]


def test_a_full_novelty_store_forgets_the_state_that_was_met_least():
    novelty = NoveltyStore(capacity=2)
    x, y, z = np.eye(3)
    novelty.add([x, x, y, z], "task")
    assert len(novelty) == 2
    assert novelty.visits([x], "task") == [3] and novelty.visits([z], "task") == [2]
    assert novelty.visits([y], "task") == [1], "the oldest of those met once made room"
    before = novelty.slots["task"].keys.copy()
    assert novelty.visits([y, y, z], "task") == [1, 2, 1]  # y takes the place of z
    assert (novelty.slots["task"].keys == before).all(), "asking makes no room in the store"
    equals = NoveltyStore(capacity=2)
    equals.add([x, y, z], "task")
    assert [equals.visits([key], "task") for key in (x, y, z)] == [[1], [2], [2]]
