"""A library end to end: index, index again, search. Real photos where they are, drawn ones elsewhere."""

import resource
import tarfile
import tempfile
import time
from pathlib import Path

from indexer import PhotoLibrary
from tests.benchmarks.machine import machine, show, versus
from tests.tiny import SHARED_DATA, drawn_photo

COUNT = 1000
QUERIES = ("a dog running on grass", "children on a playground", "a man on a snowboard", "people in a city street")


def photos(folder: Path) -> str:
    """Fill a folder with photos. -> what they are."""
    archive = SHARED_DATA / "flickr8k" / "dev.tar"
    if archive.exists():
        with tarfile.open(archive) as members:
            members.extractall(folder, filter="data")
        return "Flickr8k dev, 224 px"
    for number in range(COUNT):
        drawn_photo(number, (500, 375)).save(folder / f"{number:04}.jpg", quality=90)
    return "drawn, 500 x 375"


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        kind = photos(folder)
        with PhotoLibrary.open(Path(name) / "library") as library:
            library.encoder()
            report = library.index(folder)
            print(
                f"index {report.added} photos ({kind}): {report.seconds:.1f} s, {report.added / report.seconds:.1f}/s"
            )
            started = time.perf_counter()
            again = library.index(folder)
            print(f"index again, {again.unchanged} unchanged: {time.perf_counter() - started:.2f} s")
            ways = {
                "first stage only": lambda: [library.search(q, rerank=0) for q in QUERIES],
                "re-ranked, top 100, photos in memory": lambda: [library.search(q) for q in QUERIES],
            }
            show("four queries", versus(ways), len(QUERIES), "query")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
