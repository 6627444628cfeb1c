"""How well search finds, through `PhotoLibrary.search`, on a split of Flickr8k with its five captions a photo.

    python -m tests.benchmarks.search_quality [--split dev] [--queries 500] [--only channels|nothing|exclusion]
        [--beside nothing|model|people]

Three times: over a library without any captions, with those that the model itself writes (as `photoblip caption
--missing`), and with the first of the five stored beside each photo as the user's own.

- channels: one of a photo's other four captions is asked for; recall@k of its photo.
- nothing to find: captions, half of whose photos have been taken out; and things (tests.benchmarks.things), each asked
  with all photos there and with those taken out of which a caption mentions it. AUROC of the best hit's probability
  and of the best cosine; F1 at the default cut (`SearchResults.cut`), and at the cosine's best cut on these queries.
- exclusion: "X without Y", for all X and Y of `LEFT_OUT` of which SHARE or more of the photos that mention X mention Y,
  and LEAST or more do not: these are relevant. All five captions decide, the stored one too. Precision@10 of the
  program, without and with re-ranking; of vector subtraction, the query's vector less Y's; and with nothing left out.
"""

import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from sqlalchemy import delete

from blipcore.layouts import read_captions
from indexer import PhotoLibrary
from indexer.schema import Caption
from tests.benchmarks.machine import arguments, machine, table
from tests.benchmarks.things import LEFT_OUT, SOUGHT, mentions
from tests.tiny import SHARED_DATA

SHARE, LEAST = 0.5, 10
BEST, DEPTH = 10, 100  # results that count for precision, and that are looked at
GONE = "taken out"  # the album of photos that a query must not find
DATA = SHARED_DATA / "flickr8k"
BESIDE = {
    "nothing": "no captions stored",
    "model": "the model's own captions stored",
    "people": "one caption stored beside each photo",
}
CHANNELS = ("vectors (ITC)", "words (full text)", "fused", "fused + re-ranked")


class Split:
    """A library of a split's photos, and what their captions say: rows are photos in the order of their ids.

    Attributes:
        captions: the five of each photo. beside: what stands beside it, one of BESIDE.
    """

    def __init__(self, folder: Path, split: str):
        photos = folder / "photos" / split
        if not photos.exists():
            with tarfile.open(DATA / f"{split}.tar") as archive:
                archive.extractall(photos, filter="data")
        self.library = PhotoLibrary.open(folder / f"library-{split}")
        self.library.index(photos, workers=0)
        every = read_captions(DATA / "captions.tsv")
        self.ids = self.library.present()
        names = [Path(self.library.photo(photo_id)["path"]).name for photo_id in self.ids]
        self.captions = [every[name] for name in names]
        self.beside = "nothing"

    def put_beside(self, what: str) -> None:
        """One of BESIDE, in place of what was there."""
        with self.library.catalog.transaction() as connection:
            connection.execute(delete(Caption))
        if what == "model":
            self.library.caption(self.ids)
        elif what == "people":
            for row, own in enumerate(self.captions):
                self.library.add_caption(self.ids[row], own[0])
        self.beside = what

    def asked(self, count: int) -> list[tuple[int, str]]:
        """(row, one of its captions that are never stored), of photos drawn at random."""
        pairs = [(row, text) for row, own in enumerate(self.captions) for text in own[1:]]
        return [pairs[at] for at in np.random.default_rng(0).permutation(len(pairs))[:count]]

    def says(self, pattern: str) -> np.ndarray:
        """In how many of its captions a thing is mentioned: int [photos]."""
        return np.array([mentions(pattern, own) for own in self.captions])


def channels(split: Split, count: int) -> list[str]:
    """Recall of each way of searching; `itc_rank` and `text_rank` are those of the first two."""
    places = []
    for row, text in split.asked(count):
        first, last = split.library.search_progressively(without_signs(text), top_k=DEPTH)
        own = next((hit for hit in first if hit.photo_id == split.ids[row]), None)
        alone = (own.itc_rank, own.text_rank) if own else (None, None)
        ranks = [next((hit.rank for hit in hits if hit.photo_id == split.ids[row]), None) for hits in (first, last)]
        places.append([rank or np.inf for rank in (*alone, *ranks)])
    recall = {k: 100 * (np.array(places) <= k).mean(0) for k in (1, 5, 10)}
    rows = [(name, *(f"{recall[k][at]:.1f}" for k in recall)) for at, name in enumerate(CHANNELS)]
    gain = f"R@1 of the last less the better of the first two: {recall[1][3] - recall[1][:2].max():+.1f}"
    title = f"### Channels, {len(places)} captions, {BESIDE[split.beside]}"
    return [title, "", *table(("searched by", *(f"R@{k}" for k in recall)), rows), gain, ""]


def nothing(split: Split, count: int) -> list[str]:
    """Whether search knows that there is nothing to find."""
    rows = [("captions", *_detection(*_captions_asked(split, count))), ("things", *_detection(*_things_asked(split)))]
    head = ("asked", "n", "AUROC probability", "AUROC cosine", "F1 default cut", "F1 cosine's best cut")
    return [f"### Nothing to find, {BESIDE[split.beside]}", "", *table(head, rows)]


def _captions_asked(split: Split, count: int) -> tuple[list, list]:
    """Best hits of captions whose photos are there, and of those whose photos are taken out."""
    asked = split.asked(count)
    gone = np.zeros(len(split.ids), bool)
    gone[np.random.default_rng(1).permutation(len(gone))[: len(gone) // 2]] = True
    with _taken_out(split, gone) as where:
        found = [(gone[row], _best(split, text, where)) for row, text in asked]
    return [best for was_gone, best in found if not was_gone], [best for was_gone, best in found if was_gone]


def _things_asked(split: Split) -> tuple[list, list]:
    there, not_there = [], []
    for thing, pattern in SOUGHT.items():
        mentioned = split.says(pattern) > 0
        if mentioned.any() and not mentioned.all():
            there.append(_best(split, thing))
            with _taken_out(split, mentioned) as where:
                not_there.append(_best(split, thing, where))
    return there, not_there


def _best(split: Split, text: str, where: str | None = None) -> tuple[float, float, bool]:
    """(the best hit's probability, the best cosine, whether anything is above the cut)"""
    hits = split.library.search(without_signs(text), where=where, top_k=DEPTH)
    return max(hit.probability or 0 for hit in hits), max(hit.itc for hit in hits), bool(hits.cut)


def _detection(there: list, not_there: list) -> tuple[str, ...]:
    truth = np.array([True] * len(there) + [False] * len(not_there))
    probability, cosine, said = (np.array(each) for each in zip(*there, *not_there, strict=True))
    best = max(f1(cosine >= cut, truth) for cut in cosine)
    figures = (auroc(probability, truth), auroc(cosine, truth), f1(said, truth), best)
    return f"{len(there)} + {len(not_there)}", *(f"{each:.3f}" for each in figures)


def exclusion(split: Split, _: int) -> list[str]:
    """Precision@10 of "X without Y", over all pairs."""
    said = {name: split.says(pattern) > 0 for name, pattern in LEFT_OUT.items()}
    pairs = [
        (x, y)
        for x in LEFT_OUT
        for y in LEFT_OUT
        if x != y and said[x].any() and said[y][said[x]].mean() >= SHARE and (said[x] & ~said[y]).sum() >= LEAST
    ]
    search, stages = split.library.search, split.library.search_progressively
    ways = {
        "nothing left out, re-ranked": lambda x, y: search(x, top_k=BEST),
        "vector subtraction": lambda x, y: search(f"{x} - 1:{y}", top_k=BEST, rerank=0),
        "vector subtraction, half of Y": lambda x, y: search(f"{x} - 0.5:{y}", top_k=BEST, rerank=0),
        "left out, first stage": lambda x, y: next(stages(x, without=[y], top_k=BEST)),
        "left out, re-ranked": lambda x, y: search(x, without=[y], top_k=BEST),
    }
    found = {
        way: np.mean([_precision(split, find(x, y), said[x] & ~said[y]) for x, y in pairs])
        for way, find in ways.items()
    }
    base = found["vector subtraction"]
    rows = [(way, f"{value:.3f}", f"{value / base:.2f}") for way, value in found.items()]
    head = ("way", f"precision@{BEST}", "to subtraction")
    return [f"### X without Y, {len(pairs)} pairs, {BESIDE[split.beside]}", "", *table(head, rows)]


def _precision(split: Split, hits: Iterable, relevant: np.ndarray) -> float:
    place = {photo_id: row for row, photo_id in enumerate(split.ids)}
    return sum(bool(relevant[place[hit.photo_id]]) for hit in hits) / BEST


# -- parts ----------------------------------------------------------------------------------------------------


@contextmanager
def _taken_out(split: Split, gone: np.ndarray) -> Iterator[str]:
    """Photos that are not there while it lasts: yields the filter that takes them out."""
    split.library.create_album(GONE)
    split.library.add_to_album(GONE, [split.ids[row] for row in np.flatnonzero(gone)])
    try:
        yield f'NOT album:"{GONE}"'
    finally:
        split.library.delete_album(GONE)


def without_signs(caption: str) -> str:
    """A caption as a plain sentence of the search box: its signs and quotation marks are none of the box's language."""
    return " ".join(re.findall(r"[\w']+", caption))


def auroc(score: np.ndarray, truth: np.ndarray) -> float:
    """The probability that a true one has a higher score than a false one; ties count half."""
    difference = score[truth][:, None] - score[~truth][None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def f1(said: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (said & truth).sum() / max(1, said.sum() + truth.sum()))


EXPERIMENTS = {"channels": channels, "nothing": nothing, "exclusion": exclusion}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--queries", type=int, default=500, help="captions asked for")
    parser.add_argument("--only", choices=EXPERIMENTS, action="append")
    parser.add_argument("--beside", choices=BESIDE, action="append", help="what stands beside the photos")
    parser.add_argument("--library", type=Path, help="where the library is built and kept; by default nowhere")
    options = parser.parse_args()
    with nullcontext(options.library) if options.library else tempfile.TemporaryDirectory() as folder:
        split = Split(Path(folder), options.split)
        encoder = split.library.encoder()
        lines = [
            f"# Search on Flickr8k {options.split}, {encoder.name} ({encoder.fingerprint[:12]})",
            "",
            machine(),
            "",
        ]
        print("\n".join(lines), flush=True)
        for what in options.beside or BESIDE:
            split.put_beside(what)
            for name in options.only or EXPERIMENTS:
                if name != "channels" or what != "nothing":
                    found = EXPERIMENTS[name](split, options.queries)
                    print("\n".join(found), flush=True)
                    lines += found
        split.library.close()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "search-quality.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
