"""The library's own captions as queries: what is held out, the figures, the saved report."""

import json

import pytest

from indexer.errors import LibraryError, PhotoNotFound
from indexer.evaluate import Asked, _figures, own_queries
from indexer.full_text import FullText, without_captions


def caption_all(library):
    for name in ("red", "green", "blue"):
        library.add_caption(library.photo_id(str(library.folder_of_test / f"{name}.png")), f"{name} thing")


@pytest.fixture
def captioned(library, photos):
    library.folder_of_test = photos
    caption_all(library)
    return library


def test_a_caption_is_not_found_by_itself(captioned, monkeypatch):
    monkeypatch.setattr("indexer.full_text.ROWS", 2)  # more photos than are copied at once
    asked, held_out = own_queries(captioned.catalog)
    assert sorted(query.text for query in asked) == ["blue thing", "green thing", "red thing"] and len(held_out) == 3
    ids = captioned.searcher().index.ids()
    ids.sort()
    assert FullText(captioned.catalog).search("thing", 9, ids).ids.size == 3
    held = without_captions(captioned.catalog, held_out)
    assert held.search("thing", 9, ids).ids.size == 0
    assert held.search("red", 9, ids).ids.size == 1, "its file's name is still there"
    assert FullText(captioned.catalog).search("thing", 9, ids).ids.size == 3, "the library's own is as it was"


def test_of_several_captions_one_is_asked_and_the_others_stay(captioned, photos):
    red = captioned.photo_id(str(photos / "red.png"))
    captioned.add_caption(red, "scarlet")
    captioned.caption([red])
    asked, held_out = own_queries(captioned.catalog, seed=1)
    assert len(asked) == 3 and len(held_out) == 3
    query = next(query for query in asked if query.photo_ids == {red})
    left = {"scarlet": "thing", "red thing": "scarlet"}[query.text]
    ids = captioned.searcher().index.ids()
    ids.sort()
    texts = without_captions(captioned.catalog, held_out)
    assert texts.search(left, 9, ids).ids.tolist() == [red]
    assert red not in texts.search({"scarlet": "scarlet", "red thing": "thing"}[query.text], 9, ids).ids.tolist()
    assert texts.search("picture a red", 9, ids).ids.tolist() == [red], "a model's caption stays"


def test_photos_that_share_a_caption_are_one_query(captioned, photos):
    red, blue = (captioned.photo_id(str(photos / f"{name}.png")) for name in ("red", "blue"))
    captioned.add_caption(captioned.photo_id(str(photos / "yellow.png")), " RED  thing")
    asked, held_out = own_queries(captioned.catalog)
    shared = next(query for query in asked if query.text.lower().split() == ["red", "thing"])
    assert len(shared.photo_ids) == 2 and red in shared.photo_ids and blue not in shared.photo_ids
    assert len(held_out) == 4


def test_a_model_s_captions_and_missing_photos_are_not_asked(library, photos):
    library.caption([1, 2])
    library.add_caption(3, "a note")
    paths = library.photo(3)["paths"]
    __import__("pathlib").Path(paths[0]).unlink()
    library.index(photos, workers=0)
    assert own_queries(library.catalog) == ([], [])
    with pytest.raises(LibraryError, match="no captions to ask with"):
        library.evaluate()


def test_the_figures_are_those_of_the_field():
    asked = [
        Asked("a", frozenset({1})),
        Asked("b", frozenset({2})),
        Asked("c", frozenset({3, 4})),
        Asked("d", frozenset({9})),
    ]
    answers = [(0, [1, 2], 0.1), (1, [1, 2], 0.1), (2, [7, 3, 4], 0.1), (3, [1], 0.5)]
    found = _figures(asked, answers)
    assert (found.r1, found.r5, found.r10) == (25.0, 75.0, 75.0)
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 2 + 0) / 4, abs=1e-4)
    two = (1 / 1.58496 + 1 / 2) / (1 + 1 / 1.58496)
    assert found.ndcg10 == pytest.approx((1 + 1 / 1.58496 + two + 0) / 4, abs=1e-4)
    assert found.p50_ms == 100 and found.p99_ms > 480


def test_every_way_of_searching_is_measured_and_saved(captioned, tmp_path):
    seen = []
    report = captioned.evaluate(progress=lambda done, total: seen.append((done, total)))
    assert list(report.channels) == ["itc", "text", "fused", "reranked"] and seen == [(1, 3), (2, 3), (3, 3)]
    assert report.channels["itc"].r1 == report.channels["reranked"].r1 == 100
    assert report.queries == report.held_out == 3 and report.photos == 4
    (file,) = captioned.paths.reports.iterdir()
    assert json.loads(file.read_text()) == report.as_dict()
    captioned.evaluate(report=tmp_path / "reports", limit=1)
    assert len(list((tmp_path / "reports").iterdir())) == 1


def test_given_queries_are_asked_instead(captioned, photos):
    pairs = [(str(photos / "red.png"), "red thing"), (captioned.photo_id(str(photos / "blue.png")), "thing")]
    report = captioned.evaluate(pairs, rerank=0)
    assert "reranked" not in report.channels and report.held_out == 0 and report.queries == 2
    assert report.channels["text"].r5 == 100
    with pytest.raises(PhotoNotFound):
        captioned.evaluate([("nowhere.png", "x")])
