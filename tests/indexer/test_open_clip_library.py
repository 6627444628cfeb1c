"""A library whose first stage is an open_clip model, with the shipped BLIP behind it: real weights, real photos."""

from pathlib import Path

import pytest

from indexer import PhotoLibrary
from indexer.demo import copy_demo_photos, demo_manifest
from tests.open_clip_models import blip_mini_towers, tiny_multilingual


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return blip_mini_towers(root / "towers"), tiny_multilingual(root / "many")


@pytest.fixture(scope="module")
def demo(tmp_path_factory, folders):
    """The demo's photos, indexed with blip-mini and with the same towers as an open_clip model."""
    folder = tmp_path_factory.mktemp("demo")
    copy_demo_photos(folder / "photos")
    with PhotoLibrary.open(folder / "library") as library:
        library.index(folder / "photos", workers=0)
        library.reindex(f"open_clip:{folders[0]}", workers=0)
        yield library


@pytest.mark.parametrize("query", demo_manifest()["queries"], ids=lambda query: query["text"])
def test_the_demos_queries_put_the_right_photo_first(demo, query):
    hits = demo.search(query["text"])
    assert Path(hits[0].path).name == query["expect"] and hits[0].model.startswith("open_clip:")
    assert hits.reranked == 17 and hits[0].probability > 0.4
    first = demo.search(query["text"], rerank=0)
    assert Path(first[0].path).name == query["expect"]


def test_photos_describe_and_explain_themselves(demo):
    photo = demo.status()["roots"][0] + "/cat.png"
    assert demo.describe(photo, candidates=["a cat", "a rocket", "a flower"])[0].text == "a cat"
    assert demo.search("a cat")[0].explain("cat").size == demo.picture(demo.photo_id(photo)).size
    assert Path(demo.search(image=photo)[0].path).name == "cat.png"


def test_both_models_are_compared_over_the_library(demo, folders, tmp_path):
    photos = demo.status()["roots"][0]
    lines = [f"{query['text']}\t{photos}/{query['expect']}" for query in demo_manifest()["queries"]]
    (tmp_path / "queries.tsv").write_text("\n".join(lines), encoding="utf-8")
    found = demo.compare_models("blip-mini", f"open_clip:{folders[0]}", tmp_path / "queries.tsv", k=5).summary()
    assert found["recall"][0]["r1"] == found["recall"][1]["r1"] == 100 and found["overlap"] > 0.4


def test_a_model_of_many_languages_leaves_matching_to_english(demo, folders):
    active = demo.catalog.active_model().name
    demo.reindex(f"open_clip:{folders[1]}", workers=0)
    try:
        assert demo.search("zwei Hunde im Schnee").reranked == 0
        assert demo.search("two dogs in the snow").reranked == 17
    finally:
        demo.use_model(active)
