"""How long the browse page's questions to the catalog take, by the size of the library.

    python -m tests.benchmarks.bench_browse [--photos 10000 100000]

Photos are rows with made-up dates, places, cameras and tags in a catalog of their own; the best of three.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import insert

from indexer import browse
from indexer.catalog import Catalog, now
from indexer.schema import File, Photo, Tag


def fill(catalog: Catalog, count: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    photos, files, tags = [], [], []
    for at in range(1, count + 1):
        placed, dated = rng.random() < 0.4, rng.random() < 0.95
        photos.append({
            "id": at, "content_hash": f"{at:064x}", "bytes": 3_000_000, "width": 4000, "height": 3000,
            "format": "JPEG", "orientation": 1, "camera_make": "Acme", "camera_model": f"Cam {rng.randint(1, 30)}",
            "taken_at": datetime(2005, 1, 1) + timedelta(hours=rng.randint(0, 175_000)) if dated else None,
            "latitude": rng.choice([52.5, 48.8, 40.7]) + rng.gauss(0, 0.3) if placed else None,
            "longitude": rng.choice([13.4, 2.3, -74.0]) + rng.gauss(0, 0.3) if placed else None,
            "favourite": rng.random() < 0.01, "added_at": now(),
        })  # fmt: skip
        path = f"/photos/{2005 + at % 20}/{at % 12:02}/event {at % 7}/IMG_{at}.jpg"
        files.append({"photo_id": at, "path": path, "size": 3_000_000, "mtime_ns": at})
        name = f"tag {rng.randint(1, 500)}"
        tags.append({"photo_id": at, "name": name, "folded": name, "source": "generated", "created_at": now()})
    with catalog.transaction() as connection:
        for table, rows in ((Photo, photos), (File, files), (Tag, tags)):
            connection.execute(insert(table), rows)


def best(work: Callable, repeats: int = 3) -> float:
    """Milliseconds."""
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return 1000 * min(spent)


def questions(catalog: Catalog) -> dict[str, Callable]:
    month, folder = browse.months(catalog)[0].where, browse.folders(catalog)[0].where
    ways = (browse.months, browse.folders, browse.cameras, browse.places, browse.tags, browse.favourites)
    return {way.__name__: lambda way=way: way(catalog) for way in ways} | {
        "count of a month": lambda: browse.count(catalog, month),
        "48 photos of a month": lambda: browse.photos(catalog, month, 48),
        "48 photos of a folder": lambda: browse.photos(catalog, folder, 48),
        "48 photos, page 40": lambda: browse.photos(catalog, "", 48, 1920),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[10_000, 100_000])
    for count in parser.parse_args().photos:
        with tempfile.TemporaryDirectory() as folder:
            catalog = Catalog(Path(folder) / "catalog.sqlite")
            fill(catalog, count)
            for name, work in questions(catalog).items():
                print(f"{count:>7} photos  {name:<24} {best(work):8.1f} ms")
            catalog.close()


if __name__ == "__main__":
    main()
