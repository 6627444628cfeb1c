"""Two-stage search: query -> vector -> candidates -> matching -> ranked results.

First stage: cosines of BLIP's contrastive vectors over the whole library (ITC). Second stage: the matching
model scores the best candidates (ITM), and both become one score and one probability (blipcore.calibration).
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime

import numpy as np

from indexer.catalog import Catalog
from indexer.query import Query, compile_filter
from indexer.rerank import Reranker
from indexer.vector_index import VectorIndex

TEXT_BATCH = 256
KNOWN_TEXTS = 100_000  # texts whose vectors are kept in memory: 1 kB each
EXCLUSION_PROBABILITY = 0.5  # a photo whose match with a phrase to leave out is likelier than not is dropped


@dataclass(frozen=True)
class SearchResult:
    """A photo that answers a query, and why.

    Attributes:
        itc: cosine with the query, -1 to 1. itm: the matching model's own probability, 0 to 1.
        probability: calibrated match probability. Both are None where the result was not re-ranked.
        question, answer: what was asked of the results, and this photo's answer (None: it could not be read).
    """

    rank: int
    photo_id: int
    path: str
    itc: float
    itm: float | None
    probability: float | None
    caption: str | None
    taken_at: datetime | None
    model: str
    question: str | None = None
    answer: str | None = None

    def as_dict(self) -> dict:
        """As JSON values; question and answer only where something was asked."""
        values = asdict(self)
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
    """Results, best first, with how many of the candidates the second stage read and how long it all took."""

    def __init__(self, results: Iterable, *, reranked: int = 0, candidates: int = 0, seconds: float = 0.0):
        super().__init__(results)
        self.reranked, self.candidates, self.seconds = reranked, candidates, seconds


def nearest_cosines(cosines: np.ndarray) -> np.ndarray:
    """Cosines [n] of photos with one vector, or [n, Q] of photos with several, of which the nearest counts. -> [n]."""
    return cosines.max(-1) if cosines.ndim > 1 else cosines


def one_vector(vectors: np.ndarray) -> np.ndarray:
    """A picture as a query: its unit vector [E]; of several [Q, E], their direction together."""
    if vectors.ndim == 1:
        return vectors
    total = vectors.sum(0)
    return total / max(np.linalg.norm(total), 1e-12)


class Searcher:
    """Answers queries over one catalog with one model.

    Args:
        encoder: a blipcore encoder. index: its vectors, level with the catalog. load_picture: photo id -> picture.
    """

    def __init__(self, catalog: Catalog, index: VectorIndex, encoder, model_row, reranker: Reranker, open_query):
        self.catalog, self.index, self.encoder = catalog, index, encoder
        self.model, self.reranker, self.open_query = model_row, reranker, open_query
        self._known_texts: dict[str, np.ndarray] = {}

    def search(
        self,
        query: Query,
        *,
        top_k: int = 20,
        rerank: int = 100,
        budget_seconds: float | None = None,
        min_probability: float | None = None,
    ) -> SearchResults:
        """The best `top_k` photos for a query; the best `rerank` of the first stage are read by the second."""
        started = time.monotonic()
        rerank = rerank if query.text and self.encoder.can_match else 0
        among = self._among(query)
        ids, itc = self._candidates(self.vector(query), max(top_k, rerank), among)
        if query.without:
            ids, itc = self._exclude(ids, itc, query.without)
        margins = self.reranker.score(query.text, ids[:rerank].tolist(), budget_seconds) if rerank else {}
        scored = self._ordered(ids, itc, margins)
        if min_probability is not None:
            scored = [row for row in scored if row[3] is not None and row[3] >= min_probability]
        return SearchResults(
            self._results(scored[:top_k]),
            reranked=len(margins),
            candidates=len(ids),
            seconds=time.monotonic() - started,
        )

    def similar(self, photo_id: int, top_k: int = 20, where=None) -> SearchResults:
        """Photos whose vectors lie next to this one's; the photo itself is left out."""
        started = time.monotonic()
        vector = next((v for _, v in self.catalog.vectors(self.model.id, [photo_id])), None)
        if vector is None:
            return SearchResults([])
        among = self._among(Query(text="-", where=where))
        ids, itc = self._candidates(one_vector(vector[0]), top_k + 1, among)
        others = ids != photo_id
        scored = [(int(i), float(s), None, None) for i, s in zip(ids[others], itc[others], strict=True)][:top_k]
        return SearchResults(self._results(scored), candidates=len(ids), seconds=time.monotonic() - started)

    def describe(self, picture, texts: dict[str, int | None], top_k: int = 5, rerank: int = 32) -> SearchResults:
        """The texts that fit a picture best. `texts` maps each text to a photo that carries it, or None."""
        started = time.monotonic()
        lines = list(texts)
        pixels = self.encoder.pixels([picture])
        tokens = self.encoder.image_tokens(pixels)
        itc = nearest_cosines(self._text_vectors(lines) @ self.encoder.embed_tokens(tokens)[0].T)
        order = np.argsort(-itc, kind="stable")[: max(top_k, rerank)]
        margins = {}
        if self.encoder.can_match:
            best = order[:rerank]
            pairs = np.stack([np.zeros(len(best), int), np.arange(len(best))], 1)
            found = self.encoder.match_tokens(tokens, [lines[i] for i in best], pairs)
            margins = dict(zip(best.tolist(), found.tolist(), strict=True))
        scored = self._ordered(order, itc[order], margins)[:top_k]
        results = [
            TextResult(rank, lines[i], cosine, itm, probability, texts[lines[i]])
            for rank, (i, cosine, itm, probability) in enumerate(scored, start=1)
        ]
        return SearchResults(results, reranked=len(margins), candidates=len(lines), seconds=time.monotonic() - started)

    def vector(self, query: Query) -> np.ndarray:
        """The query's unit vector float32 [E]: of its words, its picture, or half way between the two."""
        vectors = []
        if query.text:
            vectors.append(self.encoder.embed_texts([query.text])[0])
        if query.image is not None:
            vectors.append(one_vector(self.encoder.embed_images([self.open_query(query.image)])[0]))
        total = np.sum(vectors, axis=0)
        return total / max(np.linalg.norm(total), 1e-12)

    def _text_vectors(self, lines: list[str]) -> np.ndarray:
        """Unit vectors float32 [T, E]; a library's captions are embedded once, not once a photo."""
        if len(self._known_texts) > KNOWN_TEXTS:
            self._known_texts.clear()
        fresh = [line for line in lines if line not in self._known_texts]
        for at in range(0, len(fresh), TEXT_BATCH):
            part = fresh[at : at + TEXT_BATCH]
            self._known_texts.update(zip(part, self.encoder.embed_texts(part), strict=True))
        return np.stack([self._known_texts[line] for line in lines])

    def _among(self, query: Query) -> np.ndarray | None:
        condition = compile_filter(query.where)
        return None if condition is None else self.catalog.searchable_ids(self.model.id, condition)

    def _candidates(self, vector: np.ndarray, k: int, among) -> tuple[np.ndarray, np.ndarray]:
        if not len(self.index) or k <= 0 or (among is not None and not len(among)):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        scores, ids = self.index.search(vector[None], k, among)
        found = ids[0] >= 0
        return ids[0][found], np.clip(scores[0][found], -1, 1)  # float16 vectors are not exactly of unit length

    def _exclude(self, ids: np.ndarray, itc: np.ndarray, phrases) -> tuple[np.ndarray, np.ndarray]:
        """Drop candidates that the matching model finds likelier than not to show one of the phrases."""
        shown: set[int] = set()
        for phrase in phrases:
            vector = self.encoder.embed_texts([phrase])[0]
            margins = self.reranker.score(phrase, ids.tolist())
            for part, vectors in self.catalog.vectors(self.model.id, margins):
                read = np.array([margins[photo_id] for photo_id in part.tolist()])
                probability = self.encoder.scoring.probability(read, nearest_cosines(vectors @ vector))
                shown.update(part[probability >= EXCLUSION_PROBABILITY].tolist())
        keep = ~np.isin(ids, list(shown))
        return ids[keep], itc[keep]

    def _ordered(self, ids, itc, margins: dict) -> list[tuple[int, float, float | None, float | None]]:
        """(id, itc, itm, probability), re-ranked ones first by their fused score, the others by cosine."""
        from blipcore.calibration import sigmoid

        scoring = self.encoder.scoring
        read, rest = [], []
        for item, cosine in zip(np.asarray(ids).tolist(), np.asarray(itc).tolist(), strict=True):
            if item in margins:
                margin = margins[item]
                probability = float(scoring.probability(margin, cosine))
                read.append((float(scoring.fused(margin, cosine)), item, cosine, float(sigmoid(margin)), probability))
            else:
                rest.append((item, cosine, None, None))
        read.sort(key=lambda row: -row[0])
        return [row[1:] for row in read] + rest

    def _results(self, scored: list) -> list[SearchResult]:
        photos = self.catalog.photo_rows([row[0] for row in scored])
        results = []
        for photo_id, itc, itm, probability in scored:
            photo = photos.get(photo_id)
            if photo is None or photo["path"] is None:  # went missing since the index was brought level
                continue
            results.append(
                SearchResult(
                    len(results) + 1, photo_id, photo["path"], round(itc, 5), itm, probability,
                    photo["caption"], photo["taken_at"], self.model.name,
                )
            )  # fmt: skip
        return results
