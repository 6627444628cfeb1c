"""The search that the address names: reading and writing it, and its results, which the session keeps.

The address is the query (?q=..&where=..&similar=..&example=..), so that links, reload and Back bring it back. A picture
that was dropped on the page is in it by its hash; the picture itself waits in this process.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

import streamlit as st
from PIL import Image

from app import state
from indexer.errors import QueryError
from indexer.filters import split_filter

PAGE_SIZES, RERANK, SORTS = (12, 24, 48, 96), (0, 50, 100, 200), ("relevance", "newest", "oldest")
LONGEST = 2000  # letters of a query or filter
TEXTS = ("q", "where", "ask", "answer")
DEFAULTS = {"top": 24, "rerank": 100, "sort": "relevance", "page": 1, "all": 0, "by": ""} | dict.fromkeys(TEXTS, "")
OPTIONS = {"top": PAGE_SIZES, "rerank": RERANK, "sort": SORTS, "all": (0, 1)}
DEPTH = 480  # results that a search brings at first: whole pages of every size
EXAMPLES = 64  # dropped pictures that are kept


@dataclass(frozen=True)
class Wanted:
    """The search.

    Attributes:
        example: the hash of a dropped picture. similar: a photo to find others like; a sent box ends it.
        ask: a question for the results; answer: the condition that they must fulfil; by: the model that answers.
        per_page, page: of the results. everything: the less likely ones too.
    """

    text: str = ""
    where: str = ""
    example: str = ""
    similar: str = ""
    ask: str = ""
    answer: str = ""
    by: str = ""
    rerank: int = 100
    sort: str = "relevance"
    per_page: int = 24
    page: int = 1
    everything: bool = False

    @property
    def is_search(self) -> bool:
        return bool(self.text or self.where or self.example or self.similar or self.ask or self.answer)

    @property
    def depth(self) -> int:
        """How many results are needed: beyond the page at hand, so that it is known whether there are more."""
        if self.ask:  # each of them is asked
            return self.per_page
        depth = DEPTH
        while depth <= self.page * self.per_page:
            depth *= 2
        return depth

    @property
    def key(self) -> tuple:
        """What the results depend on."""
        named = (self.text, self.where, self.example, self.similar, self.ask, self.answer, self.by)
        return (*named, self.rerank, self.depth)


# -- the address ----------------------------------------------------------------------------------------------


def read_address(key: str):
    """A value of the address, or its default where it is not there or makes no sense."""
    value, default = st.query_params.get(key), DEFAULTS[key]
    if key in OPTIONS:
        return {str(option): option for option in OPTIONS[key]}.get(value, default)
    if key == "page":
        return max(1, int(value)) if value and value.isdecimal() and len(value) < 6 else default
    return (value or default)[:LONGEST]


def answering_models() -> list[str]:
    """Models on this machine that can answer a question about the results."""
    return [name for name, can in state.library().able_models().items() if "ask" in can]


def wanted() -> Wanted:
    """The search of the address; without its question where no model here could answer."""
    texts = {key: read_address(key).strip() for key in TEXTS}
    models, by = answering_models(), read_address("by")
    if not models:
        texts |= {"ask": "", "answer": ""}
    return Wanted(
        text=texts["q"],
        where=texts["where"],
        example=st.query_params.get("example", ""),
        similar=st.query_params.get("similar", ""),
        ask=texts["ask"],
        answer=texts["answer"],
        by=by if by in models or not models else models[0],
        rerank=read_address("rerank"),
        sort=read_address("sort"),
        per_page=read_address("top"),
        page=read_address("page"),
        everything=bool(read_address("all")),
    )


def go(drop: Iterable[str] = ("page", "photo"), **changes) -> None:
    """Change the address; what has its default is left out, and so is what is in `drop` (a new search: page 1)."""
    held = {name: value for name, value in st.query_params.items() if name not in {*drop, *changes}}
    new = {name: str(value) for name, value in changes.items() if value not in {DEFAULTS.get(name, ""), ""}}
    st.query_params.from_dict(held | new)


def search_address(arguments: Mapping) -> dict[str, str]:
    """A saved search (the arguments of `PhotoLibrary.search`) as an address."""
    without = arguments.get("without") or ()
    without = [without] if isinstance(without, str) else without
    text = ", ".join([*filter(None, [arguments.get("text")]), *(f"no {phrase}" for phrase in without)])
    where = arguments.get("where") or ""
    if isinstance(where, Mapping):
        where = " ".join(term(name, value) for name, value in where.items())
    named = {"q": text, "where": where, "ask": arguments.get("ask"), "answer": arguments.get("answer")}
    return {name: value for name, value in named.items() if value}


def search_arguments(wanted: Wanted) -> dict:
    """A search as it is saved: the arguments of `PhotoLibrary.search`. A dropped picture cannot be saved."""
    text = " + ".join(filter(None, [wanted.text, wanted.similar and f"photo:{wanted.similar}"]))
    named = {"text": text, "where": wanted.where, "ask": wanted.ask, "answer": wanted.answer}
    return {name: value for name, value in named.items() if value}


# -- filters: parts of `where` --------------------------------------------------------------------------------


def terms(where: str) -> list[str]:
    """The parts of a filter; all of it as one where it cannot be read."""
    try:
        return split_filter(where)
    except QueryError:
        return [where]


def term(field: str, value: object, sign: str = "=") -> str:
    """One part of a filter, its value in quotation marks where it needs them."""
    text = str(value).replace('"', "")
    is_word = text and all(letter.isalnum() or letter in "-_.,*" for letter in text)
    return f"{field}{sign}{text}" if is_word else f'{field}{sign}"{text}"'


def with_term(where: str, new: str, *, instead_of: Iterable[str] = ()) -> str:
    """A filter with one more part, in the place of those that begin with one of the given words."""
    parts = terms(where)
    if len(parts) == 1 and " OR " in parts[0]:
        parts = [f"({parts[0]})"]
    return " ".join([*(part for part in parts if part != new and not part.startswith(tuple(instead_of))), new])


def without_term(where: str, gone: str) -> str:
    return " ".join(part for part in terms(where) if part != gone)


# -- dropped pictures -----------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def _dropped() -> OrderedDict[str, Image.Image]:
    return OrderedDict()


def keep_example(data: bytes) -> str:
    """Keep a dropped picture, as long as others do not push it out. -> its hash. Raises UnreadablePhoto."""
    name, kept = sha256(data).hexdigest()[:32], _dropped()
    kept[name] = state.open_upload(data)
    while len(kept) > EXAMPLES:
        kept.popitem(last=False)
    return name


def example(name: str) -> Image.Image | None:
    """A dropped picture; None where it is not here any more, as after a restart."""
    return _dropped().get(name)


# -- results --------------------------------------------------------------------------------------------------


def find(wanted: Wanted) -> Iterator[tuple]:
    """The results, which the session keeps: (SearchResults, whether they are the last ones), once or twice.

    Raises:
        QueryError, ModelError, PhotoNotFound: as `PhotoLibrary.search`.
    """
    photos = state.library()
    key = wanted.key, photos.catalog.generation()
    kept = st.session_state.get("found")
    if kept and kept[0] == key:
        yield kept[1], True
        return
    for hits, is_last in _found(photos, wanted):
        if is_last:
            st.session_state["found"] = key, hits
        yield hits, is_last


def forget_results() -> None:
    """What the session found may not be so any more: a photo's facts were changed."""
    st.session_state.pop("found", None)


def _found(photos, wanted: Wanted) -> Iterator[tuple]:
    where = wanted.where or None
    if wanted.similar:
        yield photos.similar(wanted.similar, top_k=wanted.depth, where=where), True
        return
    named = {"image": example(wanted.example) if wanted.example else None, "where": where}
    if wanted.ask or wanted.answer:
        if not wanted.ask:
            raise QueryError("there is a condition on the answers, but no question: ask one")
        asked = {"ask": wanted.ask, "answer": wanted.answer or None, "ask_model": wanted.by or None}
        yield photos.search(wanted.text or None, **named, **asked, top_k=wanted.depth, rerank=wanted.rerank), True
        return
    stages = photos.search_progressively(wanted.text or None, **named, top_k=wanted.depth, rerank=wanted.rerank)
    reads, is_last = wanted.rerank and photos.encoder().can_match, False
    for number, hits in enumerate(stages):
        is_last = bool(number or not reads or not hits.candidates or not (hits.query and hits.query.text))
        yield hits, is_last
    if not is_last:  # words that the matching model cannot read: there is no second stage
        yield hits, True


def in_order(hits, wanted: Wanted) -> list:
    """The results as they are shown: the likely ones or all, by what the reader wants."""
    likely = hits.cut if hits.cut and not wanted.everything and not wanted.ask else len(hits)
    shown = list(hits[:likely])
    if wanted.sort != "relevance":
        dated = [hit for hit in shown if hit.taken_at]
        dated.sort(key=lambda hit: hit.taken_at, reverse=wanted.sort == "newest")
        shown = dated + [hit for hit in shown if not hit.taken_at]
    return shown
