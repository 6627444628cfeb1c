"""The library page: what it holds, folders and the index run, what could not be used, models, storage, safekeeping."""

from contextlib import suppress
from datetime import date
from pathlib import Path

import streamlit as st

from app import components, running, state
from app.texts import _, _n, number
from app.views import models
from indexer.browse import folder_of, missing_files
from indexer.demo import copy_demo_photos
from indexer.errors import LibraryError, PhotoblipError

EXCLUSIVE = ("index",)  # tasks that change the library; the rest only reads it
ROWS = 1000  # of a table of files
DOWNLOAD_BYTES = 1_000_000_000  # a backup up to this size is offered through the browser


def page() -> None:
    status = state.library().status()
    busy = other_process(status["job"]) or running.active(EXCLUSIVE)
    numbers(status)
    running.unconfirmed()
    # when nothing runs, a slow look is enough to see that another program began
    st.fragment(index_run, run_every=1 if busy else 5)()
    add_folder(status, busy)
    names = [_("Folders"), _("Problems"), _("Models"), _("Storage"), _("Safekeeping")]
    folders_tab, problems_tab, models_tab, storage_tab, safe_tab = st.tabs(names, key="library-tabs")
    with folders_tab:
        folders(status["roots"], busy)
    with problems_tab:
        problems(status)
    with models_tab:
        models.section(busy)
    with storage_tab:
        storage()
    with safe_tab:
        safekeeping()


def numbers(status: dict) -> None:
    shown = {
        _("Photos"): number(status["photos"]),
        _("Searchable"): number(status["embedded"]),
        _("With a caption"): number(status["captioned"]),
        _("Size"): components.size_words(status["bytes"]),
        _("Model"): components.model_name(status["model"]) if status["model"] else _("none yet"),
    }
    if status["missing"]:
        shown[_("Missing from disk")] = number(status["missing"])
    cells = "".join(f"<div><dt>{name}</dt><dd>{components.escape(value)}</dd></div>" for name, value in shown.items())
    st.html(f'<dl class="pb-numbers">{cells}</dl>')


# -- folders ------------------------------------------------------------------------------------------------


def add_folder(status: dict, busy: bool) -> None:
    first = not status["roots"]
    if first:
        st.subheader(_("Add your photos"))
        st.caption(_("They are only read, and stay where they are; nothing leaves this machine."))
    with st.form("add", border=False), st.container(horizontal=True, vertical_alignment="bottom", key="add-row"):
        folder = st.text_input(
            _("Add a folder of this machine"),
            value=usual_folder() if first else "",
            key="folder",
            placeholder="~/Pictures",
        )
        sent = st.form_submit_button(_("Add"), type="primary", icon=":material/create_new_folder:", disabled=busy)
    if first and st.button(_("Try the sample photos"), icon=":material/auto_awesome:", disabled=busy):
        add_samples()
    if sent and not folder.strip():
        st.warning(_("Type the path of a folder first."))
    elif sent:
        start([folder.strip()])


def usual_folder() -> str:
    """Where most people keep photos, if it is there."""
    with suppress(OSError, RuntimeError):
        return next((name for name in ("~/Pictures", "~/Photos") if Path(name).expanduser().is_dir()), "")
    return ""


def add_samples() -> None:
    folder = state.library().paths.folder.parent / "photoblip-samples"  # not inside: a library reads nothing of its own
    try:
        copy_demo_photos(folder)
    except LibraryError as error:
        components.problem(error)
        return
    start([str(folder)])


def folders(roots: list[str], busy: bool) -> None:
    if not roots:
        st.caption(_("No folder has been added yet."))
        return
    held = state.groups("folders")
    for at, root in enumerate(roots):
        with st.container(horizontal=True, vertical_alignment="center", key=f"root-{at}"):
            found = folder_of(held, root)
            count = _n("{count} photo", "{count} photos", found.photos if found else 0)
            st.html(f'<div class="pb-root">{components.escape(root)} {components.badge(count)}</div>')
            if st.button(_("Forget"), icon=":material/folder_off:", disabled=busy, key=f"forget-{at}", type="tertiary"):
                forget_dialog(root)
    if st.button(_("Look for changes"), icon=":material/refresh:", disabled=busy):
        start(roots)


def start(roots: list[str]) -> None:
    try:
        state.start_index(roots)
    except LibraryError as error:
        components.problem(error)
        return
    st.rerun()


def forget_dialog(folder: str) -> None:
    st.dialog(_("Forget this folder?"), icon=":material/folder_off:")(ask_to_forget)(folder)


def ask_to_forget(folder: str) -> None:
    with components.errors_as_words():
        report = state.library().forget(folder, dry_run=True)
        st.markdown(f"`{components.plain(folder)}`")
        leaving = _n("{count} photo leaves search.", "{count} photos leave search.", report.photos)
        kept = _("The files stay where they are; captions, tags and albums come back when the folder is added again.")
        st.markdown(f"{leaving} {kept}")
        st.checkbox(_("Also remove thumbnails and vectors of these photos"), key="forget-purge")
        running.confirm(_("Forget the folder"), ":material/folder_off:", forget, folder)


def forget(folder: str) -> None:
    state.library().forget(folder, purge=bool(st.session_state.get("forget-purge")))


# -- the index run ------------------------------------------------------------------------------------------


def other_process(job: dict | None) -> bool:
    """Whether a job of another process, such as `photoblip index`, is at work on the library."""
    return bool(job and job["state"] == "running" and not state.is_own(job))


def index_run() -> None:
    job = state.library().catalog.latest_job()
    elsewhere = other_process(job)
    running.redraw_when_changed("index-active", elsewhere or running.active(EXCLUSIVE))
    held = running.task_bar("index", _("Indexing"), _("photos/s"), stop=_("Pause"))
    if held.active:
        name = Path(held.progress.path).name if held.progress.path else _("looking for photos, loading the model")
        st.caption(components.plain(name))
    elif elsewhere:
        speed = state.job_speed(job["id"])
        speed.mark(job["done"])
        label = _("Another program is at work on this library ({kind})").format(kind=job["kind"])
        running.bar(label, job["done"], job["total"], speed.rate(), _("photos/s"), job["failed"])
    else:
        outcome(held, job)


def outcome(held: state.TaskState, job: dict | None) -> None:
    """How the last run of this page ended, or the one that was stopped before this page began."""
    running.failure(held)
    if held.phase == "done":
        finished(held.result)
    elif held.phase != "failed" and job and job["state"] == "interrupted" and job["kind"] in {"index", "reindex"}:
        with st.container(horizontal=True, vertical_alignment="center", key="resume"):
            total = number(job["total"]) if job["total"] else _("an unknown number")
            st.info(
                _("Paused after {done} of {total}. What was done is kept.").format(
                    done=number(max(job["done"], held.progress.done)), total=total
                ),
                icon=":material/pause_circle:",
            )
            if st.button(_("Resume"), type="primary", icon=":material/play_arrow:"):
                resume(job)


def resume(job: dict) -> None:
    """The catalog knows what is done: the same run again does the rest."""
    if job["kind"] == "reindex":
        state.start_reindex(job["arguments"]["model"])
        st.rerun()
    start(job["arguments"]["folders"])


def finished(result) -> None:
    if isinstance(result, tuple):
        st.success(_n("{count} photo is ready for this model.", "{count} photos are ready for this model.", result[0]))
        return
    kinds = {
        "added": _n("{count} added", "{count} added", result.added),
        "updated": _n("{count} updated", "{count} updated", result.updated),
        "moved": _n("{count} moved", "{count} moved", result.moved),
        "unchanged": _n("{count} unchanged", "{count} unchanged", result.unchanged),
        "failed": _n("{count} failed", "{count} failed", result.failed),
        "missing": _n("{count} missing", "{count} missing", result.missing),
    }
    counts = [words for kind, words in kinds.items() if getattr(result, kind)]
    with st.container(horizontal=True, vertical_alignment="center", key="finished"):
        what = ", ".join(counts) or _("Nothing to do")
        st.success(_("{what} in {time}.").format(what=what, time=components.time_words(result.seconds)))
        st.page_link(components.HOME, label=_("Search your photos"), icon=":material/search:", query_params={})
    for warning in result.warnings:
        st.warning(components.plain(warning))


# -- problems -----------------------------------------------------------------------------------------------


def problems(status: dict) -> None:
    missing = missing_files(state.library().catalog, ROWS)
    if not status["failed"] and not missing:
        st.caption(_("Every file that was found could be used, and is still there."))
    if status["failed"]:
        count = _n("{count} file could not be used", "{count} files could not be used", status["failed"])
        st.markdown(f"**{count}**")
        rows = [
            {
                _("File"): row["path"],
                _("Reason"): row["reason"],
                _("What happened"): row["detail"],
                _("Seen"): row["at"],
            }
            for row in state.library().errors()[:ROWS]
        ]
        st.dataframe(rows, hide_index=True, alt=_("Files that could not be used, with the reason for each"))
    if missing:
        st.markdown("**" + _("Files that are not where they were") + "**")
        st.caption(_("Their photos keep captions, tags and albums, and come back when the files do."))
        rows = [{_("File"): row["path"], _("Missing since"): row["missing_since"]} for row in missing]
        st.dataframe(rows, hide_index=True, alt=_("Files that are missing from disk"))


# -- storage ------------------------------------------------------------------------------------------------


def storage() -> None:
    photos = state.library()
    parts = {
        "catalog": (_("Catalog"), _("what is known of the photos")),
        "thumbnails": (_("Thumbnails"), _("made again from the photos when lost")),
        "index": (_("Index"), _("made again from the catalog")),
        "image tokens": (_("Image tokens"), _("what the matching model has read; makes re-ranking quick")),
        "own models": (_("Own models"), _("fine-tuned on this library")),
        "reports": (_("Reports"), _("of evaluations")),
    }
    sizes = photos.storage()
    largest = max(sizes.values()) or 1
    rows = "".join(
        f'<dt>{name}<span class="pb-origin">{why}</span></dt>'
        f'<dd><span class="pb-bar" style="width:{100 * sizes[part] / largest:.1f}%"></span>'
        f"{components.size_words(sizes[part])}</dd>"
        for part, (name, why) in parts.items()
    )
    st.html(f'<dl class="pb-storage">{rows}</dl>')
    st.caption(f"{components.size_words(sum(sizes.values()))} · {components.plain(photos.paths.folder)}")


# -- safekeeping --------------------------------------------------------------------------------------------


def safekeeping() -> None:
    st.fragment(check, run_every=1 if running.active(["check"]) else None)()
    st.divider()
    st.fragment(backup, run_every=1 if running.active(["backup"]) else None)()


def check() -> None:
    st.markdown("**" + _("Check") + "**")
    st.caption(_("Compares the catalog, the index and the thumbnails with each other."))
    running.redraw_when_changed("check-active", running.active(["check"]))
    held = running.task_bar("check", _("Checking"))
    if not held.active and st.button(_("Check the library"), icon=":material/fact_check:"):
        photos = state.library()
        begin("check", ["library"], lambda step: photos.verify())
    running.failure(held)
    if held.phase == "done":
        if not held.result:
            st.success(_("Everything agrees."), icon=":material/check_circle:")
        for sentence in held.result:
            st.warning(components.plain(sentence), icon=":material/build:")


def backup() -> None:
    st.markdown("**" + _("Backup") + "**")
    st.caption(_("One file with the catalog and the library's own models. `photoblip restore` brings it back."))
    running.redraw_when_changed("backup-active", running.active(["backup"]))
    held = running.task_bar("backup", _("Writing the backup"))
    with st.form("backup", border=False):
        with st.container(horizontal=True, vertical_alignment="bottom", key="backup-row"):
            file = st.text_input(_("File to write"), value=f"~/photoblip-{date.today()}.zip", key="backup-file")
            sent = st.form_submit_button(_("Back up"), icon=":material/save:", disabled=held.active)
        with_thumbnails = st.checkbox(_("With thumbnails (larger)"), key="backup-thumbnails")
    if sent and file.strip():
        photos = state.library()
        begin("backup", [file], lambda step: photos.backup(file.strip(), thumbnails=with_thumbnails))
    running.failure(held)
    if held.phase == "done":
        written(held.result)


def written(done) -> None:
    photos = _n("{count} photo", "{count} photos", done.photos)
    size = components.size_words(done.bytes)
    st.success(components.plain(f"{done.file} · {photos} · {size}"), icon=":material/check_circle:")
    file = Path(done.file)
    if done.bytes <= DOWNLOAD_BYTES and file.is_file():
        st.download_button(
            _("Download this backup"), file.read_bytes, file.name, "application/zip", icon=":material/download:"
        )


def begin(kind: str, subject: list[str], work) -> None:
    """Start a task that only reads the library, and draw the page again with its bar."""
    with suppress(PhotoblipError):  # another session was quicker: its bar is drawn
        state.task(kind).start(subject, work)
    st.rerun()


with st.container(key="narrow"):
    page()
