"""indexer keeps the library: `from indexer import PhotoLibrary`."""

from indexer.library import PhotoLibrary

__all__ = ["PhotoLibrary"]
