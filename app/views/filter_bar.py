"""Filters: popovers that add a part to `where`, and the parts as chips that a click takes away."""

from collections.abc import Callable, Iterable
from datetime import date

import streamlit as st

from app import components, finding, state
from app.texts import _

HAS = ("caption", "title", "tag", "album", "gps", "date", "camera", "rating")


@st.fragment  # opening one does not run the search again; what is in it is read when it is open
def popovers(where: str) -> None:
    bar = {
        "date": (_("Date"), ":material/calendar_month:", dates),
        "camera": (_("Camera"), ":material/photo_camera:", cameras),
        "album": (_("Album"), ":material/photo_album:", albums),
        "tag": (_("Tag"), ":material/sell:", tags),
        "rating": (_("Rating"), ":material/star:", rating),
        "place": (_("Place"), ":material/location_on:", place),
        "more": (_("More"), ":material/filter_alt:", more),
    }
    with st.container(horizontal=True, key="filters", gap="xsmall"):
        for name, (label, icon, draw) in bar.items():
            popover = st.popover(label, icon=icon, key=f"filter-{name}", on_change="rerun")
            if popover.open:
                with popover, components.errors_as_words():
                    draw(where)
    if st.session_state.pop("filter-changed", False):
        st.rerun()


def chips(where: str) -> None:
    """Each part of the filter, with a way to take it away."""
    parts = finding.terms(where)
    if not parts:
        return
    with st.container(horizontal=True, vertical_alignment="center", key="chips", gap="xsmall"):
        for number, part in enumerate(parts):
            st.button(
                components.plain(part),
                icon=":material/close:",
                icon_position="right",
                key=f"chip-{number}-{part}",
                help=_("Remove this filter"),
                on_click=lambda part=part: finding.go(where=finding.without_term(where, part)),
            )
        if len(parts) > 1:
            st.button(_("Clear"), type="tertiary", key="clear-filters", on_click=lambda: finding.go(where=""))


# -- what is in each ------------------------------------------------------------------------------------------


def dates(where: str) -> None:
    years = [str(int(year)) for year, _count in _choices()["year"]]
    if years:
        _choice(where, _("Year"), years, "year", instead_of=("year", "taken"), draw=st.pills)
    else:
        st.caption(_("No photo says when it was taken."))
    span = st.date_input(_("From and to"), value=(), min_value=date(1900, 1, 1), key=_fresh("span", where))
    if isinstance(span, tuple) and len(span) == 2:
        _add(where, f"taken={span[0]}..{span[1]}", instead_of=("year", "taken"))


def cameras(where: str) -> None:
    counted = dict(_choices()["camera"])
    if counted:
        _choice(where, _("Camera"), counted, "camera", instead_of=("camera",), counts=counted)
    else:
        st.caption(_("No photo says which camera took it."))


def albums(where: str) -> None:
    counted = {album["name"]: album["photos"] for album in state.library().albums()}
    if counted:
        _choice(where, _("Album"), counted, "album", counts=counted)
    else:
        st.caption(_("No albums yet: a photo's own page puts it into one."))


def tags(where: str) -> None:
    counted = {tag["name"]: tag["photos"] for tag in state.library().tags()}
    if counted:
        _choice(where, _("Tag"), counted, "tag", counts=counted)
    else:
        st.caption(_("No tags yet: a photo's own page gives it some."))


def rating(where: str) -> None:
    stars = st.feedback("stars", key=_fresh("stars", where))
    st.caption(_("At least so many stars"))
    if stars is not None:
        _add(where, f"rating>={stars + 1}", instead_of=("rating",))
    if st.button(_("Favourites only"), icon=":material/favorite:", key="only-favourites"):
        _add(where, "favourite=yes", instead_of=("favourite", "favorite", "is"))


def place(where: str) -> None:
    if st.button(_("Photos that know their place"), icon=":material/location_on:", key="only-places"):
        _add(where, "has:gps")
    with st.form("near", border=False):
        at = st.text_input(_("Near: latitude, longitude, distance"), placeholder="48.85,2.35,10km", key="near-place")
        if st.form_submit_button(_("Add")) and at.strip():
            _add(where, finding.term("near", at.replace(" ", "")), instead_of=("near",))


def more(where: str) -> None:
    formats = dict(_choices()["format"])
    _choice(where, _("Type"), formats, "type", instead_of=("type", "format"), counts=formats)
    shapes = {"landscape": _("Landscape"), "portrait": _("Portrait"), "square": _("Square")}
    _choice(where, _("Shape"), shapes, "orientation", instead_of=("orientation",), draw=st.pills, names=shapes.get)
    has = {
        "caption": _("caption"), "title": _("title"), "tag": _("tag"), "album": _("album"), "gps": _("place"),
        "date": _("date"), "camera": _("camera"), "rating": _("rating"),
    }  # fmt: skip
    _choice(where, _("Has"), has, "has", sign=":", draw=st.pills, names=has.get)
    with st.form("leave-out", border=False):
        phrase = st.text_input(_("Leave out photos that show"), placeholder=_("people"), key="leave-out")
        if st.form_submit_button(_("Leave out")) and phrase.strip():
            _leave_out(phrase.strip())
    key = _fresh("where", where)
    st.text_input(
        _("All filters, as text"),
        value=where,
        key=key,
        placeholder="year=2023 camera=Pixel* has:gps",
        max_chars=finding.LONGEST,
        on_change=lambda: _go(where=st.session_state[key].strip()),
    )


# -- parts ----------------------------------------------------------------------------------------------------


def _choices() -> dict:
    photos = state.library()
    return _choices_of(photos.catalog.generation(), str(photos.paths.folder))


@st.cache_data(max_entries=4, show_spinner=False)
def _choices_of(generation: int, folder: str) -> dict:
    return state.library().filter_choices()


def _choice(  # noqa: PLR0913 - a widget's settings
    where: str,
    label: str,
    values: Iterable[str],
    field: str,
    *,
    sign: str = "=",
    instead_of: Iterable[str] = (),
    counts: dict | None = None,
    names: Callable = str,
    draw: Callable = st.selectbox,
) -> None:
    """A widget of which one value is chosen, and becomes a part of the filter."""
    words = names if counts is None else lambda value: f"{value} ({counts[value]:,})"
    options, key = list(values), _fresh(field, where)
    if draw is st.selectbox:
        chosen = draw(label, options, index=None, key=key, format_func=words, placeholder=_("Any"))
    else:
        chosen = draw(label, options, key=key, format_func=words)
    if chosen is not None:
        _add(where, finding.term(field, chosen, sign), instead_of=instead_of)


def _fresh(name: str, where: str) -> str:
    """A key for a widget that is empty again once the filter has changed."""
    return f"filter-{name}-{where}"


def _add(where: str, part: str, instead_of: Iterable[str] = ()) -> None:
    _go(where=finding.with_term(where, part, instead_of=instead_of))
    st.rerun()


def _go(**changes) -> None:
    finding.go(("page", "photo", "all"), **changes)
    st.session_state["filter-changed"] = True


def _leave_out(phrase: str) -> None:
    text = finding.read_address("q").strip()
    _go(q=f"{text}, no {phrase}" if text else f"no {phrase}")
    st.rerun()
