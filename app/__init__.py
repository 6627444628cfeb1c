"""The web page: Streamlit draws, the library does. Started by `photoblip ui`."""
