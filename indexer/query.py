"""What a person asks for, as one object, and the filter language as SQL.

A filter is `field operator value` terms with AND, OR, NOT and parentheses; AND may be left out:

    year=2023 camera=Pixel*          taken>=2023-06-01 AND NOT format=PNG
    folder="/home/me/Pictures/2024"  has:gps OR has:caption
    answer("how many people?") > 2   answer("is it indoors?") = yes

`*` and `?` in a text value are wildcards; text compares without regard to case. `answer("...")` reads what models have
answered before, with the conditions of indexer.conditions (`= 2..5`, `= red|blue`); a photo that was never asked does
not match. `answer=beach` finds photos by any answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path

from lark import Lark, Transformer, UnexpectedInput, v_args
from lark.exceptions import VisitError
from sqlalchemy import ColumnElement, and_, exists, extract, func, not_, or_

from indexer.catalog import under
from indexer.conditions import parse_condition, plain_question
from indexer.errors import QueryError
from indexer.schema import Answer, Caption, File, Photo


@dataclass(frozen=True)
class Query:
    """A search: words, an example picture, or both; phrases to leave out; a filter.

    Raises:
        QueryError: neither words nor a picture.
    """

    text: str | None = None
    image: object | None = None  # a path, bytes, or a PIL image
    without: tuple[str, ...] = ()
    where: Mapping[str, object] | str | None = None

    def __post_init__(self):
        if not (self.text and self.text.strip()) and self.image is None:
            raise QueryError("nothing to search for: give words, a photo, or both")


MAX_LENGTH, MAX_NESTING = 1000, 20  # beyond them, Python and SQLite run out of stack
GRAMMAR = r"""
    ?start: disjunction
    ?disjunction: conjunction (_OR conjunction)*
    ?conjunction: negation (_AND? negation)*
    ?negation: _NOT negation -> negate | "(" disjunction ")" | term
    term: FIELD OPERATOR value | HAS -> has | ANSWER STRING ")" OPERATOR value -> answer
    value: STRING | WORD
    FIELD: /[a-z_]+(?=\s*(=|!=|>=|<=|>|<))/
    OPERATOR: ">=" | "<=" | "!=" | "=" | ">" | "<"
    HAS: /has:[a-z]+/
    ANSWER: /answer\s*\(/
    STRING: /"[^"]*"/
    WORD: /[^\s()"<>=!]+/
    _AND.2: /AND\b/
    _OR.2: /OR\b/
    _NOT.2: /NOT\b/
    %ignore /\s+/
"""


def compile_filter(where: Mapping[str, object] | str | None) -> ColumnElement | None:
    """A filter, as text or as {field: value}, -> a condition on Photo; None filters nothing.

    Raises:
        QueryError: names the place in the text, the unknown field, or the value that does not fit.
    """
    if not where:
        return None
    if isinstance(where, str):
        if len(where) > MAX_LENGTH:
            raise QueryError(f"the filter is longer than {MAX_LENGTH} characters: shorten it")
        if where.count("NOT") + where.count("(") > MAX_NESTING:
            raise QueryError(f"the filter has more than {MAX_NESTING} NOT and parentheses: make it simpler")
        return _parse(where)
    return and_(*(_condition(name, "=", value) for name, value in where.items()))


def _parse(text: str) -> ColumnElement:
    try:
        return _ToSql().transform(_parser().parse(text))
    except UnexpectedInput as error:
        at_end = getattr(getattr(error, "token", None), "type", None) == "$END"
        place = len(text) if at_end or error.pos_in_stream is None else error.pos_in_stream
        raise QueryError(
            f"the filter cannot be read at position {place + 1}: {text[:place]}>>>{text[place:]} "
            "(a filter looks like: year=2023 camera=Pixel*)"
        ) from error
    except VisitError as error:
        raise error.orig_exc from error


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr")


@v_args(inline=True)
class _ToSql(Transformer):
    def value(self, token) -> str:
        return token[1:-1] if token.type == "STRING" else str(token)

    def term(self, field, operator, value) -> ColumnElement:
        return _condition(str(field), str(operator), value)

    def has(self, token) -> ColumnElement:
        return _condition("has", "=", token[4:])

    def answer(self, _, question, operator, value) -> ColumnElement:
        return _answer(question[1:-1], operator + value)

    def negate(self, condition) -> ColumnElement:
        return _without(condition)

    def conjunction(self, *conditions) -> ColumnElement:
        return and_(*conditions)

    def disjunction(self, *conditions) -> ColumnElement:
        return or_(*conditions)


def _condition(name: str, operator: str, value: object) -> ColumnElement:
    if name not in FIELDS:
        raise QueryError(f"there is no filter {name!r}: filters are {', '.join(sorted(FIELDS))}")
    return FIELDS[name](name, operator, value)


def _number(column: ColumnElement):
    def condition(name: str, operator: str, value: object) -> ColumnElement:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise QueryError(f"{name} needs a number, not {value!r}") from None
        return _compare(column, operator, number)

    return condition


def _day(column: ColumnElement):
    def condition(name: str, operator: str, value: object) -> ColumnElement:
        """A day, month or year stands for all of it: taken=2023-06 is the whole of June."""
        start, end = _span(name, value)
        inside = and_(column >= start, column < end)
        return {
            "=": inside, "!=": _without(inside),
            ">=": column >= start, "<": column < start, ">": column >= end, "<=": column < end,
        }[operator]  # fmt: skip

    return condition


def _span(name: str, value: object) -> tuple[datetime, datetime]:
    if isinstance(value, date):
        start = datetime(value.year, value.month, value.day)
        return start, start + timedelta(days=1)
    parts = str(value).split("-")
    try:
        numbers = [int(part) for part in parts]
        start = datetime(*[*numbers, 1, 1][:3])
        if len(numbers) == 1:
            return start, datetime(start.year + 1, 1, 1)
        if len(numbers) == 2:
            return start, datetime(start.year + start.month // 12, start.month % 12 + 1, 1)
        return start, start + timedelta(days=1)
    except (ValueError, TypeError, OverflowError):
        raise QueryError(f"{name} needs a date like 2023, 2023-06 or 2023-06-30, not {value!r}") from None


def _words(*columns: ColumnElement):
    def condition(name: str, operator: str, value: object) -> ColumnElement:
        pattern = _like(str(value))
        found = or_(*(func.coalesce(column, "").like(pattern, escape="\\") for column in columns))
        return _equality(name, operator, found)

    return condition


def _like(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


def _folder(name: str, operator: str, value: object) -> ColumnElement:
    folder = str(Path(str(value)).expanduser().absolute())
    found = exists().where(File.photo_id == Photo.id, File.missing_since.is_(None), under(File.path, folder))
    return _equality(name, operator, found)


def _file(name: str, operator: str, value: object) -> ColumnElement:
    pattern = _like(f"*{value}*")
    found = exists().where(
        File.photo_id == Photo.id, File.missing_since.is_(None), File.path.like(pattern, escape="\\")
    )
    return _equality(name, operator, found)


def _caption(name: str, operator: str, value: object) -> ColumnElement:
    found = exists().where(Caption.photo_id == Photo.id, Caption.text.like(_like(f"*{value}*"), escape="\\"))
    return _equality(name, operator, found)


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


def _has(name: str, operator: str, value: object) -> ColumnElement:
    known = {
        "gps": Photo.latitude.is_not(None),
        "date": Photo.taken_at.is_not(None),
        "camera": Photo.camera_model.is_not(None),
        "caption": exists().where(Caption.photo_id == Photo.id),
    }
    if str(value) not in known:
        raise QueryError(f"{name} takes {', '.join(known)}, not {value!r}")
    return _equality(name, operator, known[str(value)])


def _equality(name: str, operator: str, condition: ColumnElement) -> ColumnElement:
    if operator not in {"=", "!="}:
        raise QueryError(f"{name} compares with = or !=, not {operator}")
    return condition if operator == "=" else _without(condition)


def _without(condition: ColumnElement) -> ColumnElement:
    """NOT in the plain sense: a photo of which a value is not known does not fulfil the condition."""
    return not_(func.coalesce(condition, False))


def _compare(column: ColumnElement, operator: str, number: float) -> ColumnElement:
    return {
        "=": column == number, "!=": _without(column == number), ">": column > number,
        "<": column < number, ">=": column >= number, "<=": column <= number,
    }[operator]  # fmt: skip


FIELDS = {
    "id": _number(Photo.id),
    "year": _number(extract("year", Photo.taken_at)),
    "month": _number(extract("month", Photo.taken_at)),
    "taken": _day(Photo.taken_at),
    "width": _number(Photo.width),
    "height": _number(Photo.height),
    "bytes": _number(Photo.bytes),
    "camera": _words(Photo.camera_model, Photo.camera_make),
    "lens": _words(Photo.lens),
    "format": _words(Photo.format),
    "folder": _folder,
    "file": _file,
    "caption": _caption,
    "answer": _answer_text,
    "has": _has,
}
