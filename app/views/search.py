"""The search page: words, an example photo or both; the address (?q=..&where=..) is the query."""

from dataclasses import dataclass
from hashlib import sha256

import streamlit as st
from PIL import Image

from app import components, state
from indexer.conditions import EXAMPLES
from indexer.errors import QueryError, UnreadablePhoto

TOP, RERANK = (12, 24, 48, 96), (0, 50, 100, 200)
LONGEST = 500  # letters of a query or filter
TEXTS = ("q", "where", "ask", "answer")
BOXES = {"top": 24, "rerank": 100, "by": ""} | dict.fromkeys(TEXTS, "")  # in the address where the form differs


@dataclass(frozen=True)
class Wanted:
    """The query.

    Attributes:
        picture: an uploaded example. similar: a photo to find others like; a sent form ends it.
        ask: a question for the results; answer: the condition that they must fulfil; by: the model that answers.
    """

    text: str
    where: str
    top_k: int
    rerank: int
    picture: Image.Image | None
    similar: str | None
    ask: str
    answer: str
    by: str


def page() -> None:
    try:
        wanted = search_form()
        if wanted.similar:
            show_similar(wanted)
        elif wanted.text or wanted.picture or wanted.ask:
            show_found(wanted)
        else:
            show_latest()
    except (QueryError, UnreadablePhoto) as error:
        components.problem(error)
    if not answering_models():
        components.no_model("ask")


def search_form() -> Wanted:
    """One box, and the rest behind it."""
    fill_boxes()
    with st.form("search", border=False):
        with st.container(horizontal=True, key="search-row"):
            text = st.text_input(
                "Describe a photo",
                key="q",
                type="search",
                placeholder="Describe a photo: two dogs playing in the snow",
                label_visibility="collapsed",
                max_chars=LONGEST,
            )
            sent = st.form_submit_button("Search", type="primary", icon=":material/search:")
        with st.container(horizontal=True, key="search-more"):
            where = st.text_input(
                "Filter",
                key="where",
                placeholder="Filter: year=2023 camera=Pixel* has:gps",
                label_visibility="collapsed",
                max_chars=LONGEST,
            )
            upload = example_photo()
            top_k, rerank = options()
        ask, answer, by = question()
    if sent:
        held = {"q": text, "where": where, "top": top_k, "rerank": rerank, "ask": ask, "answer": answer}
        write_address(held | {"by": by if ask else ""}, upload)
    picture, similar = st.session_state.get(example_key()), st.query_params.get("similar")
    texts = (part.strip() for part in (ask, answer))
    return Wanted(text.strip(), where.strip(), top_k, rerank, picture, similar, *texts, by)


def question() -> tuple[str, str, str]:
    """(question for the results, condition on the answers, model that answers), empty where no model can answer."""
    models = answering_models()
    if not models:
        return "", "", ""
    by = read_address("by")
    folded = st.expander("Ask the results", icon=":material/help:", expanded=bool(read_address("ask")))
    with folded, st.container(horizontal=True, key="ask-row"):
        ask = st.text_input("Question", key="ask", placeholder="how many people are there?", max_chars=LONGEST)
        answer = st.text_input("Keep answers like", key="answer", placeholder=EXAMPLES, max_chars=LONGEST)
        at = models.index(by) if by in models else 0
        by = st.selectbox("Model", models, index=at, key=f"by-{by}", format_func=components.model_name)
    return ask, answer, by


def answering_models() -> list[str]:
    return [name for name, can in state.library().able_models().items() if "ask" in can]


def fill_boxes() -> None:
    """The address decides what the boxes hold: a link, a reload or Back brings another query than they have."""
    address = {key: read_address(key) for key in TEXTS}
    if st.session_state.get("address") != address or "q" not in st.session_state:
        st.session_state.update(address, address=address)


def read_address(key: str):
    value, default = st.query_params.get(key), BOXES[key]
    if isinstance(default, str):
        return (value or default)[:LONGEST]
    known = {str(option): option for option in (TOP if key == "top" else RERANK)}
    return known.get(value, default)


def write_address(held: dict, upload) -> None:
    """The form was sent: what it holds becomes the address, an example photo by its hash."""
    address = {key: str(value) for key, value in held.items() if value != BOXES[key]}
    example = st.query_params.get("example")
    if upload:
        example = sha256(upload.getvalue()).hexdigest()[:12]
        st.session_state[f"picture-{example}"] = state.open_upload(upload.getvalue())
    st.session_state["address"] = {key: held[key] for key in TEXTS}
    st.query_params.from_dict(address | ({"example": example} if example else {}))


def example_key() -> str:
    """Where the session keeps the example photo that the address names."""
    return f"picture-{st.query_params.get('example')}"


def example_photo():
    """A new example photo, if one is given. Once searched for, it is the address's, and the field is fresh."""
    with st.popover("Example photo", icon=":material/add_photo_alternate:"):
        return st.file_uploader(
            "Photos like this one, or like it and fitting the words",
            type=components.UPLOAD_TYPES,
            max_upload_size=components.UPLOAD_MEGABYTES,
            key=f"upload-{st.query_params.get('example')}",
        )


def options() -> tuple[int, int]:
    """(photos shown, candidates re-ranked). Their keys hold the address's value: a new address, a new choice."""
    top, rerank = read_address("top"), read_address("rerank")
    with st.popover("Options", icon=":material/tune:"):
        top_k = st.segmented_control("Photos shown", TOP, default=top, key=f"top-{top}", required=True)
        read = st.segmented_control(
            "Candidates re-ranked",
            RERANK,
            default=rerank,
            key=f"rerank-{rerank}",
            required=True,
            format_func=lambda count: str(count) if count else "none",
            help="The matching model reads this many of the first-stage candidates against your words.",
        )
    return top_k, read


def show_found(wanted: Wanted) -> None:
    if state.never_indexed():
        components.empty_library()
        return
    if wanted.picture:
        show_example(wanted)
    if wanted.answer and not wanted.ask:
        raise QueryError("there is a condition on the answers, but no question: ask one")
    with st.spinner("Searching, and asking the results" if wanted.ask else "Searching"):
        hits = state.library().search(
            wanted.text or None,
            image=wanted.picture,
            where=wanted.where or None,
            top_k=wanted.top_k,
            rerank=wanted.rerank,
            ask=wanted.ask or None,
            answer=wanted.answer or None,
            ask_model=wanted.by or None,
        )
    show_hits(hits, wanted)


def show_example(wanted: Wanted) -> None:
    rest = {name: value for name, value in st.query_params.items() if name != "example"}
    components.example(
        "Photos like your example" + (", and fitting the words" if wanted.text else ""),
        lambda: st.image(wanted.picture, alt="your example photo", output_format="JPEG"),
        lambda: st.page_link(components.HOME, label="Remove", icon=":material/close:", query_params=rest),
    )


def show_similar(wanted: Wanted) -> None:
    photos = state.library()
    photo = photos.photo(wanted.similar)
    label = components.photo_tile(photo).label
    components.example(f"Photos like **{components.plain(label)}**", lambda: components.thumbnail(photo["id"], label))
    with st.spinner("Searching"):
        hits = photos.similar(photo["id"], top_k=wanted.top_k, where=wanted.where or None)
    show_hits(hits, wanted)


def show_hits(hits, wanted: Wanted) -> None:
    if not hits and not state.library().latest(1):
        components.empty_library()
        return
    if not hits:
        passes = "No photo passes the filter." if wanted.where else "No photo found."
        words = "No photo's answer fulfils the condition." if wanted.answer else passes
        st.info(words, icon=":material/search_off:")
        return
    second = f"{hits.reranked} of {hits.candidates} candidates re-ranked" if hits.reranked else "not re-ranked"
    count = f"{len(hits)} photo{'s' if len(hits) > 1 else ''}"
    st.caption(f"{count} · {second} · {max(hits.seconds, 0.01):.2f} s")
    components.photo_grid(map(components.result_tile, hits), "hits")


def show_latest() -> None:
    """Before the first query: what the library holds."""
    latest = state.library().latest(12)
    if not latest:
        components.empty_library()
        return
    st.caption("Latest in your library")
    components.photo_grid(map(components.photo_tile, latest), "latest")
