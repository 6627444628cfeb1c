"""Words that stand beside the photos, found by SQLite's FTS5: captions, titles, tags, names of files and folders.

The table `photo_texts` has a row a photo, kept by triggers in the transaction that changes what it is made of (see
migrations 0004 and 0005). What models wrote, which search trusts less, stands in a table of its own. Ranked by BM25
(Robertson & Zaragoza 2009, sqlite.org/fts5.html); words are compared by their stems.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from sqlalchemy import (
    Boolean,
    CompoundSelect,
    Connection,
    Select,
    column,
    create_engine,
    insert,
    select,
    table,
    text,
    union,
)
from sqlalchemy.pool import StaticPool

from indexer.catalog import Catalog, chunks
from indexer.schema import Caption

TABLE, FIELDS = "photo_texts", "title, captions, tags, names"  # what people wrote, and names, as migration 0005 has it
WRITTEN = "written_texts"  # captions and tags of models
TOKENIZER = "porter unicode61 remove_diacritics 2"
MAX_WORDS = 40
MAX_MATCHES = 20_000  # rows that BM25 ranks for one query: 2 microseconds each
ROWS = 200  # read at once
_WORD = re.compile(r"[^\W_]+")
# words without a subject: they are left out where others are left
_STOP_WORDS = """
    a about above across after against all along also am among an and another any are around as at away back be
    because been before behind being below beside between both but by can could did do does doing down during
    each few for from front had has have having he her here hers herself him himself his how i if image images
    in inside into is it its itself just me more most much my myself near next no nor not of off on once one
    onto or other our out outside over own photo photos picture pictures same several she so some such than that
    the their them themselves then there these they this those through to together too toward towards under
    until up upon us very was we were what when where which while who whom why will with without you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def words(line: str) -> tuple[str, ...]:
    """The words of a text, as the index has them before their stems: without case and punctuation."""
    return tuple(_WORD.findall(line.casefold()))


def quoted(phrase: Iterable[str]) -> str:
    """Words as a phrase of FTS5's language, in which nothing is special then."""
    return '"' + " ".join(phrase).replace('"', '""') + '"'


def having(phrase: Iterable[str]) -> CompoundSelect:
    """The ids of photos in whose texts, or in what models wrote of them, these words stand one after another."""
    line = quoted(phrase)
    return union(*(_matching(name, line) for name in (TABLE, WRITTEN)))


def _matching(name: str, line: str) -> Select:
    texts = table(name, column("rowid"), column(name))
    return select(texts.c.rowid).where(texts.c[name].op("MATCH", return_type=Boolean())(line))


class TextHits(NamedTuple):
    """Photos by their texts, best first: ids int64 [n], and how much of the query's meaning stands there, float32 [n].

    A strength of 1 is all of the query's words; rare words count for more (BM25 over the sum of the words' IDF).
    """

    ids: np.ndarray
    strengths: np.ndarray


NOTHING = TextHits(np.zeros(0, np.int64), np.zeros(0, np.float32))


class FullText:
    """Ranks a catalog's photos by their texts.

    Args:
        source: a catalog, or what else has its `reading` and such a table. name: the table's, TABLE or WRITTEN.
    """

    def __init__(self, source: "Catalog | _Copy", name: str = TABLE):
        self.source, self.name = source, name

    def search(self, line: str, k: int, among: np.ndarray) -> TextHits:
        """The k best of the photos `among` (ids int64, sorted) that hold some of the words of `line`.

        Words that stand beside more than MAX_MATCHES photos are looked for only in company of rarer ones.
        """
        with self.source.reading() as connection:
            count = connection.execute(text(f"SELECT count(*) FROM {self.name}_docsize")).scalar()
            weighed = self._weigh(connection, subject(line), count)
            chosen = _rarest(weighed)
            if not chosen or not len(among) or k <= 0:
                return NOTHING
            total = sum(_idf(held, count) for _, held in weighed)
            query = text(f"SELECT rowid, rank FROM {self.name} WHERE {self.name} MATCH :match ORDER BY rank, rowid")
            matches = " OR ".join(quoted([word]) for word in chosen)
            rows = connection.execution_options(yield_per=ROWS).execute(query, {"match": matches})
            ids, strengths = [], []
            for part in rows.partitions():
                found = np.array([row.rowid for row in part], np.int64)
                for at in np.flatnonzero(_isin_sorted(found, among)):
                    ids.append(found[at])
                    strengths.append(-part[at].rank / total)
                if len(ids) >= k:
                    break
            rows.close()
        return TextHits(np.array(ids[:k], np.int64), np.array(strengths[:k], np.float32))

    def with_all_words(self, line: str, ids: Iterable[int]) -> frozenset[int]:
        """Of these photos those beside which every word of `line` stands that has a subject."""
        if not (wanted := subject(line)):
            return frozenset()
        return self.matched(" AND ".join(quoted([word]) for word in wanted), ids)

    def matched(self, line: str, ids: Iterable[int]) -> frozenset[int]:
        """Of these photos those whose texts a line of FTS5's language matches."""
        query = _matching(self.name, line)
        with self.source.reading() as connection:
            found = (connection.execute(query.where(column("rowid").in_(part))) for part in chunks(ids))
            return frozenset(row.rowid for rows in found for row in rows)

    def _weigh(self, connection, line_words: Iterable[str], count: int) -> list[tuple[str, int]]:
        """Each word with the number of photos it stands beside."""
        query = text(f"SELECT count(*) FROM {self.name} WHERE {self.name} MATCH :match")
        return [
            (word, min(count, connection.execute(query, {"match": quoted([word])}).scalar())) for word in line_words
        ]


def subject(line: str) -> tuple[str, ...]:
    """The words of a query to look for: each once, those without a subject left out unless there are no others."""
    found = tuple(dict.fromkeys(words(line)))[:MAX_WORDS]
    return tuple(word for word in found if word not in STOP_WORDS) or found


def _rarest(weighed: list[tuple[str, int]]) -> list[str]:
    """Words that some photo has, the rarest first, as many as may be ranked in little time."""
    chosen, matches = [], 0
    for word, held in sorted(weighed, key=lambda pair: pair[1]):
        matches += held
        if matches > MAX_MATCHES:
            break
        if held:
            chosen.append(word)
    return chosen


def _idf(held: int, count: int) -> float:
    """As FTS5 has it, with its floor for words that most photos have."""
    return max(math.log((count - held + 0.5) / (held + 0.5)), 1e-6)


def _isin_sorted(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether each id is in a sorted array: a fraction of np.isin's time where that is long."""
    at = np.searchsorted(among, ids)
    return among[np.minimum(at, len(among) - 1)] == ids


# -- a copy in memory -----------------------------------------------------------------------------------------


class _Copy:
    """A catalog's full text in memory, in which captions can be missing."""

    def __init__(self):
        self.engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection


def without_captions(catalog: Catalog, caption_ids: Collection[int]) -> FullText:
    """What people wrote as it would be without some captions: to ask with them, and not to find them by themselves."""
    texts = table(TABLE, *(column(name) for name in ("rowid", "title", "captions", "tags", "names")))
    held_out, copy = frozenset(caption_ids), _Copy()
    with copy.reading() as connection:
        connection.execute(text(f"CREATE VIRTUAL TABLE {TABLE} USING fts5({FIELDS}, tokenize = '{TOKENIZER}')"))
        for part in chunks(catalog.stream(select(texts)), ROWS):
            rows = [dict(row._mapping) for row in part]
            left = _captions(catalog, [row["rowid"] for row in rows], held_out)
            for row in rows:
                row["captions"] = "\n".join(left.get(row["rowid"], ())) or None
            connection.execute(insert(texts), rows)
        connection.commit()
    return FullText(copy)


def _captions(catalog: Catalog, photo_ids: list[int], held_out: frozenset[int]) -> dict[int, list[str]]:
    query = select(Caption.id, Caption.photo_id, Caption.text)
    query = query.where(Caption.photo_id.in_(photo_ids), Caption.source == "user")
    left: dict[int, list[str]] = {}
    for row in catalog.rows(query.order_by(Caption.id)):
        if row.id not in held_out:
            left.setdefault(row.photo_id, []).append(row.text)
    return left
