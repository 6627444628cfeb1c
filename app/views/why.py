"""Why a photo was found: its scores in words, and where it shows each word, in a dialog."""

import streamlit as st

from app import components, state
from app.texts import _

SHORTEST, MOST = 3, 8  # letters of a word that says something; words of a query that are shown


def why(hit, text: str) -> None:
    """Open the dialog for a search result; `text` is what the matching model read."""

    @st.dialog(_("Why this photo"), width="medium")
    def dialog() -> None:
        with components.errors_as_words():
            components.facts_table(scores(hit))
            heat(hit, text)

    dialog()


def scores(hit) -> dict[str, str]:
    """What each stage said of a result, in words."""
    facts = {}
    if hit.probability is not None:
        facts[_("Match probability")] = f"{hit.probability:.0%}"
    if hit.itc_rank is not None:
        facts[_("By what it shows")] = _("place {rank}; cosine {cosine:.2f}").format(rank=hit.itc_rank, cosine=hit.itc)
    if hit.text_rank is not None:
        facts[_("By the words beside it")] = _("place {rank}").format(rank=hit.text_rank)
    if hit.itm is not None:
        facts[_("Matching model alone")] = f"{hit.itm:.0%}"
    if hit.likelihood is not None:
        facts[_("Caption writer")] = _("{nats:+.1f} nats against the mean of the best").format(nats=hit.likelihood)
    return facts | {_("Model"): components.model_name(hit.model)}


def heat(hit, text: str) -> None:
    """A heat map a word: hot is where the photo made the matching model believe the word."""
    photos = state.library()
    if not hasattr(photos.encoder(), "explain"):
        st.caption(_("This model cannot show where it saw the words."))
        return
    with st.spinner(_("Looking where the photo shows the words")):
        maps = photos.explain(hit.photo_id, text)
        picture = photos.picture(hit.photo_id)
    maps = ([each for each in maps if len(each.word) >= SHORTEST] or maps)[:MOST]
    words = [each.word for each in maps]
    strongest = max(range(len(maps)), key=lambda at: maps[at].strength)
    at = st.pills(
        _("Word"), range(len(maps)), default=strongest, required=True, format_func=words.__getitem__, key="why-word"
    )
    shown = maps[strongest if at is None else at]
    label = _("where the photo shows {word}").format(word=shown.word)
    with st.container(key="large"):
        st.image(shown.image(picture), alt=label, output_format="JPEG")
    st.caption(_("The brighter a place, the more it made the matching model believe the word."))
