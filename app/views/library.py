"""The library page: what it holds, folders to add, the index run as it goes, and files that could not be used."""

from pathlib import Path

import streamlit as st

from app import components, state
from indexer.errors import LibraryError


def page() -> None:
    status = state.library().status()
    numbers(status)
    running = other_process(status["job"]) or state.background_index().look().active
    # when nothing runs, a slow look is enough to see that another program began
    st.fragment(index_run, run_every=1 if running else 5)()
    add_folder(running)
    folders(status["roots"], running)
    failures(status["failed"])


def numbers(status: dict) -> None:
    shown = {
        "Photos": f"{status['photos']:,}",
        "Searchable": f"{status['embedded']:,}",
        "With a caption": f"{status['captioned']:,}",
        "Size": components.size_words(status["bytes"]),
        "Model": status["model"] or "none yet",
    }
    if status["missing"]:
        shown["Missing from disk"] = f"{status['missing']:,}"
    cells = "".join(f"<div><dt>{name}</dt><dd>{components.escape(value)}</dd></div>" for name, value in shown.items())
    st.html(f'<dl class="pb-numbers">{cells}</dl>')


def add_folder(running: bool) -> None:
    with st.form("add", border=False), st.container(horizontal=True, vertical_alignment="bottom", key="add-row"):
        folder = st.text_input("Add a folder of this machine", key="folder", placeholder="~/Pictures")
        sent = st.form_submit_button("Add", type="primary", icon=":material/create_new_folder:", disabled=running)
    if sent and not folder.strip():
        st.warning("Type the path of a folder first.")
    elif sent:
        start([folder.strip()])


def folders(roots: list[str], running: bool) -> None:
    if not roots:
        return
    st.subheader("Folders")
    st.html("<ul class='pb-roots'>" + "".join(f"<li>{components.escape(root)}</li>" for root in roots) + "</ul>")
    if st.button("Look for changes", icon=":material/refresh:", disabled=running):
        start(roots)


def start(roots: list[str]) -> None:
    try:
        state.background_index().start(state.library(), roots)
    except LibraryError as error:
        components.problem(error)
        return
    st.rerun()


def failures(count: int) -> None:
    if not count:
        return
    with st.expander(f"{count:,} file{'s' if count > 1 else ''} could not be used"):
        rows = [
            {"File": row["path"], "Reason": row["reason"], "What happened": row["detail"], "Seen": row["at"]}
            for row in state.library().errors()
        ]
        st.dataframe(rows, hide_index=True, alt="Files that could not be used, with the reason for each")


# -- the index run ------------------------------------------------------------------------------------------


def other_process(job: dict | None) -> bool:
    """Whether a job of another process, such as `photoblip index`, is at work on the library."""
    return bool(job and job["state"] == "running" and not state.is_own(job))


def index_run() -> None:
    """Drawn again by the clock; where a run begins or ends the whole page is, for the new numbers."""
    run = state.background_index().look()
    job = state.library().catalog.latest_job()
    active = run.active or other_process(job)
    was_active = st.session_state.get("index-active", active)
    st.session_state["index-active"] = active
    if was_active != active:
        st.rerun()
    if run.active:
        own_progress(run)
    elif active:
        progress_bar(f"Another program is at work on this library ({job['kind']})", job["done"], job["total"])
    else:
        outcome(run)


def own_progress(run: state.IndexState) -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="run"):
        with st.container(key="run-bar"):
            speed = [] if run.rate is None else [f"{run.rate:.1f} photos/s"]
            speed += [] if run.seconds_left is None else [f"{components.time_words(run.seconds_left)} left"]
            label = "Stopping after this batch" if run.phase == "stopping" else "Indexing"
            progress_bar(label, run.progress.done, run.progress.total, speed, run.progress.failed)
        if st.button("Stop", icon=":material/stop:", disabled=run.phase == "stopping"):
            state.background_index().stop()
            st.rerun(scope="fragment")
    name = Path(run.progress.path).name if run.progress.path else "looking for photos, loading the model"
    st.caption(components.plain(name))


def progress_bar(label: str, done: int, total: int | None, speed: list[str] | None = None, failed: int = 0) -> None:
    count = f"{done:,} of {total:,}" if total else f"{done:,} files"
    parts = [label, count, *(speed or []), *([f"{failed:,} could not be used"] if failed else [])]
    st.progress(min(done / total, 1.0) if total else 0.0, text=" · ".join(parts))


def outcome(run: state.IndexState) -> None:
    """How the last run of this page ended."""
    if run.phase == "failed":
        st.error(components.plain(run.error), icon=":material/error:")
    elif run.phase == "stopped":
        st.info(f"Stopped after {run.progress.done:,} files. What was done is kept; start again to go on.")
    elif run.report:
        kinds = ("added", "updated", "moved", "unchanged", "failed", "missing")
        counts = [f"{getattr(run.report, kind):,} {kind}" for kind in kinds if getattr(run.report, kind)]
        st.success(f"{', '.join(counts) or 'Nothing to do'} in {components.time_words(run.report.seconds)}.")
        for warning in run.report.warnings:
            st.warning(components.plain(warning))


with st.container(key="narrow"):
    page()
