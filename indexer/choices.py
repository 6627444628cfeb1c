"""What a library's photos offer to choose from: values for filters, and searches to begin with."""

from collections.abc import Iterable

from sqlalchemy import extract, func, select

from indexer.catalog import SURE_CAPTION, Catalog, is_present
from indexer.schema import Caption, Photo, Tag

SHORTEST, LONGEST = 3, 9  # words of a caption that is an example of what to search for
SAMPLE = 200  # captions that examples are chosen from


def filter_choices(catalog: Catalog) -> dict[str, list[tuple[object, int]]]:
    """{"year", "camera", "format": [(value, photos on disk that have it)]}; years latest first, others by count."""
    year = extract("year", Photo.taken_at)
    counted = {"year": year, "camera": Photo.camera_model, "format": Photo.format}
    found = {name: _counts(catalog, column) for name, column in counted.items()}
    found["year"].sort(reverse=True)
    return found


def _counts(catalog: Catalog, column) -> list[tuple[object, int]]:
    photos = func.count().label("photos")
    query = select(column.label("value"), photos).where(column.is_not(None), is_present(Photo.id))
    return [(row.value, row.photos) for row in catalog.rows(query.group_by("value").order_by(photos.desc(), "value"))]


def example_queries(catalog: Catalog, count: int) -> list[str]:
    """Searches that find something: short captions of different photos, then tags."""
    sure = Caption.score.is_(None) | (Caption.score >= SURE_CAPTION)
    # every so many captions, so that neither the oldest nor the newest folder gives them all
    step = max(1, (catalog.scalar(select(func.max(Caption.id))) or 0) // SAMPLE)
    query = select(Caption.text).where(sure, Caption.id % step == 0, is_present(Caption.photo_id))
    captions = [row.text.strip().rstrip(" .") for row in catalog.rows(query.order_by(Caption.id).limit(SAMPLE))]
    short = [text for text in captions if SHORTEST <= len(text.split()) <= LONGEST and _is_plain(text)]
    photos = func.count(Tag.photo_id.distinct())
    names = select(func.min(Tag.name).label("name")).group_by(Tag.folded).order_by(photos.desc(), Tag.folded)
    tags = [row.name for row in catalog.rows(names.limit(count))]
    return list(dict.fromkeys([*_spread(short, count), *tags]))[:count]


def _is_plain(text: str) -> bool:
    """Whether the search box reads it as words alone."""
    return all(letter.isalpha() or letter in " '" for letter in text)


def _spread(texts: Iterable[str], count: int) -> list[str]:
    """As many different texts, from beginning to end."""
    different = list(dict.fromkeys(texts))
    step = max(1, len(different) // max(count, 1))
    return different[::step][:count]
