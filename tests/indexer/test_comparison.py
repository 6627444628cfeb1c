"""How alike two rankings are."""

import pytest

from indexer.comparison import overlap, rbo


def test_overlap_counts_common_photos_among_the_first():
    assert overlap([1, 2, 3, 4], [4, 3, 9, 8], 2) == 0
    assert overlap([1, 2, 3, 4], [4, 3, 9, 8], 4) == 0.5
    assert overlap([1, 2], [2, 1, 3], 3) == pytest.approx(2 / 3)
    assert overlap([], [], 5) == 1 and overlap([], [1], 5) == 0


def test_rank_biased_overlap_is_that_of_the_paper():
    """Equation 30 of Webber et al. by hand, p = 0.9, depth 3: agreements 1/1, 1/2, 3/3."""
    expected = 3 / 3 * 0.9**3 + 0.1 / 0.9 * (1 * 0.9 + 1 / 2 * 0.9**2 + 3 / 3 * 0.9**3)
    assert rbo([1, 2, 3], [1, 3, 2], 0.9) == pytest.approx(expected)


def test_rank_biased_overlap_weighs_the_top_more():
    assert rbo([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1)
    assert rbo([1, 2, 3, 4], [5, 6, 7, 8]) == 0
    assert rbo([1, 2, 3, 4], [1, 2, 4, 3]) > rbo([1, 2, 3, 4], [2, 1, 3, 4])
    assert rbo([], []) == 1 and rbo([], [1]) == 0
