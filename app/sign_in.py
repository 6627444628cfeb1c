"""Sign-in with OpenID Connect, where it is set up: off by default, because the page is served to this machine only.

Streamlit does the signing in: an `[auth]` section in `.streamlit/secrets.toml` (docs/interface.md) turns it on. Who the
provider lets in may use the page, or only those whom `[photoblip] users = ["me@example.org"]` names there.
"""

import streamlit as st

from app.texts import _


def required() -> bool:
    return st.secrets.load_if_toml_exists() and "auth" in st.secrets


def let_in() -> bool:
    """Whether this session may see the library; if not, the page to sign in is drawn instead."""
    if not required():
        return True
    if not st.user.get("is_logged_in"):
        st.subheader(_("This photo library asks you to sign in"))
        st.button(_("Sign in"), type="primary", icon=":material/login:", on_click=st.login)
        return False
    if not _is_welcome(st.user.to_dict()):
        st.error(_("This account may not see this library: sign in with another one."), icon=":material/block:")
        sign_out_button()
        return False
    return True


def _is_welcome(user: dict) -> bool:
    """An address counts only where the provider vouches for it."""
    users = st.secrets.get("photoblip", {}).get("users")
    address = str(user.get("email", "")).lower()
    return users is None or (user.get("email_verified", True) is True and address in {one.lower() for one in users})


def sign_out_button() -> None:
    if required() and st.user.get("is_logged_in"):
        st.button(_("Sign out"), icon=":material/logout:", on_click=st.logout)
