"""indexer keeps the library: `from indexer import PhotoLibrary`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from indexer.library import PhotoLibrary

__all__ = ["PhotoLibrary"]


def __getattr__(name: str):
    """Import the library when it is asked for: decoding workers import this package and need none of it."""
    if name == "PhotoLibrary":
        from blipcore.imports import collector_paused

        with collector_paused():
            from indexer.library import PhotoLibrary

        return PhotoLibrary
    raise AttributeError(f"module 'indexer' has no attribute {name!r}")
