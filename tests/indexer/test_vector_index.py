"""The contract of a vector index."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.vector_index import VectorIndex


def unit(count, dim=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(count=50, dim=16):
    index, vectors = VectorIndex(dim), unit(count, dim)
    index.add(np.arange(count) * 10, vectors)
    return index, vectors


def test_search_equals_brute_force():
    index, vectors = filled()
    queries = unit(5, seed=1)
    scores, ids = index.search(queries, 7)
    exact = queries @ vectors.T
    np.testing.assert_array_equal(ids, np.argsort(-exact, axis=1)[:, :7] * 10)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :7], atol=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(0, 1000))
def test_a_filtered_search_is_the_best_of_the_filtered(count, seed):
    index, vectors = filled()
    chosen = np.sort(np.random.default_rng(seed).choice(50, count, replace=False))
    query = unit(1, seed=seed + 1)
    scores, ids = index.search(query, 5, among=chosen * 10)
    best = chosen[np.argsort(-(query @ vectors[chosen].T)[0])][:5] * 10
    np.testing.assert_array_equal(ids[0][: len(best)], best)
    assert (ids[0][len(best) :] == -1).all() and np.isneginf(scores[0][len(best) :]).all()


def test_fewer_than_k_is_no_error():
    index, _ = filled(3)
    assert index.search(unit(1), 10)[1].shape == (1, 3)
    scores, ids = VectorIndex(16).search(unit(1), 5)
    assert (ids == -1).all() and np.isneginf(scores).all()


def test_adding_an_id_again_replaces_it():
    index, _ = filled(5)
    fresh = unit(1, seed=9)
    index.add(np.array([20]), fresh)
    assert len(index) == 5 and index.search(fresh, 1)[1][0, 0] == 20


def test_removed_ids_are_gone_and_unknown_ones_ignored():
    index, vectors = filled(5)
    assert index.remove(np.array([20, 999])) == 1
    assert sorted(index.ids().tolist()) == [0, 10, 30, 40]
    assert 20 not in index.search(vectors[2:3], 5)[1]
    assert index.remove(np.array([], np.int64)) == 0


def test_a_saved_index_answers_the_same(tmp_path):
    index, _ = filled()
    index.save(tmp_path / "deep" / "a.faiss")
    again = VectorIndex.load(tmp_path / "deep" / "a.faiss", 16)
    for left, right in zip(index.search(unit(3), 5), again.search(unit(3), 5), strict=True):
        np.testing.assert_array_equal(left, right)
    again.add(np.array([7]), unit(1, seed=5))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.faiss"]


@pytest.mark.parametrize("content", [b"", b"rubbish" * 50])
def test_a_damaged_file_is_a_value_error(tmp_path, content):
    (tmp_path / "a.faiss").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable index"):
        VectorIndex.load(tmp_path / "a.faiss", 16)


def test_another_width_is_a_value_error(tmp_path):
    filled()[0].save(tmp_path / "a.faiss")
    with pytest.raises(ValueError, match="width 16, expected 32"):
        VectorIndex.load(tmp_path / "a.faiss", 32)
    with pytest.raises(ValueError, match="expected"):
        VectorIndex(16).add(np.array([1]), unit(1, 8))


def test_threads_may_search_while_another_adds():
    index, vectors = filled()
    errors = []

    def search():
        for _ in range(200):
            scores, ids = index.search(vectors[:1], 3)
            if ids[0, 0] != 0:
                errors.append((scores, ids))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(100):
        index.add(np.array([1000 + number]), -vectors[:1])
    for thread in threads:
        thread.join()
    assert errors == [] and len(index) == 150


def several(count: int, each: int, dim: int = 8, seed: int = 3) -> np.ndarray:
    """Unit vectors [count, each, dim] that float16 holds exactly."""
    drawn = np.random.default_rng(seed).normal(size=(count, each, dim))
    return (drawn / np.linalg.norm(drawn, axis=2, keepdims=True)).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_a_photo_with_several_vectors_counts_by_the_nearest_of_them(k):
    vectors, ids = several(40, 6), np.arange(100, 140)
    index = VectorIndex(8)
    index.add(ids[:25], vectors[:25])
    index.add(ids[25:], vectors[25:])
    queries = several(3, 1, seed=4)[:, 0]
    scores, found = index.search(queries, k)
    exact = np.einsum("qd,ned->qne", queries, vectors).max(2)
    order = np.argsort(-exact, axis=1)[:, :k]
    assert np.array_equal(found, ids[order])
    assert np.allclose(scores, np.take_along_axis(exact, order, 1), atol=1e-3)
    assert len(index) == 40
    assert np.array_equal(index.ids(), ids)
    assert np.array_equal(index.vectors(ids[[7, 3]]), vectors[[7, 3]])


def test_photos_with_several_vectors_are_filtered_replaced_removed_saved(tmp_path):
    vectors, ids = several(20, 4), np.arange(20)
    index = VectorIndex(8)
    index.add(ids, vectors)
    index.add(ids[:1], vectors[1:2])  # photo 0 now looks as photo 1 does
    assert index.remove(np.array([5, 6])) == 2
    index.save(tmp_path / "index.faiss")
    index = VectorIndex.load(tmp_path / "index.faiss", 8)
    assert (len(index), index.per_photo) == (18, 4)
    query = vectors[1, 2][None]
    assert set(index.search(query, 2)[1][0].tolist()) == {0, 1}
    scores, found = index.search(query, 4, among=np.array([3, 4, 5]))
    assert set(found[0].tolist()) == {3, 4, -1}
    assert np.isneginf(scores[0][found[0] == -1]).all()
    with pytest.raises(ValueError, match="vectors are"):
        index.add(np.array([50]), several(1, 3))
