"""The audit: texts that do not fit their photo come first, with the model's own words beside them."""

import pytest

from indexer.errors import PhotoNotFound
from indexer.jobs import store_caption
from tests.fakes import ColourEncoder


@pytest.fixture
def described(library, photos):
    """Each photo with a caption of the user's; green's is wrong, and so is one tag of blue's."""
    captions = {"red": "a red wall", "green": "a blue lake", "blue": "the blue sky", "yellow": "yellow"}
    for name, words in captions.items():
        library.add_caption(photos / f"{name}.png", words)
    library.tag(photos / "blue.png", ["blue", "red"])
    return library


def said(suspicions):
    return [(one.path.rpartition("/")[2], one.kind, one.text) for one in suspicions]


def test_wrong_captions_and_tags_are_listed_the_most_suspicious_first(described):
    found = described.audit(below=0.5)
    assert sorted(said(found)) == [("blue.png", "tag", "red"), ("green.png", "caption", "a blue lake")]
    assert [one.probability for one in found] == sorted(one.probability for one in found)
    assert all(0 <= one.probability < 0.5 and one.suggestion is None for one in found)
    everything = described.audit(below=1.01)
    assert len(everything) == 6 and said(everything)[:2] == said(found)


def test_a_models_caption_that_fits_better_is_suggested(described, photos):
    described.caption(str(photos / "green.png"))
    with described.catalog.transaction() as connection:
        store_caption(connection, described.photo_id(photos / "green.png"), "a red herring", "worse", 0.1)
    green = next(one for one in described.audit(below=0.5) if one.kind == "caption")
    assert green.suggestion == "a green picture" and green.suggestion_probability > 0.5 > green.probability
    assert green.as_dict()["suggestion"] == "a green picture"


def test_generated_words_are_not_audited_themselves(library, photos):
    with library.catalog.transaction() as connection:
        store_caption(connection, library.photo_id(photos / "red.png"), "a blue lake", "colours", 0.9)
    library.add_caption(photos / "green.png", "green")
    assert library.audit(below=0.5) == []


def test_only_the_photos_asked_for_are_read_and_photos_that_are_gone_are_left_out(described, photos):
    assert described.audit([photos / "red.png"], below=0.5) == []
    steps = []
    (photos / "green.png").unlink()
    described.index(photos, workers=0)
    assert said(described.audit(below=0.5, progress=steps.append)) == [("blue.png", "tag", "red")]
    assert (steps[-1].done, steps[-1].total, steps[-1].failed) == (3, 3, 0)
    with pytest.raises(PhotoNotFound):
        described.audit([999])


def test_a_photo_that_cannot_be_read_is_counted_and_stops_nothing(described, photos):
    described.patches().clear()
    described.thumbnail(described.photo_id(photos / "red.png")).unlink()
    (photos / "red.png").write_bytes(b"broken")
    steps = []
    assert len(described.audit(below=0.5, progress=steps.append)) == 2 and steps[-1].failed == 1


def test_nothing_written_is_nothing_to_audit(library):
    assert library.audit() == []


def test_all_texts_of_a_photo_are_read_at_once(described, photos, monkeypatch):
    calls = []
    plain = ColourEncoder.match_tokens

    def counted(self, tokens, texts, pairs):
        calls.append(len(pairs))
        return plain(self, tokens, texts, pairs)

    monkeypatch.setattr(ColourEncoder, "match_tokens", counted)
    described.audit()
    assert calls == [6]
