"""Image to text: the texts that fit an uploaded photo, a caption written now, and photos like it."""

import streamlit as st
from PIL import Image

from app import components, state
from indexer.errors import UnreadablePhoto


def page() -> None:
    upload, lines = upload_form()
    if upload is None:
        st.caption("The photo stays on this machine and is not added to the library.")
        return
    try:
        picture = state.open_upload(upload.getvalue())
    except UnreadablePhoto as error:
        components.problem(error)
        return
    shown, words = st.columns([2, 3], gap="large")
    with shown, st.container(key="large"):
        st.image(picture, alt="the uploaded photo", output_format="JPEG")
    with words:
        written_now(picture)
        best_texts(picture, lines)
    similar_photos(picture)


def upload_form():
    """-> (the upload or None, candidate lines or None for the library's captions)."""
    upload = st.file_uploader(
        "Which words, and which photos, fit this one?",
        type=components.UPLOAD_TYPES,
        max_upload_size=components.UPLOAD_MEGABYTES,
        key="upload",
    )
    with st.expander("Choose between my own lines"), st.form("lines", border=False):
        text = st.text_area(
            "One text a line; empty for the captions of the library",
            key="candidates",
            max_chars=20_000,
            placeholder="a dog on a beach\na city at night",
        )
        st.form_submit_button("Compare")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return upload, lines or None


def written_now(picture: Image.Image) -> None:
    encoder = state.library().encoder()
    if not encoder.can_caption:
        return
    st.subheader("Caption")
    with st.spinner("Looking at the photo"):
        caption = encoder.caption([picture])[0]
    components.text_list([(caption.text, "" if caption.score is None else f"{caption.score:.0%}", encoder.name)])


def best_texts(picture: Image.Image, lines: list[str] | None) -> None:
    photos = state.library()
    st.subheader("Best texts")
    if lines is None and not photos.status()["captioned"]:
        st.caption("The library has no captions to choose from yet: write lines of your own above.")
        return
    hits = photos.describe(picture, candidates=lines, top_k=5)
    components.text_list([text_row(hit) for hit in hits])


def text_row(hit) -> tuple[str, str, str]:
    note = f"cos {hit.itc:.2f}" if hit.probability is None else f"{hit.probability:.0%}"
    return hit.text, note, "" if hit.photo_id is None else f"photo {hit.photo_id}"


def similar_photos(picture: Image.Image) -> None:
    if state.never_indexed():
        return
    hits = state.library().search(image=picture, top_k=12)
    if hits:
        st.subheader("Similar photos")
        components.photo_grid(map(components.result_tile, hits), "similar")


page()
