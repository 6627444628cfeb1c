"""The model that ships, on real photos: the demo's, and where they are, the development photos."""

from pathlib import Path

import pytest

from blipcore import load
from blipcore.evaluation import retrieval
from indexer import PhotoLibrary
from indexer.demo import copy_demo_photos, demo_manifest
from tests.tiny import BUNDLED, SHARED_DATA, needs_shared_data


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    copy_demo_photos(folder / "photos")
    with PhotoLibrary.open(folder / "library") as library:
        library.index(folder / "photos", workers=0)
        yield library


@pytest.mark.parametrize("query", demo_manifest()["queries"], ids=lambda query: query["text"])
def test_the_demos_queries_put_the_right_photo_first(demo, query):
    hits = demo.search(query["text"])
    assert Path(hits[0].path).name == query["expect"]
    assert hits[0].probability > 2 * hits[1].probability


def test_a_query_of_nothing_there_is_less_probable_than_a_query_of_something(demo):
    there, absent = demo.search("a cat")[0], demo.search("people playing football in a stadium")[0]
    assert there.probability > absent.probability


def test_a_photo_is_described_by_the_text_that_fits(demo):
    texts = ["a cat", "a cup of coffee", "a motorcycle", "a rocket", "a flower"]
    for name, text in (("cat.png", "a cat"), ("coffee.png", "a cup of coffee"), ("flower.jpg", "a flower")):
        photo = demo.status()["roots"][0] + "/" + name
        assert demo.describe(photo, candidates=texts)[0].text == text


def test_a_photo_is_most_like_itself_in_another_form(demo, tmp_path):
    picture = demo.picture(demo.photo_id(demo.status()["roots"][0] + "/temple.jpg")).rotate(2).resize((300, 220))
    assert Path(demo.search(image=picture)[0].path).name == "temple.jpg"


def test_captions_are_words_with_a_probability(demo):
    words, score = demo.caption(demo.status()["roots"][0] + "/" + demo_manifest()["caption"])
    assert {"man", "camera"} <= set(words.split()) and score > 0.3


def test_the_shipped_folder_is_whole_and_small():
    names = {file.name for file in BUNDLED.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "photoblip.json"} <= names
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 90e6
    assert load("blip-mini").scoring.calibrated


@needs_shared_data
def test_real_captions_find_their_photos_and_re_ranking_does_not_hurt():
    itc, itm = retrieval(SHARED_DATA / "flickr8k", "dev", "blip-mini", rerank=8, limit=60)
    assert itc["t2i"]["r1"] >= 70 and itc["t2i"]["r10"] >= 96
    assert itm["t2i"]["r1"] >= itc["t2i"]["r1"] - 2
