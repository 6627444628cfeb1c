"""What a search makes of a query: both lists, examples, exclusion, the cut, and results in two steps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import delete

from blipcore.calibration import Scoring
from indexer.errors import QueryError
from indexer.jobs import store_caption
from indexer.schema import Caption
from indexer.search import SearchResults
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS, paint


def names(hits):
    return [Path(hit.path).stem for hit in hits]


def photo_id(library, photos, name):
    return library.photo_id(str(photos / f"{name}.png"))


# -- words beside the photos ----------------------------------------------------------------------------------


def test_a_word_in_a_caption_is_found_where_the_embedding_misses_it(library, photos):
    library.add_caption(photo_id(library, photos, "blue"), "our zeppelin over the lake")
    hit = library.search("zeppelin")[0]
    assert names([hit]) == ["blue"] and hit.text_rank == 1 and hit.likely
    assert library.search("zeppelin", rerank=0)[0].text_rank == 1


def test_what_a_model_wrote_is_found_and_says_less_than_what_people_wrote(library, photos):
    def wrote(model, score):
        with library.catalog.transaction() as connection:
            connection.execute(delete(Caption))
            store_caption(connection, photo_id(library, photos, "blue"), "a red zeppelin", model, score)

    def found(line, **options):
        return {names([hit])[0]: hit for hit in library.search(line, **options)}

    order = names(library.search("red zeppelin", rerank=0))
    wrote("captioner", 0.9)
    assert names(library.search("red zeppelin", rerank=0)) == order, "a model's words move nothing that vectors found"
    by_model, worth = found("red zeppelin"), library.searcher().encoder.scoring
    assert by_model["blue"].text_rank == 2 and not by_model["blue"].likely, "after the file that is called red"
    wrote(None, None)
    by_people = found("red zeppelin")
    assert by_people["blue"].likely and by_people["blue"].probability > by_model["blue"].probability
    assert names(library.search("red zeppelin", rerank=0))[0] == "blue" != order[0]
    assert worth.text_weight > worth.written_weight > 0


def test_a_photo_that_only_its_words_find_has_its_cosine_too(library, photos):
    library.add_caption(photo_id(library, photos, "blue"), "zeppelin")
    hit = next(hit for hit in library.search("red zeppelin", top_k=1, rerank=1) + library.search("zeppelin") if hit)
    assert -1 <= hit.itc <= 1
    found = {names([hit])[0]: hit for hit in library.search("zeppelin", rerank=0, top_k=4)}
    expected = (
        library.searcher().encoder.embed_texts(["zeppelin"])
        @ library.searcher().encoder.embed_images([Image.new("RGB", (60, 40), COLOURS["blue"])]).T
    )
    assert found["blue"].itc == pytest.approx(float(expected[0, 0]), abs=2e-3)


def test_each_hit_says_which_list_it_came_from(library):
    hits = {names([hit])[0]: hit for hit in library.search("red")}
    assert (hits["red"].itc_rank, hits["red"].text_rank) == (1, 1)
    assert hits["green"].text_rank is None and hits["green"].itc_rank in {2, 3, 4}


def test_quoted_words_must_stand_there_and_are_then_what_was_meant(library, photos):
    library.add_caption(photo_id(library, photos, "blue"), "the Golden Gate at dawn")
    library.add_caption(photo_id(library, photos, "red"), "a golden retriever at the gate")
    hits = library.search('"golden gate"')
    assert names(hits) == ["blue"] and hits[0].likely and hits.cut == 1
    assert names(library.search('"golden gate" at dusk')) == ["blue"]
    assert "blue" not in names(library.search('dawn -"golden gate"'))
    assert library.search('"gate golden"') == []


# -- one query ------------------------------------------------------------------------------------------------


def test_filters_stand_in_the_box_and_beside_it(library, photos):
    paint(photos / "big.png", COLOURS["red"], (300, 200))
    library.index(photos, workers=0)
    assert names(library.search("blue width=300")) == names(library.search("blue", where="width=300")) == ["big"]
    assert library.search("blue width=300", where={"width": 60}) == []


def test_a_filter_does_not_find_a_photo_that_is_gone(library, photos):
    (photos / "red.png").unlink()
    library.index(photos, workers=0)
    assert sorted(names(library.search("red", where="width=60"))) == ["blue", "green", "yellow"]
    assert library.search("red", where={"id": 10_000}) == []


def test_a_filter_alone_lists_the_newest_photos_that_pass(library, photos):
    paint(photos / "big.png", COLOURS["red"], (300, 200))
    library.index(photos, workers=0)
    hits = library.search("width=60", top_k=3)
    assert len(hits) == 3 and "big" not in names(hits) and hits.cut is None
    assert [hit.photo_id for hit in hits] == sorted((hit.photo_id for hit in hits), reverse=True)
    assert {(hit.itc, hit.itm, hit.probability, hit.likely) for hit in hits} == {(None, None, None, None)}
    assert names(library.search(where="width=300")) == ["big"] and library.search("year=1999") == []


def test_an_error_points_at_the_place_before_anything_is_loaded(open_library):
    with pytest.raises(QueryError, match="position 11: dogs year=>>>soon"):
        open_library().search("dogs year=soon")


def test_photos_of_the_library_are_examples_and_not_results(library, photos):
    red = photo_id(library, photos, "red")
    assert names(library.search(f"photo:{red}"))[0] == names(library.similar(red))[0]
    assert "red" not in names(library.search(image=red)) and len(library.search(image=red)) == 3
    with pytest.raises(QueryError, match="no photo 99"):
        library.search("photo:99")


def test_weights_decide_between_words(library):
    first = {box: names(library.search(box, rerank=0))[0] for box in ("9:green + red", "green + 9:red")}
    assert first == {"9:green + red": "green", "green + 9:red": "red"}


def test_less_of_something_moves_away_from_it(library):
    assert names(library.search("yellow - 0.9:red", rerank=0)).index("green") < names(
        library.search("yellow - 0.9:green", rerank=0)
    ).index("green")


def test_several_examples_search_together(library, photos, tmp_path):
    query = tmp_path / "query.jpg"
    Image.new("RGB", (30, 90), COLOURS["blue"]).save(query)
    assert names(library.search(image=[query, query.read_bytes(), photo_id(library, photos, "green")]))[0] == "blue"


# -- leaving out ----------------------------------------------------------------------------------------------


def test_what_is_left_out_is_not_there(library):
    for box in ("photo, no red", "photo without red", "photo -red", "photo - red"):
        hits = library.search(box)
        assert "red" not in names(hits) and len(hits) == 3, box


def test_leaving_out_works_without_anything_to_look_for_and_without_re_ranking(library):
    assert sorted(names(library.search("width=60 no red"))) == ["blue", "green", "yellow"]
    assert "red" not in names(library.search("photo, no red", rerank=0))


def test_there_are_as_many_results_as_wanted_where_some_are_left_out(library, photos):
    for number in range(6):
        paint(photos / f"red{number}.png", (230, 20, 20 + number))
    library.index(photos, workers=0)
    hits = library.search("red, no red", top_k=3, rerank=3)
    assert len(hits) == 3 and not any(name.startswith("red") for name in names(hits))


# -- the cut, and two steps -----------------------------------------------------------------------------------


def test_likely_results_come_first_and_the_cut_counts_them(library):
    hits = library.search("red")
    assert hits.cut == sum(hit.likely for hit in hits) and all(hit.likely for hit in hits[: hits.cut])
    assert names(library.search("red", likely=True)) == names(hits)[: hits.cut]


def test_where_nothing_fits_nothing_is_likely(library):
    hits = library.search("purple", likely=True)
    assert hits == [] and hits.cut == 0 and hits.reranked == 4
    assert library.search("purple").cut == 0 and len(library.search("purple")) == 4


def test_results_come_at_once_and_again_when_they_are_re_ranked(library):
    first, last = library.search_progressively("red", top_k=3, min_probability=0.5)
    assert isinstance(first, SearchResults) and first.reranked == 0 and first[0].probability is None
    assert last.reranked == 4 and last.seconds >= first.seconds and last[0].probability >= 0.5
    assert [hit.photo_id for hit in last] == [
        hit.photo_id for hit in library.search("red", top_k=3, min_probability=0.5)
    ]


def test_where_there_is_no_second_stage_there_is_one_answer(library):
    for options in ({"rerank": 0}, {"where": "width=60", "text": None}):
        (only,) = library.search_progressively(**({"text": "red"} | options))
        assert len(only) == 4 and only.reranked == 0


def test_a_spent_budget_leaves_the_rest_as_the_first_stage_had_it(library, monkeypatch):
    monkeypatch.setattr("indexer.rerank.CHUNK", 1)
    monkeypatch.setattr("indexer.rerank.FRESH_CHUNK", 1, raising=False)
    hits = library.search("red", budget_ms=0)
    assert hits.reranked == 1 and [hit.probability is None for hit in hits] == [False, True, True, True]


class WritingEncoder(ColourEncoder):
    """Its decoder prefers what is blue, whatever the words, by 10 nats."""

    def __init__(self, weight: float):
        super().__init__()
        self.scoring = Scoring(itc_weight=1.0, scale=0.1, calibrated=True, likelihood_weight=weight)
        self.read = []

    def likelihoods(self, tokens, texts, pairs):
        self.read.append(len(pairs))
        tokens = np.asarray(tokens)[pairs[:, 0], 0]
        return np.where(tokens[:, 2] > tokens[:, 0], -5.0, -15.0)


def test_the_decoder_reorders_the_best_and_is_part_of_their_probability(library, open_library, monkeypatch):
    plain = {hit.photo_id: hit for hit in open_library(encoder=WritingEncoder(0.0)).search("reddish")}
    encoder = WritingEncoder(5.0)
    weighed = open_library(encoder=encoder).search("reddish")
    assert [hit.likelihood for hit in weighed] == [7.5, -2.5, -2.5, -2.5]
    assert encoder.read == [4] and names(plain.values())[0] == "red" and names(weighed)[0] == "blue"
    odds = {hit.photo_id: np.log(hit.probability / (1 - hit.probability)) for hit in weighed}
    before = {photo: np.log(hit.probability / (1 - hit.probability)) for photo, hit in plain.items()}
    gained = np.array([odds[photo] - before[photo] for photo in before])
    assert gained.sum() == pytest.approx(0, abs=1e-3) and sorted(set(gained.round(2).tolist())) == [-1.25, 3.75]
    assert [hit.probability for hit in weighed] == sorted((hit.probability for hit in weighed), reverse=True)
    monkeypatch.setattr("blipcore.calibration.DECODED", 2)
    assert len(open_library(encoder=encoder).search("reddish")) == 4 and encoder.read == [4, 2]
    open_library(encoder=encoder).search("reddish", budget_ms=0)
    assert encoder.read == [4, 2]  # there is no time left


def test_the_background_is_that_of_the_whole_library(library):
    searcher = library.searcher()
    vector = searcher.encoder.embed_texts(["red"])[0]
    mean, spread = searcher.background(vector)
    cosines = searcher.cosines(np.sort(searcher.index.ids()), vector)
    assert mean == pytest.approx(cosines.mean(), abs=1e-3) and spread == pytest.approx(cosines.std(), abs=1e-3)


# -- hubness --------------------------------------------------------------------------------------------------


class Crowded(ColourEncoder):
    """Colours, some of which lie near everything: what is taken from the cosines of their photos, or of their texts."""

    def __init__(self, *crowded: str):
        super().__init__()
        self.scoring = Scoring(itc_weight=50.0, calibrated=True, text_crowding_weight=1.0)
        self.crowded, self.among = self.embed_texts(crowded), []

    def crowding(self, images):
        return 1.2 * (images @ self.crowded.T > 0.999).any(1).astype(np.float32)

    def text_crowding(self, texts, among=None):
        self.among.append(among)
        return self.crowding(texts)


def test_a_photo_that_lies_near_everything_comes_later_with_its_own_cosine(open_library, tmp_path):
    plain, crowded = open_library("plain"), open_library("crowded", Crowded("yellow"))
    for place, name in (("1", "yellow"), ("2", "red"), ("3", "blue")):
        paint(tmp_path / "nameless" / f"{place}.png", COLOURS[name])
    for library in (plain, crowded):
        library.index(tmp_path / "nameless", workers=0)
    first, later = plain.search("something yellow"), crowded.search("something yellow")
    assert names(first) == ["1", "2", "3"] and names(later) == ["2", "1", "3"]
    assert later[1].itc == pytest.approx(first[0].itc, abs=1e-4) and later[1].itc_rank == 1
    assert later[1].probability < first[0].probability
    assert names(crowded.search("something yellow", rerank=0))[0] == "1"  # it is a matter of the second stage


def test_a_text_that_lies_near_everything_says_little_of_a_photo(open_library, photos):
    library = open_library(encoder=Crowded("red"))
    library.index(photos, workers=0)
    found = library.describe(photos / "red.png", candidates=["a red thing", "a yellow thing", "a blue thing"])
    assert found[0].text == "a yellow thing"
    red = {hit.text: hit for hit in found}["a red thing"]
    assert red.itc == pytest.approx(1, abs=1e-3) and red.probability == max(hit.probability for hit in found)


def test_in_a_large_library_its_own_photos_tell_which_texts_do(open_library, photos, monkeypatch):
    encoder = Crowded("red")
    library = open_library(encoder=encoder)
    library.index(photos, workers=0)
    library.describe(photos / "red.png", candidates=["a red thing"])
    monkeypatch.setattr("indexer.search.ENOUGH", 4)
    library.describe(photos / "red.png", candidates=["a red thing"])
    small, large = encoder.among
    assert small is None and large.shape == (4, encoder.dim)
