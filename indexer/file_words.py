"""What a photo file says about itself in words: its title, its keywords and its rating, from EXIF and XMP.

EXIF 2.32 and Microsoft's XP tags; XMP part 1 (ISO 16684-1), as Lightroom, digiKam, Photos and Explorer write them.
Both are written by anybody: whatever is too long, too much or not to be parsed is left out.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

TITLE_LENGTH, KEYWORD_LENGTH = 500, 100  # letters
MAX_KEYWORDS = 200
MAX_XMP = 4 << 20  # bytes: a packet of 64 kB is large, one with an embedded preview may reach megabytes

DESCRIPTION, RATING, RATING_PERCENT, XP_TITLE, XP_KEYWORDS = 0x010E, 0x4746, 0x4749, 0x9C9B, 0x9C9E
TAGS = (DESCRIPTION, RATING, RATING_PERCENT, XP_TITLE, XP_KEYWORDS)

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_XMP = "{http://ns.adobe.com/xap/1.0/}"
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"

# what cameras write into every photo's description, and programs where nobody said anything
_NOT_A_TITLE = re.compile(r".*\bdigital (still )?camera|(sony )?dsc|<.*>|dcim[\\/].*|untitled|default", re.IGNORECASE)


@dataclass(frozen=True)
class FileWords:
    """A file's own words. rating is 1 to 5; nought, which cameras write for "not rated", is none."""

    title: str | None = None
    rating: int | None = None
    keywords: tuple[str, ...] = ()


def file_words(exif: Mapping[int, object], xmp: object, camera: tuple[str | None, str | None]) -> FileWords:
    """The words of a file's main EXIF directory and of its XMP packet (bytes, str, or anything else for none).

    Args:
        camera: its make and model, which are no title.
    """
    packet = _parsed(xmp)
    titles = [*_xmp_texts(packet, f"{_DC}title"), _utf16(exif.get(XP_TITLE)), exif.get(DESCRIPTION)]
    keywords = [*_xmp_texts(packet, f"{_DC}subject"), *(_utf16(exif.get(XP_KEYWORDS)) or "").split(";")]
    ratings = (*_xmp_values(packet, f"{_XMP}Rating"), exif.get(RATING), _stars(exif.get(RATING_PERCENT)))
    return FileWords(
        title=next((text for title in titles if (text := _title(title, camera))), None),
        rating=next((stars for rating in ratings if (stars := _rating(rating))), None),
        keywords=_distinct(keywords),
    )


def clean_text(value: object, length: int = 200) -> str | None:
    """One line of printable text of an EXIF value, None for nothing."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        return None
    with suppress(UnicodeError):  # Pillow reads EXIF text as Latin-1, many cameras write UTF-8
        value = value.encode("latin-1").decode("utf-8")
    value = value.strip("\0 ").partition("\0")[0]  # as in C, what follows a NUL is left over from another text
    return "".join(letter for letter in value if letter.isprintable()).strip()[:length].strip() or None


def _one_line(value: object, length: int) -> str | None:
    """As `clean_text`, with line breaks and tabs as spaces."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return clean_text(re.sub(r"\s+", " ", value[: 4 * length]), length) if isinstance(value, str) else None


def _title(value: object, camera: tuple[str | None, str | None]) -> str | None:
    text = _one_line(value, TITLE_LENGTH)
    if text is None or _NOT_A_TITLE.fullmatch(text) or text in camera or not any(map(str.isalnum, text)):
        return None
    return text


def _distinct(keywords: list[str]) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for keyword in keywords:
        text = _one_line(keyword, KEYWORD_LENGTH)
        if text:
            found.setdefault(text.casefold(), text)
        if len(found) == MAX_KEYWORDS:
            break
    return tuple(found.values())


def _utf16(value: object) -> str | None:
    """The text of an XP tag: UTF-16, little-endian."""
    if isinstance(value, tuple | list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in value):
        value = bytes(value)
    return value.decode("utf-16-le", errors="ignore").partition("\0")[0] if isinstance(value, bytes) else None


def _rating(value: object) -> int | None:
    """1 to 5; XMP's -1 (rejected) and nought are none."""
    try:
        stars = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return round(stars) if 0.5 <= stars <= 5 else None


def _stars(percent: object) -> int | None:
    """1, 25, 50, 75 and 99 per cent are Windows' one to five stars."""
    try:
        share = float(percent)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return 1 + round(share / 25) if 1 <= share <= 100 else None


def _parsed(xmp: object):
    """The packet's root element, or None. defusedxml refuses entities, and with them every known XML bomb."""
    from defusedxml import ElementTree

    data = xmp.encode() if isinstance(xmp, str) else xmp
    if not isinstance(data, bytes) or not data.strip(b"\0 \r\n\t") or len(data) > MAX_XMP:
        return None
    try:
        return ElementTree.fromstring(data.strip(b"\0 \r\n\t"))
    except Exception:  # ParseError, DefusedXmlException, UnicodeError, LookupError of an encoding, ...
        return None


def _xmp_texts(packet, name: str) -> Iterator[str]:
    """The items of an XMP list, those of the default language first; or the property's own text."""
    for element in () if packet is None else packet.iter(name):
        items = list(element.iter(f"{_RDF}li"))
        items.sort(key=lambda item: item.get(_LANGUAGE, "x-default") != "x-default")
        yield from (item.text or "" for item in items[: 2 * MAX_KEYWORDS])
        if not items and element.text:
            yield element.text


def _xmp_values(packet, name: str) -> Iterator[str]:
    """A simple property's values: an attribute of rdf:Description, or an element."""
    for element in () if packet is None else packet.iter(f"{_RDF}Description"):
        yield from filter(None, (element.get(name), element.findtext(name)))
