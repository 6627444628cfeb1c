"""Which of people's own captions and tags does the matching model believe to be wrong?

`photoblip audit`. Each photo is read once, together with all that is written about it. What a model wrote about the
same photo and is surer of is suggested in its place; nothing is changed.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sqlalchemy import select, union

from indexer.catalog import Catalog, chunks, is_present
from indexer.jobs import Progress, ProgressCallback
from indexer.matching import look, match
from indexer.rerank import Reranker
from indexer.schema import Caption, Tag

BATCH = 16  # photos
BELOW = 0.05  # match probability under which a text is suspicious


@dataclass(frozen=True)
class Suspicion:
    """A text that probably does not describe its photo.

    Attributes:
        kind: "caption" or "tag". text: as it stands in the catalog. probability: that it describes the photo.
        suggestion: what a model wrote about the photo and is surer of, with that probability; None where nothing is.
    """

    photo_id: int
    path: str | None
    kind: str
    text: str
    probability: float
    suggestion: str | None = None
    suggestion_probability: float | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def audit(
    catalog: Catalog,
    reranker: Reranker,
    *,
    below: float = BELOW,
    photo_ids: Iterable[int] | None = None,
    progress: ProgressCallback | None = None,
) -> list[Suspicion]:
    """People's captions and tags with a match probability under `below`, the most suspicious first.

    Args:
        photo_ids: photos to look at; by default all on disk that people wrote something about.
    """
    ids = described_photos(catalog) if photo_ids is None else list(photo_ids)
    found, done, failed = [], 0, 0
    for part in chunks(ids, BATCH):
        looked = look(catalog, reranker, part)
        if looked is not None:
            found += _suspicions(catalog, reranker.encoder, looked, below)
        done, failed = done + len(part), failed + len(part) - (len(looked.ids) if looked else 0)
        if progress:
            progress(Progress(done, len(ids), failed))
    rows = catalog.photo_rows({one.photo_id for one in found})
    found.sort(key=lambda one: (one.probability, one.photo_id, one.text))
    return [Suspicion(**{**one.as_dict(), "path": rows[one.photo_id]["path"]}) for one in found]


def described_photos(catalog: Catalog) -> list[int]:
    """Ids of photos on disk that people, or the files themselves, say something about."""
    captions = select(Caption.photo_id).where(Caption.source == "user", is_present(Caption.photo_id))
    tags = select(Tag.photo_id).where(Tag.source != "generated", is_present(Tag.photo_id))
    return sorted(row[0] for row in catalog.rows(union(captions, tags)))


def _suspicions(catalog: Catalog, encoder, looked, below: float) -> list[Suspicion]:
    written, generated = _texts(catalog, looked.ids)
    texts = [[text for _, text in written[i]] + generated[i] for i in looked.ids]
    found = []
    for photo_id, probabilities in zip(looked.ids, match(encoder, looked, texts), strict=True):
        own, others = written[photo_id], generated[photo_id]
        of_others = dict(zip(others, probabilities[len(own) :].tolist(), strict=True))
        best = max(of_others, key=of_others.get, default=None)
        for (kind, text), probability in zip(own, probabilities.tolist(), strict=False):
            if probability < below:
                better = kind == "caption" and best is not None and of_others[best] > probability
                suggestion = (best, of_others[best]) if better else (None, None)
                found.append(Suspicion(photo_id, None, kind, text, probability, *suggestion))
    return found


def _texts(catalog: Catalog, photo_ids: list[int]) -> tuple[dict, dict]:
    """({photo id: (kind, text) of people}, {photo id: captions of models})."""
    written, generated = defaultdict(list), defaultdict(list)
    captions = select(Caption.photo_id, Caption.text, Caption.source).where(Caption.photo_id.in_(photo_ids))
    for row in catalog.rows(captions.order_by(Caption.id)):
        if row.source == "user":
            written[row.photo_id].append(("caption", row.text))
        elif row.text not in generated[row.photo_id]:
            generated[row.photo_id].append(row.text)
    tags = select(Tag.photo_id, Tag.name).where(Tag.photo_id.in_(photo_ids), Tag.source != "generated")
    for row in catalog.rows(tags.group_by(Tag.photo_id, Tag.folded).order_by(Tag.folded)):
        written[row.photo_id].append(("tag", row.name))
    return written, generated
