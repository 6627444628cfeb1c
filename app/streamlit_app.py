"""The entry file of the web page: routes, and errors turned into words. `photoblip ui` runs it."""

import streamlit as st

from app import components

st.set_page_config(page_title="photoblip", page_icon=str(components.ICON), layout="wide")
page = st.navigation(
    [
        st.Page("views/home.py", title="Search", default=True),
        st.Page("views/image_to_text.py", title="Image to text"),
        st.Page("views/library.py", title="Library"),
    ],
    position="hidden",
)
components.style()
components.menu()
with components.errors_as_words():
    page.run()
