"""The catalog's tables. A change here comes with a migration in `migrations/versions`."""

import unicodedata
from datetime import datetime

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, UniqueConstraint, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


def fold(name: str) -> str:
    """A tag's or album's name as it is compared: "  Beach  Party" and "beach party" are the same one."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _folded_name(context) -> str:
    return fold(context.get_current_parameters()["name"])


class Base(DeclarativeBase):
    """The metadata all tables share."""


class Root(Base):
    """A folder the user asked to index."""

    __tablename__ = "roots"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(unique=True)
    added_at: Mapped[datetime]


class Photo(Base):
    """A photo is its content: files that hold the same bytes are one photo, wherever they lie."""

    __tablename__ = "photos"

    id: Mapped[int] = mapped_column(primary_key=True)
    content_hash: Mapped[str] = mapped_column(unique=True)  # sha256 of the file's bytes
    bytes: Mapped[int]
    width: Mapped[int]  # as displayed, after the EXIF orientation
    height: Mapped[int]
    format: Mapped[str]
    orientation: Mapped[int]
    taken_at: Mapped[datetime | None] = mapped_column(index=True)
    camera_make: Mapped[str | None]
    camera_model: Mapped[str | None] = mapped_column(index=True)
    lens: Mapped[str | None]
    latitude: Mapped[float | None]
    longitude: Mapped[float | None]
    altitude: Mapped[float | None]
    title: Mapped[str | None]  # the user's, or what the file says
    favourite: Mapped[bool] = mapped_column(default=False, server_default=false())
    rating: Mapped[int | None]  # 0 to 5, the user's or the file's
    phash: Mapped[int | None] = mapped_column(BigInteger)  # see indexer.images.perceptual_hash, as a signed integer
    tagged_with: Mapped[str | None]  # which model, over which list of things, wrote its generated tags
    added_at: Mapped[datetime]


class File(Base):
    """Where a photo lies on disk. A vanished file is marked, not deleted."""

    __tablename__ = "files"

    id: Mapped[int] = mapped_column(primary_key=True)
    photo_id: Mapped[int] = mapped_column(ForeignKey("photos.id"), index=True)
    path: Mapped[str] = mapped_column(unique=True)
    size: Mapped[int]
    mtime_ns: Mapped[int]
    missing_since: Mapped[datetime | None]


class Model(Base):
    """A model whose vectors the library holds; at most one is active."""

    __tablename__ = "models"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]  # a known name or a folder: what `blipcore.load` takes
    fingerprint: Mapped[str] = mapped_column(unique=True)
    dim: Mapped[int]
    active: Mapped[bool] = mapped_column(default=False)


class Embedding(Base):
    """A photo's unit vector under one model: float16, `dim` numbers; BLIP-2's 32 vectors stand one after another."""

    __tablename__ = "embeddings"

    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"), primary_key=True)
    photo_id: Mapped[int] = mapped_column(ForeignKey("photos.id"), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class Caption(Base):
    """A text for a photo: written by the user, or by a model together with how sure ITM is of it."""

    __tablename__ = "captions"
    __table_args__ = (Index("one_generated_caption_a_model", "photo_id", "source", "model"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    photo_id: Mapped[int] = mapped_column(ForeignKey("photos.id"), index=True)
    text: Mapped[str]
    source: Mapped[str]  # "generated" or "user"
    model: Mapped[str | None]
    score: Mapped[float | None]
    created_at: Mapped[datetime]


class Answer(Base):
    """What a model answered to a question about a photo: each is asked once (see indexer.answers)."""

    __tablename__ = "answers"

    photo_id: Mapped[int] = mapped_column(ForeignKey("photos.id"), primary_key=True)
    question: Mapped[str] = mapped_column(primary_key=True)  # without case and question mark
    model: Mapped[str] = mapped_column(primary_key=True)  # the fingerprint of its weights
    answer: Mapped[str]
    created_at: Mapped[datetime]


class Album(Base):
    """Photos that the user put together."""

    __tablename__ = "albums"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]  # as the user writes it
    folded: Mapped[str] = mapped_column(unique=True, default=_folded_name)  # fold(name): how it is found
    created_at: Mapped[datetime]


class AlbumPhoto(Base):
    """A photo's place in an album; a photo may be in many."""

    __tablename__ = "album_photos"

    album_id: Mapped[int] = mapped_column(ForeignKey("albums.id"), primary_key=True)
    photo_id: Mapped[int] = mapped_column(ForeignKey("photos.id"), primary_key=True, index=True)
    added_at: Mapped[datetime]


class Tag(Base):
    """A word that hangs on a photo: the user's, the file's own keyword, or a model's with how sure it is."""

    __tablename__ = "tags"
    __table_args__ = (UniqueConstraint("photo_id", "folded", "source"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    photo_id: Mapped[int] = mapped_column(ForeignKey("photos.id"))
    name: Mapped[str]  # as it was written
    folded: Mapped[str] = mapped_column(index=True, default=_folded_name)  # fold(name): how it is found
    source: Mapped[str]  # "user", "file" or "generated"
    model: Mapped[str | None]
    probability: Mapped[float | None]
    created_at: Mapped[datetime]


class SavedSearch(Base):
    """A search under a name: the arguments of `PhotoLibrary.search`."""

    __tablename__ = "saved_searches"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    folded: Mapped[str] = mapped_column(unique=True, default=_folded_name)
    query: Mapped[dict] = mapped_column(JSON)
    created_at: Mapped[datetime]


class Job(Base):
    """A batch job's state, so that progress is right after a restart and a dead job is seen."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]  # "index", "reindex", "caption"
    state: Mapped[str]  # "running", "done", "interrupted", "failed"
    arguments: Mapped[dict] = mapped_column(JSON)
    pid: Mapped[int]
    total: Mapped[int | None]
    done: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class Failure(Base):
    """A file that could not become a photo, until it changes or goes."""

    __tablename__ = "failures"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(unique=True)
    reason: Mapped[str]  # one of UnreadablePhoto.REASONS
    detail: Mapped[str]
    size: Mapped[int | None]
    mtime_ns: Mapped[int | None]
    ctime_ns: Mapped[int | None]
    at: Mapped[datetime]


class State(Base):
    """Single values: `generation` counts the changes that search must see."""

    __tablename__ = "state"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]
