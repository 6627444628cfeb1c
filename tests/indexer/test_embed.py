"""Stages that overlap: nothing is lost, nothing changes places, and each says how busy it was."""

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest

from indexer.embed import StageTimes, behind, embed_batches
from indexer.errors import UnreadablePhoto
from indexer.images import DecodedPhoto


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
    times.lanes = 3  # together they were busy for 9 of 30 seconds
    assert times.bottleneck() == "decode"


def test_a_run_without_photos_has_no_rates():
    assert [row["photos_per_second"] for row in StageTimes().rows()] == [None, None, None]


# -- embedding ------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """As blipcore.lanes.Lanes."""

    count: int
    pool: Executor


class Numbers:
    """An encoder whose vectors are the photos' own numbers; the later ones are ready first."""

    def __init__(self, lanes: int = 0):
        self.parts = []
        if lanes:
            self.lanes = lambda: self._lanes(lanes)

    @contextmanager
    def _lanes(self, count):
        with ThreadPoolExecutor(count) as pool:
            yield Side(count, pool)

    def image_tokens(self, pixels):
        self.parts.append(pixels[:, 0, 0, 0].tolist())
        time.sleep(0.02 if pixels[0, 0, 0, 0] % 8 == 0 else 0)
        return pixels

    def embed_tokens(self, tokens):
        return tokens[:, 0, 0, :2].astype(np.float32)

    def pack_tokens(self, tokens, form):
        return [f"{form} {number}".encode() for number in tokens[:, 0, 0, 0]]


def photo(number):
    pixels = np.full((2, 2, 3), number, np.uint8)
    return DecodedPhoto(content_hash=str(number), info=None, pixels=pixels, phash=0, bytes=1, seconds=0.5)


def decoded(count, broken=()):
    for number in range(count):
        yield number, UnreadablePhoto("truncated", "cut") if number in broken else photo(number)


@pytest.mark.parametrize("lanes", [0, 1, 2, 5])
def test_batches_come_in_order_with_failures_in_their_place(lanes):
    times, encoder = StageTimes(), Numbers(lanes)
    batches = list(embed_batches(decoded(50, broken={3, 20}), encoder, lambda: "int8", 16, times))
    assert [len(batch.files) + len(batch.failures) for batch in batches] == [16, 16, 16, 2]
    assert [file for batch in batches for file in batch.files] == [n for n in range(50) if n not in {3, 20}]
    assert [[file for file, _ in batch.failures] for batch in batches] == [[3], [20], [], []]
    for batch in batches:
        assert batch.vectors.dtype == np.float16 and batch.vectors[:, 0].tolist() == batch.files
        assert batch.records == [f"int8 {number}".encode() for number in batch.files]
        assert [each.content_hash for each in batch.photos] == list(map(str, batch.files))
    assert times.photos == 48 and times.decode == 24 and times.embed > 0 and times.lanes == max(1, lanes)


def test_a_group_is_shared_by_the_lanes_in_parts_worth_it():
    encoder = Numbers(lanes=3)
    list(embed_batches(decoded(12), encoder, lambda: None, 12))
    assert sorted(encoder.parts) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    encoder = Numbers(lanes=8)
    list(embed_batches(decoded(12), encoder, lambda: None, 12))
    assert max(map(len, encoder.parts)) == 4


def test_a_group_of_failures_alone_is_a_batch_too():
    (batch,) = embed_batches(decoded(3, broken={0, 1, 2}), Numbers(2), lambda: "int8", 16)
    assert batch.files == [] and len(batch.failures) == 3 and batch.vectors.shape[0] == 0 and batch.records == []


def test_tokens_are_packed_as_long_as_they_are_wanted():
    forms = iter(["int8", "int8"])
    batches = embed_batches(decoded(12), Numbers(), lambda: next(forms, None), 4)
    assert [len(batch.records) for batch in batches] == [4, 4, 0]


def test_an_error_of_the_model_is_raised_and_nothing_goes_on():
    encoder = Numbers(2)
    encoder.embed_tokens = lambda tokens: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(embed_batches(decoded(200), encoder, lambda: None, 8))
    assert len(encoder.parts) < 10


def test_a_consumer_that_leaves_ends_the_lanes():
    before, encoder = threading.active_count(), Numbers(2)
    batches = embed_batches(decoded(400), encoder, lambda: None, 8)
    next(batches)
    batches.close()
    assert threading.active_count() == before and len(encoder.parts) < 20
