"""The filter language: what may stand in a filter, and the SQL that it becomes.

A filter is `field operator value` terms with AND, OR, NOT and parentheses; AND may be left out:

    year=2023 camera=Pixel*                taken=2023-06..2023-08 AND NOT format=PNG
    folder="/home/me/Pictures/2024"        has:gps OR has:caption
    near=48.85,2.35,10km rating>=4         album:"Summer 2023" size>2MB
    answer("how many people?") > 2         answer("is it indoors?") = yes

`:` is another way to write `=`. `*` and `?` in a text value are wildcards; text compares without regard to case. A
photo of which a value is not known does not fulfil a term, and does fulfil its NOT. `answer("...")` reads what models
have answered before, with the conditions of indexer.conditions (`= 2..5`, `= red|blue`); a photo that was never asked
does not match. `answer=beach` finds photos by any answer. docs/search.md lists the fields.
"""

import calendar
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path

from lark import Lark, Token, Transformer, Tree, UnexpectedInput, v_args
from lark.exceptions import VisitError
from sqlalchemy import ColumnElement, and_, exists, extract, func, not_, or_, true

from indexer.catalog import under
from indexer.conditions import parse_condition, plain_question
from indexer.errors import QueryError
from indexer.full_text import having
from indexer.geography import KM_A_DEGREE, parse_box, parse_near
from indexer.schema import Album, AlbumPhoto, Answer, Caption, File, Photo, Tag, fold

MAX_LENGTH, MAX_NESTING = 1000, 20  # beyond them, Python and SQLite run out of stack
EXCERPT = 40  # letters that an error shows before and after the place
QUOTED = r'"[^"]*"|“[^”]*”'
GRAMMAR = rf"""
    ?start: disjunction
    ?disjunction: conjunction (_OR conjunction)*
    ?conjunction: negation (_AND? negation)*
    ?negation: _NOT negation -> negate | "(" disjunction ")" | term
    term: FIELD OPERATOR value | ANSWER STRING ")" OPERATOR value -> answer
    value: STRING | WORD
    FIELD: /[a-z_]+(?=\s*(=|!=|>=|<=|>|<)|:)/
    OPERATOR: ">=" | "<=" | "!=" | "=" | ">" | "<" | ":"
    ANSWER: /answer\s*\(/
    STRING: /{QUOTED}/
    WORD: /[^\s()"“<>=!]+/
    _AND.2: /AND\b/
    _OR.2: /OR\b/
    _NOT.2: /NOT\b/
    %ignore /\s+/
"""


@dataclass(frozen=True)
class FilterText:
    """A filter that stands in a longer text, so that an error can point at its place there.

    Attributes:
        text: all of it; the filter is text[start:end]. negated: photos that do not pass are wanted.
    """

    text: str
    start: int
    end: int
    negated: bool = False

    def __str__(self) -> str:
        source = self.text[self.start : self.end]
        return f"NOT ({source})" if self.negated else source


@dataclass(frozen=True)
class Phrase:
    """Words that must stand, in this order, in a photo's own texts (see indexer.full_text); or must not.

    Attributes:
        words: without punctuation, as `indexer.full_text.words` gives them.
    """

    words: tuple[str, ...]
    negated: bool = False

    def __str__(self) -> str:
        return ("NOT " if self.negated else "") + f'"{" ".join(self.words)}"'


Where = Mapping[str, object] | str | FilterText | Phrase


class _Unfit(Exception):
    """A value that a field does not take; the message is the rest of a sentence after the field's name."""


def compile_filter(where: Where | None) -> ColumnElement | None:
    """A filter, as text or as {field: value}, -> a condition on Photo; None filters nothing.

    A list of values in a mapping means any of them.

    Raises:
        QueryError: names the place in the text, the unknown field, or the value that does not fit.
    """
    if not where:
        return None
    if isinstance(where, Phrase):
        found = Photo.id.in_(having(where.words))
        return _without(found) if where.negated else found
    if isinstance(where, str):
        where = FilterText(where, 0, len(where))
    if isinstance(where, FilterText):
        found = _parse(where)
        return found if found is None or not where.negated else _without(found)
    return and_(true(), *(_of_mapping(name, value) for name, value in where.items()))


def compile_filters(filters: tuple[Where, ...]) -> ColumnElement | None:
    """All of several filters, or None where they filter nothing."""
    conditions = [found for where in filters if (found := compile_filter(where)) is not None]
    return and_(*conditions) if conditions else None


def unreadable(what: str, text: str, place: int, why: str) -> QueryError:
    """An error that points at a place (a position in `text`, from 0)."""
    before = text[max(0, place - EXCERPT) : place]
    after = text[place : place + EXCERPT]
    before = ("..." if place > EXCERPT else "") + before
    after += "..." if place + EXCERPT < len(text) else ""
    return QueryError(f"the {what} cannot be read at position {place + 1}: {before}>>>{after} ({why})", place)


def _parse(where: FilterText) -> ColumnElement | None:
    source = where.text[where.start : where.end]
    if not source.strip():
        return None
    if len(source) > MAX_LENGTH:
        why = f"it is longer than {MAX_LENGTH} characters: shorten it"
        raise unreadable("filter", where.text, where.start + MAX_LENGTH, why)
    nested = [found.start() for found in re.finditer(r"NOT|\(", source)]
    if len(nested) > MAX_NESTING:
        why = f"it has more than {MAX_NESTING} NOT and parentheses: make it simpler"
        raise unreadable("filter", where.text, where.start + nested[MAX_NESTING], why)
    try:
        return _ToSql(where).transform(_parser().parse(source))
    except UnexpectedInput as error:
        at_end = getattr(getattr(error, "token", None), "type", None) == "$END"
        place = len(source) if at_end or error.pos_in_stream is None else error.pos_in_stream
        why = "a filter looks like: year=2023 camera=Pixel*"
        raise unreadable("filter", where.text, where.start + place, why) from error
    except VisitError as error:
        raise error.orig_exc from error


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr")


def split_filter(where: str) -> list[str]:
    """The parts of a filter that must all be passed, as they are written: `year=2023 (a=1 OR a=2)` has two.

    Raises:
        QueryError: it cannot be read.
    """
    if compile_filter(where) is None:
        return []
    whole = Lark(GRAMMAR, parser="lalr", keep_all_tokens=True).parse(where)
    parts = whole.children if isinstance(whole, Tree) and whole.data == "conjunction" else [whole]
    found = []
    for part in parts:
        tokens = [part] if isinstance(part, Token) else list(part.scan_values(lambda value: isinstance(value, Token)))
        if tokens[0].type != "_AND":
            found.append(where[tokens[0].start_pos : tokens[-1].end_pos])
    return found


@v_args(inline=True)
class _ToSql(Transformer):
    """A filter's tree -> a condition; knows where in the whole text the filter stands."""

    def __init__(self, where: FilterText):
        super().__init__()
        self.where = where

    def value(self, token):
        """The token, with what it says: without its quotation marks."""
        return token, str(token)[1:-1] if token.type == "STRING" else str(token)

    def term(self, field, operator, value) -> ColumnElement:
        if field not in FIELDS:
            raise self._error(field, unknown_filter(str(field)))
        token, said = value
        try:
            return FIELDS[field](str(field), "=" if operator == ":" else str(operator), said)
        except _Unfit as error:
            raise self._error(token, f"{field} {error}") from error

    def answer(self, _, question, operator, value) -> ColumnElement:
        token, said = value
        asked = str(question)[1:-1]
        if not asked.strip(" ?!."):
            raise self._error(question, 'there is no question: ask something, as answer("how many people?") > 2')
        try:
            return _answer(asked, ("=" if operator == ":" else operator) + said)
        except QueryError as error:
            raise self._error(token, str(error)) from error

    def negate(self, condition) -> ColumnElement:
        return _without(condition)

    def conjunction(self, *conditions) -> ColumnElement:
        return and_(*conditions)

    def disjunction(self, *conditions) -> ColumnElement:
        return or_(*conditions)

    def _error(self, token, why: str) -> QueryError:
        return unreadable("filter", self.where.text, self.where.start + token.start_pos, why)


def unknown_filter(name: str) -> str:
    return f"there is no filter {name!r}: filters are {', '.join(sorted(FIELDS))}"


def _of_mapping(name: str, value: object) -> ColumnElement:
    if name not in FIELDS:
        raise QueryError(unknown_filter(name))
    try:
        if isinstance(value, list | tuple | set | frozenset):
            return or_(*(FIELDS[name](name, "=", one) for one in value), *([] if value else [~true()]))
        return FIELDS[name](name, "=", value)
    except _Unfit as error:
        raise QueryError(f"{name} {error}") from error


# -- numbers, sizes, days -------------------------------------------------------------------------------------


def _number(quantity: ColumnElement, read: Callable[[str], float] | None = None):
    """A condition on a number; `a..b` is a range whose ends belong to it, and either end may be left out."""
    read = read or _plain_number

    def condition(name: str, operator: str, value: object) -> ColumnElement:
        if isinstance(value, str) and ".." in value:
            low, high = _ends(value)
            inside = and_(
                quantity.is_not(None),
                *([quantity >= read(low)] if low else []),
                *([quantity <= read(high)] if high else []),
            )
            return _equality(name, operator, inside)
        return _compare(quantity, operator, read(value))

    return condition


def _plain_number(value: object) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _Unfit(f"needs a number, not {value!r}")
    return number


def _month(value: object) -> float:
    text = str(value).strip().lower()
    names = [name.lower() for name in calendar.month_name]
    if len(text) >= 3 and (found := [at for at, name in enumerate(names) if at and name.startswith(text)]):
        return found[0]
    try:
        return _plain_number(value)
    except _Unfit:
        raise _Unfit(f"needs a month, as 7 or July, not {value!r}") from None


_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(b|kb|mb|gb|mp)?", re.IGNORECASE)
_BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}


def _size(name: str, operator: str, value: object) -> ColumnElement:
    """Of the file (`2MB`) or of the picture (`12MP`)."""
    parts = _ends(value) if isinstance(value, str) and ".." in value else [value]
    found = [_SIZE.fullmatch(str(part).strip()) for part in parts if part]
    if not found or None in found:
        raise _Unfit(f"needs a size like 2MB, 500kB or 12MP, not {value!r}")
    of_picture = {(match[2] or "").lower() == "mp" for match in found}
    if len(of_picture) > 1:
        raise _Unfit(f"compares bytes or megapixels, not both: {value!r}")

    def read(part: object) -> float:
        number, unit = _SIZE.fullmatch(str(part).strip()).groups()
        return float(number) * (1 if of_picture == {True} else _BYTES[(unit or "").lower()])

    quantity = Photo.width * Photo.height / 1e6 if of_picture == {True} else Photo.bytes
    return _number(quantity, read)(name, operator, value)


def _ends(value: str) -> tuple[str, str]:
    low, high = (part.strip() for part in value.split("..", 1))
    if not low and not high:
        raise _Unfit(f"needs a beginning or an end, not {value!r}")
    return low, high


def _day(moment: ColumnElement):
    def condition(name: str, operator: str, value: object) -> ColumnElement:
        """A day, month or year stands for all of it: taken=2023-06 is the whole of June."""
        if isinstance(value, str) and ".." in value:
            first, last = _ends(value)
            start, end = (_span(first)[0] if first else datetime.min), (_span(last)[1] if last else datetime.max)
        else:
            start, end = _span(value)
        inside = and_(moment >= start, moment < end)
        return {
            "=": inside, "!=": _without(inside),
            ">=": moment >= start, "<": moment < start, ">": moment >= end, "<=": moment < end,
        }[operator]  # fmt: skip

    return condition


def _span(value: object) -> tuple[datetime, datetime]:
    """A day, month or year -> (its beginning, the beginning of the next)."""
    if isinstance(value, date):
        start = datetime(value.year, value.month, value.day)
        return start, start + timedelta(days=1)
    try:
        parts = str(value).split("-")
        if not all(part.isdecimal() for part in parts):
            raise ValueError(value)
        numbers = [int(part) for part in parts]
        start = datetime(*[*numbers, 1, 1][:3])
        if len(numbers) == 1:
            return start, datetime(start.year + 1, 1, 1)
        if len(numbers) == 2:
            return start, datetime(start.year + start.month // 12, start.month % 12 + 1, 1)
        return start, start + timedelta(days=1)
    except (ValueError, TypeError, OverflowError):
        raise _Unfit(f"needs a date like 2023, 2023-06 or 2023-06-30, not {value!r}") from None


# -- words ----------------------------------------------------------------------------------------------------


def _words(*columns: ColumnElement):
    def condition(name: str, operator: str, value: object) -> ColumnElement:
        return _equality(name, operator, or_(*(_says(text, str(value)) for text in columns)))

    return condition


def _says(text: ColumnElement, value: str) -> ColumnElement:
    return func.coalesce(text, "").like(_like(value), escape="\\")


def _like(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


_FORMATS = {"jpg": "jpeg", "tif": "tiff", "heic": "heif"}  # names of files -> of formats


def _format(name: str, operator: str, value: object) -> ColumnElement:
    said = str(value).lower().removeprefix(".")
    return _equality(name, operator, _says(Photo.format, _FORMATS.get(said, said)))


def _folder(name: str, operator: str, value: object) -> ColumnElement:
    """A whole path is the folder and what lies below it; a name or part of a path, any folder called so."""
    said = str(value)
    if said.startswith(("/", "~", "./", "../")) or Path(said).is_absolute():
        below = under(File.path, str(Path(said).expanduser().absolute()))
    else:
        below = File.path.like(f"%/{_like(said.strip('/'))}/%", escape="\\")
    found = exists().where(File.photo_id == Photo.id, File.missing_since.is_(None), below)
    return _equality(name, operator, found)


def _in_path(value: object) -> ColumnElement:
    return exists().where(
        File.photo_id == Photo.id,
        File.missing_since.is_(None),
        File.path.like(_like(f"*{value}*"), escape="\\"),
    )


def _in_caption(value: object) -> ColumnElement:
    return exists().where(Caption.photo_id == Photo.id, Caption.text.like(_like(f"*{value}*"), escape="\\"))


def _file(name: str, operator: str, value: object) -> ColumnElement:
    return _equality(name, operator, _in_path(value))


def _caption(name: str, operator: str, value: object) -> ColumnElement:
    return _equality(name, operator, _in_caption(value))


def _title(name: str, operator: str, value: object) -> ColumnElement:
    return _equality(name, operator, _says(Photo.title, f"*{value}*"))


def _text(name: str, operator: str, value: object) -> ColumnElement:
    """In a caption, the title, or the path of a file."""
    return _equality(name, operator, or_(_in_caption(value), _says(Photo.title, f"*{value}*"), _in_path(value)))


def _tag(name: str, operator: str, value: object) -> ColumnElement:
    found = exists().where(Tag.photo_id == Photo.id, Tag.folded.like(_like(fold(str(value))), escape="\\"))
    return _equality(name, operator, found)


def _album(name: str, operator: str, value: object) -> ColumnElement:
    found = exists().where(
        AlbumPhoto.photo_id == Photo.id,
        AlbumPhoto.album_id == Album.id,
        Album.folded.like(_like(fold(str(value))), escape="\\"),
    )
    return _equality(name, operator, found)


# -- yes and no -----------------------------------------------------------------------------------------------

_YES, _NO = {"yes", "true", "1"}, {"no", "false", "0"}


def _favourite(name: str, operator: str, value: object) -> ColumnElement:
    said = str(value).lower()
    if said not in _YES | _NO:
        raise _Unfit(f"is yes or no, not {value!r}")
    return _equality(name, operator, Photo.favourite if said in _YES else _without(Photo.favourite))


def _is(name: str, operator: str, value: object) -> ColumnElement:
    if str(value).lower() not in {"favourite", "favorite"}:
        raise _Unfit(f"takes favourite, not {value!r}")
    return _equality(name, operator, Photo.favourite)


def _has(name: str, operator: str, value: object) -> ColumnElement:
    known = {
        "gps": Photo.latitude.is_not(None) & Photo.longitude.is_not(None),
        "date": Photo.taken_at.is_not(None),
        "camera": Photo.camera_model.is_not(None),
        "lens": Photo.lens.is_not(None),
        "title": Photo.title.is_not(None),
        "rating": Photo.rating.is_not(None),
        "caption": exists().where(Caption.photo_id == Photo.id),
        "tag": exists().where(Tag.photo_id == Photo.id),
        "album": exists().where(AlbumPhoto.photo_id == Photo.id),
        "answer": exists().where(Answer.photo_id == Photo.id),
    }
    if str(value).lower() not in known:
        raise _Unfit(f"takes {', '.join(known)}, not {value!r}")
    return _equality(name, operator, known[str(value).lower()])


def _orientation(name: str, operator: str, value: object) -> ColumnElement:
    known = {
        "portrait": Photo.height > Photo.width,
        "landscape": Photo.width > Photo.height,
        "square": Photo.width == Photo.height,
    }
    if str(value).lower() not in known:
        raise _Unfit(f"is {', '.join(known)}, not {value!r}")
    return _equality(name, operator, known[str(value).lower()])


# -- places ---------------------------------------------------------------------------------------------------


def _near(name: str, operator: str, value: object) -> ColumnElement:
    try:
        latitude, longitude, distance = parse_near(str(value))
    except ValueError:
        raise _Unfit(f"needs latitude, longitude and distance, as 48.85,2.35,10km, not {value!r}") from None
    band = Photo.latitude.between(latitude - distance / KM_A_DEGREE, latitude + distance / KM_A_DEGREE)
    found = and_(band, func.km_between(Photo.latitude, Photo.longitude, latitude, longitude) <= distance)
    return _equality(name, operator, found)


def _box(name: str, operator: str, value: object) -> ColumnElement:
    try:
        south, west, north, east = parse_box(str(value))
    except ValueError:
        raise _Unfit(f"needs two corners, as 48.8,2.2,48.9,2.5, not {value!r}") from None
    across = Photo.longitude.between(west, east)
    if west > east:  # over the 180th meridian
        across = or_(Photo.longitude >= west, Photo.longitude <= east)
    return _equality(name, operator, and_(Photo.latitude.between(south, north), across))


# -- answers --------------------------------------------------------------------------------------------------


def _answer_text(name: str, operator: str, value: object) -> ColumnElement:
    found = exists().where(Answer.photo_id == Photo.id, Answer.answer.like(_like(f"*{value}*"), escape="\\"))
    return _equality(name, operator, found)


def _answer(question: str, condition: str) -> ColumnElement:
    parse_condition(condition)  # an error is met here, not in the middle of a query
    return exists().where(
        Answer.photo_id == Photo.id,
        Answer.question == plain_question(question),
        func.fulfils(Answer.answer, condition),
    )


# -- parts ----------------------------------------------------------------------------------------------------


def _equality(name: str, operator: str, condition: ColumnElement) -> ColumnElement:
    if operator not in {"=", "!="}:
        raise _Unfit(f"compares with = or !=, not {operator}")
    return condition if operator == "=" else _without(condition)


def _without(condition: ColumnElement) -> ColumnElement:
    """NOT in the plain sense: a photo of which a value is not known does not fulfil the condition."""
    return not_(func.coalesce(condition, False))


def _compare(quantity: ColumnElement, operator: str, number: float) -> ColumnElement:
    return {
        "=": quantity == number, "!=": _without(quantity == number), ">": quantity > number,
        "<": quantity < number, ">=": quantity >= number, "<=": quantity <= number,
    }[operator]  # fmt: skip


FIELDS = {
    "id": _number(Photo.id),
    "year": _number(extract("year", Photo.taken_at)),
    "month": _number(extract("month", Photo.taken_at), _month),
    "taken": _day(Photo.taken_at),
    "added": _day(Photo.added_at),
    "camera": _words(Photo.camera_model, Photo.camera_make),
    "lens": _words(Photo.lens),
    "folder": _folder,
    "file": _file,
    "album": _album,
    "tag": _tag,
    "title": _title,
    "caption": _caption,
    "text": _text,
    "favourite": _favourite,
    "favorite": _favourite,
    "is": _is,
    "rating": _number(Photo.rating),
    "has": _has,
    "near": _near,
    "box": _box,
    "orientation": _orientation,
    "format": _format,
    "type": _format,
    "size": _size,
    "bytes": _number(Photo.bytes),
    "width": _number(Photo.width),
    "height": _number(Photo.height),
    "answer": _answer_text,
}
