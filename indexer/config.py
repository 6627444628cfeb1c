"""Where a library lies and the few numbers that shape it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from indexer.errors import LibraryError

DEFAULT_MODEL = "blip-mini"
PATCH_GB = 2.0  # of image tokens kept for matching: some 30,000 photos with blip-mini
DISK_SHARE = 0.1  # of what is free on the disk, at most
PATCH_FORM, PATCH_FORMS = "int8", ("fp16", "int8", "int8-128", "int8-62")  # see blipcore.patches


def default_library() -> Path:
    """`PHOTOBLIP_LIBRARY`, or the platform's data directory."""
    return Path(os.environ.get("PHOTOBLIP_LIBRARY") or user_data_path("photoblip") / "library")


def patch_budget(folder: Path) -> int:
    """Bytes of image tokens that a library in `folder` may keep: `PHOTOBLIP_PATCH_GB`, or what the disk can spare.

    Raises LibraryError for a setting that is no number.
    """
    wanted = os.environ.get("PHOTOBLIP_PATCH_GB")
    if wanted is None:
        return int(min(PATCH_GB * 1e9, DISK_SHARE * shutil.disk_usage(folder).free))
    try:
        return max(0, int(float(wanted) * 1e9))
    except (ValueError, OverflowError):
        raise LibraryError(f"PHOTOBLIP_PATCH_GB is a number of gigabytes, such as 2 or 0, not {wanted!r}") from None


def patch_form() -> str:
    """How image tokens are kept: `PHOTOBLIP_PATCH_FORM`, or in 8 bits. Raises LibraryError for an unknown form."""
    form = os.environ.get("PHOTOBLIP_PATCH_FORM") or PATCH_FORM
    if form not in PATCH_FORMS:
        raise LibraryError(f"PHOTOBLIP_PATCH_FORM is one of {', '.join(PATCH_FORMS)}, not {form!r}")
    return form


@dataclass(frozen=True)
class LibraryPaths:
    """The files of a library. The catalog is the truth; everything else can be made again from it."""

    folder: Path

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.sqlite"

    @property
    def thumbnails(self) -> Path:
        return self.folder / "thumbnails"

    @property
    def lock(self) -> Path:
        return self.folder / "indexing.lock"

    @property
    def models(self) -> Path:
        """The library's own models, a folder each; a run that is not done begins with a dot."""
        return self.folder / "models"

    @property
    def patches(self) -> Path:
        """Image tokens kept for matching."""
        return self.folder / "patches"

    @property
    def reports(self) -> Path:
        """What `photoblip evaluate library` measured."""
        return self.folder / "reports"

    def vectors(self, fingerprint: str) -> Path:
        """The FAISS file of one model's vectors."""
        return self.folder / "indexes" / f"{fingerprint}.faiss"
