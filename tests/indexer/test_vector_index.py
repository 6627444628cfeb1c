"""The contract of a vector index, run over every form it takes, and what each form adds to it."""

import logging
import os
import subprocess
import sys
import threading

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import index_gpu, index_tuning, vector_index
from indexer.index_file import index_kind, read_notes
from indexer.index_lists import VectorLists
from indexer.vector_index import VectorIndex
from tests.indexer.conftest import paint

DIM = 16
FORMS = ("flat", "mapped", "ivf", "mapped ivf", "several", "several ivf")
MANY = 2000


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch):
    """Lists from a thousand vectors on, so that a test is quick."""
    monkeypatch.setattr(index_tuning, "FLAT_LIMIT", 1000)


def unit(count, dim=DIM, seed=0):
    """Unit vectors that float16 holds exactly."""
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


def several(count, each=4, dim=DIM, seed=3):
    """Unit vectors [count, each, dim]."""
    return unit(count * each, dim, seed).reshape(count, each, dim)


def made(form, folder, ids, vectors):
    """An index of one form: one that came from a file where it is mapped, with many lists where it is ivf."""
    index = VectorIndex(DIM)
    index.add(ids, vectors)
    if "ivf" in form:
        assert index.retrain()
        assert index.kind.startswith("ivf")
    if "mapped" in form:
        index.save(folder / "index.faiss")
        index = VectorIndex.load(folder / "index.faiss", DIM)
        assert index._lists._mapped
    return index


@pytest.fixture(params=FORMS)
def filled(request, tmp_path):
    """(index, ids, vectors [n, each, DIM]) of one form."""
    each = 4 if "several" in request.param else 1
    count = 1200 if "ivf" in request.param else 60
    vectors, ids = several(count, each), np.arange(count) * 10
    return made(request.param, tmp_path, ids, vectors if each > 1 else vectors[:, 0]), ids, vectors


def exact(queries, ids, vectors, k, among=None):
    """(cosines, ids) of the k best photos by brute force, equal ones by id; vectors [n, each, dim]."""
    scores = np.einsum("qd,ned->qne", queries, vectors).max(2)
    keep = np.full(len(ids), True) if among is None else np.isin(ids, among)
    scores, ids = scores[:, keep], ids[keep]
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), ids[order]


def check(index, queries, found, wanted):
    """What was found is what brute force found: all of it, or by many lists nearly all, and nothing else."""
    (scores, ids), (exact_scores, exact_ids) = found, wanted
    held = {photo: row for row, photo in enumerate(index.ids().tolist())}
    vectors = index.vectors(index.ids()).reshape(len(index), -1, index.dim)
    for row, query in enumerate(queries):
        real = ids[row][ids[row] >= 0]
        assert len(np.unique(real)) == len(real) and (np.diff(scores[row][: len(real)]) <= 0).all()
        rows = [held[photo] for photo in real.tolist()]
        np.testing.assert_allclose(scores[row][: len(real)], (vectors[rows] @ query).max(1), atol=1e-4)
        assert np.isneginf(scores[row][len(real) :]).all()
    if index.kind == "flat-fp16":
        np.testing.assert_allclose(scores[:, : exact_scores.shape[1]], exact_scores, atol=1e-4)
    recall = np.mean([np.isin(*pair).mean() for pair in zip(exact_ids, ids, strict=True)])
    assert recall >= (0.999 if index.kind == "flat-fp16" else 0.95)


# -- every form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 50])
def test_search_finds_what_brute_force_finds(filled, k):
    index, ids, vectors = filled
    queries = unit(20, seed=1)
    check(index, queries, index.search(queries, k), exact(queries, ids, vectors, k))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.9, 1.0])
def test_a_filtered_search_finds_the_best_of_the_filtered(filled, share):
    index, ids, vectors = filled
    queries = unit(10, seed=2)
    among = np.sort(np.random.default_rng(5).choice(ids, max(1, int(share * len(ids))), replace=False))
    found = index.search(queries, 20, among=among)
    check(index, queries, found, exact(queries, ids, vectors, 20, among))
    assert np.isin(found[1], [*among, -1]).all()


def test_a_filter_may_name_photos_that_are_not_there(filled):
    index, ids, _ = filled
    scores, found = index.search(unit(2), 5, among=np.array([-3, 7, int(ids[2]), 10**15]))
    assert found[:, 0].tolist() == [ids[2]] * 2 and (found[:, 1:] == -1).all() and np.isneginf(scores[:, 1:]).all()
    assert (index.search(unit(1), 5, among=np.array([7]))[1] == -1).all()
    assert (index.search(unit(1), 5, among=np.array([], np.int64))[1] == -1).all()


def test_photos_come_and_go_and_change_in_every_form(filled):
    index, ids, vectors = filled
    each = vectors.shape[1]
    fresh = several(3, each, seed=9)
    index.add(np.array([7, 17, int(ids[4])]), fresh if each > 1 else fresh[:, 0])  # the third is replaced
    assert index.remove(np.array([int(ids[0]), int(ids[1]), 999_999])) == 2
    now = np.sort([*ids[2:], 7, 17])
    np.testing.assert_array_equal(index.ids(), now)
    assert len(index) == len(now)
    for photo, own in zip((7, 17, int(ids[4])), fresh, strict=True):
        np.testing.assert_array_equal(index.vectors(np.array([photo])).reshape(each, DIM), own)
        assert index.search(own[:1], 1)[1][0, 0] == photo
    assert not np.isin(index.search(vectors[0, :1], 20)[1], ids[:2]).any()


def test_vectors_come_back_in_the_order_asked_for(filled):
    index, ids, vectors = filled
    found = index.vectors(ids[[7, 3, 40]])
    np.testing.assert_array_equal(found.reshape(3, -1, DIM), vectors[[7, 3, 40]])


def test_a_saved_index_answers_the_same(filled, tmp_path):
    index, _, _ = filled
    index.save(tmp_path / "deep" / "a.faiss")
    again = VectorIndex.load(tmp_path / "deep" / "a.faiss", DIM)
    assert again.kind == index.kind == index_kind(tmp_path / "deep" / "a.faiss")
    for left, right in zip(index.search(unit(3), 5), again.search(unit(3), 5), strict=True):
        np.testing.assert_array_equal(left, right)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.faiss"]


def test_equal_photos_come_in_the_order_of_their_ids(filled):
    index, _, vectors = filled
    each = vectors.shape[1]
    same = np.repeat(several(1, each, seed=8), 30, axis=0)
    index.add(np.arange(5, 305, 10), same if each > 1 else same[:, 0])
    for k in (1, 4, 29):
        assert index.search(same[0, :1], k)[1][0].tolist() == list(range(5, 305, 10))[:k]
    assert index.search(same[0, :1], 3, among=np.arange(45, 305, 10))[1][0].tolist() == [45, 55, 65]


def test_no_queries_and_no_photos_are_no_error():
    index = VectorIndex(DIM)
    scores, ids = index.search(unit(1), 5)
    assert (ids == -1).all() and np.isneginf(scores).all()
    assert (index.search(unit(1), 5, among=np.array([1, 2]))[1] == -1).all()
    index.add(np.arange(3), unit(3))
    assert index.search(unit(1), 10)[1].shape == (1, 3)
    assert index.search(np.zeros((0, DIM), np.float32), 2)[1].shape == (0, 2)
    assert index.remove(np.array([], np.int64)) == 0
    assert index.remove(np.arange(3)) == 3 and len(index) == 0
    index.add(np.arange(2), several(2))  # an empty index takes photos with another number of vectors
    assert index.per_photo == 4


def test_vectors_that_do_not_fit_are_refused():
    index = VectorIndex(DIM)
    with pytest.raises(ValueError, match="expected"):
        index.add(np.array([1]), unit(1, 8))
    with pytest.raises(ValueError, match="given twice"):
        index.add(np.array([1, 1]), unit(2))
    index.add(np.array([1]), unit(1))
    with pytest.raises(ValueError, match="vectors are"):
        index.add(np.array([2]), several(1))


@pytest.mark.parametrize("form", ["flat", "ivf"])
def test_threads_may_search_while_another_changes_and_saves(form, tmp_path):
    index = made(form, tmp_path, np.arange(1200), unit(1200))
    first, errors = unit(1200)[:1], []

    def search():
        for _ in range(100):
            scores, ids = index.search(first, 3)
            if ids[0, 0] != 0:
                errors.append((scores, ids))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(40):
        index.add(np.array([5000 + number]), -first)
        index.remove(np.array([1000 + number]))
        if number % 10 == 0:
            index.save(tmp_path / "saved.faiss")
    for thread in threads:
        thread.join()
    assert errors == [] and len(index) == 1200


# -- filters of any selectivity ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexes():
    """{form: index} of MANY photos in clusters, some of them alike, with gaps among the ids; and ids, vectors."""
    centres = unit(40, seed=4)[np.random.default_rng(6).integers(40, size=MANY)]
    vectors = centres + 0.6 * unit(MANY, seed=7)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    vectors[1::50] = vectors[0]
    ids = np.sort(np.random.default_rng(8).choice(3 * MANY, MANY, replace=False))
    flat, ivf = VectorIndex(DIM), VectorIndex(DIM)
    for index in (flat, ivf):
        index.add(ids, vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_tuning, "FLAT_LIMIT", 1000)
        ivf.retrain()
    return {"flat": flat, "ivf": ivf}, ids, vectors


@pytest.mark.parametrize("form", ["flat", "ivf"])
@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.001, 1), k=st.integers(1, 120), seed=st.integers(0, 10_000), together=st.booleans())
def test_a_filter_of_any_selectivity_equals_brute_force(indexes, form, share, k, seed, together):
    """Chosen at random or all alike, as an album is; exact in one list, and in many where the filter leaves few."""
    by_form, ids, vectors = indexes
    index, rng = by_form[form], np.random.default_rng(seed)
    count = max(1, round(share * MANY))
    alike = np.argsort(-(vectors @ vectors[rng.integers(MANY)]))[:count]
    among = np.sort(ids[alike] if together else rng.choice(ids, count, replace=False))
    query = unit(1, seed=seed + 1)
    scores, found = index.search(query, k, among=among)
    exact_scores, exact_ids = exact(query, ids, vectors[:, None], k, among)
    count = exact_ids.shape[1]
    assert np.isin(found[0, :count], among).all() and (found[0, count:] == -1).all()
    if form == "flat" or share < vector_index.EXACT_SHARE:
        np.testing.assert_allclose(scores[0, :count], exact_scores[0], atol=1e-5)
        near = exact_scores[0] > exact_scores[0, -1] + 1e-4  # those at the end may be a rounding apart
        assert np.isin(exact_ids[0][near], found[0]).all()
    else:
        assert (~np.isin(exact_ids[0], found[0])).sum() <= max(1, count // 10)  # on average fewer, see below


def test_filters_of_many_lists_reach_the_recall_on_average(indexes):
    by_form, ids, vectors = indexes
    queries = unit(200, seed=11)
    for share in (0.03, 0.06, 0.1, 0.3, 0.6):
        among = np.sort(np.random.default_rng(1).choice(ids, int(share * MANY), replace=False))
        found = by_form["ivf"].search(queries, 50, among=among)[1]
        wanted = exact(queries, ids, vectors[:, None], 50, among)[1]
        assert np.mean([np.isin(*pair).mean() for pair in zip(wanted, found, strict=True)]) >= 0.99


def test_ids_far_apart_are_filtered_too():
    index, ids = VectorIndex(DIM), np.array([3, 10**6, 10**12])
    index.add(ids, unit(3))
    assert set(index.search(unit(1), 3, among=ids[[0, 2]])[1][0].tolist()) == {3, 10**12, -1}
    assert set(index.search(unit(1), 3, among=ids)[1][0].tolist()) == set(ids.tolist())


# -- files ------------------------------------------------------------------------------------------------------


def test_a_mapped_index_that_is_added_to_leaves_its_file_alone(tmp_path):
    for form in ("mapped", "mapped ivf"):
        index = made(form, tmp_path, np.arange(1100), unit(1100))
        content = (tmp_path / "index.faiss").read_bytes()
        index.add(np.array([5000]), unit(1, seed=5))
        index.remove(np.array([4]))
        assert not index._lists._mapped and (tmp_path / "index.faiss").read_bytes() == content
        index.save(tmp_path / "index.faiss")
        assert len(VectorIndex.load(tmp_path / "index.faiss", DIM)) == 1100


def test_a_mapped_index_goes_on_when_its_file_is_replaced(tmp_path):
    index = made("mapped", tmp_path, np.arange(100), unit(100))
    before = index.search(unit(1, seed=1), 5)
    made("flat", tmp_path, np.arange(3), unit(3, seed=2)).save(tmp_path / "index.faiss")
    for left, right in zip(before, index.search(unit(1, seed=1), 5), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("each", [1, 4])
def test_a_file_of_the_first_format_is_read(tmp_path, each):
    vectors, ids = several(20, each), np.arange(20) * 3 + 1
    old = faiss.IndexIDMap2(faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT))
    old.add_with_ids(vectors.reshape(-1, DIM), np.repeat(ids, each))
    faiss.write_index(old, str(tmp_path / "old.faiss"))
    assert index_kind(tmp_path / "old.faiss") == "flat-fp16"
    index = VectorIndex.load(tmp_path / "old.faiss", DIM)
    assert index.per_photo == each
    np.testing.assert_array_equal(index.ids(), ids)
    np.testing.assert_array_equal(index.vectors(ids).reshape(20, each, DIM), vectors)
    with pytest.raises(ValueError, match="width 16, expected 32"):
        VectorIndex.load(tmp_path / "old.faiss", 32)


@pytest.mark.parametrize("content", [b"", b"rubbish" * 50])
def test_a_damaged_file_is_a_value_error(tmp_path, content):
    (tmp_path / "a.faiss").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable index"):
        VectorIndex.load(tmp_path / "a.faiss", DIM)
    with pytest.raises(ValueError, match="not a readable index"):
        VectorIndex.load(tmp_path / "absent.faiss", DIM)


@pytest.mark.parametrize("form", ["flat", "ivf"])
def test_a_file_cut_short_or_overwritten_is_a_value_error(tmp_path, form):
    made(form, tmp_path, np.arange(1100), unit(1100)).save(tmp_path / "a.faiss")
    content = (tmp_path / "a.faiss").read_bytes()
    notes = len(content) - content.rindex(b'{"')
    for damaged in (content[: len(content) // 2], bytes(200) + content[200:], content[:300] + content[-notes:]):
        (tmp_path / "a.faiss").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable index"):
            VectorIndex.load(tmp_path / "a.faiss", DIM)


def test_what_a_process_that_died_left_of_a_save_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left, alive = tmp_path / f"a.faiss.{process.pid}-1.part", tmp_path / f"a.faiss.{os.getpid()}-1.part"
    for file in (left, alive):
        file.write_bytes(b"half an index")
    made("flat", tmp_path, np.arange(5), unit(5)).save(tmp_path / "a.faiss")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.faiss", alive]


def test_another_width_is_a_value_error(tmp_path):
    made("flat", tmp_path, np.arange(5), unit(5)).save(tmp_path / "a.faiss")
    with pytest.raises(ValueError, match="width 16, expected 32"):
        VectorIndex.load(tmp_path / "a.faiss", 32)


# -- lists, trained and tuned -----------------------------------------------------------------------------------


def test_an_index_beyond_the_limit_is_due_and_retrained_knows_its_recall(tmp_path):
    index = VectorIndex(DIM)
    index.add(np.arange(900), unit(900))
    assert not index.due() and index.kind == "flat-fp16"
    index.add(np.arange(900, 1800), unit(900, seed=1))
    assert index.due() and index.kind == "flat-fp16"
    assert index.retrain(lambda: unit(300, seed=2))
    assert not index.due()
    index.save(tmp_path / "a.faiss")
    notes = read_notes(tmp_path / "a.faiss")
    assert notes["captions"] == 300 and notes["recall"] >= 0.97 and notes["lists"] == index_tuning.lists_for(1800)
    assert "300 captions" in index_kind(tmp_path / "a.faiss")


def test_lists_are_due_again_when_the_library_doubles_shrinks_or_moves(tmp_path):
    for change in (
        lambda index: index.add(np.arange(2000, 3500), unit(1500, seed=2)),
        lambda index: index.remove(np.arange(900)),
        lambda index: index.add(np.arange(2000, 2300), unit(1, seed=2) + 0.01 * unit(300, seed=3)),
    ):
        index = made("ivf", tmp_path, np.arange(1300), unit(1300))
        assert not index.due()
        change(index)
        assert index.due()
        index.retrain()
        assert not index.due()


def test_an_index_that_shrank_is_read_whole_again(tmp_path):
    index = made("ivf", tmp_path, np.arange(1300), unit(1300))
    index.remove(np.arange(1000))
    index.retrain()
    assert index.kind == "flat-fp16" and len(index) == 300
    check(index, unit(3, seed=1), index.search(unit(3, seed=1), 9),
          exact(unit(3, seed=1), np.arange(1000, 1300), unit(1300)[1000:, None], 9))  # fmt: skip


def test_what_changes_while_lists_are_made_is_in_them(tmp_path):
    index = made("flat", tmp_path, np.arange(1500), unit(1500))
    fresh = unit(3, seed=5)

    def queries():  # called when the new lists are filled and not yet in use
        index.add(np.array([9001, 9002, 7]), fresh)
        index.remove(np.array([3, 9002]))
        assert index.kind == "flat-fp16" and index.search(fresh[:1], 1)[1][0, 0] == 9001

    assert index.retrain(queries)
    assert index.kind.startswith("ivf")
    np.testing.assert_array_equal(index.ids(), [*(i for i in range(1500) if i != 3), 9001])
    np.testing.assert_array_equal(index.vectors(np.array([7, 9001])), fresh[[2, 0]])
    assert index.search(fresh[2:], 1)[1][0, 0] == 7
    assert not np.isin(index.search(unit(1500)[3:4], 50)[1], [3, 9002]).any()


def test_training_that_is_told_to_stop_leaves_everything_as_it_was(tmp_path):
    index = made("flat", tmp_path, np.arange(1500), unit(1500))
    asked = iter([False, False, False, True])
    assert not index.retrain(stop=lambda: next(asked))
    assert index.kind == "flat-fp16" and index.due()
    assert index.retrain()


def test_only_one_thread_trains_at_a_time(tmp_path):
    index = made("flat", tmp_path, np.arange(1500), unit(1500))
    second = []
    assert index.retrain(lambda: second.append(index.retrain()))
    assert second == [False]


def test_training_beside_search_calls_back_when_it_is_done(tmp_path, caplog):
    index, done = made("flat", tmp_path, np.arange(900), unit(900)), threading.Event()
    index.retrain_beside(lambda: None, done.set)  # not due: nothing happens
    index.add(np.arange(900, 1500), unit(600, seed=1))
    index.retrain_beside(lambda: None, done.set)
    assert done.wait(60) and index.kind.startswith("ivf")

    def broken():
        raise RuntimeError("no model")

    index.add(np.arange(2000, 4000), unit(2000, seed=2))
    with caplog.at_level(logging.WARNING):
        index.retrain_beside(broken, done.set)
        for thread in threading.enumerate():
            if thread.name == "retrain":
                thread.join()
    assert "no model" in caplog.text and len(index) == 3500 and index.due()


def test_a_margin_reads_more_lists_for_a_filter_and_all_of_them_for_a_rare_one():
    """The k-th best of few photos lies low, so more lists may hold one as near."""
    rng = np.random.default_rng(0)
    lists = VectorLists(unit(200))
    lists.add(np.arange(3000), unit(3000, seed=1))
    read = []
    scan = lists._scan
    lists._scan = lambda *given: read.append(int((given[2] >= 0).sum())) or scan(*given)
    counts = []
    for share in (1.0, 0.3, 0.002):
        chosen = np.packbits(rng.random(3000) < share, bitorder="little")
        read.clear()
        lists.search(unit(1, seed=2), 10, 0.3, faiss.IDSelectorBitmap(chosen))
        counts.append(sum(read))
    assert counts == sorted(counts) and counts[0] < 200 and counts[-1] == 200


def test_lists_with_fewer_than_k_say_so():
    lists = VectorLists(unit(100))
    lists.add(np.arange(3), unit(3, seed=1))
    for margin in (None, 0.1):
        scores, labels = lists.search(unit(2, seed=2), 5, margin)
        assert (np.sort(labels[:, :3]) == [0, 1, 2]).all()
        assert (labels[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()


# -- the library's hooks ----------------------------------------------------------------------------------------


def lists_of_two(monkeypatch):
    """Libraries of a few photos use two lists."""
    monkeypatch.setattr(index_tuning, "FLAT_LIMIT", 2)
    monkeypatch.setattr(index_tuning, "lists_for", lambda vectors: 2)


def test_a_library_that_grew_is_retrained_by_the_job_that_made_it_grow(monkeypatch, open_library, photos):
    with open_library() as library:
        assert library.status()["index_kind"] == "flat-fp16"
        lists_of_two(monkeypatch)
        library.index(photos, workers=0)
        library.add_caption(photos / "red.png", "something red")
        assert library.status()["index_kind"].startswith("ivf2-fp16")
    with open_library() as library:  # from the file
        assert library.search("a red photo")[0].path.endswith("red.png")
        assert library.verify() == []


def test_a_program_that_sees_the_library_grow_trains_beside_its_searches(monkeypatch, open_library, library, photos):
    library.search("red")
    library.add_caption(photos / "red.png", "something red")
    other = open_library()
    paint(photos / "red2.png", (200, 30, 30))
    other.index(photos, workers=0)
    lists_of_two(monkeypatch)
    library.search("red")
    for thread in threading.enumerate():
        if thread.name == "retrain":
            thread.join()
    assert "1 captions" in library.searcher().index.kind
    assert library.status()["index_kind"] == library.searcher().index.kind
    assert {hit.path[-8:] for hit in library.search("red")[:2]} >= {"red2.png"}


# -- a GPU ------------------------------------------------------------------------------------------------------


class CopyElsewhere:
    """As index_gpu.GpuVectors, without a GPU."""

    def __init__(self, dim):
        self.lists, self.searches = VectorLists.flat(dim), 0

    def add(self, labels, vectors):
        if len(self.lists) + len(labels) > 5000:
            raise RuntimeError("out of memory")
        self.lists.add(labels, vectors)

    def search(self, queries, k):
        self.searches += 1
        return self.lists.search(queries, k)


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """An index with a copy of its vectors elsewhere from the first search on."""
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(index_gpu, "GpuVectors", CopyElsewhere)
    monkeypatch.setattr(vector_index, "GPU_PAYS", 1)
    return made("flat", tmp_path, np.arange(MANY), unit(MANY))


def test_a_copy_on_the_gpu_answers_and_is_kept_level(copied):
    queries, vectors = unit(5, seed=1), unit(MANY)
    check(copied, queries, copied.search(queries, 9), exact(queries, np.arange(MANY), vectors[:, None], 9))
    assert copied._gpu.searches == 1
    copied.add(np.array([9000]), queries[:1])
    assert copied.search(queries[:1], 1)[1][0, 0] == 9000 and copied._gpu.searches == 2
    copied.remove(np.array([9000]))
    assert copied.search(queries[:1], 1)[1][0, 0] != 9000
    among = np.arange(0, MANY, 3)
    found = copied.search(queries, 9, among=among)
    check(copied, queries, found, exact(queries, np.arange(MANY), vectors[:, None], 9, among))
    assert copied.search(queries, MANY)[1].shape == (5, MANY)  # deeper than the GPU goes


def test_too_little_memory_on_the_gpu_is_said_once_and_the_cpu_answers(copied, caplog):
    copied.search(unit(1), 3)
    with caplog.at_level(logging.WARNING):
        copied.add(np.arange(MANY, 6000), unit(6000 - MANY, seed=2))
        for _ in range(3):
            assert copied.search(unit(6000 - MANY, seed=2)[-1:], 1)[1][0, 0] == 5999
    assert caplog.text.count("out of memory") == 1 and "so the CPU searches" in caplog.text


def test_a_gpu_that_faiss_cannot_use_is_no_error(monkeypatch, caplog):
    lists = VectorLists.flat(DIM)
    assert faiss.get_num_gpus() or index_gpu.on_gpu(lists) is None
    if not faiss.get_num_gpus():
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)  # a driver that promises too much
        with caplog.at_level(logging.WARNING):
            assert index_gpu.on_gpu(lists) is None
        assert "so the CPU searches" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not faiss.get_num_gpus(), reason="FAISS sees no GPU")
@pytest.mark.parametrize("each", [1, 4])
def test_the_gpu_finds_what_the_cpu_finds(monkeypatch, each):
    vectors, ids = several(30_000, each, seed=1), np.arange(30_000) * 2
    on_cpu, on_gpu = VectorIndex(DIM), VectorIndex(DIM)
    monkeypatch.setattr(index_tuning, "FLAT_LIMIT", 10**9)
    for index in (on_cpu, on_gpu):
        index.add(ids, vectors if each > 1 else vectors[:, 0])
    queries, on_cpu._gpu = unit(300, seed=2), False
    monkeypatch.setattr(vector_index, "GPU_PAYS", 1)
    for among in (None, ids[::3], ids[::500]):
        wanted, found = on_cpu.search(queries, 50, among), on_gpu.search(queries, 50, among)
        np.testing.assert_allclose(found[0], wanted[0], atol=2e-3)
        assert np.mean([np.isin(*pair).mean() for pair in zip(wanted[1], found[1], strict=True)]) > 0.98
    assert isinstance(on_gpu._gpu, index_gpu.GpuVectors)
    on_gpu.add(np.array([1]), queries[:1] if each == 1 else np.repeat(queries[:1, None], each, axis=1))
    assert on_gpu.search(queries[:1], 1)[1][0, 0] == 1
    on_gpu.remove(np.array([1]))
    assert on_gpu.search(queries[:1], 1)[1][0, 0] != 1


# -- one vector a photo -----------------------------------------------------------------------------------------


def one_vector_search(queries, ids, vectors, k, named):
    """By brute force: of the photos whose mean direction is nearest, the k best by the nearest of their vectors."""
    means = vectors.mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    best = np.argsort(-(queries @ means.T), axis=1)[:, :named]
    return np.array(
        [ids[row[np.argsort(-(vectors[row] @ query).max(1))[:k]]] for query, row in zip(queries, best, strict=True)]
    )


@pytest.mark.parametrize("form", ["several", "several ivf"])
def test_one_vector_a_photo_names_candidates_whose_vectors_are_then_compared(form, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_index, "NAMED", 30)
    monkeypatch.setattr(vector_index, "NAMED_EACH", 1)
    vectors, ids, queries = several(1200), np.arange(1200) * 10, unit(20, seed=1)
    index = made(form, tmp_path, ids, vectors)
    scores, found = index.search(queries, 10, approximate=True)
    wanted = one_vector_search(queries, ids, vectors, 10, 30)
    assert np.mean([np.isin(*pair).mean() for pair in zip(wanted, found, strict=True)]) > 0.98  # float16 may tie
    exact_scores, exact_ids = exact(queries, ids, vectors, 10)
    assert not np.array_equal(found, exact_ids)  # an approximation: some photos are missed
    assert (scores[:, 0] <= exact_scores[:, 0] + 1e-4).all() and (np.diff(scores, axis=1) <= 0).all()


def test_the_summary_is_kept_level_and_saved_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_index, "NAMED", 5)
    monkeypatch.setattr(vector_index, "NAMED_EACH", 1)
    vectors, ids, file = several(60), np.arange(60), tmp_path / "index.faiss"
    index = VectorIndex(DIM)
    index.add(ids[:40], vectors[:40])
    index.search(unit(1), 1, approximate=True)
    index.add(ids[35:], vectors[::-1][:25])  # five of them are replaced
    index.remove(ids[:10])
    held = np.concatenate([vectors[10:35], vectors[::-1][:25]])
    queries = unit(10, seed=4)
    wanted = one_vector_search(queries, ids[10:], held, 3, 5)
    np.testing.assert_array_equal(index.search(queries, 3, approximate=True)[1], wanted)
    index.save(file)
    again = VectorIndex.load(file, DIM)
    assert again._summary is not None
    np.testing.assert_array_equal(again.search(queries, 3, approximate=True)[1], wanted)
    # a file of the summary that another index left is not believed
    again.remove(ids[10:12])
    again._summary = None
    again.save(file)
    last = VectorIndex.load(file, DIM)
    assert last._summary is None
    found = last.search(queries, 3, approximate=True)[1]
    np.testing.assert_array_equal(found, one_vector_search(queries, ids[12:], held[2:], 3, 5))


def test_a_model_of_one_vector_a_photo_has_nothing_to_approximate():
    index, queries = VectorIndex(DIM), unit(5, seed=1)
    index.add(np.arange(60), unit(60))
    every, named = index.search(queries, 7), index.search(queries, 7, approximate=True)
    np.testing.assert_array_equal(every[1], named[1])
