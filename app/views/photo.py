"""One photo (?photo=ID): large, with what is known of it, its captions, talk about it, and photos like it."""

import streamlit as st

from app import components, state
from app.views import talk
from indexer.errors import UnreadablePhoto


def page() -> None:
    wanted = st.query_params.get("photo")
    back()
    if not wanted:
        st.info("No photo is chosen: open one from a search.")
        return
    photo = state.library().photo(wanted)
    picture, facts = st.columns([5, 2], gap="medium")
    with picture:
        large_view(photo)
    with facts:
        st.subheader(components.plain(components.file_name(photo)))
        components.facts_table(components.photo_facts(photo))
        captions(photo)
    talk.section(photo["id"])
    similar_row(photo)


def back() -> None:
    """The way back to the search that led here: the address still holds it."""
    query = {name: value for name, value in st.query_params.items() if name != "photo"}
    label = "Back to the results" if query else "Search"
    with st.container(key="back"):
        st.page_link(components.HOME, label=label, icon=":material/arrow_back:", query_params=query)


def large_view(photo: dict) -> None:
    try:
        data = state.large_picture(photo["content_hash"], photo["paths"], photo["id"])
    except UnreadablePhoto:
        st.warning("Neither the photo nor its thumbnail can be read any more.")
        return
    with st.container(key="large"):
        st.image(data, alt=components.photo_tile(photo).label)


def captions(photo: dict) -> None:
    st.subheader("Captions")
    if photo["captions"]:
        components.text_list([caption_row(caption) for caption in photo["captions"]])
    else:
        st.caption("None yet.")
    if st.button("Write a caption", icon=":material/edit_note:"):
        with st.spinner("Looking at the photo"):
            state.library().caption(photo["id"])
        st.rerun()
    with st.form("own", border=False, clear_on_submit=True):
        text = st.text_input("Your own words", max_chars=500, key="own-caption")
        if st.form_submit_button("Add") and text.strip():
            state.library().add_caption(photo["id"], text.strip())
            st.rerun()


def caption_row(caption: dict) -> tuple[str, str, str]:
    score = "" if caption["score"] is None else f"{caption['score']:.0%}"
    return caption["text"], score, caption["model"] or "yours"


def similar_row(photo: dict) -> None:
    hits = state.library().similar(photo["id"], top_k=6)
    if hits:
        st.subheader("Similar photos")
        components.photo_grid(map(components.result_tile, hits), "similar")
