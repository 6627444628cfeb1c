"""What a file says about itself in words: from EXIF and XMP, however it is written, and never a crash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from indexer.file_words import (
    DESCRIPTION,
    KEYWORD_LENGTH,
    MAX_KEYWORDS,
    MAX_XMP,
    RATING,
    RATING_PERCENT,
    TITLE_LENGTH,
    XP_KEYWORDS,
    XP_TITLE,
    FileWords,
    file_words,
)
from indexer.images import decode_photo
from tests.tiny import SHARED_DATA, needs_shared_data

NOBODY = (None, None)


def packet(inside, attributes=""):
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f'{attributes}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
    ).encode() + b" " * 100 + b"\0"  # fmt: skip


def bag(*items):
    return "<dc:subject><rdf:Bag>" + "".join(f"<rdf:li>{item}</rdf:li>" for item in items) + "</rdf:Bag></dc:subject>"


def test_exif_alone_is_enough():
    exif = {DESCRIPTION: "A dog  on\nthe beach\0", RATING: 4, XP_KEYWORDS: "dog;Beach; dog;".encode("utf-16-le")}
    assert file_words(exif, None, NOBODY) == FileWords("A dog on the beach", 4, ("dog", "Beach"))


def test_xmp_goes_before_xp_tags_and_these_before_the_description():
    exif = {DESCRIPTION: "three", XP_TITLE: "two".encode("utf-16-le"), RATING: 2}
    xmp = packet("<dc:title><rdf:Alt><rdf:li xml:lang='x-default'>one</rdf:li></rdf:Alt></dc:title>", 'xmp:Rating="5"')
    assert file_words(exif, xmp, NOBODY) == FileWords("one", 5)
    assert file_words(exif, None, NOBODY) == FileWords("two", 2)


def test_keywords_of_both_are_joined_once_each():
    exif = {XP_KEYWORDS: "Dog;cat".encode("utf-16-le")}
    assert file_words(exif, packet(bag("dog", "tree")), NOBODY).keywords == ("dog", "tree", "cat")


@pytest.mark.parametrize(
    "description",
    ["OLYMPUS DIGITAL CAMERA         ", "SONY DSC", "DCIM\\100MEDIA\\DJI_0042.JPG", "<Digimax i50 MP3, Samsung #1 MP3>",
     "Untitled", "Pentax", "K10D", "---", " " * 31, "\0" * 20],
)  # fmt: skip
def test_what_cameras_write_is_no_title(description):
    assert file_words({DESCRIPTION: description}, None, ("Pentax", "K10D")).title is None


@pytest.mark.parametrize(
    ("value", "stars"), [(5, 5), ("3", 3), (4.0, 4), (0, None), (-1, None), (99, None), ("x", None)]
)
def test_ratings_are_one_to_five_stars(value, stars):
    assert file_words({RATING: value}, None, NOBODY).rating == stars
    assert file_words({}, packet(f"<xmp:Rating>{value}</xmp:Rating>"), NOBODY).rating == stars


@pytest.mark.parametrize(("percent", "stars"), [(1, 1), (25, 2), (50, 3), (75, 4), (99, 5), (0, None), (None, None)])
def test_windows_percentages_are_stars_too(percent, stars):
    assert file_words({RATING_PERCENT: percent}, None, NOBODY).rating == stars


def test_a_flood_of_keywords_is_cut():
    words = file_words({}, packet(bag(*(f"word{number} " + "x" * 500 for number in range(5000)))), NOBODY)
    assert len(words.keywords) == MAX_KEYWORDS and max(map(len, words.keywords)) == KEYWORD_LENGTH
    assert len(file_words({DESCRIPTION: "x" * 10**6}, None, NOBODY).title) == TITLE_LENGTH


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
    + "]><x>&j;</x>"
).encode()
OUTSIDE = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><x>&f;</x>'


@pytest.mark.parametrize(
    "xmp", [b"", b"\0\0", b"<", b"<a><b></a>", "<a/>", b"\xff\xfe<\0", BOMB, OUTSIDE, b"x" * (MAX_XMP + 1), 7, (1, 2)]
)
def test_a_packet_that_is_no_xmp_or_a_bomb_is_nothing(xmp):
    assert file_words({}, xmp, NOBODY) == FileWords()


def test_a_very_deep_packet_is_no_crash():
    depth = 50_000
    assert file_words({}, b"<a>" * depth + b"</a>" * depth, NOBODY) == FileWords()


anything = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers(), max_size=4).map(tuple)
)
tags = st.sampled_from((DESCRIPTION, RATING, RATING_PERCENT, XP_TITLE, XP_KEYWORDS))


@given(st.dictionaries(tags, anything), anything)
def test_no_metadata_can_break_it_or_leave_its_limits(exif, xmp):
    words = file_words(exif, xmp, NOBODY)
    assert words.rating is None or 1 <= words.rating <= 5
    assert words.title is None or (words.title.strip() == words.title and words.title.isprintable())
    assert all(keyword.strip() == keyword and keyword.isprintable() and keyword for keyword in words.keywords)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "heic"])
def test_every_format_that_carries_xmp_is_read(tmp_path, suffix):
    import pillow_heif

    path = tmp_path / f"photo.{suffix}"
    image = Image.new("RGB", (64, 48), "red")
    xmp = packet(bag("boat"), 'xmp:Rating="2"')
    if suffix == "heic":
        image.info["xmp"] = xmp
        pillow_heif.from_pillow(image).save(path)
    elif suffix == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        image.save(path, pnginfo=info)
    elif suffix == "tif":
        image.save(path, tiffinfo={700: xmp})
    else:
        image.save(path, xmp=xmp)
    info = decode_photo(str(path), input_size=8, thumbnails=None).info
    assert (info.keywords, info.rating) == (("boat",), 2)


@needs_shared_data
def test_real_cameras_files_give_titles_that_people_wrote():
    titles = {
        name: decode_photo(str(SHARED_DATA / "camera" / name), input_size=8, thumbnails=None).info.title
        for name in (
            "no_exif.jpg", "33-type_error.jpg", "Konica_Minolta_DiMAGE_Z3.jpg", "Samsung_Digimax_i50_MP3.jpg",
            "WWL_(Polaroid)_ION230.jpg", "sanyo-vpcg250.jpg", "sony-d700.jpg", "Nikon_COOLPIX_P1.jpg",
        )
    }  # fmt: skip
    written = {name: title for name, title in titles.items() if title}
    assert written == {
        "no_exif.jpg": "Der Goalie bin ig",
        "33-type_error.jpg": "El cielo sobre Berlin (Heaven above Berlin)",
    }
