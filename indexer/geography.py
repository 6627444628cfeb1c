"""Places on the earth: distances, and the words in which people give them."""

import math
import re

EARTH_KM = 6371.0088  # mean radius (IUGG)
KM_A_DEGREE = math.pi * EARTH_KM / 180  # of latitude
UNITS = {"": 1.0, "km": 1.0, "m": 0.001, "mi": 1.609344}
_DISTANCE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(km|m|mi)?", re.IGNORECASE)


def km_between(
    latitude: float | None, longitude: float | None, other_latitude: float, other_longitude: float
) -> float | None:
    """The great-circle distance (haversine) of two places in degrees; None where one is not known.

    The catalog has it as the SQL function `km_between`.
    """
    if latitude is None or longitude is None:
        return None
    a, b = math.radians(latitude), math.radians(other_latitude)
    half_chord = (
        math.sin((b - a) / 2) ** 2
        + math.cos(a) * math.cos(b) * math.sin(math.radians(other_longitude - longitude) / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(min(1.0, math.sqrt(half_chord)))


def parse_near(text: str) -> tuple[float, float, float]:
    """ "48.85,2.35,10km" -> (latitude, longitude, kilometres). Raises ValueError."""
    *place, distance = (part.strip() for part in text.split(","))
    latitude, longitude = parse_place(place)
    found = _DISTANCE.fullmatch(distance)
    if found is None:
        raise ValueError(f"{distance!r} is no distance")
    return latitude, longitude, float(found[1]) * UNITS[(found[2] or "").lower()]


def parse_box(text: str) -> tuple[float, float, float, float]:
    """ "lat1,lon1,lat2,lon2" -> (south, west, north, east); west > east crosses the 180th meridian."""
    parts = [part.strip() for part in text.split(",")]
    (latitude, west), (other, east) = parse_place(parts[:2]), parse_place(parts[2:])
    return min(latitude, other), west, max(latitude, other), east


def parse_place(parts: list[str]) -> tuple[float, float]:
    """Two numbers in degrees -> (latitude, longitude). Raises ValueError where they are none on the earth."""
    latitude, longitude = (float(part) for part in parts)
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise ValueError(f"{latitude}, {longitude} is no place on the earth")
    return latitude, longitude
