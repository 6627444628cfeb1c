"""A library searched with BLIP-2's first stage: 32 vectors a photo, the nearest of which counts, then its matcher."""

import numpy as np
import pytest

from blipcore import evaluation
from blipcore.checkpoint import save_blip2
from blipcore.encoder import load_encoder
from blipcore.transforms import TextTokenizer
from indexer import PhotoLibrary, vector_index
from tests.blipcore.test_blip2 import HALF, tiny_blip2
from tests.tiny import TOKENIZER, drawn_photo


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, photos, library): twelve drawn photos indexed with a tiny random BLIP-2."""
    root = tmp_path_factory.mktemp("blip2")
    save_blip2(tiny_blip2(), root / "model", TextTokenizer(TOKENIZER), mean=HALF, std=HALF)
    (root / "photos").mkdir()
    for seed in range(12):
        drawn_photo(seed).save(root / "photos" / f"{seed:02}.png")
    library = PhotoLibrary.open(root / "library", model=str(root / "model"))
    assert library.index(root / "photos").added == 12
    return root / "model", root / "photos", root / "library"


@pytest.fixture
def library(folders):
    return PhotoLibrary.open(folders[2])


@pytest.fixture(scope="module")
def encoder(folders):
    return load_encoder(str(folders[0]))


def nearest(encoder, photos, text: str) -> dict[str, float]:
    """The published score of every photo, by its file's name: the largest of the 32 cosines."""
    files = sorted(photos.iterdir())
    cosines = encoder.embed_images(files) @ encoder.embed_texts([text])[0]
    assert cosines.shape == (12, 32)
    return {file.name: float(row.max()) for file, row in zip(files, cosines, strict=True)}


def test_the_first_stage_ranks_by_the_nearest_of_a_photos_vectors(folders, library, encoder):
    exact = nearest(encoder, folders[1], "two dogs")
    hits = library.search("two dogs", top_k=12, rerank=0)
    found = {hit.path.rsplit("/", 1)[1]: hit.itc for hit in hits}
    assert found.keys() == exact.keys()
    assert [hit.itc for hit in hits] == sorted(found.values(), reverse=True)
    for name, cosine in exact.items():
        assert found[name] == pytest.approx(cosine, abs=2e-3)  # thumbnails and float16 stand between
    assert len({round(value, 4) for value in exact.values()}) == 12


def test_one_vector_a_photo_names_what_all_its_vectors_then_order(folders, library, monkeypatch):
    every = [(hit.photo_id, hit.itc) for hit in library.search("two dogs", top_k=12, rerank=0)]
    named = library.search("two dogs", top_k=12, rerank=0, approximate=True)
    assert [hit.photo_id for hit in named] == [photo for photo, _ in every]  # fewer than are named: nothing is missed
    assert [hit.itc for hit in named] == pytest.approx([cosine for _, cosine in every], abs=1e-6)
    monkeypatch.setattr(vector_index, "NAMED", 4)
    monkeypatch.setattr(vector_index, "NAMED_EACH", 1)
    few = [hit.photo_id for hit in library.search("two dogs", top_k=4, rerank=0, approximate=True)]
    assert len(few) == 4
    assert few == [photo for photo, _ in every if photo in few]  # in the order of their exact scores
    (kept,) = folders[2].rglob("*.summary")  # made once
    made = kept.stat().st_mtime_ns
    again = PhotoLibrary.open(folders[2])
    assert [hit.photo_id for hit in again.search("two dogs", top_k=4, rerank=0, approximate=True)] == few
    assert kept.stat().st_mtime_ns == made


def test_classes_are_told_by_the_nearest_of_a_photos_vectors(encoder, tmp_path):
    classes, seeds = ["cat", "cow", "dog"], range(6)
    for seed in seeds:
        (tmp_path / classes[seed % 3]).mkdir(exist_ok=True)
        drawn_photo(seed).save(tmp_path / classes[seed % 3] / f"{seed}.png")
    (plain,) = evaluation.classification(tmp_path, encoder, prompts=["a {}"])
    scores = (
        encoder.embed_images([drawn_photo(seed) for seed in seeds])
        @ encoder.embed_texts([f"a {name}" for name in classes]).T
    )
    right = scores.max(1).argmax(1) == np.arange(6) % 3
    assert plain["top1"] == round(100 * right.mean(), 2) and plain["top5"] == 100
    assert len(evaluation.classification(tmp_path, encoder, prompts=["a {}"], rerank=2)) == 2


def test_its_own_matcher_reads_the_candidates(library, encoder, folders):
    hits = library.search("two dogs", top_k=12, rerank=12)
    assert len(hits) == 12 and all(hit.itm is not None for hit in hits)
    margin = encoder.match([hits[0].path], ["two dogs"])[0]
    assert hits[0].itm == pytest.approx(1 / (1 + np.exp(-margin)), abs=0.02)
    fused = [np.log(hit.itm / (1 - hit.itm)) + encoder.scoring.itc_weight * hit.itc for hit in hits]
    assert fused == sorted(fused, reverse=True)


def test_photos_texts_and_exclusions_work_with_many_vectors(library, folders):
    own = next(hit.photo_id for hit in library.search("two dogs", top_k=1))
    similar = library.similar(own, top_k=3)
    assert len(similar) == 3 and own not in {hit.photo_id for hit in similar}
    assert len(library.describe(str(folders[1] / "01.png"), candidates=["a cat", "a dog in snow"])) == 2
    assert len(library.search(image=str(folders[1] / "01.png"), top_k=5)) == 5
    every, without = library.search("two dogs", top_k=12), library.search("two dogs", top_k=12, without=["a cat"])
    assert {hit.photo_id for hit in without} <= {hit.photo_id for hit in every}


def test_the_index_can_be_lost_and_made_again(library, folders):
    before = [(hit.photo_id, hit.itc) for hit in library.search("two dogs", top_k=12, rerank=0)]
    for file in folders[2].rglob("*.faiss"):
        file.unlink()
    again = PhotoLibrary.open(folders[2])
    assert [(hit.photo_id, hit.itc) for hit in again.search("two dogs", top_k=12, rerank=0)] == before
    assert again.status()["embedded"] == 12
