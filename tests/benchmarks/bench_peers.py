"""Indexing end to end beside other programs: `photoblip index` (blip-mini) against rclip and clip-retrieval.

Each is its own command in a process of its own, on the same photos, into an empty library, in turn, and timed from its
start to its end; nothing is subtracted. A run with few photos beside one with many says what starting costs, and how
fast it is from then on. photoblip also makes thumbnails, catalogs EXIF and keeps image tokens for matching; rclip also
answers one query, as its command always does; clip-retrieval's search index, which is another command, is left out.

The peers are installed once, into the folder of --peers (clip-retrieval takes 6 GB there: it brings PyTorch), with
random weights of the architecture that they would download (tests/benchmarks/peers.py). Photos are those of --photos,
else as bench_indexing's.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import photos
from tests.benchmarks.machine import arguments, draw_bars, machine, publish, table
from tests.benchmarks.peers import PEERS, Unavailable, called

OURS = "photoblip, blip-mini, ViT-Tiny/16 at 288"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "photoblip" / "peers"
Index = Callable[[Path, Path], int]  # (photos, an empty folder) -> photos indexed


def photoblip(folder: Path, work: Path) -> int:
    command = [sys.executable, "-m", "indexer.cli", "index", folder, "--library", work, "--json"]
    return json.loads(called(command).splitlines()[-1])["added"]


def timed(index: Index, folder: Path) -> float:
    """Seconds. Raises Unavailable where photos were left out: then the time says nothing."""
    there = sum(1 for _ in folder.iterdir())
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        found = index(folder, Path(work))
        seconds = time.perf_counter() - started
    if found != there:
        raise Unavailable(f"it indexed {found} of {there} photos")
    return seconds


def available(cache: Path, few: Path, chosen: list[str]) -> tuple[dict[str, Index], list[str]]:
    """(What can be run, photoblip first; a sentence for each that cannot). Each has then run once."""
    ways, missing = {OURS: photoblip}, []
    timed(photoblip, few)
    for peer in PEERS:
        if peer.name not in chosen:
            continue
        try:
            home = peer.prepare(cache)
            way = lambda folder, work, peer=peer, home=home: peer.index(home, folder, work)  # noqa: E731
            timed(way, few)
            ways[peer.shown] = way
        except Unavailable as problem:
            missing.append(f"{peer.name} cannot be compared here: {problem}")
            print(missing[-1], flush=True)
    return ways, missing


def measure(ways: dict[str, Index], few: Path, many: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """{way: (seconds for few, for many) a round}."""
    times = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            times[name].append((timed(way, few), timed(way, many)))
            print(f"  round {number + 1}: {name}: {times[name][-1][0]:.1f} s, {times[name][-1][1]:.1f} s", flush=True)
    return times


def figures(times: dict[str, list[tuple[float, float]]], few: int, many: int) -> list[dict]:
    """A row a way: photos/s of all, and without starting; `x` ones say how many times faster photoblip is.

    A way whose long runs took no longer than its short ones (a busy machine) has no rate without starting: nan.
    """
    rows = []
    for name, rounds in times.items():
        short, long = (statistics.median(column) for column in zip(*rounds, strict=True))
        steady = (many - few) / (long - short) if long > short else float("nan")
        best = min(seconds for _, seconds in rounds)
        rows.append({
            "way": name, "rate": many / long, "best": many / best, "steady": steady, "start": short - few / steady,
        })  # fmt: skip
    ours = rows[0]
    return [row | {f"x {key}": ours[key] / row[key] for key in ("rate", "best", "steady")} for row in rows]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--photos", type=Path, help="a folder or tar of JPEGs (camera photos made 500 x 375)")
    parser.add_argument("--count", type=int, default=480, help="photos of the long run (480)")
    parser.add_argument("--few", type=int, default=64, help="photos of the short run (64)")
    parser.add_argument("--peers", type=Path, default=CACHE, help=f"where the peers are installed ({CACHE})")
    parser.add_argument("--only", nargs="+", choices=[peer.name for peer in PEERS], help="these peers alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        few, many = Path(place) / "few", Path(place) / "many"
        photos.fill(few, options.few, (500, 375), options.photos)
        kind = photos.fill(many, options.count, (500, 375), options.photos)
        shown = "" if options.photos else ", 500 x 375"
        lines = [f"{machine()}. {options.count} {kind}{shown}; {options.rounds} rounds.", ""]
        print("\n".join(lines), flush=True)
        ways, missing = available(options.peers, few, options.only or [peer.name for peer in PEERS])
        rows = figures(measure(ways, few, many, options.rounds), options.few, options.count)
    heading = ("program", "photos/s, median", "best", "photoblip is x faster, median", "best",
               "photos/s without starting", "photoblip is x faster", "starting, s")  # fmt: skip
    lines += table(heading, [
        (row["way"], f"{row['rate']:.1f}", f"{row['best']:.1f}", f"{row['x rate']:.2f}", f"{row['x best']:.2f}",
         f"{row['steady']:.1f}", f"{row['x steady']:.2f}", f"{row['start']:.1f}")
        for row in rows
    ])  # fmt: skip
    lines += missing
    print("\n".join(lines))
    groups = {title: {row["way"].partition(",")[0]: row[key] for row in rows}
              for title, key in (("start to end", "rate"), ("without starting", "steady"))}  # fmt: skip
    publish(options.out, "peers", "Indexing beside other programs", lines,
            lambda file: draw_bars(groups, "photos/s", file))  # fmt: skip


if __name__ == "__main__":
    main()
