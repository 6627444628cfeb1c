"""One photo (?photo=ID): large, its neighbours in the search, what is known of it, and what people say of it."""

import streamlit as st

from app import components, finding, state
from app.texts import _
from app.views import organise, place, talk
from indexer.errors import PhotoblipError, UnreadablePhoto

NEIGHBOURS = 480  # of a start page without a search


def page() -> None:
    named = st.query_params.get("photo")
    with st.container(horizontal=True, vertical_alignment="center", key="photo-bar"):
        back()
        neighbours_slot = st.empty()
    if not named:
        st.info(_("No photo is chosen: open one from a search."))
        return
    photo = state.library().photo(named)
    picture, facts = st.columns([5, 2], gap="medium")
    with picture:
        large_view(photo)
        talk.section(photo["id"])
    with facts:
        panel(photo)
    similar_row(photo)
    with neighbours_slot.container(horizontal=True, vertical_alignment="center", key="neighbours"):
        neighbours(photo["id"])


def panel(photo: dict) -> None:
    """What is known of the photo, and what the user can say about it."""
    st.subheader(components.plain(photo["title"] or components.file_name(photo)))
    organise.favourite_and_stars(photo)
    captions(photo)
    organise.tags(photo)
    organise.albums(photo)
    with st.container(key="about"):
        st.subheader(_("About the file"))
        components.facts_table(components.photo_facts(photo))
        where_it_is(photo)
    place.section(photo)
    organise.title(photo)


# -- moving -------------------------------------------------------------------------------------------------


def back() -> None:
    """The way back to the search that led here: the address still holds it."""
    query = {name: value for name, value in st.query_params.items() if name != "photo"}
    label = _("Back to the results") if query else _("Search")
    with st.container(key="back", width="content"):
        st.page_link(components.HOME, label=label, icon=":material/arrow_back:", query_params=query)


def neighbours(photo_id: int) -> None:
    """Previous and next in the results that the photo came from; drawn last, a search may have to be made again."""
    try:
        ids = result_ids()
    except PhotoblipError:  # the photo can be looked at all the same
        return
    if photo_id not in ids:
        return
    at = ids.index(photo_id)
    st.caption(_("{place} of {count}").format(place=at + 1, count=len(ids)), width="content")
    step(_("Previous"), ":material/chevron_left:", "Left", ids[at - 1] if at else None)
    step(_("Next"), ":material/chevron_right:", "Right", ids[at + 1] if at + 1 < len(ids) else None)


def result_ids() -> list[int]:
    """Ids of the results that the address names, in the order in which they are shown."""
    wanted = finding.wanted()
    if not wanted.is_search:
        return [photo["id"] for photo in state.library().latest(NEIGHBOURS)]
    *_others, (hits, _is_last) = finding.find(wanted)
    return [hit.photo_id for hit in finding.in_order(hits, wanted)]


def step(label: str, icon: str, shortcut: str, photo_id: int | None) -> None:
    st.button(
        label,
        icon=icon,
        key=f"step-{shortcut}",
        shortcut=shortcut,
        disabled=photo_id is None,
        on_click=finding.go,
        kwargs={"drop": (), "photo": str(photo_id)},
    )


# -- the picture --------------------------------------------------------------------------------------------


def large_view(photo: dict) -> None:
    with st.container(key="large"):
        try:
            data = state.large_picture(photo["content_hash"], photo["paths"], photo["id"])
        except UnreadablePhoto:
            st.warning(_("Neither the photo nor its thumbnail can be read any more."))
            return
        st.image(data, alt=components.photo_tile(photo).label)


def where_it_is(photo: dict) -> None:
    """Paths, to be copied; a photo may lie in several places."""
    for path in photo["paths"]:
        st.code(path, language=None, wrap_lines=True)
    if not photo["paths"]:
        st.warning(_("No file of this photo is on disk now."), icon=":material/folder_off:")


def similar_row(photo: dict) -> None:
    hits = state.library().similar(photo["id"], top_k=6)
    if hits:
        st.subheader(_("Similar photos"))
        components.photo_grid(map(components.result_tile, hits), "similar", query={"similar": str(photo["id"])})


# -- captions -----------------------------------------------------------------------------------------------


@st.fragment  # a model may write for seconds: the rest of the page stays as it is
def captions(photo: dict) -> None:
    photos = state.library()
    st.subheader(_("Captions"))
    with st.container(key="captions", gap="xsmall"), components.errors_as_words():
        held = photos.photo(photo["id"])["captions"]
        for number, caption in enumerate(held):
            one_caption(photo["id"], number, caption)
        if not held:
            st.caption(_("None yet."))
        with st.container(horizontal=True, vertical_alignment="center", key="caption-actions", gap="xsmall"):
            write_now(photo["id"])
            with (
                st.popover(_("Your own words"), icon=":material/edit:"),
                st.form("own", border=False, clear_on_submit=True),
            ):
                text = st.text_input(_("Your own words"), max_chars=500, key="own-caption")
                if st.form_submit_button(_("Add")) and text.strip():
                    photos.add_caption(photo["id"], text.strip())
                    changed()


def write_now(photo_id: int) -> None:
    if st.button(_("Write a caption"), icon=":material/edit_note:"):
        with st.spinner(_("Looking at the photo")):
            state.library().caption(photo_id)
        changed()


def one_caption(photo_id: int, number: int, caption: dict) -> None:
    """A caption with its match probability and its model; the user's own can be changed."""
    with st.container(horizontal=True, vertical_alignment="center", key=f"caption-{number}", gap="xsmall"):
        components.text_list([caption_row(caption)])
        if caption["source"] != "user":
            return
        with (
            st.popover("", icon=":material/edit:", key=f"edit-{number}", help=_("Change your words")),
            st.form(f"edit-own-{number}", border=False),
        ):
            text = st.text_input(_("Your own words"), value=caption["text"], max_chars=500, key=f"words-{number}")
            with st.container(horizontal=True):
                saves = st.form_submit_button(_("Save"), type="primary")
                deletes = st.form_submit_button(_("Delete"), icon=":material/delete:")
            if saves or deletes:
                new = None if deletes else text.strip() or None
                state.library().edit_caption(photo_id, caption["text"], new)
                changed()


def caption_row(caption: dict) -> tuple[str, str, str]:
    score = "" if caption["score"] is None else f"{caption['score']:.0%}"
    origin = {"user": _("yours"), "file": _("in the file")}.get(caption["source"])
    return caption["text"], score, origin or components.model_name(caption["model"] or "")


def changed() -> None:
    """A fact of this photo is another now: what was found before may not be so any more."""
    finding.forget_results()
    st.rerun()
