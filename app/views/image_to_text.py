"""Image to text: the library's texts and the user's own lines that fit a dropped photo, and captions written now."""

import streamlit as st
from PIL import Image

from app import components, finding, state
from app.texts import _
from indexer.errors import UnreadablePhoto

BEST, CANDIDATE_TAGS = 5, 1000


def page() -> None:
    components.name_drop_button()
    with st.container(key="drop-here"):
        upload = st.file_uploader(
            _("Which words, and which photos, fit this one?"),
            type=components.UPLOAD_TYPES,
            max_upload_size=components.UPLOAD_MEGABYTES,
            key="upload",
        )
    if upload is None:
        st.caption(_("The photo stays on this machine and is not added to the library."))
        return
    try:
        name = finding.keep_example(upload.getvalue())
    except UnreadablePhoto as error:
        components.problem(error)
        return
    picture = finding.example(name)
    shown, words = st.columns([2, 3], gap="large")
    with shown:
        with st.container(key="large"):
            st.image(picture, alt=_("the uploaded photo"), output_format="JPEG")
        st.page_link(
            components.HOME,
            label=_("Search with this photo"),
            icon=":material/search:",
            query_params={"example": name},
        )
    with words:
        own_lines(picture)
        written_now(name, picture)
        library_texts(picture)
    similar_photos(picture)


@st.fragment
def own_lines(picture: Image.Image) -> None:
    """Zero-shot: which of the lines that are typed fits best."""
    with components.errors_as_words():
        st.subheader(_("Choose between your own lines"))
        with st.form("lines", border=False):
            text = st.text_area(
                _("One text a line"),
                key="candidates",
                max_chars=20_000,
                placeholder=_("a dog on a beach") + "\n" + _("a city at night"),
            )
            st.form_submit_button(_("Compare"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            with st.spinner(_("Comparing")):
                hits = state.library().describe(picture, candidates=lines, top_k=len(lines))
            components.text_list([text_row(hit) for hit in hits])


@st.fragment
def written_now(name: str, picture: Image.Image) -> None:
    """A caption in each style of decoding, with its match probability; none is kept."""
    photos = state.library()
    if not photos.encoder().can_caption:
        return
    st.subheader(_("Captions written now"))
    with components.errors_as_words():
        styles = {
            "short": _("short"), "detailed": _("detailed"), "sampled": _("sampled"), "plain": _("plain"),
        }  # fmt: skip
        held = st.session_state.setdefault("written", {})
        if name not in held or st.session_state.pop("write-again", False):
            with st.spinner(_("Looking at the photo")):
                held.clear()
                held[name] = photos.write_captions(picture)
        rows = [(each.text, _percent(each.score), styles.get(style, style)) for style, each in held[name].items()]
        components.text_list(rows)
        st.button(_("Write again"), icon=":material/refresh:", key="again", on_click=_again)


def _again() -> None:
    st.session_state["write-again"] = True


def library_texts(picture: Image.Image) -> None:
    """The captions and tags of the library that fit best."""
    photos = state.library()
    with components.errors_as_words():
        st.subheader(_("Best captions of your library"))
        if photos.status()["captioned"]:
            with st.spinner(_("Comparing")):
                components.text_list([text_row(hit) for hit in photos.describe(picture, top_k=BEST)])
        else:
            st.caption(_("The library has no captions to choose from yet: write lines of your own above."))
        names = [tag["name"] for tag in photos.tags()[:CANDIDATE_TAGS]]
        if names:
            st.subheader(_("Best tags of your library"))
            with st.spinner(_("Comparing")):
                hits = photos.describe(picture, candidates=names, top_k=BEST)
            components.text_list([text_row(hit) for hit in hits])


def text_row(hit) -> tuple[str, str, str]:
    note = f"cos {hit.itc:.2f}" if hit.probability is None else f"{hit.probability:.0%}"
    return hit.text, note, "" if hit.photo_id is None else _("photo {number}").format(number=hit.photo_id)


def similar_photos(picture: Image.Image) -> None:
    if state.never_indexed():
        return
    hits = state.library().search(image=picture, top_k=12)
    if hits:
        st.subheader(_("Similar photos"))
        components.photo_grid(map(components.result_tile, hits), "similar", query={})


def _percent(score: float | None) -> str:
    return "" if score is None else f"{score:.0%}"


page()
