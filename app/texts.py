"""The interface's words in the reader's language: gettext over the catalogs below `locales`.

The `.po` files are read as they are (Babel), so there is nothing to compile. tests/app/test_texts.py finds texts that
lack a translation. Errors of the library itself, file names and captions stay as they are.
"""

import gettext
from datetime import date
from functools import cache
from io import BytesIO
from pathlib import Path

import streamlit as st
from babel.dates import format_date
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.numbers import format_decimal
from streamlit.runtime.scriptrunner import get_script_run_ctx

LANGUAGES = {"en": "English", "zh": "中文"}
COOKIE = "photoblip_language"
LOCALES = Path(__file__).parent / "locales"


def _(text: str) -> str:
    """The text in the language of this session; put values in afterwards: `_("{count} left").format(count=3)`."""
    return _translations(language()).gettext(text)


def _n(one: str, several: str, count: int) -> str:
    """The text for that many, with `{count}` filled in."""
    return _translations(language()).ngettext(one, several, count).format(count=number(count))


def marked(text: str) -> str:
    """A text of a module's table, which is drawn as `_(text)` once there is a session."""
    return text


def language() -> str:
    """The session's choice, else the one that this browser made before, else what the browser asks for."""
    if get_script_run_ctx() is None:
        return "en"
    wanted = st.session_state.get("language") or st.context.cookies.get(COOKIE) or st.context.locale or "en"
    known = wanted.replace("_", "-").split("-")[0].lower()
    return known if known in LANGUAGES else "en"


def choose_language() -> None:
    """The switch. The choice is kept by the browser, as a cookie of this page."""
    names = list(LANGUAGES)
    label = "Language · 语言"
    chosen = st.segmented_control(
        label, names, default=language(), key="language-switch", format_func=LANGUAGES.get, required=True
    )
    if chosen != language():
        st.session_state["language"] = chosen
        st.rerun()
    if "language" in st.session_state:
        st.html(
            f'<script>document.cookie = "{COOKIE}={language()};path=/;max-age=31536000;SameSite=Strict"</script>',
            unsafe_allow_javascript=True,
        )


def number(value: int) -> str:
    """12345 -> "12,345"."""
    return format_decimal(value, locale=language())


def month_name(year: int, month: int) -> str:
    """ "June 2023", "2023年6月"."""
    return format_date(date(year, month, 1), {"zh": "y年M月"}.get(language(), "LLLL y"), locale=language())


@cache
def _translations(name: str) -> gettext.NullTranslations:
    file = LOCALES / name / "LC_MESSAGES" / "photoblip.po"
    if not file.exists():  # English, as it stands in the code
        return gettext.NullTranslations()
    compiled = BytesIO()
    with file.open("rb") as words:
        write_mo(compiled, read_po(words, locale=name))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)
