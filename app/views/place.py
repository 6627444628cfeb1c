"""Where a photo was taken. Nothing is fetched from the network unless the user asks for a street map."""

import streamlit as st

from app import components
from app.texts import _

WIDE, HIGH = 360, 180  # a point of the plot a degree


def section(photo: dict) -> None:
    latitude, longitude = photo["latitude"], photo["longitude"]
    if latitude is None or longitude is None:
        return
    st.subheader(_("Place"))
    if st.session_state.get("map-tiles"):
        label = _("a street map of the place")
        st.map({"lat": [latitude], "lon": [longitude]}, zoom=11, height=240, size=60, alt=label)
    else:
        words = place_words(latitude, longitude)
        st.image(plot(latitude, longitude), alt=_("the place on a map of the world: {place}").format(place=words))
        st.caption(words)
    nearby = {"where": f"near={latitude:.5f},{longitude:.5f},1km"}
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="place-actions"):
        st.page_link(components.HOME, label=_("Photos taken near here"), icon=":material/near_me:", query_params=nearby)
        if not st.session_state.get("map-tiles"):
            st.button(
                _("Street map"),
                icon=":material/map:",
                type="tertiary",
                key="allow-tiles",
                help=_("Fetches map pictures of this place from the network, for this visit"),
                on_click=lambda: st.session_state.update({"map-tiles": True}),
            )


def place_words(latitude: float, longitude: float) -> str:
    north, east = "N" if latitude >= 0 else "S", "E" if longitude >= 0 else "W"
    return f"{abs(latitude):.4f}° {north}, {abs(longitude):.4f}° {east}"


def plot(latitude: float, longitude: float) -> str:
    """The point among circles of latitude and meridians every 30 degrees, as SVG: drawn here, fetched from nowhere.

    Its colours read well in light and dark: a picture does not know the theme.
    """
    x, y = longitude + WIDE / 2, HIGH / 2 - latitude
    across = "".join(f'<path d="M{at} 0V{HIGH}"/>' for at in range(0, WIDE + 1, 30))
    down = "".join(f'<path d="M0 {at}H{WIDE}"/>' for at in range(0, HIGH + 1, 30))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}">'
        f'<rect width="{WIDE}" height="{HIGH}" rx="6" fill="#3a8aa6" fill-opacity="0.14"/>'
        f'<g stroke="#808080" stroke-opacity="0.4" stroke-width="0.6">{across}{down}</g>'
        f'<path d="M0 90H{WIDE}M180 0V{HIGH}" stroke="#808080"/>'
        f'<path d="M0 {y:.2f}H{WIDE}M{x:.2f} 0V{HIGH}" stroke="#d1603d" stroke-opacity="0.6"/>'
        f'<circle cx="{x:.2f}" cy="{y:.2f}" r="5" fill="#d1603d" stroke="white"/></svg>'
    )
