"""A photo in the user's own order: favourite, stars, title, tags, albums. Every change is kept at once."""

from collections.abc import Iterable

import streamlit as st

from app import components, finding, state
from app.texts import _


def favourite_and_stars(photo: dict) -> None:
    photo_id, is_favourite = photo["id"], bool(photo["favourite"])
    with st.container(horizontal=True, vertical_alignment="center", key="stars"):
        key = f"favourite-{photo_id}-{is_favourite}"
        st.button(
            _("Favourite"),
            key=f"on-{key}" if is_favourite else f"off-{key}",
            icon=":material/favorite:",
            type="primary" if is_favourite else "secondary",
            help=_("Take it off the favourites") if is_favourite else _("Make it a favourite"),
            on_click=_keep,
            args=[state.library().set_favourite, photo_id, not is_favourite],
        )
        key = f"stars-{photo_id}-{photo['rating']}"
        default = photo["rating"] - 1 if photo["rating"] else None
        st.feedback("stars", key=key, default=default, on_change=_rate, args=[photo_id, key])


def title(photo: dict) -> None:
    photos, photo_id = state.library(), photo["id"]
    key = f"title-{photo_id}-{photo['title']}"
    st.text_input(
        _("Title"),
        value=photo["title"] or "",
        key=key,
        max_chars=500,
        placeholder=_("None yet."),
        on_change=lambda: _keep(photos.set_title, photo_id, st.session_state[key]),
    )


def tags(photo: dict) -> None:
    """The user's, the file's and models' tags alike; a new one is typed."""
    photos, photo_id = state.library(), photo["id"]
    held = {tag["name"]: tag for tag in photo["tags"]}

    def change(names: Iterable[str]) -> None:
        new, gone = [name for name in names if name not in held], [name for name in held if name not in names]
        if gone:
            photos.untag(photo_id, gone)
        if new:
            photos.tag(photo_id, new)

    known = [tag["name"] for tag in photos.tags()]
    _several(_("Tags"), f"tags-{photo_id}", list(held), known, change, lambda name: _tag_words(held.get(name), name))


def _tag_words(tag: dict | None, name: str) -> str:
    probability = tag and tag["source"] == "generated" and tag["probability"]
    return components.plain(f"{name} {probability:.0%}" if probability else name)


def albums(photo: dict) -> None:
    photos, photo_id = state.library(), photo["id"]
    held, known = photo["albums"], [album["name"] for album in photos.albums()]

    def change(names: Iterable[str]) -> None:
        for name in (name for name in held if name not in names):
            photos.remove_from_album(name, photo_id)
        for name in (name for name in names if name not in held):
            if name not in known:
                photos.create_album(name)
            photos.add_to_album(name, photo_id)

    _several(_("Albums"), f"albums-{photo_id}", held, known, change)


def _several(label: str, name: str, held: list[str], known: list[str], change, words=str) -> None:
    """A box of names of which each can be taken away, and others chosen or typed."""
    key = f"{name}-{'|'.join(held)}"
    options = [*held, *(each for each in known if each not in held)]
    st.multiselect(
        label,
        options,
        default=held,
        key=key,
        accept_new_options=True,
        format_func=words,
        placeholder=_("Choose or type one"),
        on_change=lambda: _keep(change, [each.strip() for each in st.session_state[key] if each.strip()]),
    )


def _rate(photo_id: int, key: str) -> None:
    stars = st.session_state[key]
    _keep(state.library().rate, photo_id, None if stars is None else stars + 1)


def _keep(change, *arguments) -> None:
    """Make a change, and say so where it cannot be made."""
    with components.errors_as_words():
        change(*arguments)
    finding.forget_results()
