"""What stands above every page: the way to the pages, and the settings of this browser."""

import streamlit as st

from app import components, sign_in
from app.texts import _, choose_language


def menu() -> None:
    """Not Streamlit's own menu: its link to the page at hand keeps that page's query."""
    with st.container(horizontal=True, vertical_alignment="center", key="menu"):
        st.html('<div class="pb-brand">photoblip</div>', width="content")
        with st.container(horizontal=True, vertical_alignment="center", key="menu-links"):
            st.page_link(components.HOME, label=_("Search"), icon=":material/search:", query_params={})
            st.page_link(components.BROWSE, label=_("Browse"), icon=":material/photo_library:", query_params={})
            st.page_link(components.IMAGE_TO_TEXT, label=_("Image to text"), icon=":material/image_search:")
            st.page_link(components.LIBRARY, label=_("Library"), icon=":material/folder_open:")
            st.page_link(components.EVALUATE, label=_("Evaluate"), icon=":material/monitoring:")
        with st.popover(":material/translate:", help="Language · 语言", key="settings"):
            choose_language()
            sign_in.sign_out_button()
