"""The first page: the photo that the address names (?photo=ID), else the search (?q=..&where=..).

One page for both: between two pages Streamlit leaves a second entry in the browser's history, and Back would
lead to a search without its query.
"""

import streamlit as st

from app.views import photo, search

# a link within a page reaches the script, but not the browser's address until the script writes it
st.query_params.from_dict(st.query_params.to_dict())
if "photo" in st.query_params:
    photo.page()
else:
    search.page()
