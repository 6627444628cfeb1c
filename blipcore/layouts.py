"""The layouts captioned photos come in: found, and gone through photo by photo without reading the pictures."""

import csv
import json
import logging
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

log = logging.getLogger(__name__)

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
TEXT_SUFFIXES = frozenset({".txt", ".json"})
NOT_THERE, DAMAGED = "annotated photos that are not there", "damaged tars"


class Member(NamedTuple):
    """Where a file lies: a whole file, or a stretch of a tar."""

    name: str  # relative, with / between folders
    file: Path
    offset: int = 0
    size: int = -1  # -1: to the end

    @property
    def stem(self) -> str:
        """The name without its suffix: what a photo and its caption share."""
        return str(PurePosixPath(self.name).with_suffix(""))

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    def read(self) -> bytes:
        # opened anew each time: threads, forked workers and a pickled index then need no care
        with Path(self.file).open("rb") as data:
            data.seek(self.offset)
            return data.read(self.size)


class Row(NamedTuple):
    """A photo as it is found, before its bytes are read."""

    key: str
    member: Member
    captions: list[str]


def find_photos(path: Path, split: str | None, images: Path | None, skipped: Counter) -> Iterator[Row]:
    """Find out which layout `path` is, and go through its photos. What is left out is counted in `skipped`."""
    if not path.is_dir():
        if path.suffix == ".json":
            return _annotated(path, split, images, skipped)
        if split:
            raise ValueError(f"{path} has no splits: name a folder that holds {split}, or give each split its own path")
        return _grouped(expand_braces(path), skipped)
    if (path / "captions.tsv").exists():
        return listed(read_captions(path / "captions.tsv"), photo_place(path, split), skipped)
    if (file := _annotation_file(path, split)) is not None:
        return _annotated(file, split, images, skipped)
    return _grouped(_shards(path, split), skipped)


def expand_braces(pattern: Path | str) -> list[Path]:
    """`a/{00..12}.tar` or `{a,b}.tar` -> the files it names. Raises FileNotFoundError naming one that is not there."""
    names = [str(pattern)]
    while not Path(names[0]).exists() and (braces := re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", names[0])):
        names = [name.replace(braces[0], part, 1) for name in names for part in _brace_parts(braces[1])]
    for name in names:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"there is no {name}: photos come from a folder, a tar, or a pattern {{000..012}}.tar"
            )
    return [Path(name) for name in names]


def _brace_parts(inside: str) -> list[str]:
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = span.groups()
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return inside.split(",")


def _shards(folder: Path, split: str | None) -> list[Path]:
    """The tars of a folder, those of a split, or the folder itself where it has none."""
    if split and (folder / split).is_dir():
        folder, split = folder / split, None
    shards = sorted(folder.glob(f"{split or ''}*.tar"))
    if split and not shards:
        raise FileNotFoundError(f"{folder} has neither {split}*.tar nor a folder {split}")
    return shards or [folder]


def photo_place(data: Path, split: str | None) -> Path:
    """Where the photos of `data`/captions.tsv lie: a tar or a folder."""
    name = split or "photos"
    if (archive := data / f"{name}.tar").exists():
        return archive
    if (data / name).is_dir():
        return data / name
    if split:
        raise FileNotFoundError(f"{data} has neither {name}.tar nor a folder {name}")
    return data


# -- the three layouts --------------------------------------------------------------------------------------


def read_captions(file: Path) -> dict[str, list[str]]:
    """`captions.tsv` -> file name to its captions, in the order of the lines."""
    captions = defaultdict(list)
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} needs a header line with the columns file and caption")
        for row in rows:
            captions[row["file"]].append(row["caption"])
    return dict(captions)


def listed(captions: dict[str, list[str]], place: Path, skipped: Counter) -> Iterator[Row]:
    """Photos of a place with the captions listed for them, sorted by name.

    A list may name the photo by its path in the place or, where no other has it, by the path's last part.
    """
    last_parts = Counter(PurePosixPath(name).name for name in captions)
    by_last = {last: name for name in captions if last_parts[last := PurePosixPath(name).name] == 1}
    rows = []
    for member in _members(place, skipped):
        if member.suffix in PHOTO_SUFFIXES:
            key = member.name if member.name in captions else by_last.get(PurePosixPath(member.name).name, member.name)
            rows.append(Row(key, member, _texts(captions.get(key, []))))
    return iter(sorted(rows, key=lambda row: row.key))


def _annotation_file(folder: Path, split: str | None) -> Path | None:
    """The folder's caption annotations of that split, or None. Raises ValueError where several would do."""
    patterns = ["dataset_coco.json", "dataset_flickr*.json"]  # Karpathy's: every split in one file
    patterns += [f"captions_{split or ''}*.json", f"*_karpathy_{split or ''}*.json"]
    for pattern in patterns:
        files = [*sorted(folder.glob(pattern)), *sorted((folder / "annotations").glob(pattern))]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{folder} has several annotation files ({names}): name one of them, or a split")
        if files:
            return files[0]
    return None


def _annotated(file: Path, split: str | None, images: Path | None, skipped: Counter) -> Iterator[Row]:
    """The photos that an annotation file names, sorted by name."""
    captions = _read_annotations(file, split)
    place = Path(images) if images else file.parent.parent if file.parent.name == "annotations" else file.parent
    if not place.exists():
        raise FileNotFoundError(f"there is no {place} to take the photos of {file.name} from")
    rows = [row for row in listed(captions, place, skipped) if row.key in captions]
    if missing := len(captions) - len({row.key for row in rows}):
        skipped[NOT_THERE] += missing
    return iter(rows)


def _read_annotations(file: Path, split: str | None) -> dict[str, list[str]]:
    """COCO's, Karpathy's or BLIP's JSON -> photo name to its captions."""
    if not file.exists():
        raise FileNotFoundError(f"there is no annotation file {file}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "annotations" not in values:
            return _karpathy(values["images"], split, file)
        if split and split not in file.stem:
            raise ValueError(
                f"{file} has no split {split}: name the folder with a file for each, or leave the split out"
            )
        return _coco(values) if isinstance(values, dict) else _blip_list(values)
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a caption file of COCO's or Karpathy's kind ({error!r})") from error


def _coco(values: dict) -> dict[str, list[str]]:
    names = {image["id"]: image["file_name"] for image in values["images"]}
    captions = {name: [] for name in names.values()}
    for annotation in values["annotations"]:
        if annotation["image_id"] in names:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    return captions


def _karpathy(images: list[dict], split: str | None, file: Path) -> dict[str, list[str]]:
    wanted = {"train", "restval"} if split == "train" else {split}
    if split and not any(image["split"] in wanted for image in images):
        raise ValueError(f"{file} has no split {split}, only {', '.join(sorted({i['split'] for i in images}))}")
    return {
        str(PurePosixPath(image.get("filepath", ""), image["filename"])): [s["raw"] for s in image["sentences"]]
        for image in images
        if not split or image["split"] in wanted
    }


def _blip_list(entries: list[dict]) -> dict[str, list[str]]:
    """salesforce/BLIP's lists: a caption an entry for training, all of a photo's captions for evaluation."""
    captions = defaultdict(list)
    for entry in entries:
        texts = entry["caption"]
        captions[entry["image"]] += [texts] if isinstance(texts, str) else texts
    return dict(captions)


def _grouped(places: Iterable[Path], skipped: Counter) -> Iterator[Row]:
    """Photos of tars or folders, in their order, with the captions in the files that share their names."""
    for place in places:
        photos, texts = [], defaultdict(list)
        for member in _members(place, skipped):
            if member.suffix in PHOTO_SUFFIXES:
                photos.append(member)
            elif member.suffix in TEXT_SUFFIXES:
                texts[member.stem].append(member)
        for photo in photos:
            found = [text for member in texts.get(photo.stem, ()) for text in _read_texts(member)]
            yield Row(photo.name, photo, list(dict.fromkeys(found)))  # img2dataset writes .txt and .json of one caption


def _read_texts(member: Member) -> list[str]:
    """The captions in a .txt (one) or .json; none where it cannot be read."""
    try:
        content = member.read().decode("utf-8-sig")
        if member.suffix == ".txt":
            return _texts([content])
        values = json.loads(content)
        return _texts([values.get("caption"), *(values.get("captions") or ())])
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _texts(values: Iterable) -> list[str]:
    """Those that are text and not blank, with single spaces."""
    return [text for value in values if isinstance(value, str) and (text := " ".join(value.split()))]


# -- tars and folders ---------------------------------------------------------------------------------------


def _members(place: Path, skipped: Counter) -> Iterator[Member]:
    """The files in a tar, in their order, or below a folder, sorted; hidden ones are passed over."""
    found = _folder_members(place) if place.is_dir() else _tar_members(place, skipped)
    return (
        m for m in found if not any(part.startswith(".") for part in PurePosixPath(m.name).parts) and _is_text(m.name)
    )


def _folder_members(folder: Path) -> Iterator[Member]:
    for at, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            file = Path(at, name)
            yield Member(file.relative_to(folder).as_posix(), file)


def _tar_members(file: Path, skipped: Counter) -> Iterator[Member]:
    """One pass over a tar's headers; what lies before the damage of a damaged one."""
    try:
        with tarfile.open(file, "r:") as members:  # "r:": offsets into a compressed tar would mean nothing
            for member in members:
                if member.isfile():
                    yield Member(str(PurePosixPath(member.name)), file, member.offset_data, member.size)
    except tarfile.TarError as error:
        log.warning("%s is no whole, uncompressed tar (%s)", file, error)
        skipped[DAMAGED] += 1


def _is_text(name: str) -> bool:
    """Whether a name can be written in UTF-8, as the index's columns are."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def write_shard(file: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write a webdataset shard aside and rename it when it is whole; equal records give equal bytes.

    Args:
        records: (name, {"jpg": ..., "json": ...}); names without dots, as webdataset wants them.
    """
    aside = file.with_name(f".{file.name}.part")
    with tarfile.open(aside, "w") as shard:
        for name, parts in records:
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")  # no time and no owner
                info.size = len(content)
                shard.addfile(info, BytesIO(content))
    aside.replace(file)
