"""Work in the background, as pages draw it: a bar with rate and time left, and how it ended."""

from collections.abc import Callable, Sequence

import streamlit as st

from app import components, state
from app.texts import _, _n, number
from indexer.errors import ModelError, PhotoblipError


def bar(label: str, done: int, total: int | None, rate: float | None = None, unit: str = "", failed: int = 0) -> None:
    """A progress bar with what is known in words.

    Args:
        unit: of what the rate counts, as "photos/s"; "" says no rate.
    """
    count = _("{done} of {total}").format(done=number(done), total=number(total)) if total else number(done)
    left = state.seconds_left(rate, done, total)
    parts = [label, count]
    parts += [f"{rate:.1f} {unit}"] if rate and unit else []
    parts += [_("{time} left").format(time=components.time_words(left))] if left is not None else []
    parts += [_n("{count} could not be used", "{count} could not be used", failed)] if failed else []
    st.progress(min(done / total, 1.0) if total else 0.0, text=" · ".join(parts))


def task_bar(kind: str, label: str, unit: str = "", stop: str = "") -> state.TaskState:
    """The bar of a task while it runs, with a button that stops it where `stop` names one. -> the look at it."""
    held = state.task(kind).look()
    if not held.active:
        return held
    with st.container(horizontal=True, vertical_alignment="center", key=f"run-{kind}"):
        with st.container(key=f"run-bar-{kind}"):
            label = _("Stopping after this step") if held.phase == "stopping" else label
            bar(label, held.progress.done, held.progress.total, held.rate, unit, held.progress.failed)
        if stop:
            quiet, end = held.phase == "stopping", state.task(kind).stop
            st.button(stop, icon=":material/pause:", disabled=quiet, key=f"stop-{kind}", on_click=end)
    return held


def failure(held: state.TaskState) -> None:
    if held.phase == "failed":
        words = held.error[:1].upper() + held.error[1:]
        st.error(components.plain(words), icon=":material/error:")


def redraw_when_changed(key: str, active: bool) -> None:
    """In a fragment that the clock draws: where work began or ended, the whole page is drawn, for the new numbers."""
    before = st.session_state.get(key, active)
    st.session_state[key] = active
    if before != active:
        st.rerun()


def active(kinds: Sequence[str]) -> bool:
    return any(state.task(kind).look().active for kind in kinds)


def confirm(label: str, icon: str, action: Callable, *args) -> None:
    """The button of a dialog that does what was asked about, and closes it; an error is said on the page."""
    if st.button(label, type="primary", icon=icon, on_click=_do, args=[action, *args]):
        st.rerun()


def _do(action: Callable, *args) -> None:
    try:
        action(*args)
    except (PhotoblipError, ModelError) as error:
        st.session_state["unconfirmed"] = error


def unconfirmed() -> None:
    """Why the last dialog's action was not done, once."""
    error = st.session_state.pop("unconfirmed", None)
    if error is not None:
        components.problem(error)
