"""Search beside indexing, in two processes, as a page open beside `photoblip index`: what each leaves to the other.

Both run on all cores. How long OpenMP's threads spin for work decides who gets it: GNU OpenMP's default, what photoblip
sets (`indexer.cli.SPINS`), and no spinning at all.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from indexer.cli import SPINS
from tests.benchmarks import photos
from tests.benchmarks.machine import arguments, machine, publish, table

WAITING = {
    "GNU OpenMP's default": {},
    f"photoblip's, {SPINS} rounds": {"GOMP_SPINCOUNT": SPINS},
    "none (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
}
QUERIES = ("a dog on a beach", "two children playing", "a red car", "a boat")
BATCH, PHOTOS = 16, 100


def searching(library: Path, seconds: float) -> float:
    """-> the median milliseconds of a search whose best 100 are re-ranked."""
    from indexer import PhotoLibrary

    with PhotoLibrary.open(library) as opened:
        for query in QUERIES:
            opened.search(query)
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            opened.search(QUERIES[len(times) % len(QUERIES)])
            times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def embedding(_: Path, seconds: float) -> float:
    """-> photos a second through the vision tower, an indexing job's heaviest part."""
    from blipcore import load

    encoder = load("blip-mini")
    pixels = np.zeros((BATCH, encoder.input_size, encoder.input_size, 3), np.uint8)
    encoder.image_tokens(pixels)
    done, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        encoder.image_tokens(pixels)
        done += BATCH
    return done / (time.perf_counter() - started)


WAYS = {"searching": searching, "embedding": embedding}


def measured(ways: list[str], library: Path, seconds: float, environment: dict) -> Iterator[float]:
    """What each way measures while all of them run at once."""
    here = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    command = [sys.executable, "-m", "tests.benchmarks.bench_side_by_side", "--seconds", str(seconds)]
    running = [
        subprocess.Popen(
            [*command, "--way", way, "--library", str(library)],
            env=here | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ways
    ]
    for each in running:
        said, _ = each.communicate()
        if each.returncode:
            raise SystemExit("a way has failed: what it printed is above")
        yield float(said.split()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="that each way runs once it is warm")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(WAYS[options.way](options.library, options.seconds))
        return
    from indexer import PhotoLibrary

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library"
        photos.fill(Path(folder) / "photos", PHOTOS, (500, 375))
        with PhotoLibrary.open(library) as opened:
            opened.index(Path(folder) / "photos")
        rows = []
        for name, environment in WAITING.items():
            (alone,) = measured(["embedding"], library, options.seconds, environment)
            (quiet,) = measured(["searching"], library, options.seconds, environment)
            beside, found = measured(["embedding", "searching"], library, options.seconds, environment)
            rows.append((name, f"{alone:.0f}", f"{quiet:.0f}", f"{beside:.0f}", f"{found:.0f}"))
    head = ("spinning", "photos/s alone", "search alone, ms", "photos/s beside search", "search beside it, ms")
    lines = [machine(), "", *table(head, rows)]
    print("\n".join(lines))
    publish(options.out, "side-by-side", "Search beside indexing", lines)


if __name__ == "__main__":
    main()
