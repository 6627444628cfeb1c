"""What the pages have in common: the look, the photo grid, badges, tables of facts, errors as sentences.

Captions and file names are other people's text: they are escaped before they become HTML or Markdown.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import streamlit as st

from app import state
from app.texts import _, marked
from blipcore.hub import KNOWN_MODELS
from indexer.errors import ModelError, PhotoblipError, UnreadablePhoto
from indexer.images import EXTENSIONS
from indexer.library import ABILITIES

log = logging.getLogger(__name__)
HOME, IMAGE_TO_TEXT, LIBRARY = "views/home.py", "views/image_to_text.py", "views/library.py"
BROWSE, EVALUATE = "views/browse.py", "views/evaluate.py"
UPLOAD_TYPES = sorted(extension.removeprefix(".") for extension in EXTENSIONS)
UPLOAD_MEGABYTES = 50
CAN = {"ask": marked("answer questions"), "chat": marked("hold a conversation"), "ground": marked("point at things")}
HERE = Path(__file__).parent
STYLE, ICON, KEYS = HERE / "style.css", HERE / "icon.svg", HERE / "keys.js"


def style() -> None:
    st.html(STYLE)
    with st.container(key="keys"):
        st.html(f"<script>{KEYS.read_text(encoding='utf-8')}</script>", unsafe_allow_javascript=True)


def plain(text: object) -> str:
    """Text as Markdown that shows exactly that text."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$:^-])", r"\\\1", str(text))


def problem(error: Exception) -> None:
    """An error that the user can mend, as a sentence."""
    words = str(error)
    if isinstance(error, UnreadablePhoto):
        words = _("this photo cannot be used: {why}").format(why=f"{words[:1].lower()}{words[1:]}")
    st.error(plain(words[:1].upper() + words[1:]), icon=":material/error:")


@contextmanager
def errors_as_words() -> Iterator[None]:
    """An error inside becomes a sentence on the page; one that nobody foresaw is in the log as well."""
    try:
        yield
    except (PhotoblipError, ModelError) as error:
        problem(error)
    except Exception as error:
        log.exception("the page broke off")
        words = next(iter(str(error).splitlines()), "")
        said = _("Something went wrong ({what}): try again.").format(what=f"{type(error).__name__}: {words}")
        st.error(plain(said), icon=":material/error:")


def notice(words: str | None) -> None:
    """What the library says of words that the model does not read as they are meant."""
    if words:
        st.warning(plain(words), icon=":material/translate:")


def name_drop_button() -> None:
    """The words on the buttons of the fields that take a photo: Streamlit's own are English, and say less."""
    words = _("Drop a photo")
    st.html(f'<style>.stApp {{ --pb-drop: "{words}" }}</style>')


def no_model(*abilities: str) -> None:
    """That no model on this machine can do that, and the command that brings one."""
    able = [ABILITIES[ability][1] for ability in abilities]
    ways = (f"`photoblip models download {name}` ({KNOWN_MODELS[name].gigabytes} GB)" for name in able)
    words = _("No model on this machine can {what}: run {command} and reload the page.")
    either = _(" or ")
    st.caption(words.format(what=either.join(_(CAN[ability]) for ability in abilities), command=either.join(ways)))


def model_name(name_or_folder: str) -> str:
    return Path(name_or_folder).name


def empty_library() -> None:
    """Leads from a library without photos to the page that adds some."""
    with st.container(key="empty", horizontal_alignment="center"):
        heading, words = _("No photos yet"), _("Add a folder, and its photos can be found by what they show.")
        st.html(f"<h2>{heading}</h2><p>{words}</p>")
        st.page_link(LIBRARY, label=_("Add photos"), icon=":material/create_new_folder:")


# -- photos -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A photo in the grid.

    Attributes:
        note: what stands beside its name; meaning: the note in full, for a pointer's rest.
        answer: what a model answered about it, "" where nothing was asked.
    """

    photo_id: int
    label: str
    note: str = ""
    meaning: str = ""
    answer: str = ""


def result_tile(hit) -> Tile:
    """A search result, with its match probability, or its cosine where it was not re-ranked."""
    label = hit.caption or Path(hit.path).name
    answer = "" if hit.question is None else hit.answer or _("(no answer)")
    if hit.probability is None and hit.itc is None:  # found by a filter alone
        return Tile(hit.photo_id, label, answer=answer)
    if hit.probability is None:
        meaning = _("cosine similarity; not read by the matching model")
        return Tile(hit.photo_id, label, f"cos {hit.itc:.2f}", meaning, answer)
    meaning = _("match probability; cosine {cosine:.2f}").format(cosine=hit.itc or 0)
    return Tile(hit.photo_id, label, f"{hit.probability:.0%}", meaning, answer)


def photo_tile(photo: Mapping) -> Tile:
    """A photo of the catalog, without a score."""
    return Tile(photo["id"], photo["caption"] or file_name(photo))


def file_name(photo: Mapping) -> str:
    return Path(photo["path"]).name if photo["path"] else _("photo {number}").format(number=photo["id"])


def photo_grid(
    tiles: Iterable[Tile],
    key: str,
    *,
    query: Mapping[str, str] | None = None,
    why: Callable[[int], None] | None = None,
) -> None:
    """Thumbnails in as many columns as fit; each opens its photo, and leads to photos like it.

    Args:
        key: unlike that of any other grid on the page.
        query: the address of the search that the photos come from, by default the one at hand: the photo page leads
            back to it, and to its other photos.
        why: what to do for "Why", with the photo's id; None leaves it out.
    """
    query = st.query_params.to_dict() if query is None else dict(query)
    with st.container(key=f"size-{st.session_state.get('size', 'M')}-{key}"), st.container(key=f"grid-{key}"):
        for tile in tiles:
            photo = str(tile.photo_id)
            with st.container(key=f"tile-{key}-{photo}", gap="xxsmall"):
                thumbnail(tile.photo_id, tile.label)
                with st.container(horizontal=True, gap=None, key=f"links-{key}-{photo}"):
                    st.page_link(HOME, label=plain(tile.label), query_params={**query, "photo": photo})
                    if tile.note:
                        st.html(badge(tile.note, tile.meaning), width="content")
                    st.page_link(HOME, label=_("Similar"), query_params={"similar": photo})
                    if why:
                        name = f"why-{key}-{photo}"
                        st.button(_("Why"), key=name, type="tertiary", on_click=why, args=[tile.photo_id])
                if tile.answer:
                    answer = escape(tile.answer)
                    st.html(f'<div class="pb-answer" title="{answer}">{answer}</div>')


def grid_size() -> None:
    """The choice of how large the photos of all grids are drawn."""
    st.segmented_control(
        _("Size of the photos"),
        ["S", "M", "L"],
        default="M",
        key="size",
        required=True,
        label_visibility="collapsed",
        persist_state="session",
    )


def example(words: str, draw: Callable[[], None], more: Callable[[], None] | None = None) -> None:
    """A line that says, and shows, which photo the ones below are like."""
    with st.container(horizontal=True, vertical_alignment="center", key="example-row"):
        with st.container(width=72, key="tile-example"):
            draw()
        st.markdown(words, width="content")
        if more:
            more()


def thumbnail(photo_id: int, alt: str) -> None:
    """A photo's thumbnail file as it is, else its picture, else a grey field."""
    photos = state.library()
    try:
        st.image(photos.thumbnail(photo_id).read_bytes(), alt=alt, width="stretch")
    except OSError:  # gone, or not an image any more
        try:
            st.image(photos.picture(photo_id), alt=alt, width="stretch", output_format="JPEG")
        except UnreadablePhoto as error:
            st.html(f'<div class="pb-lost">{escape(error.detail)}</div>')


def badge(text: str, meaning: str = "") -> str:
    """A small quiet label, as HTML."""
    return f'<span class="pb-badge" title="{escape(meaning)}">{escape(text)}</span>' if text else ""


# -- facts --------------------------------------------------------------------------------------------------


def photo_facts(photo: Mapping) -> dict[str, str]:
    """What is known of a photo, in words; what is not known is left out."""
    camera = " ".join(dict.fromkeys(word for word in (photo["camera_make"], photo["camera_model"]) if word))
    position = photo["latitude"] is not None and f"{photo['latitude']:.5f}, {photo['longitude']:.5f}"
    if position and photo["altitude"] is not None:
        position += f", {photo['altitude']:.0f} m"
    facts = {
        _("Taken"): photo["taken_at"] and f"{photo['taken_at']:%Y-%m-%d %H:%M}",
        _("Size"): f"{photo['width']} x {photo['height']}",
        _("Camera"): camera,
        _("Lens"): photo["lens"],
        _("GPS"): position,
        _("Format"): f"{photo['format']}, {size_words(photo['bytes'])}",
    }
    return {name: value for name, value in facts.items() if value}


def facts_table(facts: Mapping[str, object]) -> None:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    st.html(f'<dl class="pb-facts">{rows}</dl>')


def text_list(rows: Sequence[tuple[str, str, str]]) -> None:
    """(text, badge, where it comes from) rows, one below the other."""
    items = "".join(
        f'<li><span class="pb-text">{escape(text) or escape(_("(no words)"))}</span>{badge(note)}'
        f'<span class="pb-origin">{escape(origin)}</span></li>'
        for text, note, origin in rows
    )
    st.html(f'<ul class="pb-texts">{items}</ul>')


def size_words(count: int) -> str:
    """Bytes in a unit that people read."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def time_words(seconds: float) -> str:
    """A rough duration: the bar moves anyway."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
