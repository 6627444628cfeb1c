"""The search page: words, a photo or both; filters as chips; the address (?q=..&where=..) is the query."""

from itertools import count
from math import ceil

import streamlit as st

from app import components, finding, state
from app.finding import Wanted
from app.texts import _, _n, number
from app.views import filter_bar
from app.views.why import why
from indexer.conditions import EXAMPLES
from indexer.errors import QueryError, UnreadablePhoto

CLOSEST = 12  # photos that are shown although none is likely
LATEST = 24
BOXES = ("q", "ask", "answer")
TO_TOP = "<script>document.querySelector('[data-testid=stMain]')?.scrollTo({top: 0})</script>"


def page() -> None:
    search_form()
    wanted = finding.wanted()
    with st.container(horizontal=True, vertical_alignment="center", key="search-more"):
        drop_zone()
        filter_bar.popovers(wanted.where)
        options(wanted)
        saved(wanted)
    filter_bar.chips(wanted.where)
    try:
        if wanted.is_search:
            show_found(wanted)
        else:
            show_start()
    except (QueryError, UnreadablePhoto) as error:
        components.problem(error)
    if not finding.answering_models():
        components.no_model("ask")


# -- what is asked --------------------------------------------------------------------------------------------


def search_form() -> None:
    """The box, and a question for the results behind it."""
    fill_boxes()
    with st.form("search", border=False):
        with st.container(horizontal=True, key="search-row"):
            text = st.text_input(
                _("Describe a photo"),
                key="q",
                type="search",
                placeholder=_("Describe a photo: two dogs playing in the snow"),
                label_visibility="collapsed",
                max_chars=finding.LONGEST,
            )
            sent = st.form_submit_button(_("Search"), type="primary", icon=":material/search:")
        ask, answer, by = question()
    if sent:
        finding.go(("page", "photo", "similar", "all"), q=text, ask=ask, answer=answer, by=by if ask else "")
        keep_boxes()


def question() -> tuple[str, str, str]:
    """(question for the results, condition on the answers, model that answers), empty where no model can answer."""
    models = finding.answering_models()
    if not models:
        return "", "", ""
    by = finding.read_address("by")
    folded = st.expander(_("Ask the results"), icon=":material/help:", expanded=bool(finding.read_address("ask")))
    with folded, st.container(horizontal=True, key="ask-row"):
        hint = _("how many people are there?")
        ask = st.text_input(_("Question"), key="ask", placeholder=hint, max_chars=finding.LONGEST)
        answer = st.text_input(_("Keep answers like"), key="answer", placeholder=EXAMPLES, max_chars=finding.LONGEST)
        at = models.index(by) if by in models else 0
        by = st.selectbox(_("Model"), models, index=at, key=f"by-{by}", format_func=components.model_name)
    return ask, answer, by


def fill_boxes() -> None:
    """The address decides what the boxes hold: a link, a reload or Back brings another query than they have."""
    before = st.session_state.setdefault("address", {})
    for box in BOXES:
        said = finding.read_address(box)
        if before.get(box) != said or box not in st.session_state:
            st.session_state[box] = before[box] = said


def keep_boxes() -> None:
    """The boxes hold what the address says: they were sent."""
    st.session_state["address"] = {box: finding.read_address(box) for box in BOXES}


def drop_zone() -> None:
    """A photo dropped here is searched for at once; then the field is fresh for the next one."""
    held = st.query_params.get("example", "")
    components.name_drop_button()
    with st.container(key="drop", width="content"):
        upload = st.file_uploader(
            _("Drop a photo to find others like it"),
            type=components.UPLOAD_TYPES,
            max_upload_size=components.UPLOAD_MEGABYTES,
            key=f"upload-{held}-{st.session_state.get('dropped', 0)}",
            label_visibility="collapsed",
        )
    if upload is None:
        return
    try:
        finding.go(("page", "photo", "similar", "all"), example=finding.keep_example(upload.getvalue()))
    except UnreadablePhoto as error:
        components.problem(error)
        st.stop()
    st.session_state["dropped"] = st.session_state.get("dropped", 0) + 1
    st.rerun()


def options(wanted: Wanted) -> None:
    """How many photos a page has, how many are read. Keys hold the address's value: a new address, a new choice."""
    with st.popover(_("Options"), icon=":material/tune:"):
        top, rerank = wanted.per_page, wanted.rerank
        top_k = st.segmented_control(
            _("Photos a page"), finding.PAGE_SIZES, default=top, key=f"top-{top}", required=True
        )
        read = st.segmented_control(
            _("Candidates re-ranked"),
            finding.RERANK,
            default=rerank,
            key=f"rerank-{rerank}",
            required=True,
            format_func=lambda number: str(number) if number else _("none"),
            help=_("The matching model reads this many of the first-stage candidates against your words."),
        )
    if (top_k, read) != (top, rerank):
        finding.go(top=top_k, rerank=read)
        st.rerun()


def saved(wanted: Wanted) -> None:
    """Searches under a name: open, delete, and save the one at hand."""
    photos = state.library()
    with st.popover(_("Saved"), icon=":material/bookmark:"):
        for number, each in enumerate(photos.saved_searches()):
            with st.container(horizontal=True, vertical_alignment="center", key=f"saved-{number}"):
                query = finding.search_address(each["query"])
                st.page_link(components.HOME, label=components.plain(each["name"]), query_params=query)
                st.button(
                    "",
                    icon=":material/delete:",
                    type="tertiary",
                    key=f"forget-{each['name']}",
                    help=_("Delete this saved search"),
                    on_click=photos.delete_saved_search,
                    args=[each["name"]],
                )
        arguments = finding.search_arguments(wanted)
        if not arguments:
            st.caption(_("Search for something, and it can be saved here."))
            return
        with st.form("save", border=False, clear_on_submit=True):
            name = st.text_input(_("Save this search as"), key="save-as", max_chars=100)
            if st.form_submit_button(_("Save"), icon=":material/bookmark_add:"):
                with components.errors_as_words():
                    photos.save_search(name, arguments)
                    st.toast(_("Saved."), icon=":material/bookmark_added:")
                    st.rerun()


# -- what was found -------------------------------------------------------------------------------------------


def show_found(wanted: Wanted) -> None:
    """The first stage's results as soon as they are there, then the re-ranked ones in their place."""
    if state.never_indexed():
        components.empty_library()
        return
    if wanted.similar:
        show_subject(wanted)
    elif wanted.example and not show_example(wanted):
        return
    head, first, slot = st.empty(), st.empty(), st.empty()
    stages = finding.find(wanted)
    for stage in count():
        with head, st.spinner(_("Searching, and asking the results") if wanted.ask else _("Searching")):
            hits, is_last = next(stages)
        if is_last:
            break
        with head.container(key="first-head"):
            words = _("First results; the matching model is reading the best {count} against your words")
            st.caption(words.format(count=min(wanted.rerank, hits.candidates)) + " …")
        with first.container():  # to be looked at while the matching model reads
            components.photo_grid(map(components.result_tile, hits[: wanted.per_page]), f"first{stage}")
    first.empty()
    show_last(hits, wanted, head, slot)


def show_last(hits, wanted: Wanted, head, slot) -> None:
    if not hits:
        head.empty()
        with slot.container():
            components.notice(hits.notice)
            nothing_found(wanted)
        return
    shown = finding.in_order(hits, wanted)
    nothing_likely = hits.cut == 0 and not wanted.everything and not wanted.ask
    if nothing_likely:
        shown = shown[:CLOSEST]
    pages = ceil(len(shown) / wanted.per_page)
    at = min(wanted.page, pages)
    with head.container():
        components.notice(hits.notice)
        with st.container(key="found-head", horizontal=True, vertical_alignment="center"):
            heading(hits, shown, wanted, nothing_likely)
    readable = hits.query is not None and hits.query.text and hits.reranked
    part = shown[(at - 1) * wanted.per_page : at * wanted.per_page]
    with slot.container():
        components.photo_grid(map(components.result_tile, part), "hits", why=ask_why if readable else None)
        if pages > 1:
            turn_pages(pages, at, wanted)
    if st.session_state.pop("turned", False):
        st.html(TO_TOP, unsafe_allow_javascript=True)
    if readable and (photo_id := st.session_state.pop("why", None)):
        hit = next((hit for hit in hits if hit.photo_id == photo_id), None)
        if hit:
            why(hit, hits.query.text)


def ask_why(photo_id: int) -> None:
    st.session_state["why"] = photo_id


def heading(hits, shown: list, wanted: Wanted, nothing_likely: bool) -> None:
    """How many there are, where the line between likely and not was drawn, and how the results came about."""
    second = _("{read} of {candidates} candidates re-ranked") if hits.reranked else _("not re-ranked")
    about = [second.format(read=hits.reranked, candidates=hits.candidates), f"{max(hits.seconds, 0.01):.2f} s"]
    if hits.query is not None and hits.query.without:
        about.insert(0, _("leaving out: {phrases}").format(phrases=components.plain(", ".join(hits.query.without))))
    has_cut = bool(hits.cut) and not wanted.ask and hits.cut < len(hits)
    if nothing_likely:
        found = _("Nothing fits these words well. The closest photos:")
    elif has_cut and not wanted.everything:
        found = _n("{count} photo matches", "{count} photos match", hits.cut)
    else:
        found = _n("{count} photo", "{count} photos", len(shown))
        if len(shown) >= wanted.depth:  # "480+ photos": there may be more
            found = found.replace(number(len(shown)), f"{number(len(shown))}+")
    with st.container(key="found-words", gap=None):
        st.markdown(f"**{found}**")
        st.caption(" · ".join(about))
    if nothing_likely or has_cut:
        label = _("Show less likely ones") if not wanted.everything else _("Only those that match")
        st.button(label, key="cut", type="tertiary", on_click=finding.go, kwargs={"all": int(not wanted.everything)})
    with st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center", key="found-view"):
        sort_choice(wanted)
        components.grid_size()


def sort_choice(wanted: Wanted) -> None:
    names = {"relevance": _("Best match"), "newest": _("Newest first"), "oldest": _("Oldest first")}
    key = f"sort-{wanted.sort}"
    st.selectbox(
        _("Sort by"),
        finding.SORTS,
        index=finding.SORTS.index(wanted.sort),
        key=key,
        format_func=names.get,
        label_visibility="collapsed",
        width=150,
        on_change=lambda: finding.go(sort=st.session_state[key]),
    )


def turn_pages(pages: int, at: int, wanted: Wanted) -> None:
    """Only the shown page's thumbnails are sent. The last page leads on as long as there may be more."""
    key = f"page-{at}-{pages}-{wanted.per_page}"

    def turn() -> None:
        finding.go(("photo",), page=st.session_state[key])
        st.session_state["turned"] = True

    with st.container(horizontal_alignment="center", key="pages"):
        st.pagination(pages, default=at, key=key, on_change=turn)


def nothing_found(wanted: Wanted) -> None:
    if not state.library().latest(1):
        components.empty_library()
        return
    passes = _("No photo passes the filter.") if wanted.where else _("No photo found.")
    words = _("No photo's answer fulfils the condition.") if wanted.answer else passes
    st.info(words, icon=":material/search_off:")


# -- examples -------------------------------------------------------------------------------------------------


def show_example(wanted: Wanted) -> bool:
    """The dropped photo, and a way to take it away. -> whether it is there."""
    rest = {name: value for name, value in st.query_params.items() if name not in {"example", "page"}}
    picture = finding.example(wanted.example)
    if picture is None:
        st.info(_("The photo that you dropped is not here any more: drop it again."), icon=":material/info:")
        return False
    components.example(
        _("Photos like yours, and fitting the words") if wanted.text else _("Photos like yours"),
        lambda: st.image(picture, alt=_("your example photo"), output_format="JPEG"),
        lambda: st.page_link(components.HOME, label=_("Remove"), icon=":material/close:", query_params=rest),
    )
    return True


def show_subject(wanted: Wanted) -> None:
    """The photo that others are like."""
    photo = state.library().photo(wanted.similar)
    label = components.photo_tile(photo).label
    words = _("Photos like **{name}**").format(name=components.plain(label))
    components.example(words, lambda: components.thumbnail(photo["id"], label))


def show_start() -> None:
    """Before the first query: what could be searched for, and what the library holds."""
    photos = state.library()
    latest = photos.latest(LATEST)
    if not latest:
        components.empty_library()
        return
    queries = photos.example_queries(6)
    if queries:
        with st.container(horizontal=True, vertical_alignment="center", key="tries"):
            st.caption(_("From your library:"), width="content")
            for query in queries:
                st.page_link(components.HOME, label=components.plain(query), query_params={"q": query})
    with st.container(key="found-head", horizontal=True, vertical_alignment="center"):
        latest_words = _("Latest in your library")
        st.markdown(f"**{latest_words}**")
        components.grid_size()
    components.photo_grid(map(components.photo_tile, latest), "latest")
