"""Kill -9 at random moments: nothing committed is lost, nothing is done twice, the end is the same."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sqlalchemy import select

from indexer import PhotoLibrary
from indexer.schema import Embedding, Failure, File, Photo
from tests.fakes import ColourEncoder
from tests.indexer.conftest import paint

PHOTOS = 150
PROGRAM = """
import sys, time
from indexer import PhotoLibrary
from tests.fakes import ColourEncoder

class Slow(ColourEncoder):
    def image_tokens(self, pixels):
        print("at work", flush=True)
        time.sleep(0.05)
        return super().image_tokens(pixels)

library = PhotoLibrary.open(sys.argv[1], load_encoder=lambda name: Slow())
library.index(sys.argv[2], workers=1, batch_size=4)
"""


def contents(library):
    """What must be the same: photos, files, vectors, failures, and what a search answers."""
    rows = library.catalog.rows
    photos = rows(select(Photo.id, Photo.content_hash, Photo.width, Photo.height).order_by(Photo.id))
    files = rows(select(File.photo_id, File.path, File.size, File.missing_since).order_by(File.path))
    vectors = rows(select(Embedding.photo_id, Embedding.vector).order_by(Embedding.photo_id))
    failures = rows(select(Failure.path, Failure.reason).order_by(Failure.path))
    hits = [(hit.photo_id, hit.itc) for hit in library.search("red", rerank=0, top_k=PHOTOS)]
    return [tuple(row) for part in (photos, files, vectors, failures) for row in part], hits


@pytest.fixture
def many(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        paint(tmp_path / "many" / f"{number:03}.png", tuple(rng.integers(0, 255, 3).tolist()), (20 + number, 30))
    (tmp_path / "many" / "050-broken.jpg").write_text("no image")
    return tmp_path / "many"


def run(library, folder, batches=None, delay=0.0):
    """Index in a process of its own, to the end or until it is killed, some seconds after it began its n-th batch."""
    command = [sys.executable, "-c", PROGRAM, str(library), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        if batches is None:
            process.communicate(timeout=120)
            assert process.returncode == 0
            return
        for _ in range(batches):
            process.stdout.readline()  # empty once there is nothing left to do
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)


def test_ten_kills_end_where_an_undisturbed_run_ends(many, tmp_path):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    run(tmp_path / "calm", many)
    committed = []
    for _ in range(10):
        run(tmp_path / "killed", many, moments.randint(1, 8), moments.uniform(0, 0.1))
        with PhotoLibrary.open(tmp_path / "killed", load_encoder=lambda name: ColourEncoder()) as library:
            committed.append(library.status()["photos"])
            assert library.verify() == []
    assert committed == sorted(committed), "a kill lost committed photos"
    assert any(0 < count < PHOTOS for count in committed), f"no kill hit the middle: {committed}"
    run(tmp_path / "killed", many)
    ends = []
    for name in ("killed", "calm"):
        with PhotoLibrary.open(tmp_path / name, load_encoder=lambda name: ColourEncoder()) as library:
            ends.append(contents(library))
    assert ends[0] == ends[1]
    assert len(ends[1][1]) == PHOTOS


def test_a_killed_job_shows_as_interrupted(many, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "library"), str(many)])
    library = PhotoLibrary.open(tmp_path / "library", load_encoder=lambda name: ColourEncoder())
    while process.poll() is None and library.status()["photos"] < 8:
        time.sleep(0.02)
    assert library.catalog.latest_job()["state"] == "running"
    process.kill()
    process.wait()
    job = library.catalog.latest_job()
    assert job["state"] == "interrupted" and job["done"] >= 8
    library.close()
