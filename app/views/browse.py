"""The browse page: the library by month, folder, album, tag, camera and place; each opens as a grid of its photos.

The address says what is open (?by=months&key=2023-06); the grid leads into the search with the same filter.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import streamlit as st

from app import components, running, state
from app.texts import _, _n, marked, month_name, number
from indexer import browse
from indexer.browse import UNDATED, Group

PAGE = 48  # photos of a page of the grid
FEW_MONTHS = 24  # up to so many are shown at once
CARDS = 60  # groups drawn at once: a thumbnail each
PAIRS = 12  # groups of duplicates on a page


@dataclass(frozen=True)
class Way:
    """A way of looking at the library.

    Attributes:
        draw: the groups. title: of a group, by its key. where: the filter of a group, by its key.
    """

    label: str
    icon: str
    draw: Callable[[], None]
    title: Callable[[str], str]
    where: Callable[[str], str] | None = None


def page() -> None:
    if not state.library().latest(1):
        components.empty_library()
        return
    by, key = chosen_way(), st.query_params.get("key")
    way = WAYS[by]
    if key and way.where:
        opened(by, way, key)
    else:
        way.draw()


def chosen_way() -> str:
    """The row of ways; it writes into the address, which decides."""
    wanted = st.query_params.get("by", "months")
    by = wanted if wanted in WAYS else "months"
    with st.container(key="ways"):
        chosen = st.pills(
            _("Browse by"),
            list(WAYS),
            default=by,
            key=f"by-{by}",  # another address, another choice
            format_func=lambda name: f":material/{WAYS[name].icon}: {_(WAYS[name].label)}",
            label_visibility="collapsed",
            required=True,
        )
    if chosen and chosen != by:
        st.query_params.from_dict({"by": chosen})
        st.rerun()
    return by


# -- one group ----------------------------------------------------------------------------------------------


def opened(by: str, way: Way, key: str) -> None:
    """A group's photos, a page at a time."""
    catalog, where = state.library().catalog, way.where(key)
    if by == "folders":
        crumbs(key)
    else:
        back(by, way)
    total = browse.count(catalog, where)
    with st.container(horizontal=True, vertical_alignment="center", key="opened-head"):
        st.subheader(components.plain(way.title(key)), anchor=False)
        st.html(components.badge(_n("{count} photo", "{count} photos", total)), width="content")
        st.page_link(
            components.HOME, label=_("Search in these"), icon=":material/search:", query_params={"where": where}
        )
    if by == "folders":
        cards(by, browse.subfolders(state.groups("folders"), key), folder_name)
    grid(where, total)


def back(by: str, way: Way) -> None:
    with st.container(key="back"):
        st.page_link(components.BROWSE, label=_(way.label), icon=":material/arrow_back:", query_params={"by": by})


def grid(where: str, total: int) -> None:
    pages = -(-total // PAGE)
    if not pages:
        st.info(_("There are no photos here."), icon=":material/photo_library:")
        return
    at = read_page(pages)
    photos = state.library()
    ids = browse.photos(photos.catalog, where, PAGE, (at - 1) * PAGE)
    rows = photos.catalog.photo_rows(ids)
    tiles = [components.photo_tile(rows[photo_id]) for photo_id in ids]
    components.photo_grid(tiles, "browse", query={"where": where})  # Back leads to the search for the same photos
    turn_page(pages, at)


def read_page(pages: int) -> int:
    value = st.query_params.get("page", "1")
    return min(max(int(value), 1), pages) if value.isdecimal() and len(value) < 9 else 1


def turn_page(pages: int, at: int) -> None:
    if pages < 2:
        return
    with st.container(horizontal_alignment="center", key="pages"):
        chosen = st.pagination(pages, default=at, key=f"page-{at}-of-{pages}")
    if chosen != at:
        st.query_params["page"] = str(chosen)
        st.rerun()


def cards(part: str, groups: Iterable[Group], title: Callable[[str], str]) -> None:
    """A card a group: one of its photos, what it is called, how many there are. `part` begins with the way's name."""
    groups, by = list(groups), part.partition("-")[0]
    with st.container(key=f"grid-cards-{part}"):
        for group in groups[:CARDS]:
            with st.container(key=f"tile-card-{group.key}", gap="xsmall"):
                name = title(group.key)
                if group.cover is None:
                    st.html(f'<div class="pb-lost">{components.escape(_("empty"))}</div>')
                else:
                    components.thumbnail(group.cover, "")  # the link below says what it is
                with st.container(horizontal=True, key=f"links-card-{group.key}", vertical_alignment="center"):
                    address = {"by": by, "key": group.key}
                    st.page_link(components.BROWSE, label=components.plain(name), query_params=address)
                    st.html(components.badge(number(group.photos)), width="content")
    if len(groups) > CARDS:
        names = {group.key: f"{title(group.key)} ({number(group.photos)})" for group in groups[CARDS:]}
        label = _n("{count} more", "{count} more", len(names))
        chosen = st.selectbox(label, list(names), index=None, format_func=names.get, placeholder=_("Choose one"))
        if chosen:
            st.query_params.from_dict({"by": by, "key": chosen})
            st.rerun()


def drawn(by: str, groups: list[Group], title: Callable[[str], str], nothing: str) -> None:
    if groups:
        cards(by, groups, title)
    else:
        st.info(nothing, icon=":material/info:")


# -- months -------------------------------------------------------------------------------------------------


def by_months() -> None:
    """Every month of a small library, else one year's, with a row of years to choose from."""
    groups = state.groups("months")
    years = {year: list(held) for year, held in groupby(groups, key=lambda group: group.key.partition("-")[0])}
    shown = list(years) if len(groups) <= FEW_MONTHS else [chosen_year(years)]
    for year in shown:
        if len(groups) <= FEW_MONTHS:
            st.subheader(_("Without a date") if year == UNDATED else year)
        if year != UNDATED:
            chart(years[year])
        cards(f"months-{year}", years[year], month_title)


def chosen_year(years: dict[str, list[Group]]) -> str:
    wanted = st.query_params.get("year")
    year = wanted if wanted in years else next(iter(years))
    totals = {name: sum(group.photos for group in held) for name, held in years.items()}
    undated = _("Without a date")
    chosen = st.pills(
        _("Year"),
        list(years),
        default=year,
        key=f"year-{year}",
        format_func=lambda name: f"{undated if name == UNDATED else name} · {number(totals[name])}",
        label_visibility="collapsed",
        required=True,
    )
    if chosen and chosen != year:
        st.query_params.from_dict({"by": "months", "year": chosen})
        st.rerun()
    return year


def chart(months: list[Group]) -> None:
    """Photos by month of one year, as bars: a shape at a glance, the numbers stand on the cards."""
    counts = {int(group.key.split("-")[1]): group.photos for group in months}
    largest = max(counts.values())
    bars = "".join(
        f'<span style="height:{8 + 92 * counts.get(month, 0) / largest:.0f}%"'
        f' class="{"" if month in counts else "none"}" title="{month}: {counts.get(month, 0)}"></span>'
        for month in range(1, 13)
    )
    st.html(f'<div class="pb-months" aria-hidden="true">{bars}</div>')


def month_title(key: str) -> str:
    if key == UNDATED:
        return _("Without a date")
    year, _sep, month = key.partition("-")
    known = year.isdecimal() and month.isdecimal() and 1 <= int(month) <= 12 and 1 <= int(year) <= 9999
    return month_name(int(year), int(month)) if known else key


# -- folders ------------------------------------------------------------------------------------------------


def by_folders() -> None:
    held = state.groups("folders")
    roots = [found for root in browse.roots(state.library().catalog) if (found := browse.folder_of(held, root))]
    if len(roots) == 1:
        opened("folders", WAYS["folders"], roots[0].key)
    else:
        drawn("folders", roots, folder_name, _("No folder has been added yet."))


def folder_name(path: str) -> str:
    return Path(path).name or path


def crumbs(path: str) -> None:
    """The way from the indexed folder down to this one."""
    root = next((root for root in browse.roots(state.library().catalog) if Path(path).is_relative_to(root)), path)
    above = [Path(root), *reversed([folder for folder in Path(path).parents if folder.is_relative_to(root)][:-1])]
    if path == root:
        return
    with st.container(horizontal=True, key="back"):
        label = _("Folders")
        st.page_link(components.BROWSE, label=label, icon=":material/arrow_back:", query_params={"by": "folders"})
        for folder in dict.fromkeys(above):
            if str(folder) != path:
                name = components.plain(folder_name(str(folder)))
                st.page_link(components.BROWSE, label=name, query_params={"by": "folders", "key": str(folder)})


# -- the others ---------------------------------------------------------------------------------------------


def by_albums() -> None:
    nothing = _("There are no albums yet: put photos into one from the page of a photo or of a search.")
    drawn("albums", browse.albums(state.library().catalog), str, nothing)


def by_tags() -> None:
    nothing = _("There are no tags yet: hang one on a photo, or run `photoblip tag --missing`.")
    drawn("tags", browse.tags(state.library().catalog), str, nothing)


def by_favourites() -> None:
    found = browse.favourites(state.library().catalog)
    if not found.photos:
        st.info(_("There are no favourites yet: mark one on the page of a photo."), icon=":material/info:")
        return
    search_in(found.where)
    grid(found.where, found.photos)


def search_in(where: str) -> None:
    label = _("Search in these")
    st.page_link(components.HOME, label=label, icon=":material/search:", query_params={"where": where})


def by_cameras() -> None:
    drawn("cameras", state.groups("cameras"), str, _("No photo says which camera took it."))


def by_places() -> None:
    drawn("places", state.groups("places"), place_name, _("No photo says where it was taken."))


def place_name(key: str) -> str:
    """ "52.52° N, 13.40° E": names of places would have to come from the network."""
    try:
        latitude, longitude = browse.place_centre(key)
    except ValueError:
        return key
    north, east = ("N" if latitude >= 0 else "S"), ("E" if longitude >= 0 else "W")
    return f"{abs(latitude):.2f}° {north}, {abs(longitude):.2f}° {east}"


# -- duplicates ---------------------------------------------------------------------------------------------


def by_duplicates() -> None:
    st.fragment(duplicates, run_every=1 if running.active(["duplicates"]) else None)()


def duplicates() -> None:
    """Groups of photos that show the same, side by side; looking for them takes a while, so it is asked for."""
    running.redraw_when_changed("duplicates-active", running.active(["duplicates"]))
    held = running.task_bar("duplicates", _("Comparing photos"), _("photos/s"), stop=_("Stop"))
    if held.active:
        return
    running.failure(held)
    if held.phase != "done":
        st.caption(_("Copies, and the same picture resized, cropped or brightened. Nothing is deleted."))
        if st.button(_("Look for duplicates"), type="primary", icon=":material/content_copy:"):
            look_for_duplicates()
        return
    spare = sum(group.spare_bytes for group in held.result)
    with st.container(horizontal=True, vertical_alignment="center", key="duplicates-head"):
        found = _n("{count} group", "{count} groups", len(held.result))
        st.markdown(f"**{found}** · " + _("{size} could be spared").format(size=components.size_words(spare)))
        if st.button(_("Look again"), icon=":material/refresh:"):
            look_for_duplicates()
    pages = -(-len(held.result) // PAIRS)
    at = read_page(pages) if pages else 1
    for number_, group in enumerate(held.result[(at - 1) * PAIRS : at * PAIRS]):
        side_by_side(group, number_)
    turn_page(pages, at)


def look_for_duplicates() -> None:
    photos = state.library()
    if not state.task("duplicates").look().active:
        state.task("duplicates").start(["library"], lambda step: photos.duplicates(progress=step))
    st.rerun()


def side_by_side(group, at: int) -> None:
    with st.container(border=True, key=f"duplicate-{at}"), st.container(key=f"grid-duplicate-{at}"):
        for place, photo in enumerate(group.photos):
            with st.container(key=f"tile-duplicate-{photo.photo_id}", gap="xsmall"):
                name = Path(photo.paths[0]).name if photo.paths else str(photo.photo_id)
                components.thumbnail(photo.photo_id, name)
                note = _("best") if place == 0 else f"{photo.likeness:.0%}"
                facts = f"{photo.width} x {photo.height} · {components.size_words(photo.bytes)}"
                copies = "<br>".join(components.escape(path) for path in photo.paths)
                with st.container(horizontal=True, gap=None, key=f"links-duplicate-{photo.photo_id}"):
                    address = {"photo": str(photo.photo_id)}
                    st.page_link(components.HOME, label=components.plain(name), query_params=address)
                    st.html(components.badge(note), width="content")
                st.html(f'<div class="pb-origin">{facts}<br>{copies}</div>')


WAYS = {
    "months": Way(marked("Timeline"), "calendar_month", by_months, month_title, browse.month_filter),
    "folders": Way(marked("Folders"), "folder", by_folders, folder_name, lambda key: f"folder={browse.quoted(key)}"),
    "albums": Way(marked("Albums"), "photo_album", by_albums, str, lambda key: f"album={browse.quoted(key)}"),
    "tags": Way(marked("Tags"), "sell", by_tags, str, lambda key: f"tag={browse.quoted(key)}"),
    "favourites": Way(marked("Favourites"), "favorite", by_favourites, str),
    "cameras": Way(marked("Cameras"), "photo_camera", by_cameras, str, lambda key: f"camera={browse.quoted(key)}"),
    "places": Way(marked("Places"), "location_on", by_places, place_name, lambda key: f"box={browse.quoted(key)}"),
    "duplicates": Way(marked("Duplicates"), "content_copy", by_duplicates, str),
}
page()
