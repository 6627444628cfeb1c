"""Captioned photos: layouts that read equal, an index instead of bytes, bad files that cost themselves only."""

import csv
import json
import logging
import pickle
import random
import tarfile
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipcore.captioned import NO_CAPTION, UNREADABLE, load_captioned, open_captioned, open_photos
from blipcore.layouts import DAMAGED, NOT_THERE, expand_braces, write_shard
from tests.tiny import SHARED_DATA, drawn_photo, needs_shared_data

COUNT = 6
CAPTIONS = {f"p{i}.png": [f"a thing number {i}", f"the {i}th thing"] for i in range(COUNT)}


def encoded(seed: int, kind: str = "PNG", **options) -> bytes:
    drawn_photo(seed).save(held := BytesIO(), kind, **options)
    return held.getvalue()


def save_photos(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(CAPTIONS):
        (folder / name).write_bytes(encoded(seed))
    return folder


def pack(tar: Path, members: dict[str, bytes]) -> Path:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return tar


def tsv(folder: Path, captions: dict[str, list[str]] = CAPTIONS) -> Path:
    with (folder / "captions.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel-tab").writerows(
            [["file", "caption"], *([name, text] for name, texts in captions.items() for text in texts)]
        )
    return folder


def tsv_folder(at: Path) -> Path:
    return tsv(save_photos(at))


def tsv_tar(at: Path) -> Path:
    pack(at / "photos.tar", {name: encoded(seed) for seed, name in enumerate(CAPTIONS)})
    return tsv(at)


def coco(at: Path) -> Path:
    save_photos(at / "val2017")
    images = [{"id": 7 * i, "file_name": name} for i, name in enumerate(CAPTIONS)]
    notes = [{"image_id": 7 * i, "caption": text} for i, texts in enumerate(CAPTIONS.values()) for text in texts]
    (at / "annotations").mkdir()
    file = at / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    return at


def karpathy(at: Path) -> Path:
    save_photos(at / "images")
    images = [{"filename": name, "filepath": "val2014", "split": "test", "sentences": [{"raw": t} for t in texts]}
              for name, texts in CAPTIONS.items()]  # fmt: skip
    (at / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return at


def blip_list(at: Path) -> Path:
    save_photos(at / "val2014")
    entries = [{"image": f"val2014/{name}", "caption": text} for name, texts in CAPTIONS.items() for text in texts]
    (at / "coco_karpathy_train.json").write_text(json.dumps(entries))
    return at


def shards(at: Path) -> Path:
    for number in range(2):
        records = {}
        for seed, (name, texts) in list(enumerate(CAPTIONS.items()))[3 * number : 3 * number + 3]:
            records |= {name: encoded(seed), name.replace("png", "json"): json.dumps({"captions": texts}).encode()}
        pack(at / f"part-{number:03d}.tar", records)
    return at


def unpacked(at: Path) -> Path:
    save_photos(at)
    for name, texts in CAPTIONS.items():
        (at / name.replace("png", "json")).write_text(json.dumps({"caption": texts[0], "captions": texts[1:]}))
    return at


def contents(source) -> list[tuple]:
    return [(Path(s.key).name, s.encoded, s.captions) for s in (source[i] for i in range(len(source)))]


@pytest.mark.parametrize("layout", [tsv_folder, tsv_tar, coco, karpathy, blip_list, shards, unpacked])
def test_every_layout_reads_the_same_photos_and_captions(layout, tmp_path):
    source = open_captioned(layout(tmp_path / "data"))
    assert contents(source) == [(name, encoded(i), CAPTIONS[name]) for i, name in enumerate(CAPTIONS)]
    np.testing.assert_array_equal(np.asarray(source[2].image()), np.asarray(drawn_photo(2)))
    assert source.skipped == {}
    assert len(open_captioned(tmp_path / "data", limit=4)) == 4


def test_the_index_and_the_photos_in_memory_agree(tmp_path):
    data = tsv_folder(tmp_path)
    held = load_captioned(data)
    assert contents(held) == contents(open_captioned(data)) == contents(open_captioned(data).load())
    assert held.texts()[1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_photos_come_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter
    grey = Image.new("L", (40, 20), 9)
    grey.save(tmp_path / "a.jpg", exif=exif)
    sample = open_captioned(tsv(tmp_path, {"a.jpg": ["x"]}))[0]
    assert sample.image().size == (20, 40) and sample.image().mode == "RGB"


def test_brace_patterns_name_shards_in_order(tmp_path):
    shards(tmp_path)
    assert contents(open_captioned(tmp_path / "part-{000..001}.tar")) == contents(open_captioned(tmp_path))
    second = open_captioned(str(tmp_path / "part-{001,000}.tar"))
    assert [s.key for s in second] == [f"p{i}.png" for i in (3, 4, 5, 0, 1, 2)]
    for name in ("a01", "a02", "b01", "b02"):
        (tmp_path / name).touch()
    assert [p.name for p in expand_braces(tmp_path / "{a,b}{01..02}")] == ["a01", "a02", "b01", "b02"]
    with pytest.raises(FileNotFoundError, match=r"part-002\.tar"):
        open_captioned(tmp_path / "part-{000..002}.tar")


def test_a_txt_is_one_caption_and_repeats_of_it_are_dropped(tmp_path):
    members = {"a/1.jpg": encoded(1, "JPEG"), "a/1.txt": b"two\nlines ", "a/1.json": b'{"caption": "two lines"}'}
    source = open_captioned(pack(tmp_path / "one.tar", members))
    assert [(s.key, s.captions) for s in source] == [("a/1.jpg", ["two lines"])]


def test_splits_of_each_layout(tmp_path):
    for split, seed in (("train", 1), ("dev", 2)):
        pack(tmp_path / "wds" / f"{split}-000.tar", {f"{split}.png": encoded(seed), f"{split}.txt": b"x"})
        (tmp_path / "folders" / split).mkdir(parents=True)
        (tmp_path / "folders" / split / f"{split}.png").write_bytes(encoded(seed))
    tsv(tmp_path / "folders", {"train.png": ["x"], "dev.png": ["x"]})
    for layout in ("wds", "folders"):
        assert [s.key for s in open_captioned(tmp_path / layout, "dev")] == ["dev.png"]
        assert {s.key for s in open_captioned(tmp_path / layout)} == {"dev.png", "train.png"}
        with pytest.raises(FileNotFoundError, match="test"):
            open_captioned(tmp_path / layout, "test")
    with pytest.raises(ValueError, match="no splits"):
        open_captioned(tmp_path / "wds" / "{train,dev}-000.tar", "dev")


def test_karpathys_train_takes_restval_and_unknown_splits_are_named(tmp_path):
    save_photos(tmp_path)
    names = ["train", "restval", "val", "test", "train", "val"]
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": "x"}]}
        for name, split in zip(CAPTIONS, names, strict=True)
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    assert [s.key for s in open_captioned(tmp_path, "train")] == ["p0.png", "p1.png", "p4.png"]
    assert [s.key for s in open_captioned(tmp_path / "dataset_flickr8k.json", "val")] == ["p2.png", "p5.png"]
    with pytest.raises(ValueError, match="no split dev, only restval, test, train, val"):
        open_captioned(tmp_path, "dev")


def test_coco_splits_are_files_and_images_may_lie_elsewhere(tmp_path):
    coco(tmp_path / "data")
    assert len(open_captioned(tmp_path / "data", "val")) == COUNT
    file = tmp_path / "data" / "annotations" / "captions_val2017.json"
    with pytest.raises(ValueError, match="no split train"):
        open_captioned(file, "train")
    moved = (tmp_path / "data" / "val2017").rename(tmp_path / "elsewhere")
    assert len(open_captioned(file, images=moved)) == COUNT
    (moved / "p0.png").unlink()
    assert open_captioned(file, images=moved).skipped == {NOT_THERE: 1}
    with pytest.raises(FileNotFoundError, match="not there"):
        open_captioned(file)
    file.with_name("captions_train2017.json").write_text("{}")
    with pytest.raises(ValueError, match="several annotation files"):
        open_captioned(tmp_path / "data")


@pytest.mark.parametrize("text", ["{", '{"images": []', '{"images": [{}]}', '{"annotations": [], "images": 3}', "[1]"])
def test_a_broken_annotation_file_is_named(text, tmp_path):
    (tmp_path / "captions_x.json").write_text(text)
    with pytest.raises(ValueError, match="captions_x"):
        open_captioned(tmp_path)


def test_members_without_caption_are_counted_and_warned_of_once(tmp_path, caplog):
    members = {"1.jpg": encoded(1, "JPEG"), "1.txt": b"x", "2.jpg": encoded(2, "JPEG"), "3.jpg": encoded(3, "JPEG"),
               "3.json": b"{no json", "4.jpg": b"", "4.json": b'["a list"]', "5.jpg": b"", "5.txt": b" \n",
               "._1.jpg": b"a Mac's shadow of 1.jpg", "6.txt": b"no photo"}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        source = open_captioned(pack(tmp_path / "a.tar", members))
    assert [s.key for s in source] == ["1.jpg"]
    assert source.skipped == {NO_CAPTION: 4}
    assert len(caplog.records) == 1 and "4 photos without a caption" in caplog.text


def test_corrupt_images_give_way_to_the_next_and_are_counted_once(tmp_path, caplog):
    good = encoded(1, "JPEG", quality=95)
    photos = {
        "0": good,
        "1": good[: len(good) // 2],
        "2": b"no image",
        "3": b"",
        "4": encoded(4, "JPEG"),
        "5": b"GIF89a",
    }
    members = {}
    for name, content in photos.items():
        members |= {f"{name}.jpg": content, f"{name}.txt": f"caption {name}".encode()}
    source = open_captioned(pack(tmp_path / "a.tar", members))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [source[i].key for i in range(6)] == ["0.jpg", *["4.jpg"] * 4, "0.jpg"]
            assert [s.key for s in source] == ["0.jpg", "4.jpg"]
    assert source[1].captions == ["caption 4"]
    assert source.skipped == {UNREADABLE: 4}
    assert len(caplog.records) == 1 and "1.jpg" in caplog.text
    assert source.load().files == ["0.jpg", "4.jpg"]


def test_where_nothing_can_be_read_the_error_says_so(tmp_path):
    source = open_captioned(pack(tmp_path / "a.tar", {"1.jpg": b"?", "1.txt": b"x"}))
    with pytest.raises(ValueError, match="none of the 1 photos"):
        source[0]


def test_an_index_ends(tmp_path):
    source = open_captioned(tsv_folder(tmp_path))
    assert source[-1].key == "p5.png"
    with pytest.raises(IndexError):
        source[COUNT]


def test_a_truncated_shard_gives_what_lies_before_the_damage(tmp_path):
    whole = shards(tmp_path) / "part-001.tar"
    with tarfile.open(whole) as archive:
        last = archive.getmember("p5.png")
    whole.write_bytes(whole.read_bytes()[: last.offset_data + 100])
    (tmp_path / "part-002.tar").write_bytes(b"not a tar at all" * 100)
    source = open_captioned(tmp_path)
    assert source.skipped == {DAMAGED: 2, NO_CAPTION: 1}
    assert [s.key for s in source] == ["p0.png", "p1.png", "p2.png", "p3.png", "p4.png"]


def test_a_compressed_tar_is_refused_with_the_reason(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
    with caplog.at_level(logging.WARNING), pytest.raises(FileNotFoundError, match="1 damaged tars"):
        open_captioned(tmp_path / "a.tar")
    assert "uncompressed" in caplog.text


def test_photos_need_no_caption_where_none_are_wanted(tmp_path):
    for name in ("cat/1.jpg", "dog/1.jpg", "dog/deep/2.PNG", ".hidden/3.jpg"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(encoded(len(name), "JPEG"))
    (tmp_path / "f" / "notes.json").write_text("[]")
    members = {p.relative_to(tmp_path / "f").as_posix(): p.read_bytes() for p in (tmp_path / "f").rglob("*.[jP]*")}
    pack(tmp_path / "t" / "photos.tar", dict(sorted(members.items())))
    expected = ["cat/1.jpg", "dog/1.jpg", "dog/deep/2.PNG"]
    for place in (tmp_path / "f", tmp_path / "t", tmp_path / "t" / "photos.tar"):
        source = open_photos(place)
        assert sorted(s.key for s in source) == expected and all(s.captions == [] for s in source)
        with pytest.raises(FileNotFoundError, match="3 photos without a caption"):
            open_captioned(place)


def test_a_list_may_name_photos_by_path_where_names_repeat(tmp_path):
    for name in ("bird/1.png", "cat/1.png", "dog/1.png"):  # nobody says what the bird is
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded(len(name)))
    tsv(tmp_path, {"cat/1.png": ["a cat"], "dog/1.png": ["a dog"]})
    assert [(s.key, s.captions) for s in open_captioned(tmp_path)] == [
        ("cat/1.png", ["a cat"]),
        ("dog/1.png", ["a dog"]),
    ]


def test_a_missing_place_says_what_would_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder, a tar, or a pattern"):
        open_captioned(tmp_path / "nowhere")


def test_shards_stay_on_disk(tmp_path):
    """Four megabytes of photos: neither opening nor reading them all, in any order, holds a fraction of that."""
    rng, blobs = random.Random(0), {}
    for i in range(64):
        blobs |= {f"{i:03d}.jpg": encoded(i, "JPEG") + rng.randbytes(1 << 16), f"{i:03d}.txt": b"a caption"}
    pack(tmp_path / "big.tar", blobs)
    tracemalloc.start()
    source = open_captioned(tmp_path / "big.tar")
    for i in rng.sample(range(64), 64):
        assert source[i].encoded == blobs[f"{i:03d}.jpg"]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5e6 and held < 3e5
    assert len(pickle.dumps(source)) < 2e4


def test_an_index_travels_to_a_worker(tmp_path):
    source = open_captioned(shards(tmp_path))
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_written_shard_reads_back_and_is_the_same_bytes_again(tmp_path):
    records = [("000", {"png": encoded(0), "json": b'{"captions": ["a", "b"]}'}), ("001", {"json": b"{}"})]
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, iter(records))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    source = open_captioned(tmp_path / "a.tar")
    assert [(s.key, s.encoded, s.captions) for s in source] == [("000.png", encoded(0), ["a", "b"])]


def test_a_shard_that_fails_halfway_is_not_there(tmp_path):
    def records():
        yield "000", {"txt": b"x"}
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_shard(tmp_path / "a.tar", records())
    assert not (tmp_path / "a.tar").exists() and list(tmp_path.glob("*.tar")) == []


@needs_shared_data
def test_shared_tars_are_indexed_in_place():
    photos = open_captioned(SHARED_DATA / "flickr8k", "dev", limit=20)
    held = load_captioned(SHARED_DATA / "flickr8k", "dev", limit=20)
    assert contents(photos) == contents(held) and len(photos[3].captions) == 5
    assert open_photos(SHARED_DATA / "caltech101")[0].key == "BACKGROUND_Google/image_0001.jpg"
