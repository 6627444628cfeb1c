"""Two models over one library and the same queries: how alike their answers are, and which finds what is looked for.

Overlap at k counts common photos; rank-biased overlap (Webber, Moffat and Zobel, "A Similarity Measure for Indefinite
Rankings", TOIS 2010) also asks how high they stand. Where a query comes with the photo that it means, recall says which
model is better rather than merely other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexer.errors import QueryError

PERSISTENCE = 0.9  # of rank-biased overlap: the first ten ranks weigh 86 %
RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Asked:
    """A query, and the photo that it means where that is known."""

    text: str
    photo_id: int | None = None


@dataclass(frozen=True)
class Compared:
    """One query's answers.

    Attributes:
        overlap: the share of the first k photos that both found. rbo: rank-biased overlap of these.
        ranks: of the photo that was meant, one a model; None where it is not among the first k, or nobody knows it.
    """

    query: str
    overlap: float
    rbo: float
    ranks: tuple[int | None, int | None]
    photo_id: int | None

    def as_dict(self) -> dict:
        values = {"query": self.query, "overlap": round(self.overlap, 4), "rbo": round(self.rbo, 4)}
        return values | ({} if self.photo_id is None else {"photo_id": self.photo_id, "ranks": list(self.ranks)})


@dataclass(frozen=True)
class Comparison:
    """All queries' answers of two models.

    Attributes:
        models: their names. k: how many photos of each were compared.
    """

    models: tuple[str, str]
    k: int
    rows: list[Compared]

    def summary(self) -> dict:
        """Means over the queries, and for each model recall@1, 5, 10 over those whose photo is known."""
        meant = [row for row in self.rows if row.photo_id is not None]
        values = {
            "models": list(self.models),
            "queries": len(self.rows),
            "k": self.k,
            "overlap": round(float(np.mean([row.overlap for row in self.rows])), 4),
            "rbo": round(float(np.mean([row.rbo for row in self.rows])), 4),
            "with_photo": len(meant),
        }
        return values | {"recall": [_recalls([row.ranks[side] for row in meant], self.k) for side in (0, 1)]}


def compare(
    models: tuple[str, str], searches: tuple[Callable, Callable], queries: Sequence[Asked], k: int = 10
) -> Comparison:
    """Ask both models every query.

    Args:
        searches: for each model, a function of words and a number of photos that gives results with a photo_id.
    """
    rows = []
    for asked in queries:
        first, second = ([hit.photo_id for hit in search(asked.text, k)] for search in searches)
        ranks = _rank(first, asked.photo_id), _rank(second, asked.photo_id)
        rows.append(Compared(asked.text, overlap(first, second, k), rbo(first, second), ranks, asked.photo_id))
    return Comparison(models, k, rows)


def overlap(first: Sequence[int], second: Sequence[int], k: int) -> float:
    """The share of the first k that both hold; of as many as there are where both lists are shorter."""
    depth = min(k, max(len(first), len(second)))
    return len(set(first[:depth]) & set(second[:depth])) / depth if depth else 1.0


def rbo(first: Sequence[int], second: Sequence[int], p: float = PERSISTENCE) -> float:
    """Rank-biased overlap of two rankings, extrapolated from the depth that both have (equation 30); 1 for the same."""
    depth = min(len(first), len(second))
    if not depth:
        return float(len(first) == len(second))
    common = np.array([len(set(first[:d]) & set(second[:d])) for d in range(1, depth + 1)])
    ranks = np.arange(1, depth + 1)
    return float(common[-1] / depth * p**depth + (1 - p) / p * (common / ranks * p**ranks).sum())


def read_queries(file: Path, find_photo: Callable[[str], int | None]) -> list[Asked]:
    """A file of one query a line, where it is known followed by a tab and the photo that it means: a path or an id.

    Raises QueryError naming the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{file} cannot be read as lines of UTF-8 text ({error}): check the file") from error
    asked = []
    for number, line in enumerate(lines, start=1):
        text, _, photo = (part.strip() for part in line.partition("\t"))
        if not text and not photo:
            continue
        photo_id = find_photo(photo) if photo else None
        if not text or (photo and photo_id is None):
            what = f"the library has no photo {photo}" if text else "there are no words before the tab"
            raise QueryError(f"line {number} of {file}: {what}; write a query, or a query, a tab and a photo's path")
        asked.append(Asked(text, photo_id))
    if not asked:
        raise QueryError(f"{file} holds no queries: write one a line")
    return asked


def _rank(found: Sequence[int], photo_id: int | None) -> int | None:
    return found.index(photo_id) + 1 if photo_id in found else None


def _recalls(ranks: Sequence[int | None], k: int) -> dict[str, float] | None:
    """Percent of queries whose photo is among the first 1, 5, 10, as far as k reaches; None without such queries."""
    if not ranks:
        return None
    return {
        f"r{at}": round(100 * sum(rank is not None and rank <= at for rank in ranks) / len(ranks), 1)
        for at in RECALLS
        if at <= k
    }
