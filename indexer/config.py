"""Where a library lies and the few numbers that shape it."""

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

DEFAULT_MODEL = "blip-mini"


def default_library() -> Path:
    """`PHOTOBLIP_LIBRARY`, or the platform's data directory."""
    return Path(os.environ.get("PHOTOBLIP_LIBRARY") or user_data_path("photoblip") / "library")


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

    def vectors(self, fingerprint: str) -> Path:
        """The FAISS file of one model's vectors."""
        return self.folder / "indexes" / f"{fingerprint}.faiss"
