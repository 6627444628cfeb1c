"""The interface's texts: each has a translation, and the language follows the browser or the user's choice."""

import ast
import re
from pathlib import Path

import pytest
from babel.messages.pofile import read_po

from app import texts
from tests.app.test_pages import empty_library, folder, html, library, open_page  # noqa: F401 - fixtures

APP = Path(texts.__file__).parent
TEXTS = {"_": 1, "_n": 2, "marked": 1}  # texts that each takes
LANGUAGES = sorted(set(texts.LANGUAGES) - {"en"})


def wanted() -> set:
    """The texts of the code, pairs where there is a plural."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in APP.rglob("*.py"))
    calls = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))  # in f-strings, too
    found = set()
    for call in calls:
        texts_taken = TEXTS.get(getattr(call.func, "id", ""), 0)
        said = [each.value for each in call.args[:texts_taken] if isinstance(each, ast.Constant)]
        if said:
            found.add(said[0] if texts_taken == 1 else tuple(said))
    return found


def translated(language: str) -> dict:
    with (APP / "locales" / language / "LC_MESSAGES" / "photoblip.po").open("rb") as file:
        return {
            message.id if isinstance(message.id, str) else tuple(message.id): message.string
            for message in read_po(file, locale=language)
            if message.id
        }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_has_a_translation_and_no_translation_is_left_over(language):
    held = {text: words for text, words in translated(language).items() if any(words)}
    assert len(held) > 200
    assert wanted() - set(held) == set(), "add them to the catalog"
    assert set(held) - wanted() == set(), "no longer in the code"


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_keep_the_places_for_values(language):
    for text, words in translated(language).items():
        original, said = (text, words) if isinstance(text, str) else (text[1], words[0])
        assert set(re.findall(r"\{\w+[^}]*\}", said)) == set(re.findall(r"\{\w+[^}]*\}", original)), original


@pytest.mark.parametrize(
    ("asked", "chosen", "shown"),
    [("zh-CN", None, "zh"), ("en-GB", None, "en"), ("fr-FR", None, "en"), (None, None, "en"), ("zh-CN", "en", "en"),
     ("en", "zh", "zh"), ("en", "klingon", "en")],
)  # fmt: skip
def test_language_is_the_one_chosen_before_else_the_browsers(library, monkeypatch, asked, chosen, shown):  # noqa: F811
    context = "streamlit.runtime.context.ContextProxy"
    monkeypatch.setattr(f"{context}.locale", asked)
    monkeypatch.setattr(f"{context}.cookies", {texts.COOKIE: chosen} if chosen else {})
    assert f"<dt>{'照片' if shown == 'zh' else 'Photos'}</dt>" in html(open_page("library"))


def test_switch_changes_the_language_of_the_session(library):  # noqa: F811
    app = open_page("library")
    app.button_group(key="language-switch").set_value("zh").run()
    assert not app.exception
    assert "<dt>照片</dt>" in html(app)


def test_months_are_written_as_the_language_does(monkeypatch):
    assert texts.month_name(2023, 6) == "June 2023"
    monkeypatch.setattr(texts, "language", lambda: "zh")
    assert texts.month_name(2023, 6) == "2023年6月"
