"""Leaving out: words beside the photos, hand-made scores, and what is read in how much time."""

from types import SimpleNamespace

import numpy as np
import pytest

from blipcore.calibration import Scoring, sigmoid
from indexer import exclusion
from indexer.exclusion import Exclusion, any_of, none_shown
from indexer.kinds import names
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS

IDS = np.arange(1, 7)


class Stage:
    """A searcher of photos 1 to 6 with margins {text: [one a photo]} and standings {text: [one a photo]}."""

    def __init__(self, margins, standings=None, readable=IDS):
        self.encoder = SimpleNamespace(can_match=True, scoring=Scoring())
        self.margins, self.standings, self.readable = margins, standings or {}, set(readable.tolist())
        self.reranker = SimpleNamespace(score=self.score)
        self.asked = []

    def score(self, text, ids, budget=None):
        self.asked.append((text, list(ids), budget))
        return {i: self.margins[text][i - 1] for i in ids if i in self.readable}

    def text_vectors(self, lines):
        return list(lines)

    def cosines(self, ids, vector):
        return np.zeros(len(ids))

    def crowding(self, ids):
        return np.zeros(len(ids))

    def standing(self, ids, vector):
        return np.array([self.standings.get(vector, np.zeros(6))[i - 1] for i in ids])


# -- what the evidence amounts to -----------------------------------------------------------------------------


def test_one_of_several_things_is_there_unless_all_are_missing():
    assert any_of([0.0, 0.0]) == pytest.approx(np.log(3)) and any_of([-2.5]) == pytest.approx(-2.5)
    assert any_of([-9.0, -9.0]) == pytest.approx(-9 + np.log(2), abs=1e-3) and any_of([800.0]) == 800
    assert none_shown(np.array([0.0, 0.0])) == pytest.approx(0.25)


def test_a_general_word_has_names_and_others_are_themselves():
    people = names("any people")
    assert people.read == ("any people", "man", "woman", "child") and {"girl", "surfer", "person"} < set(people.beside)
    assert names("dogs").read == ("dogs", "dog") and names("the dog").read == ("the dog",)
    assert names("a red car") == (("a red car",), ("a red car",))


def test_a_kind_is_shown_where_any_of_its_names_is():
    low = [-9.0] * 6
    stage = Stage({"people": low, "man": [3, *low[1:]], "woman": low, "child": [-9, 3, *low[2:]]})
    assert Exclusion(["people"], stage).judge(IDS, 4).rows.tolist() == [2, 3, 4, 5]


# -- what is read ---------------------------------------------------------------------------------------------


def test_photos_are_read_until_as_many_as_wanted_stay():
    stage = Stage({"mud": [2, -1, 2, -1, -1, -1]})
    judged = Exclusion(["mud"], stage).judge(IDS, 2)
    assert [ids for _, ids, _ in stage.asked] == [[1, 2], [3], [4]]
    assert sorted(judged.log_odds) == [1, 2, 3, 4] and judged.rows.tolist() == [1, 3, 4, 5]


def test_vectors_judge_what_was_not_read_or_cannot_be():
    stage = Stage({"mud": [2, -1, 0, 0, 0, 0]}, {"mud": np.array([0, 0, 2, 0, 2, 0])}, readable=IDS[[0, 1, 3]])
    judged = Exclusion(["mud"], stage).judge(IDS[:4], 2)
    assert judged.rows.tolist() == [1] and sorted(judged.log_odds) == [1, 2, 4]
    stage.encoder.can_match = False
    assert Exclusion(["mud"], stage).judge(IDS, 2).rows.tolist() == [0, 1, 3, 5]


def test_the_time_is_shared_by_the_texts_and_none_of_it_begins_another_round(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(exclusion.time, "monotonic", lambda: clock.now)
    stage = Stage({"mud": [2] * 6, "rain": [2] * 6})
    Exclusion(["mud", "rain"], stage).judge(IDS[:2], 1, 8.0)
    assert [budget for *_, budget in stage.asked] == [4, 8, 4, 8]  # one photo goes, so another is read
    stage.asked.clear()

    def slow(text, ids, budget=None, score=stage.score):
        clock.now += 5
        return score(text, ids, budget)

    stage.reranker.score = slow
    Exclusion(["mud", "rain"], stage).judge(IDS, 1, 8.0)
    assert [budget for *_, budget in stage.asked] == [4, 3]


# -- through the library --------------------------------------------------------------------------------------


def named(hits):
    return [hit.path.rsplit("/", 1)[-1].removesuffix(".png") for hit in hits]


@pytest.fixture
def ids(library, photos):
    return {name: library.photo_id(str(photos / f"{name}.png")) for name in COLOURS}


def score_by_hand(library, monkeypatch, ids, margins):
    """Let the matching model say {text: {name: margin}}."""

    def score(text, photo_ids, budget=None):
        return {ids[name]: margin for name, margin in margins[text].items() if ids[name] in photo_ids}

    monkeypatch.setattr(library.searcher().reranker, "score", score)


def test_what_is_less_likely_shown_comes_first_and_the_probability_is_of_both(library, monkeypatch, ids):
    sought, left_out = (3.0, 3.2, 3.1, 4.0), (-3.0, -1.0, -2.0, 1.0)
    scores = {"mud": dict(zip(COLOURS, left_out, strict=True)), "a lake": dict(zip(COLOURS, sought, strict=True))}
    score_by_hand(library, monkeypatch, ids, scores)
    hits = library.search("a lake", without=["mud"])
    assert named(hits) == ["red", "blue", "green"]  # yellow shows it
    own = [sigmoid(x) * (1 - sigmoid(y)) for x, y in ((3, -3), (3.1, -2), (3.2, -1))]
    assert [hit.probability for hit in hits] == pytest.approx(own)
    assert [hit.likely for hit in hits] == [True, True, True] and hits.reranked == 3
    scores["mud"]["red"] = -0.01
    assert [hit.likely for hit in library.search("a lake", without=["mud"])] == [True, True, False]


@pytest.mark.parametrize("how", ["caption", "tag", "title"])
def test_words_beside_a_photo_leave_it_out(library, ids, how):
    add = {
        "caption": lambda: library.add_caption(ids["blue"], "A girl with her two Puppies"),
        "tag": lambda: library.tag(ids["blue"], ["girls", "puppy"]),
        "title": lambda: library.set_title(ids["blue"], "puppy girl"),
    }
    add[how]()
    for phrase in ("girls", "people", "dogs", "animals", "a puppy"):
        for options in ({}, {"rerank": 0}):
            assert sorted(named(library.search("photo", without=[phrase], **options))) == ["green", "red", "yellow"]
    for phrase in ("a boy", "cats", "a red girl"):
        assert "blue" in named(library.search("photo", without=[phrase]))


def test_a_model_that_cannot_match_leaves_out_by_its_vectors(open_library, photos):
    encoder = ColourEncoder()
    library = open_library("other", encoder)
    library.index(photos, workers=0)
    encoder.can_match = False
    for folder in ("blue", "red"):
        hits = library.search("photo", without=[folder])
        assert len(hits) == 3 and folder not in named(hits)


def test_the_first_stage_prefers_what_is_unlike_the_phrase(library):
    first = next(library.search_progressively("yellow", without=["green"], top_k=4))
    assert first.reranked == 0 and "green" not in named(first)
    assert named(first).index("red") < named(first).index("blue")
