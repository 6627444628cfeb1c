"""Sign-in: off unless secrets set it up, and then nobody sees a photo without it."""

import pytest
from streamlit.testing.v1 import AppTest

from app import sign_in
from tests.app.test_pages import SCRIPT, empty_library, folder, library, open_page, photos  # noqa: F401 - fixtures

AUTH = {
    "redirect_uri": "http://localhost:8501/oauth2callback",
    "cookie_secret": "a long random string",
    "client_id": "photoblip",
    "client_secret": "secret",
    "server_metadata_url": "https://provider.invalid/.well-known/openid-configuration",
}


def test_nobody_is_asked_where_nothing_is_set_up(library):  # noqa: F811
    assert photos(open_page())


def test_where_it_is_set_up_nothing_is_shown_before_signing_in(library):  # noqa: F811
    app = AppTest.from_file(str(SCRIPT), default_timeout=20)
    app.secrets["auth"] = AUTH
    app.query_params["photo"] = "1"
    app.run()
    assert not app.exception
    assert [button.label for button in app.button] == ["Sign in"]
    assert not photos(app)
    assert not app.get("page_link")


@pytest.mark.parametrize(
    ("users", "user", "welcome"),
    [
        (None, {"email": "anyone@example.org"}, True),
        (["Me@example.org"], {"email": "me@Example.org", "email_verified": True}, True),
        (["me@example.org"], {"email": "me@example.org", "email_verified": False}, False),
        (["me@example.org"], {"email": "other@example.org"}, False),
        (["me@example.org"], {}, False),
        ([], {"email": "me@example.org"}, False),
    ],
)
def test_only_those_who_are_named_are_let_in(monkeypatch, users, user, welcome):
    named = {} if users is None else {"photoblip": {"users": users}}
    monkeypatch.setattr("streamlit.secrets", {"auth": AUTH} | named)
    assert sign_in._is_welcome(user) is welcome
