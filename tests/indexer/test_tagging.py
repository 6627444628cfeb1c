"""Zero-shot tags: what the matching model believes of the list of things, kept, resumable, beside the user's own."""

import pytest
from sqlalchemy import select

from indexer import tagging
from indexer.errors import ModelError, PhotoNotFound
from indexer.schema import Job, Photo, Tag, fold
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS, paint

LIST = ("red wall", "green meadow", "blue sky", "yellow flower", "red fox", "red", "snow")


@pytest.fixture(autouse=True)
def short_list(monkeypatch):
    monkeypatch.setattr(tagging, "all_things", lambda: LIST)


def generated(library, photo):
    return {tag["name"]: tag["probability"] for tag in library.photo(photo)["tags"] if tag["source"] == "generated"}


def test_photos_are_tagged_with_what_they_show_and_how_sure_the_model_is(library, photos):
    report = library.tag_things(library.untagged())
    red = str(photos / "red.png")
    assert set(generated(library, red)) == {"red wall", "red fox", "red"}
    assert set(generated(library, str(photos / "blue.png"))) == {"blue sky"}
    assert all(tagging.THRESHOLD <= probability <= 1 for probability in generated(library, red).values())
    tag = library.photo(red)["tags"][0]
    assert (tag["source"], tag["model"]) == ("generated", "colours")
    assert report.failed == [] and len(report.tags) == 4
    assert dict(report.tags[library.photo_id(red)]) == generated(library, red)
    assert {row["name"]: row["generated"] for row in library.tags()}["red fox"] == 1


def test_the_threshold_and_the_limit_hold(library, photos):
    red = str(photos / "red.png")
    library.tag_things(red, limit=1)
    assert len(generated(library, red)) == 1
    library.tag_things(red, threshold=0.999)
    assert generated(library, red) == {}


def test_tagging_again_replaces_the_models_tags_and_keeps_the_users(library, photos):
    red = str(photos / "red.png")
    library.tag(red, ["red fox", "mine"])
    library.tag_things(red)
    library.tag_things(red, limit=2)
    tags = [(tag["name"], tag["source"]) for tag in library.photo(red)["tags"]]
    assert tags[:2] == [("mine", "user"), ("red fox", "user")] and len(tags) == 4


def test_photos_that_show_nothing_of_the_list_are_not_read_again(library, photos):
    paint(photos / "black.png", (5, 5, 5))
    library.index(photos, workers=0)
    library.tag_things(library.untagged())
    assert generated(library, str(photos / "black.png")) == {} and library.untagged() == []
    paint(photos / "new.png", COLOURS["red"], (40, 40))
    library.index(photos, workers=0)
    assert library.untagged() == [library.photo_id(photos / "new.png")]


def test_another_list_or_other_weights_make_photos_untagged(library, photos, monkeypatch, open_library):
    library.tag_things(library.untagged())
    monkeypatch.setattr(tagging, "all_things", lambda: (*LIST, "lava"))
    assert len(library.untagged()) == 4
    monkeypatch.setattr(tagging, "all_things", lambda: LIST)
    assert library.untagged() == []
    other = open_library(encoder=ColourEncoder("other", "0ther" * 3))
    other.reindex("other", workers=0)
    assert len(other.untagged()) == 4


def test_an_interrupted_job_keeps_what_was_tagged_and_goes_on(library, photos, monkeypatch):
    monkeypatch.setattr(tagging, "BATCH", 1)

    def stop(step):
        if step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.tag_things(library.untagged(), progress=stop)
    job = library.catalog.rows(select(Job.kind, Job.state, Job.done, Job.total).order_by(Job.id.desc()))[0]
    assert tuple(job) == ("tag", "interrupted", 2, 4)
    assert len(library.untagged()) == 2
    steps = []
    library.tag_things(library.untagged(), progress=steps.append)
    assert library.untagged() == [] and steps[-1].done == steps[-1].total == 2


def test_a_photo_that_cannot_be_read_is_reported_and_stops_nothing(library, photos):
    red = library.photo_id(photos / "red.png")
    library.patches().clear()
    library.thumbnail(red).unlink()
    (photos / "red.png").write_bytes(b"broken")
    report = library.tag_things(library.untagged())
    assert report.failed == [red] and len(report.tags) == 3 and library.untagged() == [red]


def test_an_unknown_photo_or_a_model_that_cannot_match_is_an_error(library, open_library):
    with pytest.raises(PhotoNotFound):
        library.tag_things([999])
    blind = ColourEncoder()
    blind.can_match = False
    with pytest.raises(ModelError, match="cannot match"):
        open_library(encoder=blind).untagged()


def test_every_vector_of_a_photo_counts(library):
    vectors = library.encoder().embed_texts(["red", "blue"])
    looked = tagging.Looked([1], None, vectors[None])
    assert looked.cosines(vectors)[0].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_a_picture_is_described_by_things_without_being_tagged(library, photos):
    found = library.describe(photos / "red.png", things=True, top_k=3)
    assert {result.text for result in found} == {"red wall", "red fox", "red"} and found[0].rank == 1
    assert all(result.probability > 0.5 and result.photo_id is None for result in found)
    assert len(library.untagged()) == 4


# -- the list -----------------------------------------------------------------------------------------------


def test_the_list_of_things_is_sound(monkeypatch):
    monkeypatch.undo()
    names = tagging.all_things()
    assert 600 <= len(names) <= 1300 and len({fold(name) for name in names}) == len(names)
    assert all(name == " ".join(name.split()) and name.isascii() and len(name) <= 40 for name in names)
    assert {"dog", "bicycle", "sunset", "birthday cake", "swimming"} <= set(names)
    assert min(len(group) for group in tagging.things().values()) >= 20


def test_the_mark_of_a_tagged_photo_names_weights_and_list(library, photos):
    library.tag_things(str(photos / "red.png"))
    marks = library.catalog.rows(select(Photo.tagged_with).where(Photo.tagged_with.is_not(None)))
    assert [row.tagged_with for row in marks] == [tagging.tagged_with(library.encoder())]
    assert len(library.catalog.rows(select(Tag.id))) == 3
