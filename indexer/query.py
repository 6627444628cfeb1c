"""What a person asks for, as one object, and the language of the search box.

Plain sentences are what the box is for, and they stay what they are. Beside words it understands

    red car, no people            dogs without people        what is left out; also -people and - something
    2:golden retriever + snow     beach - 0.5:grass          weighted sums of words and photos, as rclip has them
    photo:123 + night             ~/query.jpg, at sunset     example photos, by id or file
    "golden gate" at dawn         "IMG_1234"                 words that must stand in a photo's own texts
    dogs year=2023 album:Spain    dogs (tag=a OR tag=b)      filters (see indexer.filters)

The grammar is below; docs/search.md tells people of it, and of what stays plain words.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lark import Lark, Token, Transformer, UnexpectedInput, v_args
from lark.exceptions import VisitError

from indexer.errors import QueryError
from indexer.filters import (
    FIELDS,
    QUOTED,
    FilterText,
    Phrase,
    Where,
    compile_filter,
    compile_filters,
    unknown_filter,
    unreadable,
)
from indexer.full_text import words

__all__ = ["Query", "Term", "compile_filter"]

MAX_BOX = 2000  # letters
MAX_WEIGHT = 100
LEFT_OUT = 3  # words, articles not counted, that "no ..." and "without ..." may leave out: more is a sentence
ARTICLES = {"a", "an", "the", "any"}
EVERYBODY = {"one", "anyone", "anybody", "nobody"}
PICTURES = "jpe?g|png|webp|tiff?|gif|bmp|heic|heif|avif"
_VALUE = rf'(?:{QUOTED}|[^\s()"“<>=!,;]+(?:,[^\s()"“<>=!,;]+)*)'
_FIELD = rf"(?:{'|'.join(sorted(FIELDS, key=len, reverse=True))})"
_COMPARES = r"(?:!=|>=|<=|=|>|<)"
_ROOT = r"(?:\/|~\/|[a-z]:[\\\/])"
GRAMMAR = rf"""
    start: clause? (_SEPARATOR clause? | signed | excluded)*
    clause: WEIGHT? piece+
    signed: SIGN WEIGHT? piece+
    excluded: _EXCLUDE piece+
    piece: (WORD | PHRASE | PHOTO | FILTER) | _DASH (WORD | PHRASE | PHOTO | FILTER) -> left_out

    PHRASE.9: /{QUOTED}/
    PHOTO.8: /photo:(?:{QUOTED}|\d+(?=[\s,;]|$)|{_ROOT}[^\s,;]*)|{_ROOT}[^\s,;]*\.(?:{PICTURES})(?=[\s,;]|$)/i
    FILTER.7: /{_FIELD}(?:\s*{_COMPARES}\s*|:){_VALUE}|answer\s*\(\s*(?:{QUOTED})\s*\)\s*(?:{_COMPARES}|:)\s*{_VALUE}/
    OPERATOR.6: /(?:AND|OR|NOT)(?=[\s()]|$)/
    _EXCLUDE.5: /(?:without|but\s+(?:not|no|without)|not|no|nobody)(?=[\s,;]|$)/i
    WEIGHT.4: /(?:\d+(?:\.\d+)?|\.\d+):(?=[^\W\d_]|["“\/~])/
    SIGN.4: /[+-](?=\s|$)/
    _DASH.4: /-(?=[^\W\d_]|["“])/
    _SEPARATOR.4: /[,;]+/
    BRACKET.4: /[()]/
    UNKNOWN.4: /[a-z][a-z_]+(?:!=|>=|<=|=)/
    UNCLOSED.4: /["“]/
    WORD: /(?:[^\s,;]|(?<=\d)[,;](?=\d))+/
    %ignore /\s+/
"""


@dataclass(frozen=True)
class Term:
    """A part of what is looked for: words or an example photo, and how much it counts (below 0: to be less like it).

    Attributes:
        photo: the id of one of the library's photos, or a path, bytes, or a PIL image.
    """

    weight: float = 1.0
    text: str | None = None
    photo: object | None = None


@dataclass(frozen=True)
class Query:
    """A search: a weighted sum of words and example photos; phrases to leave out; filters.

    Attributes:
        without: phrases; a photo that shows one is left out.
        where: filters that must all be passed, quoted words among them.

    Raises:
        QueryError: nothing to search for.
    """

    terms: tuple[Term, ...] = ()
    without: tuple[str, ...] = ()
    where: tuple[Where, ...] = ()

    def __post_init__(self):
        if not (self.terms or self.without or self.where):
            raise QueryError("nothing to search for: give words, a photo, or both")
        if self.terms and not self.positive:
            raise QueryError("there are only things to be less like: add what to look for")

    @classmethod
    def parse(
        cls,
        box: str | None = None,
        *,
        images: Iterable = (),
        without: Iterable[str] = (),
        where: Where | None = None,
    ) -> "Query":
        """The search box's text, and what a program gives beside it.

        Args:
            images: example photos, as Term.photo. without: phrases as they are. where: a filter.

        Raises:
            QueryError: names the place in the box or filter; nothing to search for.
        """
        read = _read(box) if box and box.strip() else _Parts()
        filters = (*read.where, *([where] if where else ()))
        compile_filters(filters)  # an error is met here, not in the middle of a search
        examples = tuple(Term(photo=image) for image in images)
        phrases = tuple(phrase.strip() for phrase in without if phrase.strip())
        return cls(read.terms + examples, read.without + phrases, filters)

    @property
    def positive(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.weight > 0)

    @property
    def text(self) -> str | None:
        """All words that are looked for: what the matching model and the full text read."""
        return ", ".join(term.text for term in self.positive if term.text) or None

    @property
    def photo_ids(self) -> tuple[int, ...]:
        """Photos of the library that are examples."""
        return tuple(term.photo for term in self.terms if isinstance(term.photo, int))

    @property
    def is_exact(self) -> bool:
        """Whether all that is looked for are quoted words, which stand beside every result."""
        quoted = [phrase for phrase in self.where if isinstance(phrase, Phrase) and not phrase.negated]
        known = {word for phrase in quoted for word in phrase.words}
        return bool(quoted) and self.text is not None and known >= set(words(self.text))

    def summary(self) -> str:
        """The query as it was understood, in one line for people."""
        weighed = (("" if term.weight == 1 else f"{term.weight:g}:") + _shown(term) for term in self.terms)
        parts = [" + ".join(weighed)] if self.terms else []
        parts += [f"leaving out: {', '.join(self.without)}"] if self.without else []
        parts += [f"where: {' AND '.join(map(_shown_filter, self.where))}"] if self.where else []
        return "; ".join(parts)


def _shown(term: Term) -> str:
    if term.text is not None:
        return term.text
    return f"photo {term.photo}" if isinstance(term.photo, int | str | Path) else "an example photo"


def _shown_filter(where: Where) -> str:
    return " AND ".join(f"{key}={value}" for key, value in where.items()) if isinstance(where, Mapping) else str(where)


# -- reading the box ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What a piece of the box asks for."""

    terms: tuple[Term, ...] = ()
    without: tuple[str, ...] = ()
    where: tuple[Where, ...] = ()

    def __add__(self, other: "_Parts") -> "_Parts":
        return _Parts(self.terms + other.terms, self.without + other.without, self.where + other.where)


class _Misread(Exception):
    """What cannot be read, at a position of the box."""

    def __init__(self, place: int, why: str):
        super().__init__(why)
        self.place, self.why = place, why


def _read(box: str) -> _Parts:
    if len(box) > MAX_BOX:
        raise QueryError(f"the query is longer than {MAX_BOX} characters: shorten it", MAX_BOX)
    try:
        return _ToParts(box).transform(_parser().parse(box))
    except _Misread as error:
        raise unreadable("query", box, error.place, error.why) from error
    except UnexpectedInput as error:
        token = getattr(error, "token", None)
        at_end = getattr(token, "type", None) == "$END"
        place = len(box) if at_end or error.pos_in_stream is None else error.pos_in_stream
        raise unreadable("query", box, place, "words, a photo or a filter are missing here") from error
    except VisitError as error:
        if isinstance(error.orig_exc, _Misread):
            raise unreadable("query", box, error.orig_exc.place, error.orig_exc.why) from error
        raise error.orig_exc from error


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", lexer="basic", postlex=_Roles())


class _Roles:
    """Decides from its neighbours what a token is, for those that plain sentences hold too: "no", "OR", "(", "2:"."""

    always_accept = ("OPERATOR", "BRACKET", "UNKNOWN", "UNCLOSED")  # no rule has them: lark would drop them

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        tokens = list(stream)
        for token in tokens:
            _refuse(token)
        tokens = _weights(_filters(tokens))
        yield from _exclusions(tokens)


def _refuse(token: Token) -> None:
    if token.type == "UNCLOSED":
        raise _Misread(token.start_pos, "this quotation mark is not closed")
    if token.type == "UNKNOWN":
        name = token.rstrip("!<>=")
        why = "a value is missing after it" if name in FIELDS else unknown_filter(name)
        raise _Misread(token.start_pos, f"{why}; plain words have spaces around the sign")


def _as(kind: str, token: Token, value: str | None = None) -> Token:
    return Token.new_borrow_pos(kind, str(token) if value is None else value, token)


def _filters(tokens: list[Token]) -> list[Token]:
    """Filters that AND, OR, NOT and brackets join become one; elsewhere these are words."""
    kinds, found, at = {"FILTER", "OPERATOR", "BRACKET"}, [], 0
    while at < len(tokens):
        end = at
        while end < len(tokens) and tokens[end].type in kinds:
            end += 1
        if end == at:
            found.append(tokens[at])
            end += 1
        else:
            found += _joined(tokens[at:end])
        at = end
    return found


def _joined(run: list[Token]) -> list[Token]:
    filters = [at for at, token in enumerate(run) if token.type == "FILTER"]
    if not filters:
        return [_as("WORD", token) for token in run]
    first, last = filters[0], filters[-1]
    # brackets and NOT before the first filter and brackets after the last belong to it, as far as they pair
    while first and (run[first - 1] == "(" or run[first - 1] == "NOT"):
        first -= 1
    while last + 1 < len(run) and run[last + 1] == ")":
        last += 1
    first, last = _paired(run, first, last)
    for token in run[:first] + run[last + 1 :]:
        if token == "OR":
            raise _Misread(token.start_pos, "OR stands between filters: words and filters are always both meant")
    whole = _as("FILTER", run[first], "")
    whole.end_pos = run[last].end_pos
    before = [_as("WORD", token) for token in run[:first] if token != "AND"]
    after = [_as("_EXCLUDE" if token == "NOT" else "WORD", token) for token in run[last + 1 :] if token != "AND"]
    return [*before, whole, *after]


def _paired(run: list[Token], first: int, last: int) -> tuple[int, int]:
    """A narrower run without the brackets at its ends that have no partner in it."""

    def depth() -> int:
        part = [str(token) for token in run[first : last + 1]]
        return part.count("(") - part.count(")")

    while depth() > 0 and "(" in run[first : last + 1] and run[first].type != "FILTER":
        first += 1
    while depth() < 0 and run[last].type != "FILTER":
        last -= 1
    return first, last


def _weights(tokens: list[Token]) -> list[Token]:
    """A weight stands at the beginning of a part; elsewhere, as in "at 5:pm", it is a word."""
    starts = [None, *tokens[:-1]]
    return [
        _as("WORD", token)
        if token.type == "WEIGHT" and before is not None and before.type not in {"_SEPARATOR", "SIGN"}
        else token
        for token, before in zip(tokens, starts, strict=True)
    ]


ENDS = {"_SEPARATOR", "SIGN", "_EXCLUDE"}
SAID = {"WORD", "PHRASE", "PHOTO"}


def _exclusions(tokens: list[Token]) -> Iterator[Token]:
    """ "no people" and its like, where they leave something out; elsewhere they are words."""
    at_start, dashed = True, False
    for at, token in enumerate(tokens):
        is_word = dashed and token.type in ENDS | {"WEIGHT"}
        is_word = is_word or (token.type == "_EXCLUDE" and not _leaves_out(tokens, at, at_start))
        read = _as("WORD", token) if is_word else token
        yield read
        if read.type == "_EXCLUDE" and read.lower() == "nobody":
            yield _as("WORD", read, "people")
        at_start = read.type in {"_SEPARATOR", "SIGN"} or (at_start and read.type == "FILTER")
        dashed = read.type == "_DASH"


def _leaves_out(tokens: list[Token], at: int, at_start: bool) -> bool:
    """Whether this "no", "not" or "without" begins a short phrase that ends the clause, and is not all there is."""
    token = tokens[at]
    mid_sentence = token.lower().startswith(("without", "but")) or token == "NOT"
    if not (at_start or mid_sentence):
        return False
    end = next((i for i in range(at + 1, len(tokens)) if tokens[i].type in ENDS), len(tokens))
    after = tokens[at + 1 : end]
    named = [part for part in after if part.type == "WORD" and part.lower() not in ARTICLES]
    others = [
        part for part in after if part.type in {"PHRASE", "PHOTO"} or (part is after[0] and part.type == "FILTER")
    ]
    if token.lower() == "nobody":
        return not after and len(tokens) > 1
    if len(named) > LEFT_OUT or not (named or others):
        return False
    return bool(others) or len(after) + 1 < len(tokens)


@v_args(inline=True)
class _ToParts(Transformer):
    """The box's tree -> what it asks for."""

    def __init__(self, box: str):
        super().__init__()
        self.box = box

    def start(self, *parts: "_Parts | _Clause") -> _Parts:
        """Clauses without a weight are one text, as it was written where nothing else is."""
        plain = [part for part in parts if isinstance(part, _Clause)]
        base = _Parts()
        if len(plain) == len(parts) and all(clause.is_plain for clause in plain):
            return _Parts((Term(text=" ".join(self.box.split())),)) if _is_said(self.box) else base
        texts = [clause.text for clause in plain if clause.text]
        if texts:
            base = _Parts((Term(text=", ".join(texts)),))
        for part in parts:
            base += part.rest if isinstance(part, _Clause) else part
        return base

    def clause(self, *parts) -> "_Clause | _Parts":
        weight, pieces = self._weight(parts)
        clause = self._clause(pieces)
        if weight is None:
            return clause
        return self._weighed(weight, clause)

    def signed(self, sign: Token, *parts) -> _Parts:
        weight, pieces = self._weight(parts)
        if sign == "+":
            return self._weighed(weight or 1.0, self._clause(pieces))
        if weight is None:
            return self._left_out(pieces)
        return self._weighed(-weight, self._clause(pieces))

    def excluded(self, *pieces) -> _Parts:
        return self._left_out(pieces)

    def piece(self, token: Token) -> Token:
        return token

    def left_out(self, token: Token) -> _Parts:
        return self._left_out([token])

    def _weight(self, parts: Sequence) -> tuple[float | None, Sequence]:
        if not (isinstance(parts[0], Token) and parts[0].type == "WEIGHT"):
            return None, parts
        weight = float(parts[0][:-1])
        if not 0 < weight <= MAX_WEIGHT:
            raise _Misread(parts[0].start_pos, f"a weight is more than 0 and at most {MAX_WEIGHT}")
        return weight, parts[1:]

    def _weighed(self, weight: float, clause: "_Clause") -> _Parts:
        terms = [Term(weight, text=clause.text)] if clause.text else []
        terms += [Term(weight * term.weight, term.text, term.photo) for term in clause.rest.terms]
        return _Parts(tuple(terms), clause.rest.without, clause.rest.where)

    def _clause(self, pieces: Sequence) -> "_Clause":
        """Pieces of one clause: what is said, and what else it asks for."""
        said, rest, plain = [], _Parts(), True
        for piece in pieces:
            if isinstance(piece, _Parts):
                rest += piece
            elif piece.type == "WORD":
                said.append((piece.start_pos, piece.end_pos, str(piece)))
                continue
            elif piece.type == "PHRASE":
                said.append((piece.start_pos, piece.end_pos, piece[1:-1].strip()))
                rest += _Parts(where=(self._phrase(piece),))
            elif piece.type == "PHOTO":
                rest += _Parts((Term(photo=self._photo(piece)),))
            else:
                rest += _Parts(where=(self._filter(piece),))
            plain = False
        return _Clause(_text_of(said), rest, plain)

    def _left_out(self, pieces: Sequence) -> _Parts:
        """The words to leave out; quoted words that must not stand there; a photo to be less like; not this filter."""
        found, said = _Parts(), []
        for at, piece in enumerate(pieces):
            if isinstance(piece, _Parts):
                found += piece
            elif piece.type == "WORD":
                said.append((piece.start_pos, piece.end_pos, str(piece)))
            elif piece.type == "PHRASE":
                found += _Parts(where=(self._phrase(piece, negated=True),))
            elif piece.type == "PHOTO":
                found += _Parts((Term(-1.0, photo=self._photo(piece)),))
            else:
                found += _Parts(where=(self._filter(piece, negated=at == 0),))
        phrase = _left_out_phrase(_text_of(said))
        return found + _Parts(without=(phrase,) if phrase else ())

    def _phrase(self, token: Token, negated: bool = False) -> Phrase:
        found = words(token[1:-1])
        if not found:
            raise _Misread(token.start_pos, "there is no word between the quotation marks")
        return Phrase(found, negated)

    def _photo(self, token: Token) -> int | str:
        said = re.sub(r"^photo:", "", token, flags=re.IGNORECASE)
        if not said.isdecimal():
            said = said.strip('"“”')
            if not re.match(_ROOT, said, re.IGNORECASE):
                raise _Misread(token.start_pos, "a photo is given by its id or its whole path, as photo:12")
            return said
        if int(said) >= 1 << 63:
            raise _Misread(token.start_pos, "there is no photo with so high a number")
        return int(said)

    def _filter(self, token: Token, negated: bool = False) -> FilterText:
        return FilterText(self.box, token.start_pos, token.end_pos, negated)


@dataclass(frozen=True)
class _Clause:
    """A clause without a weight: its words, what else it asks for, and whether it is words alone."""

    text: str
    rest: _Parts
    is_plain: bool


def _text_of(said: Sequence[tuple[int, int, str]]) -> str:
    """(start, end, text) of words, joined as they were written; empty where there is no letter in them."""
    joined, last = "", None
    for start, end, text in said:
        joined += text if last is None or start == last else f" {text}"
        last = end
    return joined if _is_said(joined) else ""


def _is_said(text: str) -> bool:
    return bool(words(text))


def _left_out_phrase(text: str) -> str:
    """ "any people." -> "people", "one" (of "no one") -> "people"."""
    phrase = text.strip(" .!?:").removeprefix("any ")
    return "people" if phrase.lower() in EVERYBODY else phrase
