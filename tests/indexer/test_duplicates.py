"""Duplicates: exact copies and changed copies are found and grouped, different photos and chains are not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sqlalchemy import func, select, update

from indexer.duplicates import HASH_BITS, _by_hash, _by_vector, aligned_likeness, plain_likeness
from indexer.images import perceptual_hash
from indexer.schema import File, Photo
from tests.indexer.conftest import paint


def scene(seed, size=(320, 240)):
    """A picture with structure of all sizes, like no other one."""
    random = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for side, strength in ((3, 60), (6, 40), (12, 25), (40, 12)):
        noise = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
        total += (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float64) - 128) * strength / 64
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def cropped(image, share, at=0.5):
    width, height = image.size
    left, top = round(width * share * at), round(height * share * at)
    return image.crop((left, top, left + round(width * (1 - share)), top + round(height * (1 - share))))


VARIANTS = {
    "smaller": lambda image: image.resize((160, 120), Image.Resampling.LANCZOS),
    "recompressed": lambda image: Image.open(io.BytesIO(jpeg(image, 25))),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.25),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.75),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "cropped a little": lambda image: cropped(image, 0.04),
    "cropped at one side": lambda image: image.crop((25, 0, *image.size)),
}


def jpeg(image, quality=95):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data.getvalue()


@pytest.fixture
def scenes(open_library, tmp_path):
    """Opens a library of pictures given by name."""

    def index(pictures):
        folder = tmp_path / "scenes"
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            (folder / f"{name}.jpg").write_bytes(jpeg(picture))
        library = open_library("scenes library")
        library.index(folder, workers=0)
        return library

    return index


def names(group):
    return [path.rpartition("/")[2].removesuffix(".jpg") for photo in group.photos for path in photo.paths]


def test_every_variant_of_a_picture_is_found_and_the_original_is_best(scenes):
    original = scene(1)
    library = scenes(
        {"original": original, **{name: change(original) for name, change in VARIANTS.items()}}
        | {f"other {seed}": scene(seed) for seed in range(2, 6)}
    )
    (group,) = library.duplicates()
    assert not group.exact and sorted(names(group)) == sorted(["original", *VARIANTS])
    best = group.photos[0]
    assert best.likeness == 1 and (best.width, best.height) == (320, 240)
    assert all(0.93 <= photo.likeness <= 1 for photo in group.photos)
    assert group.spare_bytes == sum(photo.bytes for photo in group.photos[1:])
    assert group.as_dict()["kind"] == "near"


def test_different_pictures_are_no_duplicates(scenes):
    assert scenes({f"scene {seed}": scene(seed) for seed in range(10)}).duplicates() == []


def test_exact_copies_are_one_group_with_all_their_paths(library, photos, tmp_path):
    paint(photos / "copies" / "again.png", (230, 20, 20))
    paint(photos / "copies" / "third.png", (230, 20, 20))
    library.index(photos, workers=0)
    for exact in (False, True):
        (group,) = library.duplicates(exact=exact)
        assert group.exact and len(group.photos) == 1 and len(group.photos[0].paths) == 3
        assert group.spare_bytes == 2 * group.photos[0].bytes
        assert group.as_dict()["kind"] == "exact"


def test_a_near_duplicate_with_copies_of_its_own_is_one_group(scenes, tmp_path):
    original = scene(1)
    library = scenes({"original": original, "smaller": VARIANTS["smaller"](original)})
    (tmp_path / "scenes" / "copy.jpg").write_bytes((tmp_path / "scenes" / "smaller.jpg").read_bytes())
    library.index(tmp_path / "scenes", workers=0)
    (group,) = library.duplicates()
    assert sorted(names(group)) == ["copy", "original", "smaller"]


def test_walls_and_black_frames_are_duplicates_only_byte_for_byte(library, photos):
    paint(photos / "black.png", (0, 0, 0))
    paint(photos / "black too.png", (1, 1, 1))
    library.index(photos, workers=0)
    assert library.duplicates() == []


def test_a_chain_of_small_changes_does_not_become_one_group(scenes):
    wide = scene(5, (640, 240))
    frames = {f"frame {at:02}": wide.crop((at * 24, 0, at * 24 + 320, 240)) for at in range(12)}
    groups = scenes(frames).duplicates()
    assert len(groups) >= 2 and all("frame 00" not in names(g) or "frame 11" not in names(g) for g in groups)
    in_groups = [name for group in groups for name in names(group)]
    assert len(in_groups) == len(set(in_groups))


def test_a_higher_threshold_keeps_only_what_is_more_alike(scenes):
    original = scene(1)
    library = scenes({"original": original, "smaller": original.resize((160, 120)), "cropped": cropped(original, 0.1)})
    assert len(library.duplicates(likeness=0.8)[0].photos) == 3
    (group,) = library.duplicates(likeness=0.995)
    assert names(group) == ["original", "smaller"]


def test_nothing_is_deleted_and_missing_photos_are_left_out(scenes, tmp_path):
    original = scene(1)
    library = scenes({"original": original, "smaller": original.resize((160, 120))})
    before = library.catalog.scalar(select(func.count()).select_from(File))
    library.duplicates()
    assert library.catalog.scalar(select(func.count()).select_from(File)) == before
    (tmp_path / "scenes" / "smaller.jpg").unlink()
    library.index(tmp_path / "scenes", workers=0)
    assert library.duplicates() == []


def test_photos_from_before_there_were_hashes_get_theirs_once(scenes):
    original = scene(1)
    library = scenes({"original": original, "smaller": original.resize((160, 120)), "other": scene(2)})
    hashes = library.catalog.rows(select(Photo.id, Photo.phash).order_by(Photo.id))
    with library.catalog.transaction() as connection:
        connection.execute(update(Photo).values(phash=None))
    steps = []
    assert len(library.duplicates(progress=steps.append)) == 1 and steps[0].total == 3
    again = library.catalog.rows(select(Photo.id, Photo.phash).order_by(Photo.id))
    for (_, before), (_, after) in zip(hashes, again, strict=True):
        assert ((before ^ after) & (2**64 - 1)).bit_count() <= 4  # from a thumbnail that was compressed once more


def test_a_library_without_thumbnails_or_model_finds_exact_copies_still(scenes, tmp_path, open_library):
    import shutil

    original = scene(1)
    library = scenes({"original": original, "smaller": original.resize((160, 120))})
    (tmp_path / "scenes" / "copy.jpg").write_bytes((tmp_path / "scenes" / "original.jpg").read_bytes())
    library.index(tmp_path / "scenes", workers=0)
    shutil.rmtree(library.paths.thumbnails)
    (group,) = library.duplicates()
    assert group.exact and sorted(names(group)) == ["copy", "original"]
    assert open_library("empty").duplicates() == []


# -- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.07, 0.1, 0.14])
def test_a_cropped_picture_is_like_the_whole_one(share):
    whole = scene(7)
    a, b = (
        np.asarray(picture.convert("L").resize((64, 64), Image.Resampling.BOX), np.float32)
        for picture in (whole, cropped(whole, share, 0.2))
    )
    assert aligned_likeness(a, b) > 0.9 and aligned_likeness(a, b) == pytest.approx(aligned_likeness(b, a), abs=1e-5)
    assert aligned_likeness(a, b) >= plain_likeness(a, b) - 1e-5


def test_a_picture_of_one_grey_is_like_nothing():
    flat, other = np.full((64, 64), 128, np.float32), np.random.default_rng(0).random((64, 64), np.float32) * 255
    assert abs(aligned_likeness(flat, other)) < 0.1 and plain_likeness(flat, flat) == 0


def test_all_hashes_within_seven_bits_are_found_as_by_comparing_all():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 1 << 63, 300, np.uint64)
    near = hashes[random.integers(0, 300, 600)].copy()
    for row in range(600):
        for bit in random.choice(64, row % 8, replace=False):
            near[row] ^= np.uint64(1) << np.uint64(bit)
    every = np.concatenate([hashes, near])
    distance = np.bitwise_count(every[:, None] ^ every[None])
    wanted = {(i, j) for i, j in np.argwhere(distance <= 7).tolist() if i < j}
    found = {tuple(pair) for pair in _by_hash(every).tolist()}
    assert wanted <= found and all(distance[i, j] <= HASH_BITS and i < j for i, j in found)


def test_a_crowd_with_one_hash_costs_no_square_of_it():
    assert len(_by_hash(np.full(5000, 77, np.uint64))) < 3 * 5000


def test_near_vectors_are_found_by_an_inverted_file_too(monkeypatch):
    monkeypatch.setattr("indexer.duplicates.FLAT_SEARCH", 500)
    random = np.random.default_rng(0)
    vectors = random.normal(size=(1500, 32)).astype(np.float32)
    vectors[750:] = vectors[:750] + 0.15 * random.normal(size=(750, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = {tuple(pair) for pair in _by_vector(vectors.astype(np.float16)).tolist()}
    wanted = {(i, j) for i, j in np.argwhere(vectors @ vectors.T >= 0.905).tolist() if i < j}
    assert len(wanted) > 500 and len(wanted - found) <= 0.02 * len(wanted)


def test_a_hash_hardly_changes_with_the_picture_and_says_nothing_of_a_wall():
    picture = scene(3)
    value = perceptual_hash(picture)
    assert -(1 << 63) <= value < 1 << 63
    for name in ("smaller", "recompressed", "darker", "grey"):
        changed = perceptual_hash(VARIANTS[name](picture).convert("RGB"))
        assert ((value ^ changed) & (2**64 - 1)).bit_count() <= 8, name
    assert ((value ^ perceptual_hash(scene(4))) & (2**64 - 1)).bit_count() > 12
    assert perceptual_hash(Image.new("RGB", (50, 50), "green")) == 0
    assert perceptual_hash(Image.new("RGB", (1, 1), "green")) == 0
