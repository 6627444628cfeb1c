"""Questions over photos: what a model answered is kept in the catalog, so that no photo is asked the same thing twice.

Answers filter a search's results, or are counted over them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert as upsert

from indexer.catalog import Catalog, chunks, now
from indexer.conditions import Condition, plain_answer, plain_question
from indexer.errors import UnreadablePhoto
from indexer.schema import Answer

ASK_BATCH = 8


@dataclass(frozen=True)
class AnswerGroup:
    """An answer that several photos share.

    Attributes:
        answer: in the words of the best-ranked photo. weight: its photos' share of all match probability, 0 to 1.
        hits: the results that it rests on, best first.
    """

    answer: str
    count: int
    weight: float
    hits: tuple

    def as_dict(self) -> dict:
        photos = [{"photo_id": hit.photo_id, "path": hit.path, "probability": hit.probability} for hit in self.hits]
        return {"answer": self.answer, "count": self.count, "weight": self.weight, "photos": photos}


def ask_photos(
    catalog: Catalog,
    encoder,
    load_picture: Callable,
    photo_ids: Sequence[int],
    question: str,
    *,
    cached: bool = True,
) -> dict[int, str]:
    """Ask each photo a question, those not asked yet; -> {photo id: answer}, in the order of `photo_ids`.

    Each batch is a transaction: what was answered before an interruption is kept.

    Args:
        encoder: a blipcore encoder that can answer. load_picture: photo id -> a picture; its UnreadablePhoto leaves
            out that photo only. cached: False asks all of them again.
    """
    key = plain_question(question)
    known = kept_answers(catalog, photo_ids, key, encoder.fingerprint) if cached else {}
    for group in chunks((photo_id for photo_id in photo_ids if photo_id not in known), ASK_BATCH):
        pictures = _readable(load_picture, group)
        if not pictures:
            continue
        answers = encoder.ask(list(pictures.values()), [question.strip()] * len(pictures))
        found = {photo_id: answer.strip() for photo_id, answer in zip(pictures, answers, strict=True)}
        with catalog.transaction() as connection:
            for photo_id, answer in found.items():
                _store(connection, photo_id, key, encoder.fingerprint, answer)
        known |= found
    return {photo_id: known[photo_id] for photo_id in photo_ids if photo_id in known}


def kept_answers(catalog: Catalog, photo_ids: Iterable[int], key: str, model: str) -> dict[int, str]:
    """The answers in the catalog to one question (see `plain_question`) by the model of this fingerprint."""
    found = {}
    for part in chunks(photo_ids):
        query = select(Answer.photo_id, Answer.answer).where(
            Answer.photo_id.in_(part), Answer.question == key, Answer.model == model
        )
        found |= {row.photo_id: row.answer for row in catalog.rows(query)}
    return found


def beside(hits: Iterable, question: str, answers: dict[int, str], condition: Condition | None = None) -> list:
    """Search results with their answers; with a condition, those whose answer fulfils it, in their order."""
    kept = [hit for hit in hits if condition is None or (hit.photo_id in answers and condition(answers[hit.photo_id]))]
    return [
        replace(hit, rank=rank, question=question, answer=answers.get(hit.photo_id))
        for rank, hit in enumerate(kept, start=1)
    ]


def group_answers(hits: Iterable, answers: dict[int, str]) -> list[AnswerGroup]:
    """Equal answers of search results together, the most probable first; results without an answer are left out.

    A result that was not re-ranked weighs as the least probable one that was; where none was, all weigh the same.
    """
    groups: dict[str, list] = {}
    for hit in hits:
        if hit.photo_id in answers:
            groups.setdefault(plain_answer(answers[hit.photo_id]), []).append(hit)
    probabilities = [hit.probability for group in groups.values() for hit in group if hit.probability is not None]
    least = min(probabilities, default=1.0)
    mass = {
        key: sum(least if hit.probability is None else hit.probability for hit in group)
        for key, group in groups.items()
    }
    total = sum(mass.values()) or 1.0
    found = [
        AnswerGroup(answers[group[0].photo_id], len(group), mass[key] / total, tuple(group))
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda group: -group.weight)


def _readable(load_picture: Callable, photo_ids: Iterable[int]) -> dict:
    pictures = {}
    for photo_id in photo_ids:
        try:
            pictures[photo_id] = load_picture(photo_id)
        except UnreadablePhoto:
            continue
    return pictures


def _store(connection: Connection, photo_id: int, key: str, model: str, answer: str) -> None:
    values = {"answer": answer, "created_at": now()}
    row = upsert(Answer).values(photo_id=photo_id, question=key, model=model, **values)
    row = row.on_conflict_do_update(index_elements=["photo_id", "question", "model"], set_=values)
    connection.execute(row)
