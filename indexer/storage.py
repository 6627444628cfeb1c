"""What a library takes on disk, by part: `PhotoLibrary.storage`."""

import os
from pathlib import Path

from indexer.config import LibraryPaths


def storage(paths: LibraryPaths) -> dict[str, int]:
    """Bytes of the catalog, thumbnails, indexes, image tokens, the library's own models, and reports."""
    indexes = paths.vectors("").parent
    return {
        "catalog": sum(size_of(Path(f"{paths.catalog}{suffix}")) for suffix in ("", "-wal", "-shm")),
        "thumbnails": size_of(paths.thumbnails),
        "index": size_of(indexes),
        "image tokens": size_of(paths.patches),
        "own models": size_of(paths.models),
        "reports": size_of(paths.reports),
    }


def size_of(path: Path) -> int:
    """Of a file, or of all files in a folder, as far as they take room on the disk; links are not followed."""
    try:
        if not path.is_dir():
            return _taken(path.lstat())
        with os.scandir(path) as entries:
            return sum(
                size_of(Path(entry))
                if entry.is_dir(follow_symlinks=False)
                else _taken(entry.stat(follow_symlinks=False))
                for entry in entries
            )
    except OSError:  # gone, or going while we look
        return 0


def _taken(stat: os.stat_result) -> int:
    """A sparse file, such as the store of image tokens, takes less than its length."""
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
