"""Two ranked lists become one, by ranks alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.full_text import NOTHING, TextHits
from indexer.fusion import RRF_K, fuse, tied_ranks


def hits(*pairs):
    ids, strengths = zip(*pairs, strict=True) if pairs else ((), ())
    return TextHits(np.array(ids, np.int64), np.array(strengths, np.float32))


def test_a_photo_that_both_lists_hold_comes_before_the_first_of_either():
    found = fuse(np.array([5, 3, 9]), hits((7, 1), (3, 1)))
    assert found.ids.tolist() == [3, 5, 7, 9]
    assert found.itc_ranks.tolist() == [2, 1, 0, 3] and found.text_ranks.tolist() == [1, 0, 1, 0]


def test_the_score_is_cormacks_with_the_texts_weighed_by_their_strength():
    found = fuse(np.array([5, 3, 9, 4]), hits((7, 0.9), (8, 0.2)))
    score = {5: 1 / 61, 7: 0.9 / 61, 3: 1 / 62, 9: 1 / 63, 4: 1 / 64, 8: 0.2 / 62}
    assert found.ids.tolist() == sorted(score, key=lambda photo: -score[photo]) and RRF_K == 60


def test_one_list_alone_keeps_its_order():
    assert fuse(np.array([5, 3]), NOTHING).ids.tolist() == [5, 3]
    assert fuse(np.zeros(0, np.int64), hits((7, 0.5), (1, 0.2))).ids.tolist() == [7, 1]
    assert len(fuse(np.zeros(0, np.int64), NOTHING)) == 0


def test_texts_that_say_as_much_share_a_rank_and_the_vectors_decide():
    assert tied_ranks(np.array([4.0, 3.0, 3.0, 1.0])).tolist() == [1, 2, 2, 4]
    found = fuse(np.array([2, 1]), hits((1, 0.5), (2, 0.5)))
    assert found.ids.tolist() == [2, 1] and found.text_ranks.tolist() == [1, 1]


def test_what_models_wrote_brings_photos_in_and_moves_none_that_were_found():
    vectors, texts = np.arange(1, 101), hits((200, 0.9), (3, 0.4))
    without = fuse(vectors, texts).ids.tolist()
    many = hits((100, 1.7), (200, 1.7), *((photo, 1.7) for photo in range(300, 400)))
    found = fuse(vectors, texts, many)
    ids = found.ids.tolist()
    assert [photo for photo in ids if photo < 300] == without
    assert [photo for photo in ids if photo >= 300] == list(range(300, 400))
    assert ids.index(300) > 60 and sum(photo >= 300 for photo in ids[:100]) < 20
    at = ids.index(100)
    assert found.written[at] == pytest.approx(1.7) and found.strengths[at] == 0 and found.itc_ranks[at] == 100
    ranks = {photo: found.text_ranks[ids.index(photo)] for photo in (200, 3, 100, 300, 50)}
    assert ranks == {200: 1, 3: 2, 100: 3, 300: 5, 50: 0}


def test_without_vectors_models_words_come_behind_peoples():
    found = fuse(np.zeros(0, np.int64), hits((7, 0.2)), hits((8, 1.5), (7, 1.0), (9, 0.9)))
    assert found.ids.tolist() == [7, 8, 9] and found.text_ranks.tolist() == [1, 2, 4]


LISTS = st.lists(st.integers(1, 40), unique=True, max_size=20)


@given(LISTS, LISTS)
def test_every_photo_is_there_once_with_its_ranks(itc, texts):
    strengths = np.linspace(1, 0.1, len(texts))
    found = fuse(np.array(itc, np.int64), hits(*zip(texts, strengths, strict=True)))
    assert sorted(found.ids.tolist()) == sorted(set(itc) | set(texts))
    for photo_id, itc_rank, text_rank in zip(found.ids, found.itc_ranks, found.text_ranks, strict=True):
        assert itc_rank == (itc.index(photo_id) + 1 if photo_id in itc else 0)
        assert text_rank == (texts.index(photo_id) + 1 if photo_id in texts else 0)
