"""Talk about one photo: questions and conversations, pointing at things, and what was answered before."""

from collections.abc import Iterator
from itertools import chain

import streamlit as st

from app import components, state
from app.texts import _, marked

LONGEST = 2000  # letters of a question
DOES = {"ask": marked("answers"), "chat": marked("conversation"), "ground": marked("pointing")}


@st.fragment  # a model may speak for a minute: the rest of the page stays as it is
def section(photo_id: int) -> None:
    with st.container(key="talk"), components.errors_as_words():
        st.subheader(_("Talk about this photo"))
        models = state.library().able_models()
        above = st.container()
        earlier_answers(photo_id)
        with above:
            if models:
                talk(photo_id, models)
            else:
                components.no_model("ask", "chat")


def talk(photo_id: int, models: dict[str, frozenset[str]]) -> None:
    head = st.container(horizontal=True, vertical_alignment="bottom", key="talk-head")
    with head:
        model = choose(models)
    words, place = st.columns([3, 2], gap="medium")
    with place:
        if "ground" in models[model]:
            pointing(photo_id, model)
        else:
            cannot_point(model, models)
    with words:  # last: what is drawn after words that are being written is grey
        turns = conversation(photo_id, model, chatty="chat" in models[model])
    if turns:
        head.button(_("Start over"), icon=":material/restart_alt:", on_click=turns.clear)


def choose(models: dict[str, frozenset[str]]) -> str:
    """The model to talk with: the one of the photo before, as long as it is there."""
    names, before = list(models), st.session_state.get("talked-with")
    model = st.selectbox(
        _("Model"),
        names,
        index=names.index(before) if before in names else 0,
        key="talk-model",
        format_func=lambda name: f"{components.model_name(name)} · {', '.join(does(models[name]))}",
    )
    st.session_state["talked-with"] = model
    return model


def does(abilities: frozenset[str]) -> list[str]:
    return [_(words) for ability, words in DOES.items() if ability in abilities]


# -- words ----------------------------------------------------------------------------------------------------


def conversation(photo_id: int, model: str, chatty: bool) -> list[dict]:
    """What was said so far, and a box to say more. -> the turns, the latest ones among them."""
    turns = st.session_state.setdefault(f"turns-{photo_id}-{model}", [])
    with st.container(key="turns"):
        for turn in turns:
            with message(turn["role"]):
                st.markdown(spoken(turn["content"]))
    latest = st.container()
    label = _("Say something about this photo") if chatty else _("Ask a single question")
    said = st.chat_input(label, key=f"say-{photo_id}-{model}", max_chars=LONGEST)
    if said and said.strip():
        with latest:
            reply(photo_id, model, turns, said.strip(), chatty)
    return turns


def reply(photo_id: int, model: str, turns: list[dict], said: str, chatty: bool) -> None:
    """Draw the user's turn and the model's as it is written; both are kept, unless nothing came."""
    before = len(turns)
    with message("user"):
        st.markdown(spoken(said))
    with message("assistant"), components.errors_as_words():
        with st.spinner(_("Looking at the photo")):
            pieces = kept(words_of(photo_id, model, turns, said, chatty), turns, said)
            first = next(pieces, "")
        st.write_stream(spoken(piece) for piece in chain([first], pieces))
        if len(turns) == before:
            st.caption(_("The model had nothing to say."))


def words_of(photo_id: int, model: str, turns: list[dict], said: str, chatty: bool) -> Iterator[str]:
    photos = state.library()
    if chatty:
        return photos.chat(photo_id, [*turns, {"role": "user", "content": said}], model=model)
    return iter([photos.ask(photo_id, said, model=model)])


def kept(pieces: Iterator[str], turns: list[dict], said: str) -> Iterator[str]:
    """The pieces, which become a turn as they come: who turns to something else meanwhile loses no words."""
    answer = {"role": "assistant", "content": ""}
    for piece in pieces:
        if piece and not answer["content"]:
            turns += [{"role": "user", "content": said}, answer]
        answer["content"] += piece
        yield piece


def message(role: str):
    return st.chat_message(role, avatar=":material/person:" if role == "user" else ":material/image_search:")


def spoken(text: str) -> str:
    """What people and models say, as Markdown: a model's could hold an address for the browser to fetch."""
    return components.plain(text).replace("\n", "  \n")


# -- places ---------------------------------------------------------------------------------------------------


def pointing(photo_id: int, model: str) -> None:
    """A phrase, and the photo with boxes around what it names."""
    with st.form("point", border=False), st.container(horizontal=True, vertical_alignment="bottom", key="point-row"):
        phrase = st.text_input(
            _("Point at"),
            key="phrase",
            placeholder=_("Point at: the dog's left ear"),
            label_visibility="collapsed",
            max_chars=LONGEST,
        ).strip()
        sent = st.form_submit_button(_("Point"), icon=":material/my_location:")
    key = f"boxes-{photo_id}-{model}"
    if sent and phrase:
        with st.spinner(_("Looking for it")):
            st.session_state[key] = phrase, state.library().ground(photo_id, phrase, model=model)
    if key in st.session_state:
        show_boxes(photo_id, *st.session_state[key])


def cannot_point(model: str, models: dict[str, frozenset[str]]) -> None:
    others = [components.model_name(name) for name, can in models.items() if "ground" in can]
    if others:
        name = components.model_name(model)
        words = _("{model} cannot point at things: choose {others}.")
        st.caption(components.plain(words.format(model=name, others=_(" or ").join(others))))
    else:
        components.no_model("ground")


def show_boxes(photo_id: int, phrase: str, boxes: list) -> None:
    if boxes:
        st.image(
            state.library().draw_boxes(photo_id, boxes),
            alt=_("where the photo shows {word}").format(word=phrase),
            width="stretch",
        )
    else:
        st.info(
            _("Nothing was found for {phrase}.").format(phrase=components.plain(phrase)), icon=":material/search_off:"
        )


# -- the catalog ----------------------------------------------------------------------------------------------


def earlier_answers(photo_id: int) -> None:
    """Each question that the catalog has, with the answers of all models that were asked."""
    answers: dict[str, list[str]] = {}
    for row in state.library().photo(photo_id)["answers"]:
        answers.setdefault(f"{row['question']}?", []).append(row["answer"] or _("(no words)"))
    if answers:
        with st.expander(_("Answered before ({count})").format(count=len(answers)), icon=":material/history:"):
            components.facts_table({asked: " · ".join(dict.fromkeys(said)) for asked, said in answers.items()})
