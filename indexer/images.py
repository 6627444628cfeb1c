"""Decode one photo: upright sRGB pixels, its EXIF facts and a thumbnail, from one read and one decode.

Whatever is wrong with a file becomes UnreadablePhoto with a reason. Pillow's own settings stay as they are:
the formats' plugins are called directly, and held to the limits of this module.
"""

import errno
import hashlib
import io
import math
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from indexer import file_words
from indexer.errors import LibraryError, UnreadablePhoto
from indexer.file_words import clean_text

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"}
    | {".heic", ".heif", ".hif", ".avif"}
)
THUMBNAIL_SIDE = 768
THUMBNAIL_QUALITY = 88
THUMBNAIL_MARGIN = 1.25  # libjpeg's scaled decode may come this near to the thumbnail's size
_HASH_GRID = 32
_FLAT = 2.0  # root mean square of the low frequencies, about half a grey level: below it noise decides the signs
_COSINES = np.cos(np.pi / _HASH_GRID * np.outer(np.arange(8), np.arange(_HASH_GRID) + 0.5)) * np.sqrt(2 / _HASH_GRID)
_COSINES[0] /= np.sqrt(2)  # rows 0 to 7 of the orthonormal DCT-II


@dataclass(frozen=True)
class Limits:
    """What one photo may cost. max_memory: bytes of decoded pixels, after the draft of a JPEG."""

    max_bytes: int = 1 << 30
    max_pixels: int = 250_000_000
    max_memory: int = 1 << 30


@dataclass(frozen=True)
class PhotoInfo:
    """What the file says about itself.

    width and height are as displayed, after the turn that EXIF asks for; orientation (1-8) is what EXIF said.
    taken_at is the camera's local time, without a zone. Latitude and longitude come together or not at all.
    """

    width: int
    height: int
    format: str  # "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "HEIF" or "AVIF"
    orientation: int = 1
    taken_at: datetime | None = None
    camera_make: str | None = None
    camera_model: str | None = None
    lens: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    altitude: float | None = None  # metres, negative below the sea
    title: str | None = None
    rating: int | None = None  # 1 to 5
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)  # == over arrays has no single answer
class DecodedPhoto:
    """A photo ready for the catalog and the model; pixels is the whole picture squashed to a square."""

    content_hash: str  # sha256 of the file's bytes, hex
    bytes: int
    info: PhotoInfo
    pixels: np.ndarray  # uint8 [S, S, 3], RGB
    phash: int | None = None  # see perceptual_hash; None where no thumbnail was made
    seconds: float = 0.0  # what reading and decoding took


# --- from a file to pixels ---------------------------------------------------------------------------------


def open_image(
    source: str | Path | bytes | Image.Image, limits: Limits | None = None, *, target: int | None = None
) -> Image.Image:
    """Open a query image or an upload: upright, RGB, sRGB, transparency on white, without metadata.

    A Pillow image given as source is left as it is and a new one returned. With target, a JPEG may come back
    smaller, its shorter side still at least 2 * target (the scaled decode of libjpeg: several times faster).

    Raises:
        UnreadablePhoto: whatever the reason.
    """
    limits = limits or Limits()
    if not isinstance(source, Image.Image):
        data = source if isinstance(source, bytes) else _read(source, limits)
        with _guarded():
            return _load(_identify(data, limits), limits, target and 2 * target)[0]
    with _guarded():
        _check_pixels(source.size, limits)
        source.load()
        upright = _upright(source)
        picture = _to_rgb(upright)
        if picture is source:
            picture = picture.copy()
        picture.info = {}
        return picture


def decode_photo(
    path: str, *, input_size: int, thumbnails: str | Path | None, limits: Limits | None = None
) -> DecodedPhoto:
    """Read path once and make everything the library needs of it, its thumbnail file (unless None) included.

    The transform is BLIP's for evaluation (salesforce/BLIP, transform_test): bicubic to input_size squared,
    whatever the aspect ratio; normalisation is left to the model.

    Raises:
        UnreadablePhoto: the file cannot become a photo.
        LibraryError: the thumbnail cannot be written (disk full, no permission): not the photo's fault.
    """
    limits = limits or Limits()
    data = _read(path, limits)
    content_hash = hashlib.sha256(data).hexdigest()
    with _guarded():
        image = _identify(data, limits)
        side = max(2 * input_size, int(THUMBNAIL_MARGIN * min(_thumbnail_size(image.size))))
        picture, info = _load(image, limits, side)
        pixels = np.array(picture.resize((input_size, input_size), Image.Resampling.BICUBIC))
        thumbnail = thumbnails and picture.resize(_thumbnail_size(picture.size), Image.Resampling.BICUBIC)
    if not thumbnail:
        return DecodedPhoto(content_hash, len(data), info, pixels)
    _write_thumbnail(thumbnail, thumbnail_path(thumbnails, content_hash))
    return DecodedPhoto(content_hash, len(data), info, pixels, perceptual_hash(thumbnail))


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits that hardly change when a picture is resized, recompressed or brightened, as a signed integer.

    The signs of the 8 x 8 lowest frequencies of the 32 x 32 grey picture about their median ("pHash": Zauner, 2010,
    Implementation and benchmarking of perceptual image hash functions). The very lowest, the brightness, is no part
    of the median. 0 for a picture with next to no structure, such as a wall or a black frame: it says nothing.
    """
    grey = picture.convert("L").resize((_HASH_GRID, _HASH_GRID), Image.Resampling.BOX)
    low = _COSINES @ np.asarray(grey, np.float64) @ _COSINES.T
    detail = low.ravel()[1:]
    if np.sqrt((detail**2).mean()) < _FLAT:
        return 0
    bits = low.ravel() > np.median(detail)
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)


def thumbnail_path(thumbnails: str | Path, content_hash: str) -> Path:
    """Where the thumbnail of a photo lies: <thumbnails>/<first two hex digits>/<hash>.jpg."""
    return Path(thumbnails) / content_hash[:2] / f"{content_hash}.jpg"


def unreadable(error: OSError | ValueError) -> UnreadablePhoto:
    """The reason for an error of the file system (scan uses it too)."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnreadablePhoto("vanished", "The file is not there any more.")
    if getattr(error, "errno", None) == errno.ELOOP:
        return UnreadablePhoto("symlink-loop", "The link leads back to itself.")
    if isinstance(error, IsADirectoryError):
        return UnreadablePhoto("not-an-image", "This is a folder.")
    words = getattr(error, "strerror", None) or type(error).__name__
    return UnreadablePhoto("permission", f"The system refuses to read it: {words}.")


def _read(path: str | Path, limits: Limits) -> bytes:
    try:
        found = os.stat(path)  # noqa: PTH116 (a path may hold surrogates; Path adds nothing here)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer for ever
            raise UnreadablePhoto("not-an-image", "This is not an ordinary file.")
        with open(path, "rb") as file:  # noqa: PTH123
            # a file may grow between the look and the read: read no more than one byte too many
            data = b"" if found.st_size > limits.max_bytes else file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise unreadable(error) from error
    if max(found.st_size, len(data)) > limits.max_bytes:
        raise UnreadablePhoto("too-large", f"The file is larger than {limits.max_bytes:,} bytes.")
    return data


def _is_riff_webp(head: bytes) -> bool:
    return head.startswith(b"RIFF") and head[8:12] == b"WEBP"


def _heif(file: io.BytesIO, name: str) -> ImageFile.ImageFile:
    from pillow_heif import HeifImageFile  # most libraries have none

    return HeifImageFile(file, name)


# The plugins are called directly: Image.open would hold every file against the program-wide
# Image.MAX_IMAGE_PIXELS, and would try formats (EPS, PDF, FITS...) that no photo library wants opened.
_PLUGINS: tuple[tuple[Callable[[bytes], bool], Callable], ...] = (
    (lambda head: head.startswith(b"\xff\xd8\xff"), JpegImagePlugin.jpeg_factory),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (_is_riff_webp, WebPImagePlugin.WebPImageFile),
    (lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    (lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    (lambda head: head.startswith(b"BM") and head[14:18] in _BMP_HEADERS, BmpImagePlugin.BmpImageFile),
    (lambda head: head[4:8] == b"ftyp" and head[8:12] in _AVIF_BRANDS, AvifImagePlugin.AvifImageFile),
    (lambda head: head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS, _heif),
)
_CONTAINER_BRANDS = {b"mif1", b"msf1"}  # AVIF or HEIC inside: tried in this order
_AVIF_BRANDS = {b"avif", b"avis"} | _CONTAINER_BRANDS
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"} | _CONTAINER_BRANDS
# "BM" alone begins many a text: the size of the second header tells
_BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}


def _identify(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    """Open by signature, whatever the file's name says; nothing is decoded yet, and the limits hold."""
    if not data:
        raise UnreadablePhoto("empty", "The file has no content.")
    if len(data) > limits.max_bytes:
        raise UnreadablePhoto("too-large", f"The image is larger than {limits.max_bytes:,} bytes.")
    failure: Exception | None = None
    for accepts, opener in _PLUGINS:
        if not accepts(data[:32]):
            continue
        try:
            image = opener(io.BytesIO(data), "")
        except SyntaxError as error:  # Pillow's word for "not mine": a container may hold another format
            failure = error
            continue
        _check_pixels(image.size, limits)
        return image
    if failure is not None:
        raise failure
    raise UnreadablePhoto("not-an-image", "The content is not an image of a known format.")


def _load(image: ImageFile.ImageFile, limits: Limits, side: int | None) -> tuple[Image.Image, PhotoInfo]:
    """Decode once -> (upright RGB picture, facts); of a JPEG, the smallest decode whose sides are `side` or more."""
    size = image.size
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    if side and is_jpeg:
        image.draft(None, (side, side))
    _check_memory(image, size, limits)
    if image.format == "TIFF":
        tags = _tags(image)  # after load() the file is closed, and the plugin has turned the picture itself
    image.load()
    if image.format != "TIFF":
        tags = _tags(image)  # a PNG may carry its EXIF behind the pixels
    if not is_jpeg:
        size = image.size  # HEIF and TIFF settle it only in load()
    if _orientation(image) >= 5:
        size = size[::-1]
    info = _photo_info(image.format or "", size, *tags)
    picture = _to_rgb(_upright(image))
    picture.info = {}  # neither a thumbnail nor a caller may meet the old EXIF, comment or profile again
    return picture, info


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        detail = f"{width} x {height} is more than {limits.max_pixels:,} pixels."
        raise UnreadablePhoto("too-large", detail)


_BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}


def _check_memory(image: ImageFile.ImageFile, full_size: tuple[int, int], limits: Limits) -> None:
    needed = math.prod(image.size) * _BYTES_A_PIXEL.get(image.mode, 4)
    if image.info.get("progressive"):  # libjpeg keeps every coefficient (2 bytes), however small the draft
        needed += math.prod(full_size) * 2 * len(image.getbands())
    if needed > limits.max_memory:
        detail = f"Decoding needs {needed:,} bytes of {limits.max_memory:,} allowed."
        raise UnreadablePhoto("too-large", detail)


@contextmanager
def _guarded() -> Iterator[None]:
    """Anything a decoder raises becomes UnreadablePhoto, and Pillow's warnings stay silent."""
    # catch_warnings is not thread-safe; crossing exits can at worst leave this one narrow filter behind
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)(\.|$)")
        try:
            yield
        except UnreadablePhoto:
            raise
        except Exception as error:  # plugins raise anything: OSError, struct.error, KeyError, RuntimeError...
            raise _undecodable(error) from error


_NOT_SUPPORTED = re.compile(r"unsupported|not (supported|available|installed|implemented)", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(r"out of memory|memory limit|security limit", re.IGNORECASE)


def _undecodable(error: Exception) -> UnreadablePhoto:
    words = str(error) or type(error).__name__
    if isinstance(error, MemoryError | Image.DecompressionBombError) or _OUT_OF_MEMORY.search(words):
        return UnreadablePhoto("too-large", f"Decoding needs too much memory: {words}.")
    if isinstance(error, NotImplementedError) or _NOT_SUPPORTED.search(words):
        return UnreadablePhoto("unsupported", f"This kind of image cannot be decoded here: {words}.")
    return UnreadablePhoto("truncated", f"The image is damaged or ends early: {words}.")


# --- pixels ------------------------------------------------------------------------------------------------

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The turn still to be made, 1-8. HEIF and loaded TIFF say 1: their plugins have turned the pixels."""
    try:
        return _one_to_eight(image.getexif().get(0x0112))
    except Exception:  # broken EXIF never costs a photo
        return 1


def _one_to_eight(value: object) -> int:
    return int(value) if value in range(1, 9) else 1  # type: ignore[call-overload]


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB in sRGB, transparency composited on white; RGB without a profile comes back itself."""
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile) if profile else image
    if rgb.mode != "RGB":
        rgb = rgb.convert("RGB")
    if alpha is None or alpha.getextrema()[0] == 255:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey -> L, scaled: Pillow's own convert("L") clips everything above 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:  # no common range: spread what is there
        values = (values - low) / max(high - low, 1e-12) * 255
    elif image.mode == "F" and high <= 1:
        values = values * 255
    elif high > 255:
        values = values / 257
    return Image.fromarray((values + 0.5).clip(0, 255).astype(np.uint8))


_PLAIN_SRGB = ("sRGB IEC61966", "sRGB built-in", "GIMP built-in sRGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert by the embedded profile (Display P3, Adobe RGB, CMYK...); a profile that fails is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and ImageCms.getProfileDescription(source).startswith(_PLAIN_SRGB):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # PyCMSError, OSError, or no littleCMS: colours slightly off beat a lost photo
        return image
    return converted or image


def _thumbnail_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, THUMBNAIL_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _write_thumbnail(thumbnail: Image.Image, path: Path) -> None:
    """Write aside and rename, unless a thumbnail of the same content is there already."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        if path.exists() and path.stat().st_size:  # a power cut may leave an empty file behind the rename
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            thumbnail.save(aside, "JPEG", quality=THUMBNAIL_QUALITY)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        words = error.strerror or error
        raise LibraryError(f"Cannot write thumbnails to {path.parent.parent}: {words}.") from error


# --- EXIF --------------------------------------------------------------------------------------------------

_MAIN_TAGS = (0x010F, 0x0110, 0x0112, 0x0132, *file_words.TAGS)  # make, model, orientation, DateTime; words


def _photo_info(image_format: str, size: tuple[int, int], main: dict, exif: dict, gps: dict, xmp: object) -> PhotoInfo:
    latitude, longitude = _position(gps)
    make, model = clean_text(main.get(0x010F)), clean_text(main.get(0x0110))
    words = file_words.file_words(main, xmp, (make, model))
    return PhotoInfo(
        width=size[0],
        height=size[1],
        format="JPEG" if image_format == "MPO" else image_format,
        orientation=_one_to_eight(main.get(0x0112)),
        taken_at=_taken_at(exif.get(0x9003), exif.get(0x9004), main.get(0x0132)),
        camera_make=make,
        camera_model=model,
        lens=clean_text(exif.get(0xA434)),
        latitude=latitude,
        longitude=longitude,
        altitude=_altitude(gps),
        title=words.title,
        rating=words.rating,
        keywords=words.keywords,
    )


def _tags(image: Image.Image) -> tuple[dict, dict, dict, object]:
    """The main, EXIF and GPS directories and the XMP packet; what cannot be parsed is left out."""
    main, exif, gps = {}, {}, {}
    with suppress(Exception):  # struct.error, SyntaxError, ValueError...: EXIF is written by anybody
        tags = image.getexif()
        for tag in _MAIN_TAGS:
            with suppress(Exception):
                main[tag] = tags.get(tag)
        if "original_orientation" in image.info:  # pillow-heif turns the pixels, sets the tag to 1, notes it here
            main[0x0112] = image.info["original_orientation"]
        with suppress(Exception):
            exif = dict(tags.get_ifd(0x8769))
        with suppress(Exception):
            gps = dict(tags.get_ifd(0x8825))
    return main, exif, gps, image.info.get("xmp")


_DATE = re.compile(r"(\d{4})[:/.-](\d{1,2})[:/.-](\d{1,2})(?:[ T]+(\d{1,2}):(\d{1,2})(?::(\d{1,2}))?)?", re.ASCII)


def _taken_at(*candidates: object) -> datetime | None:
    """The first candidate that is a date; cameras also write blanks, zeros and their own separators."""
    for candidate in candidates:
        match = _DATE.match(clean_text(candidate) or "")
        if not match:
            continue
        try:
            taken_at = datetime(*(int(part or 0) for part in match.groups()))
        except ValueError:
            continue
        if taken_at.year >= 1826:  # the oldest photograph there is
            return taken_at
    return None


def _number(value: object) -> float | None:
    """A finite float; a rational over zero is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _position(gps: dict) -> tuple[float | None, float | None]:
    """(latitude, longitude), or (None, None); 0, 0 is what cameras write without a fix."""
    latitude = _degrees(gps.get(2), gps.get(1), "NS", 90)
    longitude = _degrees(gps.get(4), gps.get(3), "EW", 180)
    if latitude is None or longitude is None or latitude == longitude == 0:
        return None, None
    return latitude, longitude


def _degrees(value: object, reference: object, letters: str, limit: int) -> float | None:
    """Degrees, minutes and seconds with a hemisphere letter -> signed degrees."""
    letter = (clean_text(reference) or "?").upper()[0]
    parts = value if isinstance(value, tuple | list) else (value,)
    numbers = [_number(part) for part in parts[:3]]
    if letter not in letters or not numbers or numbers[0] is None:
        return None
    # minutes or seconds of 0/0 are written by cameras that put the fraction into the part before
    degrees = sum(abs(number or 0.0) / 60**place for place, number in enumerate(numbers))
    if degrees > limit:
        return None
    return -degrees if letter == letters[1] else degrees


def _altitude(gps: dict) -> float | None:
    metres = _number(gps.get(6))
    if metres is None or not -12_000 <= metres <= 100_000:
        return None
    return -metres if gps.get(5) in (1, b"\x01") else metres
