"""Search: query -> candidates of two kinds -> matching -> ranked results, with an honest "nothing".

First stage: cosines of the contrastive vectors over the whole library (ITC), and the words that stand beside the photos
(full text); both lists are fused. Second stage: the matching model reads the best candidates (ITM), and all that speaks
for a photo becomes one score, one order and one probability (blipcore.calibration).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial

import numpy as np
from sqlalchemy import select

from blipcore.hubness import ENOUGH
from indexer.catalog import Catalog, is_present
from indexer.errors import QueryError
from indexer.exclusion import AGAINST, Exclusion, none_shown
from indexer.filters import Where, compile_filters
from indexer.full_text import WRITTEN, FullText
from indexer.fusion import Candidates, fuse
from indexer.language import Reading, reading
from indexer.query import Query, Term
from indexer.rerank import Reranker
from indexer.schema import Embedding, Photo
from indexer.vector_index import VectorIndex, directions

TEXT_BATCH = 256
KNOWN_TEXTS = 100_000  # texts whose vectors are kept in memory: 1 kB each
SAMPLE = 2000  # photos of the library that a query's cosines are compared with
NO_PHOTOS = np.zeros(0, np.int64), np.zeros(0, np.float32)
WIDER = 8  # texts looked at for each one that is read
LIKELY = 0.5  # the probability from which a photo is likelier meant than not
SPARE = 3  # candidates for each one that is wanted, where some will be left out


@dataclass(frozen=True)
class SearchResult:
    """A photo that answers a query, and why.

    Attributes:
        itc: cosine with the query, -1 to 1; None where the query is a filter alone.
        itm: the matching model's own probability, 0 to 1.
        probability: calibrated match probability. Both are None where the result was not re-ranked.
        question, answer: what was asked of the results, and this photo's answer (None: it could not be read).
        itc_rank, text_rank: its place among the photos found by their vectors, and by the words beside them; None
            where it is not among them.
        likely: whether it is above the cut: likelier to be meant than not, or people wrote all of the words beside it,
            or they were asked for in quotation marks; None where it was not re-ranked.
        likelihood: how likely the decoder finds the words, in nats above the mean of the photos that it read; None of
            others.
        explainer: what `explain` asks; None where the query had no words.
    """

    rank: int
    photo_id: int
    path: str
    itc: float | None
    itm: float | None
    probability: float | None
    caption: str | None
    taken_at: datetime | None
    model: str
    question: str | None = None
    answer: str | None = None
    itc_rank: int | None = None
    text_rank: int | None = None
    likely: bool | None = None
    likelihood: float | None = None
    explainer: Callable | None = field(default=None, repr=False, compare=False)

    def explain(self, word: str | None = None):
        """Where the photo shows a word, or all words of the query side by side: heat maps over it, as a PIL image.

        Raises QueryError where there are no words.
        """
        if self.explainer is None:
            raise QueryError("there is no word to explain: ask library.explain(photo, words)")
        return self.explainer(word)

    def as_dict(self) -> dict:
        """As JSON values; question and answer only where something was asked."""
        values = asdict(replace(self, explainer=None))
        del values["explainer"]
        values["taken_at"] = self.taken_at.isoformat() if self.taken_at else None
        if self.question is None:
            del values["question"], values["answer"]
        return values


@dataclass(frozen=True)
class TextResult:
    """A text that describes a photo; photo_id is a photo of the library that carries it, if any."""

    rank: int
    text: str
    itc: float
    itm: float | None
    probability: float | None
    photo_id: int | None

    def as_dict(self) -> dict:
        return asdict(self)


class SearchResults(list):
    """Results, best first, and how they came about.

    Attributes:
        reranked: how many of the candidates the second stage read. seconds: what it all took.
        cut: how many of the results are likely: they are the first ones; None where nothing was re-ranked.
        query: the Query as it was understood, None where there was none.
        notice: a sentence for people where the model does not read the words as they are meant (indexer.language).
    """

    def __init__(
        self,
        results: Iterable,
        *,
        reranked: int = 0,
        candidates: int = 0,
        seconds: float = 0.0,
        query: Query | None = None,
        notice: str | None = None,
    ):
        super().__init__(results)
        self.reranked, self.candidates, self.seconds, self.query = reranked, candidates, seconds, query
        self.notice = notice

    @property
    def cut(self) -> int | None:
        judged = [hit.likely for hit in self if getattr(hit, "likely", None) is not None]
        return sum(judged) if judged or self.reranked else None


def nearest_cosines(cosines: np.ndarray) -> np.ndarray:
    """Cosines [n] of photos with one vector, or [n, Q] of photos with several, of which the nearest counts. -> [n]."""
    return cosines.max(-1) if cosines.ndim > 1 else cosines


def one_vector(vectors: np.ndarray) -> np.ndarray:
    """A picture as a query: its unit vector [E]; of several [Q, E], their direction together."""
    return vectors if vectors.ndim == 1 else directions(vectors[None])[0]


def unit(vector: np.ndarray) -> np.ndarray:
    """[E] -> the unit vector of its direction."""
    return vector / max(np.linalg.norm(vector), 1e-12)


@dataclass(frozen=True)
class _Row:
    """A candidate with all that the stages said of it; `score` orders those that were read."""

    photo_id: int
    itc: float | None
    itc_rank: int | None = None
    text_rank: int | None = None
    itm: float | None = None
    probability: float | None = None
    likely: bool | None = None
    likelihood: float | None = None
    score: float = 0.0


class Searcher:
    """Answers queries over one catalog with one model.

    Args:
        encoder: a blipcore encoder. index: its vectors, level with the catalog. open_query: an example -> a picture.
    """

    def __init__(self, catalog: Catalog, index: VectorIndex, encoder, model_row, reranker: Reranker, open_query):
        self.catalog, self.index, self.encoder = catalog, index, encoder
        self.model, self.reranker, self.open_query = model_row, reranker, open_query
        self.texts, self.written = FullText(catalog), FullText(catalog, WRITTEN)
        self._known_texts: dict[str, np.ndarray] = {}
        self._sampled: tuple[int, np.ndarray] | None = None

    def with_texts(self, texts: FullText) -> "Searcher":
        """This searcher with another full text of what people wrote."""
        other = copy(self)
        other.texts = texts
        return other

    def search(self, query: Query, *, top_k: int = 20, **options) -> SearchResults:
        """The best `top_k` photos for a query; the best `rerank` of the first stage are read by the second.

        Args:
            options: as `stages` takes them.
        """
        *_, last = self.stages(query, top_k=top_k, first=False, **options)
        return last

    def stages(
        self,
        query: Query,
        *,
        top_k: int = 20,
        rerank: int = 100,
        budget_seconds: float | None = None,
        min_probability: float | None = None,
        likely: bool = False,
        approximate: bool = False,
        first: bool = True,
    ) -> Iterator[SearchResults]:
        """The results of the first stage at once and, where there is a second one, its results when they are ready.

        Args:
            min_probability: leave out results below it, and those that were not re-ranked.
            likely: leave out results below the cut, and those that were not re-ranked.
            approximate: as `VectorIndex.search` takes it.
            first: False yields the last results alone.
        """
        started = time.monotonic()
        words = self._reading(query)
        rerank = rerank if query.text and self.encoder.can_match and words.matches else 0
        excluded = Exclusion(query.without, self)
        found = self._candidates(query, max(top_k, rerank), excluded, approximate)

        def results(rows: list[_Row], read: int, last: bool) -> SearchResults:
            rows = [row for row in rows if not last or _passes(row, min_probability, likely)]
            spent = time.monotonic() - started
            hits = self._results(rows[:top_k])
            if query.text and self.encoder.can_match:
                hits = [replace(hit, explainer=partial(self._explain, hit.photo_id, query.text)) for hit in hits]
            counts = {"reranked": read, "candidates": len(found), "seconds": spent}
            return SearchResults(hits, query=query, notice=words.notice, **counts)

        if first and rerank:
            yield results(self._rows(found.only(excluded.by_vectors(found.ids)), {}, query), 0, last=False)
        if not rerank:
            kept = found.only(excluded.judge(found.ids, top_k, budget_seconds).rows)
            yield results(self._rows(kept, {}, query), 0, last=True)
        else:
            share = len(excluded.texts) / (len(excluded.texts) + 1)  # of the time: an even one for each text
            judged = excluded.judge(found.ids, rerank, None if budget_seconds is None else share * budget_seconds)
            kept = found.only(judged.rows)
            read = [i for i in kept.ids.tolist() if i in judged.log_odds] if judged.log_odds else kept.ids.tolist()
            left = None if budget_seconds is None else max(0.0, budget_seconds - (time.monotonic() - started))
            margins = self.reranker.score(query.text, read[:rerank], left)
            in_time = budget_seconds is None or time.monotonic() - started < budget_seconds
            likelihoods = self._likelihoods(query.text, kept, margins) if in_time else {}
            yield results(self._rows(kept, margins, query, judged.log_odds, likelihoods), len(margins), last=True)

    def similar(self, photo_id: int, top_k: int = 20, where: Where | None = None) -> SearchResults:
        """Photos whose vectors lie next to this one's; the photo itself is left out."""
        if next(self.catalog.vectors(self.model.id, [photo_id]), None) is None:
            return SearchResults([])
        return self.search(Query((Term(photo=photo_id),), where=(where,) if where else ()), top_k=top_k)

    def describe(
        self, picture, texts: dict[str, int | None], top_k: int = 5, rerank: int = 32, *, telling: bool = True
    ) -> SearchResults:
        """The texts that fit a picture best. `texts` maps each text to a photo that carries it, or None.

        Args:
            telling: those that lie near every photo come later; their probability stays what it is. Not for names: of
                Caltech-101's classes blip-mini tells 47.6 % right, and 44.7 % so.
        """
        started = time.monotonic()
        lines = list(texts)
        pixels = self.encoder.pixels([picture])
        tokens = self.encoder.image_tokens(pixels)
        vectors = self.encoder.embed_tokens(tokens)
        itc = nearest_cosines(self.text_vectors(lines) @ vectors[0].T)
        order = np.argsort(-itc, kind="stable")
        crowding = np.zeros(len(lines), np.float32)
        if telling:
            near = order[: WIDER * max(top_k, rerank)]
            crowding[near] = self._text_crowding([lines[i] for i in near])
            order = near[np.argsort(-(itc - crowding)[near], kind="stable")]
        order = order[: max(top_k, rerank)]
        margins = {}
        if self.encoder.can_match:
            best = order[:rerank]
            pairs = np.stack([np.zeros(len(best), int), np.arange(len(best))], 1)
            found = self.encoder.match_tokens(tokens, [lines[i] for i in best], pairs)
            margins = dict(zip(best.tolist(), found.tolist(), strict=True))
        read = [int(i) for i in order if int(i) in margins]
        own = self.encoder.crowding(vectors) if hasattr(self.encoder, "crowding") else 0.0
        told = self._told([lines[i] for i in read], read, [margins[i] for i in read], itc[read] - own)
        for i in told:
            told[i]["score"] -= self.encoder.scoring.scale * self.encoder.scoring.itc_weight * crowding[i]
        rows = [_Row(int(i), float(itc[i]), **told.get(int(i), {})) for i in order]
        results = [
            TextResult(rank, lines[row.photo_id], row.itc, row.itm, row.probability, texts[lines[row.photo_id]])
            for rank, row in enumerate(_ordered(rows)[:top_k], start=1)
        ]
        return SearchResults(results, reranked=len(margins), candidates=len(lines), seconds=time.monotonic() - started)

    # -- the first stage ------------------------------------------------------------------------------------

    def _reading(self, query: Query) -> Reading:
        """What the model makes of the query's words. Raises QueryError for words to leave out that it cannot read."""
        for phrase in query.without:
            if not (left_out := reading(phrase, self.encoder)).finds:
                raise QueryError(left_out.notice)
        return reading(query.text, self.encoder) if query.text else Reading()

    def _explain(self, photo_id: int, text: str, word: str | None):
        from blipcore.heat_map import sheet

        picture = self.reranker.load_picture(photo_id)
        maps = self.encoder.explain(picture, text, None if word is None else [word])
        if word is None or not maps:
            return sheet(picture, maps, text)
        return maps[0].image(picture)

    def vector(self, query: Query) -> np.ndarray | None:
        """The query's unit vector float32 [E]: the weighted sum of its words' and pictures'; None without any.

        Words that the model cannot read are not among them.
        """
        terms = [term for term in query.terms if term.text is None or reading(term.text, self.encoder).finds]
        if not terms:
            return None
        return unit(np.sum([term.weight * self._term_vector(term) for term in terms], axis=0))

    def _term_vector(self, term: Term) -> np.ndarray:
        if term.text is not None:
            return self.encoder.embed_texts([term.text])[0]
        if isinstance(term.photo, int):
            found = next(self.catalog.vectors(self.model.id, [term.photo]), None)
            if found is None:
                raise QueryError(f"the library has no photo {term.photo} to compare with: give an id from a search")
            return one_vector(found[1][0])
        return one_vector(self.encoder.embed_images([self.open_query(term.photo)])[0])

    def text_vectors(self, lines: list[str]) -> np.ndarray:
        """Unit vectors float32 [T, E]; a library's captions are embedded once, not once a photo."""
        if len(self._known_texts) > KNOWN_TEXTS:
            self._known_texts.clear()
        fresh = [line for line in lines if line not in self._known_texts]
        for at in range(0, len(fresh), TEXT_BATCH):
            part = fresh[at : at + TEXT_BATCH]
            self._known_texts.update(zip(part, self.encoder.embed_texts(part), strict=True))
        return np.stack([self._known_texts[line] for line in lines])

    def crowding(self, ids: np.ndarray) -> np.ndarray:
        """What the model's scoring takes from the cosines of photos in the index. -> float32 [n]"""
        if not len(ids) or not hasattr(self.encoder, "crowding"):
            return np.zeros(len(ids), np.float32)
        return self.encoder.crowding(self.index.vectors(ids))

    def _text_crowding(self, lines: list[str]) -> np.ndarray:
        """Likewise of texts: one that lies near every photo says little of any. -> float32 [T]

        In a large library its own photos tell which texts do.
        """
        if not lines or not self.encoder.scoring.text_crowding_weight or not hasattr(self.encoder, "text_crowding"):
            return np.zeros(len(lines), np.float32)
        among = self._sample()
        return self.encoder.text_crowding(self.text_vectors(lines), among if len(among) >= ENOUGH else None)

    def cosines(self, ids: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """Of photos in the index with a unit vector [E]. -> float32 [n]."""
        if not len(ids):
            return np.zeros(0, np.float32)
        return np.clip(nearest_cosines(self.index.vectors(ids) @ vector), -1, 1)

    def standing(self, ids: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """How near photos are to a unit vector [E], in standard deviations over the library's mean: float64 [n]."""
        mean, spread = self.background(vector)
        return (self.cosines(ids, vector).astype(float) - mean) / max(spread, 1e-6)

    def background(self, vector: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of a query's cosines over the library: what an average photo has."""
        sample = nearest_cosines(self._sample() @ vector)
        return float(sample.mean()), float(sample.std())

    def _sample(self) -> np.ndarray:
        """Vectors of some of the library's photos, the same ones as long as it does not change."""
        if self._sampled is None or self._sampled[0] != self.index.generation:
            ids = self.index.ids()
            some = np.random.default_rng(0).choice(ids, min(len(ids), SAMPLE), replace=False)
            self._sampled = self.index.generation, self.index.vectors(some)
        return self._sampled[1]

    def nearest(
        self, vector: np.ndarray, k: int, among: np.ndarray | None = None, approximate: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest photos of a unit vector [E]. -> (ids int64 [n], cosines float32 [n]), best first."""
        if not len(self.index) or k <= 0 or (among is not None and not len(among)):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        scores, ids = self.index.search(vector[None], k, among, approximate=approximate)
        found = ids[0] >= 0
        return ids[0][found], np.clip(scores[0][found], -1, 1)  # float16 vectors are not exactly of unit length

    def _candidates(self, query: Query, wanted: int, excluded: Exclusion, approximate: bool) -> Candidates:
        """Photos that may answer, best first by both lists; all pass the filters, and no words leave them out."""
        found = self._found(query, wanted * SPARE if excluded else wanted, excluded, approximate)
        return found.only(~excluded.said_beside(found.ids)) if excluded else found

    def _found(self, query: Query, wanted: int, excluded: Exclusion, approximate: bool) -> Candidates:
        vector = self.vector(query)
        condition = compile_filters(query.where)
        if vector is None and not query.text:
            return self._newest(condition, wanted)
        among = None if condition is None else self._passing(condition)
        wanted += len(query.photo_ids)
        ids, itc = NO_PHOTOS if vector is None else self.nearest(vector, wanted, among, approximate)
        if excluded and len(ids):
            order = np.argsort(excluded.likeness(ids).sum(1) - self.standing(ids, vector), kind="stable")
            ids, itc = ids[order], itc[order]
        searchable = self.index.ids() if among is None else among
        texts = (self.texts, self.written) if query.text else ()
        found = fuse(ids, *(each.search(query.text, wanted, searchable) for each in texts))
        if vector is None:  # words that the model cannot read are looked for beside the photos alone
            return found.only(~np.isin(found.ids, query.photo_ids))
        known = dict(zip(ids.tolist(), itc.tolist(), strict=True))
        others = found.ids[found.itc_ranks == 0]
        known |= dict(zip(others.tolist(), self.cosines(others, vector).tolist(), strict=True))
        cosines = np.array([known[i] for i in found.ids.tolist()], np.float32)
        found = replace(found, cosines=cosines, crowding=self.crowding(found.ids))
        return found.only(~np.isin(found.ids, query.photo_ids))

    def _passing(self, condition) -> np.ndarray:
        """Sorted int64 ids of the photos in the index that pass a filter.

        The index is level with the catalog: that a photo has a vector and lies on disk need not be asked again.
        """
        rows = self.catalog.stream(select(Photo.id).where(condition).order_by(Photo.id))
        passing = np.fromiter((row[0] for row in rows), np.int64)
        return passing[np.isin(passing, self.index.ids(), assume_unique=True)]

    def _newest(self, condition, wanted: int) -> Candidates:
        """Photos that pass a filter, the newest first: all there is to go by where nothing is looked for."""
        query = select(Photo.id).join(Embedding, Embedding.photo_id == Photo.id)
        query = query.where(Embedding.model_id == self.model.id, is_present(Photo.id))
        query = query if condition is None else query.where(condition)
        rows = self.catalog.rows(query.order_by(Photo.taken_at.desc().nulls_last(), Photo.id.desc()).limit(wanted))
        ids = np.array([row.id for row in rows], np.int64)
        nothing, unread = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.float32)
        return Candidates(ids, None, unread, unread, nothing, nothing)

    def _likelihoods(self, text: str, found: Candidates, margins: dict[int, float]) -> dict[int, float]:
        """What the decoder thinks of the best of those that ITM read, where the model's scoring asks for it."""
        from blipcore.calibration import DECODED

        scoring = self.encoder.scoring
        if not scoring.likelihood_weight or not margins:
            return {}
        read = np.array([photo_id in margins for photo_id in found.ids.tolist()])
        ids, cosines = found.ids[read], self._weighable(found, read)
        score = {i: scoring.fused(margins[i], itc) for i, itc in zip(ids.tolist(), cosines.tolist(), strict=True)}
        return self.reranker.likelihoods(text, sorted(score, key=score.get, reverse=True)[:DECODED])

    # -- the order ------------------------------------------------------------------------------------------

    def _rows(
        self,
        found: Candidates,
        margins: dict[int, float],
        query: Query,
        against: dict[int, np.ndarray] | None = None,
        likelihoods: dict[int, float] | None = None,
    ) -> list[_Row]:
        """Candidates in their final order: those that were read by what speaks for them, then the others as found.

        Args:
            against: photo id -> the log odds of each phrase that must not be there.
            likelihoods: of those that the decoder read.
        """
        ids = found.ids.tolist()
        cosines = [None] * len(found) if found.cosines is None else found.cosines.tolist()
        read = [row for row, photo_id in enumerate(ids) if photo_id in margins]
        told = {}
        if read:
            itc = self._weighable(found, read)
            named = [ids[row] for row in read]
            spoken_against = np.array([against[i] for i in named]) if against else None
            asked, weighed = [query.text] * len(read), [(likelihoods or {}).get(i) for i in named]
            told = self._told(
                asked, named, [margins[i] for i in named], itc, (found.strengths[read], found.written[read]),
                spoken_against, weighed,
            )  # fmt: skip
        rows = [
            _Row(photo_id, cosine, itc_rank or None, text_rank or None, **told.get(photo_id, {}))
            for photo_id, cosine, itc_rank, text_rank in zip(
                ids, cosines, found.itc_ranks.tolist(), found.text_ranks.tolist(), strict=True
            )
        ]
        named = [row.photo_id for row in rows if row.itm is not None and (query.is_exact or row.text_rank)]
        sure = frozenset(named) if query.is_exact else self.texts.with_all_words(query.text, named) if named else ()
        return _ordered(replace(row, likely=True) if row.photo_id in sure else row for row in rows)

    def _weighable(self, found: Candidates, rows) -> np.ndarray:
        """The cosines of some candidates as the model's scoring weighs them; zeros where nothing has any."""
        if found.cosines is None:
            return np.zeros(len(found.ids[rows]))
        return found.cosines[rows] - found.crowding[rows]

    def _told(self, texts, ids, margins, cosines, beside=(0.0, 0.0), against=None, likelihoods=None) -> dict[int, dict]:
        """What the second stage says of photos that it read, as fields of `_Row`.

        Args:
            texts: [n], what each was read with. margins, cosines: [n]. beside: strengths and written of the candidates.
            against: log odds [n, number of phrases], of what must not be there.
            likelihoods: [n], None of what the decoder did not read.
        """
        from blipcore.calibration import shortness, sigmoid

        scoring, margins = self.encoder.scoring, np.asarray(margins, np.float64)
        likelihoods = likelihoods or [None] * len(ids)
        nats = np.array([each or 0.0 for each in likelihoods])
        score = scoring.scale * scoring.fused(margins, cosines, nats) + scoring.beside(*beside)
        probability = sigmoid(scoring.log_odds(margins, cosines, shortness(texts), beside, nats))
        if against is not None:
            score = score - AGAINST * against.sum(1)
            probability = probability * [none_shown(each) for each in against]
        columns = zip(ids, sigmoid(margins).tolist(), probability.tolist(), likelihoods, score.tolist(), strict=True)
        return {
            i: {"itm": m, "probability": p, "likely": p >= LIKELY, "likelihood": found, "score": s}
            for i, m, p, found, s in columns
        }

    def _results(self, rows: list[_Row]) -> list[SearchResult]:
        photos = self.catalog.photo_rows([row.photo_id for row in rows])
        results = []
        for row in rows:
            photo = photos.get(row.photo_id)
            if photo is None or photo["path"] is None:  # went missing since the index was brought level
                continue
            results.append(
                SearchResult(
                    len(results) + 1, row.photo_id, photo["path"], None if row.itc is None else round(row.itc, 5),
                    row.itm, row.probability, photo["caption"], photo["taken_at"], self.model.name,
                    itc_rank=row.itc_rank, text_rank=row.text_rank, likely=row.likely, likelihood=row.likelihood,
                )
            )  # fmt: skip
        return results


def _ordered(rows: Iterable[_Row]) -> list[_Row]:
    """Those that the second stage read first, the likely ones by their score; the others stay as they were."""
    rows = list(rows)
    read = sorted((row for row in rows if row.itm is not None), key=lambda row: (not row.likely, -row.score))
    return read + [row for row in rows if row.itm is None]


def _passes(row: _Row, min_probability: float | None, likely: bool) -> bool:
    if min_probability is not None and (row.probability is None or row.probability < min_probability):
        return False
    return bool(row.likely) or not likely
