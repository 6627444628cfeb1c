"""The entry file of the web page: routes, and errors turned into words. `photoblip ui` runs it."""

import streamlit as st

from app import components, sign_in
from app.menu import menu
from app.texts import _

st.set_page_config(page_title="photoblip", page_icon=str(components.ICON), layout="wide")
page = st.navigation(
    [
        st.Page("views/home.py", title=_("Search"), default=True),
        st.Page("views/browse.py", title=_("Browse"), url_path="browse"),
        st.Page("views/image_to_text.py", title=_("Image to text"), url_path="image_to_text"),
        st.Page("views/library.py", title=_("Library"), url_path="library"),
        st.Page("views/evaluate.py", title=_("Evaluate"), url_path="evaluate"),
    ],
    position="hidden",
)
components.style()
with components.errors_as_words():
    if sign_in.let_in():
        menu()
        page.run()
