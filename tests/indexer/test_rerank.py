"""The second stage: what it reads, when it stops, and what it need not do twice."""

from functools import partial

import pytest

from indexer.errors import LibraryError, UnreadablePhoto
from indexer.library import PhotoLibrary
from indexer.patch_store import PatchStore
from indexer.rerank import CHUNK, FRESH_CHUNK, Reranker
from tests.fakes import ColourEncoder
from tests.indexer.conftest import paint


class Photos:
    """Pictures by id: even ones are red, odd ones blue."""

    def __init__(self):
        self.opened = []

    def __call__(self, photo_id: int):
        self.opened.append(photo_id)
        if photo_id == 13:
            raise UnreadablePhoto("truncated", "cut short")
        from PIL import Image

        return Image.new("RGB", (8, 8), (230, 20, 20) if photo_id % 2 == 0 else (20, 20, 230))


def keyed(photo_ids) -> dict[int, bytes]:
    return {photo_id: str(photo_id).encode() for photo_id in photo_ids}


def test_margins_say_what_the_photos_show():
    margins = Reranker(ColourEncoder(), Photos()).score("red", [1, 2, 3, 4])
    assert [margins[n] > 0 for n in (1, 2, 3, 4)] == [False, True, False, True]


def test_a_photo_that_cannot_be_read_is_left_out():
    assert set(Reranker(ColourEncoder(), Photos()).score("red", [12, 13, 14])) == {12, 14}


def test_a_photo_is_opened_once():
    photos = Photos()
    reranker = Reranker(ColourEncoder(), photos)
    first = reranker.score("red", [1, 2, 3])
    assert reranker.score("red", [3, 2, 1]) == first
    assert photos.opened == [1, 2, 3]


def test_memory_is_bounded():
    photos = Photos()
    reranker = Reranker(ColourEncoder(), photos, cache_bytes=3 * 12)
    for photo_id in (1, 2, 3, 4):
        reranker.score("red", [photo_id])
    reranker.score("red", [4, 3, 2])
    assert photos.opened == [1, 2, 3, 4]
    reranker.score("red", [1])
    assert photos.opened == [1, 2, 3, 4, 1]


def test_what_the_store_holds_is_not_opened_again(tmp_path):
    store, photos = PatchStore(tmp_path, 1 << 20), Photos()
    first = Reranker(ColourEncoder(), Photos(), store, keyed).score("red", [1, 2, 3])
    assert Reranker(ColourEncoder(), photos, store, keyed).score("red", [1, 2, 3, 4]) == first | {
        4: pytest.approx(first[2])
    }
    assert photos.opened == [4]
    store.close()


def test_the_budget_stops_it_after_the_first_chunk():
    margins = Reranker(ColourEncoder(), Photos()).score("red", list(range(100, 300)), budget_seconds=0)
    assert list(margins) == list(range(100, 100 + FRESH_CHUNK))


def test_a_photo_that_is_not_known_does_not_shrink_the_others_chunk(tmp_path):
    store = PatchStore(tmp_path / "patches", 1 << 20)
    asked = []

    def keys(photo_ids):
        asked.append(list(photo_ids))
        return keyed(photo_ids)

    photos = Photos()
    reranker = Reranker(ColourEncoder(), photos, store, keys)
    ids = list(range(100, 100 + CHUNK))
    reranker.score("red", ids[:20] + ids[21:])
    photos.opened.clear()
    reranker._held.clear()
    asked.clear()
    margins = reranker.score("red", ids, budget_seconds=0)
    assert list(margins) == ids and photos.opened == [ids[20]]
    assert asked == [ids, [ids[20]]]  # once to read, once to write what was missing


def test_an_index_run_keeps_tokens_for_the_first_search(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    for number in range(5):
        paint(folder / f"{number}.png", (200, 10 * number, 20))
    with PhotoLibrary.open(tmp_path / "library", load_encoder=lambda _: ColourEncoder()) as library:
        library.index(folder, workers=0)
        assert len(library.patches()) == 5
        monkeypatch.setattr(library, "picture", lambda photo_id: pytest.fail("opened a photo"))
        assert library.search("red").reranked == 5


def test_other_weights_do_not_read_them(tmp_path):
    folder = tmp_path / "photos"
    paint(folder / "red.png", (230, 20, 20))
    with PhotoLibrary.open(tmp_path / "library", load_encoder=lambda _: ColourEncoder()) as library:
        library.index(folder, workers=0)
        others = partial(keyed_by_model, library, "other" * 4)
        assert library.patches().get(others([1]).values()) == {}


def keyed_by_model(library, fingerprint, photo_ids):
    from indexer.rerank import patch_keys

    return patch_keys(library.catalog, fingerprint, "int8", photo_ids)


@pytest.mark.parametrize(("name", "value"), [("PHOTOBLIP_PATCH_GB", "lots"), ("PHOTOBLIP_PATCH_FORM", "int4")])
def test_a_setting_that_cannot_be_read_says_so(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    paint(tmp_path / "photos" / "red.png", (230, 20, 20))
    with (
        PhotoLibrary.open(tmp_path / "library", load_encoder=lambda _: ColourEncoder()) as library,
        pytest.raises(LibraryError, match=name),
    ):
        library.index(tmp_path / "photos", workers=0)
