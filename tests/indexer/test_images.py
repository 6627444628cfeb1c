"""Decoding: every format and mode, EXIF facts, limits, thumbnails; and what broken files are called."""

import hashlib
import io
import os
import pickle
import struct
import warnings
import zlib
from datetime import datetime
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from indexer import images
from indexer.errors import LibraryError, UnreadablePhoto
from indexer.images import EXTENSIONS, Limits, decode_photo, open_image, thumbnail_path

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (255, 255, 255)


def corners(width: int = 120, height: int = 80) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    picture = Image.new("RGB", (width, height), WHITE)
    half = (width // 2, height // 2)
    picture.paste(RED, (0, 0, *half))
    picture.paste(GREEN, (half[0], 0, width, half[1]))
    picture.paste(BLUE, (0, half[1], half[0], height))
    return picture


def assert_corners(picture: Image.Image, tolerance: int = 12) -> None:
    width, height = picture.size
    where = {RED: (0.2, 0.2), GREEN: (0.8, 0.2), BLUE: (0.2, 0.8), WHITE: (0.8, 0.8)}
    for colour, (x, y) in where.items():
        got = picture.getpixel((int(x * width), int(y * height)))
        assert max(abs(a - b) for a, b in zip(got, colour, strict=True)) <= tolerance, (colour, got)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(7).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def decode(path: Path, content: bytes | None = None, **options) -> images.DecodedPhoto:
    if content is not None:
        path.write_bytes(content)
    return decode_photo(str(path), input_size=64, thumbnails=path.parent / "thumbnails", **options)


def reason_of(source, **options) -> str:
    with pytest.raises(UnreadablePhoto) as caught:
        open_image(source, **options)
    assert caught.value.detail
    return caught.value.reason


def exif_bytes(main: dict | None = None, exif: dict | None = None, gps: dict | None = None) -> bytes:
    tags = Image.Exif()
    tags.update(main or {})
    tags.get_ifd(0x8769).update(exif or {})
    tags.get_ifd(0x8825).update(gps or {})
    return tags.tobytes()


def info_of(tmp_path: Path, **tags: dict) -> images.PhotoInfo:
    return decode(tmp_path / "a.jpg", encoded(corners(), exif=exif_bytes(**tags))).info


# --- what a decoded photo is -------------------------------------------------------------------------------


def test_a_photo_carries_its_hash_its_size_its_facts_and_square_pixels(tmp_path):
    content = encoded(corners(), quality=95)
    photo = decode(tmp_path / "a.jpg", content)
    assert photo.content_hash == hashlib.sha256(content).hexdigest()
    assert photo.bytes == len(content)
    assert (photo.info.width, photo.info.height, photo.info.format) == (120, 80, "JPEG")
    assert photo.pixels.shape == (64, 64, 3) and photo.pixels.dtype == np.uint8
    assert_corners(Image.fromarray(photo.pixels))


def test_the_pixels_are_the_whole_picture_squashed_with_bicubic(tmp_path):
    picture = noise(300, 200)
    photo = decode(tmp_path / "a.png", encoded(picture, "PNG"))
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(photo.pixels, expected)


def test_the_drafted_jpeg_stays_within_50_db_of_the_full_decode(tmp_path):
    content = encoded(noise(3200, 2400), quality=92)
    full = Image.open(io.BytesIO(content)).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    photo = decode(tmp_path / "a.jpg", content)
    error = np.mean((photo.pixels.astype(float) - np.asarray(full, dtype=float)) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 50


def test_a_draft_keeps_twice_the_target_on_the_shorter_side():
    content = encoded(noise(1600, 1200))
    assert open_image(content, target=150).size == (400, 300)
    assert open_image(content, target=151).size == (800, 600)
    assert open_image(content).size == (1600, 1200)


def test_the_file_is_read_once_and_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(corners()))
    before = path.read_bytes(), path.stat().st_mtime_ns
    opened = []
    real = open

    def counting(file, mode="r", *rest, **options):
        opened.append((str(file), mode))
        return real(file, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", counting)
    decode(path)
    assert [mode for name, mode in opened if name == str(path)] == ["rb"]
    monkeypatch.undo()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


# --- formats and modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "HEIF"])
def test_every_format_is_decoded_whatever_the_name_says(tmp_path, kind):
    if kind == "HEIF":
        file = io.BytesIO()
        pillow_heif.from_pillow(corners()).save(file, quality=95)
        content = file.getvalue()
    else:
        content = encoded(corners(), kind, **({"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}))
    photo = decode(tmp_path / "wrong-name.jpg", content)
    assert photo.info.format == kind
    assert_corners(Image.fromarray(photo.pixels), tolerance=25)


def test_mpo_of_phones_is_a_jpeg_and_its_first_frame_counts(tmp_path):
    content = encoded(corners(), "MPO", save_all=True, append_images=[Image.new("RGB", (120, 80), BLUE)])
    photo = decode(tmp_path / "a.jpg", content)
    assert photo.info.format == "JPEG"
    assert_corners(Image.fromarray(photo.pixels), tolerance=25)


def test_the_first_frame_of_an_animation_counts():
    content = encoded(
        corners().quantize(),
        "GIF",
        save_all=True,
        append_images=[Image.new("P", (120, 80)), Image.new("P", (120, 80))],
    )
    assert_corners(open_image(content))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None, :].repeat(4, axis=0)
    for kind in ("PNG", "TIFF"):
        got = np.asarray(open_image(encoded(Image.fromarray(ramp), kind)))[0, :, 0]
        assert np.abs(got.astype(int) - np.arange(256)).max() <= 1, kind


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255]], dtype=np.int32), [0, 255]),
        (np.array([[0, 65535]], dtype=np.int32), [0, 255]),
        (np.array([[-1000, 1_000_000]], dtype=np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.0, 1.0]], dtype=np.float32), [0, 0, 255]),
    ],
)
def test_deep_grey_comes_out_in_eight_bits(values, expected):
    got = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert got[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    source = Image.new(mode, (8, 8)) if mode in ("I;16", "PA", "LAB") else corners(8, 8).convert(mode)
    assert open_image(source).mode == "RGB"


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((*RED, 255), (0, 0, 4, 8))
    for content in (encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True), encoded(clear, "GIF")):
        picture = open_image(content)
        assert picture.getpixel((7, 4)) == WHITE
        assert picture.getpixel((0, 4)) == RED
    half = open_image(encoded(Image.new("LA", (2, 2), (0, 128)), "PNG"))
    assert abs(half.getpixel((0, 0))[0] - 127) <= 1
    keyed = open_image(encoded(Image.new("RGB", (2, 2), RED), "PNG", transparency=RED))
    assert keyed.getpixel((0, 0)) == WHITE


def test_a_cmyk_jpeg_keeps_its_colours():
    assert_corners(open_image(encoded(corners().convert("CMYK"), quality=95)), tolerance=25)


def test_an_embedded_profile_is_converted_to_srgb():
    # swapping red and green is what no untouched picture would look like
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"tmp_").replace(b"gXYZ", b"rXYZ").replace(b"tmp_", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    red, green, _ = open_image(encoded(picture, "PNG", icc_profile=swapped)).getpixel((0, 0))
    assert green > 240 and red < 20
    assert open_image(encoded(picture, "PNG", icc_profile=profile)).getpixel((0, 0)) == (255, 0, 0)


def test_a_broken_profile_is_ignored():
    assert_corners(open_image(encoded(corners(), "PNG", icc_profile=b"not a profile" * 20)))


# --- orientation -------------------------------------------------------------------------------------------

UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # the inverse of what a viewer does
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int) -> Image.Image:
    picture = corners()
    return picture.transpose(UNTURN[orientation]) if orientation > 1 else picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"quality": 95}),
        ("AVIF", {"quality": 95}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_every_orientation_is_applied_once(tmp_path, kind, options, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    photo = decode(tmp_path / "a", encoded(turned(orientation), kind, exif=tags, **options))
    assert (photo.info.width, photo.info.height) == (120, 80)
    assert photo.info.orientation == orientation
    assert_corners(Image.fromarray(photo.pixels), tolerance=25)
    assert_corners(Image.open(thumbnail_path(tmp_path / "thumbnails", photo.content_hash)), tolerance=30)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heif_is_not_turned_twice(tmp_path, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    file = io.BytesIO()
    heif = pillow_heif.from_pillow(turned(orientation))
    heif.info["exif"] = tags.tobytes()  # from here the encoder makes the container's own turn (irot)
    heif.save(file, quality=95)
    assert (b"irot" in file.getvalue()) == (orientation > 1)
    photo = decode(tmp_path / "a.heic", file.getvalue())
    assert (photo.info.width, photo.info.height) == (120, 80)
    assert_corners(Image.fromarray(photo.pixels), tolerance=25)


def test_an_opened_image_carries_no_metadata_that_would_turn_it_again():
    picture = open_image(encoded(turned(6), exif=exif_bytes({0x0112: 6}), comment=b"secret"))
    assert picture.info == {}
    assert picture.getexif().get(0x0112) is None


def test_a_pillow_image_is_accepted_and_left_alone():
    source = Image.open(io.BytesIO(encoded(turned(6), exif=exif_bytes({0x0112: 6}))))
    source.load()
    assert_corners(open_image(source), tolerance=25)
    assert source.size == (80, 120) and source.info["exif"]
    plain = corners()
    open_image(plain).paste(WHITE, (0, 0, 120, 80))
    assert_corners(plain)


# --- EXIF --------------------------------------------------------------------------------------------------


def test_exif_facts_are_read(tmp_path):
    info = info_of(
        tmp_path,
        main={0x010F: "Example Corp.\0\0", 0x0110: "  Camera 9 ", 0x0132: "2020:01:01 00:00:00"},
        exif={0x9003: "2019:07:14 18:30:59", 0xA434: "50 mm f/1.8"},
        gps={1: "S", 2: (33.0, 51.0, 25.2), 3: "E", 4: (151.0, 12.0, 54.0), 5: b"\x01", 6: 12.5},
    )
    assert info.taken_at == datetime(2019, 7, 14, 18, 30, 59)
    assert (info.camera_make, info.camera_model, info.lens) == ("Example Corp.", "Camera 9", "50 mm f/1.8")
    assert info.latitude == pytest.approx(-33.857) and info.longitude == pytest.approx(151.215)
    assert info.altitude == -12.5


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_is_read_from_every_format_that_has_it(tmp_path, kind):
    tags = exif_bytes({0x010F: "Example"}, {0x9003: "2019:07:14 18:30:59"}, {1: "N", 2: (1.0,), 3: "W", 4: (2.0,)})
    info = decode(tmp_path / "a", encoded(corners(), kind, exif=tags)).info
    assert (info.camera_make, info.taken_at) == ("Example", datetime(2019, 7, 14, 18, 30, 59))
    assert (info.latitude, info.longitude) == (1, -2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2019:07:14 18:30:59\0", datetime(2019, 7, 14, 18, 30, 59)),
        ("2019-07-14T18:30:59+02:00", datetime(2019, 7, 14, 18, 30, 59)),
        ("2019/07/14 18:30", datetime(2019, 7, 14, 18, 30)),
        ("2019:07:14", datetime(2019, 7, 14)),
        ("0000:00:00 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("2019:13:40 99:99:99", None),
        ("0001:01:01 00:00:00", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_dates_as_cameras_write_them(tmp_path, text, expected):
    assert info_of(tmp_path, exif={0x9003: text}).taken_at == expected


def test_a_useless_date_falls_back_to_the_next_one(tmp_path):
    blank = "0000:00:00 00:00:00"
    info = info_of(tmp_path, main={0x0132: "2003:01:01 00:00:00"}, exif={0x9003: blank, 0x9004: blank})
    assert info.taken_at == datetime(2003, 1, 1)
    info = info_of(tmp_path, main={0x0132: "2003:01:01 00:00:00"}, exif={0x9004: "2002:01:01 00:00:00"})
    assert info.taken_at == datetime(2002, 1, 1)


ZERO = TiffImagePlugin.IFDRational(0, 0)


@pytest.mark.parametrize(
    ("gps", "expected"),
    [
        ({1: "N", 2: (46.5, ZERO, ZERO), 3: "E", 4: (7.25, ZERO, ZERO)}, (46.5, 7.25)),
        ({1: "N", 2: (ZERO, ZERO, ZERO), 3: "E", 4: (7.0, 0.0, 0.0)}, (None, None)),
        ({1: "N", 2: (91.0, 0.0, 0.0), 3: "E", 4: (7.0, 0.0, 0.0)}, (None, None)),
        ({1: "N", 2: (46.0, 0.0, 0.0), 3: "E", 4: (181.0, 0.0, 0.0)}, (None, None)),
        ({1: "N", 2: (46.0, 0.0, 0.0)}, (None, None)),
        ({2: (46.0, 0.0, 0.0), 4: (7.0, 0.0, 0.0)}, (None, None)),
        ({1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)}, (None, None)),
    ],
)
def test_positions_are_whole_and_valid_or_none(tmp_path, gps, expected):
    info = info_of(tmp_path, gps=gps)
    assert (info.latitude, info.longitude) == expected


def test_an_altitude_over_zero_is_none(tmp_path):
    assert info_of(tmp_path, gps={6: ZERO}).altitude is None


def test_broken_exif_costs_the_facts_not_the_photo(tmp_path, capsys):
    good = exif_bytes({0x010F: "Example", 0x0112: 6}, {0x9003: "2019:07:14 18:30:59"})
    body = encoded(corners())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cut in (*range(6, len(good), 3), 0):
            for exif in (good[:cut], good[:cut] + b"\xff" * (len(good) - cut)):
                segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
                photo = decode(tmp_path / "a.jpg", body[:2] + segment + body[2:])
                assert photo.info.format == "JPEG"
    assert capsys.readouterr() == ("", "")


# --- limits ------------------------------------------------------------------------------------------------


def test_a_png_of_400_megapixels_is_refused_from_its_header(tmp_path, monkeypatch):
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert reason_of(content + b"\0\0\0\0IDAT") == "too-large"
    with pytest.raises(UnreadablePhoto) as caught:
        decode(tmp_path / "a.png", content + b"\0\0\0\0IDAT")
    assert caught.value.reason == "too-large"


def test_the_limits_on_pixels_memory_and_bytes_each_hold(tmp_path):
    content = encoded(corners(), "PNG")
    assert reason_of(content, limits=Limits(max_pixels=120 * 80 - 1)) == "too-large"
    assert reason_of(content, limits=Limits(max_memory=120 * 80 * 4 - 1)) == "too-large"
    assert reason_of(content, limits=Limits(max_bytes=len(content) - 1)) == "too-large"
    exact = Limits(max_pixels=120 * 80, max_memory=120 * 80 * 4, max_bytes=len(content))
    assert open_image(content, exact).size == (120, 80)
    (tmp_path / "a.png").write_bytes(content)
    assert reason_of(tmp_path / "a.png", limits=Limits(max_bytes=len(content) - 1)) == "too-large"
    assert reason_of(corners(), limits=Limits(max_pixels=100)) == "too-large"


def test_memory_counts_after_the_draft_and_progressive_coefficients_before_it():
    tight = Limits(max_memory=500_000)
    assert reason_of(encoded(noise(1600, 1200)), limits=tight) == "too-large"
    assert open_image(encoded(noise(1600, 1200)), tight, target=75).size == (200, 150)
    assert reason_of(encoded(noise(1600, 1200), progressive=True), limits=tight, target=75) == "too-large"


def test_the_limit_is_ours_not_the_one_that_pillow_happens_to_have(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("JPEG", "PNG", "BMP"):
            assert open_image(encoded(corners(), kind)).size == (120, 80)
    assert Image.MAX_IMAGE_PIXELS == 10


# --- thumbnails --------------------------------------------------------------------------------------------


def test_a_thumbnail_is_small_upright_and_bare(tmp_path):
    tags = exif_bytes({0x0112: 6, 0x010F: "Example"})
    content = encoded(noise(1600, 1200), exif=tags, comment=b"secret")
    photo = decode(tmp_path / "a.jpg", content)
    path = thumbnail_path(tmp_path / "thumbnails", photo.content_hash)
    assert path == tmp_path / "thumbnails" / photo.content_hash[:2] / f"{photo.content_hash}.jpg"
    with Image.open(path) as thumbnail:
        assert thumbnail.size == (576, 768)
        assert not thumbnail.getexif()
        assert "comment" not in thumbnail.info


def test_a_small_photo_is_not_scaled_up_and_a_thin_one_keeps_a_pixel(tmp_path):
    for size, expected in (((100, 50), (100, 50)), ((3000, 2), (768, 1))):
        photo = decode(tmp_path / "a.png", encoded(Image.new("RGB", size, RED), "PNG"))
        with Image.open(thumbnail_path(tmp_path / "thumbnails", photo.content_hash)) as thumbnail:
            assert thumbnail.size == expected


def test_an_existing_thumbnail_is_kept_and_an_empty_one_replaced(tmp_path):
    photo = decode(tmp_path / "a.jpg", encoded(corners()))
    path = thumbnail_path(tmp_path / "thumbnails", photo.content_hash)
    path.write_bytes(b"kept")
    decode(tmp_path / "a.jpg")
    assert path.read_bytes() == b"kept"
    path.write_bytes(b"")
    decode(tmp_path / "a.jpg")
    assert path.stat().st_size > 100


def test_a_thumbnail_that_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def half(self, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with pytest.raises(LibraryError, match="No space left"):
        decode(tmp_path / "a.jpg")
    assert [path for path in (tmp_path / "thumbnails").rglob("*") if path.is_file()] == []


# --- what broken files are called --------------------------------------------------------------------------

JPEG, PNG = encoded(noise(160, 120)), encoded(noise(64, 48), "PNG")


def test_an_empty_file_is_reported_as_empty(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert reason_of(tmp_path / "a.jpg") == reason_of(b"") == "empty"


@pytest.mark.parametrize("content", [b"just text", b"BM is how this text begins", b"\0" * 500, b"%PDF-1.7", b"\xff"])
def test_a_file_that_is_no_image_is_reported_as_not_an_image(content):
    assert reason_of(content) == "not-an-image"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_jpeg_is_reported_as_truncated(tmp_path, share):
    content = encoded(noise(160, 120))
    assert reason_of(content[: int(len(content) * share)]) == "truncated"
    assert reason_of(content[: int(len(content) * share)], target=10) == "truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "HEIF", "progressive", "lzw"])
def test_half_a_file_of_any_format_is_reported_as_truncated(kind):
    picture = noise(160, 120)
    if kind == "HEIF":
        file = io.BytesIO()
        pillow_heif.from_pillow(picture).save(file)
        content = file.getvalue()
    elif kind == "progressive":
        content = encoded(picture, progressive=True)
    elif kind == "lzw":  # Pillow writes a TIFF's directory behind its pixels: cut those out of the middle
        whole = encoded(picture, "TIFF", compression="tiff_lzw")
        content = whole[:8] + b"\xff" * 3000 + whole[3008:]
    else:
        content = encoded(picture, kind)
    keep = len(content) if kind == "lzw" else len(content) // 2
    assert reason_of(content[:keep]) == "truncated"


def test_a_header_that_lies_about_the_size_is_reported():
    lying = bytearray(PNG)
    lying[16:24] = struct.pack(">II", 4000, 4000)
    assert reason_of(bytes(lying)) == "truncated"


def test_a_file_that_is_gone_is_reported_as_vanished(tmp_path):
    assert reason_of(tmp_path / "a.jpg") == "vanished"
    (tmp_path / "file").write_bytes(b"")
    assert reason_of(tmp_path / "file" / "a.jpg") == "vanished"


def test_a_file_that_may_not_be_opened_is_reported_as_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert reason_of(path) == "permission"


def test_a_folder_or_a_pipe_is_reported_not_opened(tmp_path):
    assert reason_of(tmp_path) == "not-an-image"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "a.jpg")
        assert reason_of(tmp_path / "a.jpg") == "not-an-image"


def test_whatever_a_plugin_raises_becomes_a_reason(monkeypatch):
    for error, reason in (
        (RuntimeError("x"), "truncated"),
        (MemoryError(), "too-large"),
        (NotImplementedError("x"), "unsupported"),
        (ValueError("Unsupported codec"), "unsupported"),
        (RecursionError(), "truncated"),
    ):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
        assert reason_of(JPEG) == reason


def test_an_unreadable_photo_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadablePhoto("empty", "Nothing.")))
    assert (error.reason, error.detail) == ("empty", "Nothing.")


def never_worse_than_unreadable(content: bytes) -> None:
    try:
        picture = open_image(content, Limits(max_pixels=1_000_000), target=16)
    except UnreadablePhoto as error:
        assert error.detail
    else:
        assert picture.mode == "RGB"


SIGNATURES = st.sampled_from(
    [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"RIFF\0\0\0\0WEBP"]
    + [b"\0\0\0\x18ftyp" + brand for brand in (b"heic", b"avif", b"mif1")]
)


@settings(max_examples=300, deadline=None)
@given(SIGNATURES, st.binary(max_size=400))
@example(b"", b"")
def test_random_bytes_never_raise_anything_else(signature, rest):
    never_worse_than_unreadable(signature + rest)


SAMPLES = [
    encoded(noise(64, 48), exif=exif_bytes({0x0112: 6, 0x010F: "x"}, {0x9003: "2019:07:14 18:30:59"}, {1: "N"})),
    encoded(noise(64, 48), progressive=True),
    PNG,
    encoded(noise(64, 48), "PNG", exif=exif_bytes({0x0112: 8})),
    encoded(corners(64, 48), "GIF"),
    encoded(corners(64, 48), "TIFF", compression="tiff_lzw"),
    encoded(noise(64, 48), "WEBP"),
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=12),
    st.floats(0.05, 1),
)
def test_corrupted_files_never_raise_anything_else(sample, changes, share):
    content = bytearray(sample)
    for where, value in changes:
        content[int(where * len(content))] = value
    never_worse_than_unreadable(bytes(content[: int(len(content) * share)]))


# --- real cameras ------------------------------------------------------------------------------------------


def camera_files() -> Path:
    """The folder of real camera files beside the checkout, or a skip."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "camera"
    if not folder.is_dir():
        pytest.skip("no real camera files beside the checkout (shared/data/camera)")
    return folder


def test_every_real_camera_file_becomes_a_photo(tmp_path, capsys):
    paths = [path for path in sorted(camera_files().iterdir()) if path.suffix.lower() in EXTENSIONS]
    assert len(paths) > 80
    infos = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            infos[path.name] = decode_photo(str(path), input_size=64, thumbnails=tmp_path).info
    assert capsys.readouterr() == ("", "")
    assert sum(info.taken_at is not None for info in infos.values()) >= 60
    assert sum(info.camera_model is not None for info in infos.values()) >= 50
    for name, info in infos.items():
        if name.startswith("DSCN00"):  # a walk through Arezzo, 22 October 2008
            assert info.latitude == pytest.approx(43.467, abs=0.005), name
            assert info.longitude == pytest.approx(11.882, abs=0.005), name
            assert info.taken_at.date() == datetime(2008, 10, 22).date(), name
    assert infos["iphone_hdr_NO.jpg"].longitude == pytest.approx(-3.72475, abs=1e-4)
    assert infos["ianare__iphone_13_pro_max.HEIC"].height == 4032


@pytest.mark.parametrize("shape", ["landscape", "portrait"])
def test_the_eight_real_orientations_look_the_same(shape):
    folder = camera_files()
    views = []
    for orientation in range(1, 9):
        picture = open_image(folder / f"{shape}_{orientation}.jpg")
        assert (picture.width > picture.height) == (shape == "landscape")
        views.append(np.asarray(picture.resize((24, 24)), dtype=float).ravel())
    for view in views[1:]:  # the pictures differ in the digit drawn on them, and slightly in colour
        assert np.corrcoef(views[0], view)[0, 1] > 0.95
