"""Every error a user can meet, as one tree. A message is one sentence that names the way out.

Only the command line and the app turn these into words on a screen; everything below raises them.
"""

from blipcore.errors import ModelError, NotEnoughMemory

__all__ = [
    "LibraryBusy",
    "LibraryError",
    "ModelError",
    "NotEnoughMemory",
    "PhotoNotFound",
    "PhotoblipError",
    "QueryError",
    "UnreadablePhoto",
]


class PhotoblipError(Exception):
    """Base of everything photoblip raises on purpose."""


class LibraryError(PhotoblipError):
    """The library folder or its catalog cannot be used."""


class LibraryBusy(LibraryError):
    """Another process is indexing this library."""


class PhotoNotFound(PhotoblipError):
    """No photo of the library has this id or path."""


class QueryError(PhotoblipError):
    """A query or filter that cannot be understood.

    Attributes:
        position: of the trouble in the text as it was given, from 0; None where it lies in no text.
    """

    def __init__(self, message: str, position: int | None = None):
        super().__init__(message)
        self.position = position


class UnreadablePhoto(PhotoblipError):
    """A file that cannot become a photo: recorded in the catalog, never fatal to a batch.

    Args:
        reason: one of REASONS, stable, for programs.
        detail: one sentence for people.
    """

    REASONS = (
        "empty",  # zero bytes
        "not-an-image",  # no known image signature
        "truncated",  # the data ends or breaks before the picture does
        "too-large",  # over the limit on bytes or pixels
        "permission",  # the system refuses to open it
        "vanished",  # gone between the walk and the read
        "timeout",  # decoding took longer than the limit
        "crashed",  # the decoder died on it
        "unsupported",  # an image, in a form that cannot be decoded here
        "symlink-loop",  # a link that leads back to itself or to a parent folder
        "bad-name",  # a file name that is not valid UTF-8
    )

    def __init__(self, reason: str, detail: str):
        assert reason in self.REASONS, reason
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # survives the trip out of a worker process
        return type(self), (self.reason, self.detail)
