"""The models of the library page: the one that search uses, others on this machine, and those to download."""

import shutil
from pathlib import Path

import streamlit as st

from app import components, running, state
from app.texts import _, _n
from blipcore.hub import KNOWN_MODELS, KnownModel, abilities, download, is_downloaded, models_folder, models_here
from indexer.jobs import Progress
from indexer.storage import size_of


def section(busy: bool) -> None:
    photos = state.library()
    held = {model.name: model for model in photos.models()}
    here = models_here(photos.paths.models)
    st.markdown("**" + _("On this machine") + "**")
    for name in [*held, *(name for name in here if name not in held)]:
        row(name, held.get(name), here.get(name), busy)
    st.markdown("**" + _("To download") + "**")
    st.fragment(downloads, run_every=1 if running.active(["download"]) else None)()


def row(name: str, held, folder: Path | None, busy: bool) -> None:
    """A model with what it is, and the way to search with it."""
    active = bool(held and held.active)
    with st.container(horizontal=True, vertical_alignment="center", key=f"model-{name}"):
        words = [components.escape(what(name))]
        if held:
            words.append(_n("vectors of {count} photo", "vectors of {count} photos", held.photos))
        note = components.badge(_("search uses it")) if active else ""
        origin = " · ".join(filter(None, words))
        label = components.escape(components.model_name(name))
        st.html(f'<div class="pb-model">{label} {note}<span class="pb-origin">{origin}</span></div>')
        able = not active and searches(name, folder)
        if able and st.button(_("Search with it"), key=f"use-{name}", disabled=busy, type="tertiary"):
            st.dialog(_("Search with another model?"), icon=":material/swap_horiz:")(ask_to_switch)(name, held)


def what(name: str) -> str:
    return KNOWN_MODELS[name].what if name in KNOWN_MODELS else ""


def searches(name: str, folder: Path | None) -> bool:
    """Whether a model can give vectors, as far as its name and configuration tell."""
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name].what.startswith("search")
    return folder is not None and not abilities(folder)


def ask_to_switch(name: str, held) -> None:
    with components.errors_as_words():
        photos = state.library()
        total = photos.status()["photos"]
        missing = held.missing if held else total
        st.markdown(f"**{components.plain(components.model_name(name))}**")
        if missing:
            need = _n("{count} photo must be read first.", "{count} photos must be read first.", missing)
            then = _("Search goes on with the old model meanwhile, and switches when that is done.")
            st.markdown(f"{need} {then}")
        else:
            st.markdown(_("Every photo has its vectors: search switches at once."))
        running.confirm(
            _("Switch"), ":material/swap_horiz:", state.start_reindex if missing else photos.use_model, name
        )


# -- downloads ----------------------------------------------------------------------------------------------


def downloads() -> None:
    running.redraw_when_changed("download-active", running.active(["download"]))
    held = state.task("download").look()
    if held.active:
        running.task_bar("download", _("Downloading {model}").format(model=held.subject[0]), "MB/s")
    running.failure(held)
    if held.phase == "done":
        done = _("{model} is on this machine now.").format(model=held.subject[0])
        st.success(components.plain(done), icon=":material/check_circle:")
    for known in KNOWN_MODELS.values():
        if not is_downloaded(known):
            offer(known, held.active)


def offer(known: KnownModel, busy: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center", key=f"offer-{known.name}"):
        about = components.escape(f"{known.what} · {known.gigabytes} GB · {known.licence}")
        st.html(f'<div class="pb-model">{known.name}<span class="pb-origin">{about}</span></div>')
        label = _("Download")
        if st.button(label, key=f"get-{known.name}", disabled=busy, type="tertiary", icon=":material/download:"):
            st.dialog(_("Download this model?"), icon=":material/download:")(ask_to_download)(known)


def ask_to_download(known: KnownModel) -> None:
    """What will be fetched, from where, under which licence: before anything is."""
    folder = models_folder()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    facts = {
        _("Model"): known.name,
        _("For"): known.what,
        _("Size"): f"{known.gigabytes} GB",
        _("Licence"): known.licence,
        _("From"): "huggingface.co: " + ", ".join(known.parts.values()),
        _("To"): str(folder),
        _("Free on the disk"): components.size_words(free),
    }
    components.facts_table(facts)
    if known.gigabytes * 1e9 > free:
        st.warning(_("There is not enough room on the disk."))
    else:
        running.confirm(_("Start the download"), ":material/download:", start_download, known)


def start_download(known: KnownModel) -> None:
    folder, total = models_folder() / known.name, round(known.gigabytes * 1000)

    def measure() -> Progress:
        return Progress(min(size_of(folder) // 1_000_000, total), total, 0)

    state.task("download").start([known.name], lambda step: download(known.name), measure)
