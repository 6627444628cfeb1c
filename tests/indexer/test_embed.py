"""Stages that overlap: nothing is lost, nothing changes places, and each says how busy it was."""

import threading

import pytest

from indexer.embed import StageTimes, behind


def test_work_is_done_in_order_behind():
    done, caller = [], threading.get_ident()
    with behind(lambda item: done.append((item, threading.get_ident()))) as hand_over:
        for item in range(50):
            hand_over(item)
    assert [item for item, _ in done] == list(range(50))
    assert caller not in {thread for _, thread in done}


def test_an_error_behind_is_raised():
    done = []

    def work(item):
        if item == 3:
            raise ValueError("the disk is full")
        done.append(item)

    with pytest.raises(ValueError, match="full"), behind(work) as hand_over:
        for item in range(50):
            hand_over(item)
    assert done[:3] == [0, 1, 2] and len(done) < 10


def test_what_was_handed_over_is_done_when_the_caller_is_stopped():
    done, go_on = [], threading.Event()

    def work(item):
        go_on.wait(5)
        done.append(item)

    with pytest.raises(KeyboardInterrupt), behind(work) as hand_over:
        hand_over(1)
        hand_over(2)
        go_on.set()
        raise KeyboardInterrupt
    assert done == [1, 2]


def test_the_bottleneck_is_the_stage_that_was_busiest():
    times = StageTimes(workers=2, photos=100, decode=12.0, embed=9.0, store=1.0, seconds=10.0)
    shares = {row["stage"]: row["share"] for row in times.rows()}
    assert shares == {"decode": 0.6, "embed": 0.9, "store": 0.1}
    assert times.bottleneck() == "embed"
    assert {row["stage"]: row["photos_per_second"] for row in times.rows()}["decode"] == pytest.approx(16.7)


def test_a_run_without_photos_has_no_rates():
    assert [row["photos_per_second"] for row in StageTimes().rows()] == [None, None, None]
