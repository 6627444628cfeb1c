"""Photos that are there more than once: copies, and the same picture resized, recompressed, cropped or brightened.

`photoblip duplicates`. Candidates come from perceptual hashes (multi-index hashing: Norouzi, Punjani, Fleet 2012,
arXiv 1307.2982, as FAISS has it) and from the nearest vectors; each candidate is then looked at. Nothing is deleted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from sqlalchemy import func, select, update

from indexer.catalog import Catalog, chunks, is_present
from indexer.errors import UnreadablePhoto
from indexer.images import open_image, perceptual_hash, thumbnail_path
from indexer.jobs import Progress, ProgressCallback
from indexer.schema import File, Photo

LIKENESS = 0.93  # from which two pictures count as the same; see docs/organise.md for what it lets through
HASH_BITS = 10  # hashes that differ in more say nothing alone: a tenth of the side cut off changes 14 of them
LOOSE_BITS = 26  # neighbouring vectors are looked at only if their hashes are nearer than those of any two photos
COSINE, NEIGHBOURS = 0.9, 32
FLAT_SEARCH = 25_000  # vectors from which an inverted file pays
CROWD = 64  # photos with one and the same hash from which only the best of them is compared with the others
GREYS = 64  # side of the grey picture that is looked at
GREY_CACHE = 20_000  # pictures, 4 kB each


@dataclass(frozen=True)
class Duplicate:
    """A photo of a group. likeness: with the group's best photo, 0 to 1, whose own is 1."""

    photo_id: int
    paths: tuple[str, ...]
    width: int
    height: int
    bytes: int
    taken_at: datetime | None
    likeness: float

    def as_dict(self) -> dict:
        values = {**self.__dict__, "paths": list(self.paths)}
        return values | {"taken_at": self.taken_at.isoformat() if self.taken_at else None}


@dataclass(frozen=True)
class DuplicateGroup:
    """Photos that show the same, the best first: most pixels, then most bytes, then the oldest.

    Attributes:
        spare_bytes: what all files but one of the best photo take.
    """

    photos: tuple[Duplicate, ...]
    spare_bytes: int

    @property
    def exact(self) -> bool:
        """Whether these are copies of one file, byte for byte."""
        return len(self.photos) == 1

    def as_dict(self) -> dict:
        kind = "exact" if self.exact else "near"
        return {"kind": kind, "spare_bytes": self.spare_bytes, "photos": [photo.as_dict() for photo in self.photos]}


def find_duplicates(
    catalog: Catalog,
    thumbnails: Path,
    *,
    likeness: float = LIKENESS,
    exact: bool = False,
    progress: ProgressCallback | None = None,
) -> list[DuplicateGroup]:
    """Groups of photos on disk that are the same picture, those that take the most space first.

    Every photo of a group is like the group's best one, not merely like another one of the group: a chain of small
    changes, such as the frames of a film, does not become one group. Pictures with next to no structure (a wall, a
    black frame) are duplicates only byte for byte.

    Args:
        likeness: from which two pictures count as the same, 0 to 1. exact: only copies, byte for byte.
    """
    groups = {}
    if not exact:
        fill_hashes(catalog, thumbnails, progress)
        groups = _groups(_Photos(catalog), _Likeness(catalog, thumbnails), likeness, progress)
    grouped = {*groups, *(photo_id for others in groups.values() for photo_id in others)}
    copies = select(File.photo_id).where(File.missing_since.is_(None)).group_by(File.photo_id)
    for row in catalog.stream(copies.having(func.count() > 1)):
        if row.photo_id not in grouped:
            groups[row.photo_id] = {}
    found = [_described(catalog, best, others) for best, others in groups.items()]
    return sorted(found, key=lambda group: (-group.spare_bytes, group.photos[0].photo_id))


def fill_hashes(catalog: Catalog, thumbnails: Path, progress: ProgressCallback | None = None) -> int:
    """Give photos that came before there were perceptual hashes theirs, from their thumbnails. -> how many got one."""
    query = select(Photo.id, Photo.content_hash).where(Photo.phash.is_(None), is_present(Photo.id))
    todo, filled = catalog.rows(query.order_by(Photo.id)), 0
    for done, part in enumerate(chunks(todo, 200)):
        hashes = {}
        for row in part:
            try:
                hashes[row.id] = perceptual_hash(open_image(thumbnail_path(thumbnails, row.content_hash)))
            except UnreadablePhoto:  # without a thumbnail a photo is found by its vector, or not at all
                continue
        with catalog.transaction() as connection:
            for photo_id, value in hashes.items():
                connection.execute(update(Photo).where(Photo.id == photo_id).values(phash=value))
        filled += len(hashes)
        if progress:
            progress(Progress(min(len(todo), (done + 1) * 200), len(todo), 0))
    return filled


class _Photos:
    """Photos on disk with some structure, the best first: parallel arrays.

    Attributes:
        ids: int64 [n]. hashes: uint64 [n]. vectors: float16 [n, E], zeros where there is none; None of no model.
    """

    def __init__(self, catalog: Catalog):
        order = ((Photo.width * Photo.height).desc(), Photo.bytes.desc())
        query = select(Photo.id, Photo.phash).where(is_present(Photo.id), Photo.phash != 0)
        oldest = func.coalesce(Photo.taken_at, Photo.added_at)
        rows = [tuple(row) for row in catalog.stream(query.order_by(*order, oldest, Photo.id))]
        both = np.array(rows, np.int64).reshape(-1, 2)
        self.ids, self.hashes = both[:, 0], both[:, 1].copy().view(np.uint64)
        self.vectors = self._vectors(catalog)

    def _vectors(self, catalog: Catalog) -> np.ndarray | None:
        model = catalog.active_model()
        if model is None or not len(self.ids):
            return None
        vectors, order = np.zeros((len(self.ids), model.dim), np.float16), np.argsort(self.ids)
        for ids, found in catalog.vectors(model.id, self.ids.tolist()):
            places = order[np.searchsorted(self.ids, ids, sorter=order)]
            # of a photo with several vectors their common direction
            total = found if found.ndim == 2 else found.sum(1)
            vectors[places] = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        return vectors


def _groups(photos: _Photos, looks: "_Likeness", least: float, progress: ProgressCallback | None) -> dict:
    """{id of the best photo: {id of another: likeness}}: each photo, best first, takes those that are like it."""
    neighbours = _adjacent(_candidates(photos), len(photos.ids))
    groups, taken = {}, np.zeros(len(photos.ids), bool)
    for best, others in neighbours:
        if taken[best]:
            continue
        free = others[~taken[others]]
        alike = looks.likeness(photos.ids[best], photos.ids[free], least)
        same = {int(at): value for at, value in zip(free, alike, strict=True) if value >= least}
        if same:
            taken[[best, *same]] = True
            groups[int(photos.ids[best])] = {int(photos.ids[at]): value for at, value in same.items()}
        if progress:
            progress(Progress(best + 1, len(photos.ids), 0))
    return groups


# -- candidates ---------------------------------------------------------------------------------------------


def _candidates(photos: _Photos) -> np.ndarray:
    """Pairs of places [P, 2], the better photo first, that may show the same."""
    pairs = [_by_hash(photos.hashes)]
    if photos.vectors is not None:
        near = _by_vector(photos.vectors)
        pairs.append(near[_bits(photos.hashes, near) <= LOOSE_BITS])
    return np.unique(np.concatenate(pairs), axis=0)


def _bits(hashes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])


def _by_hash(hashes: np.ndarray) -> np.ndarray:
    """Pairs [P, 2] of hashes that differ in at most HASH_BITS: all of those up to 7 bits, most of the others.

    Four tables of 16 bits, each looked up with one bit turned: of two hashes that differ in 7 bits, at least one of
    the four quarters differs in one or none.
    """
    import faiss

    distinct, where = np.unique(hashes, return_inverse=True)
    if not len(distinct):
        return np.zeros((0, 2), np.int64)
    codes = distinct.view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    index.nflip = 1
    index.add(codes)
    found = [np.zeros((0, 2), np.int64)]
    for at in range(0, len(codes), 65_536):
        limits, _, ids = index.range_search(codes[at : at + 65_536], HASH_BITS + 1)
        first = np.repeat(np.arange(len(limits) - 1) + at, np.diff(limits.astype(np.int64)))
        found.append(np.stack([first, ids], 1)[first <= ids])
    order = np.argsort(where, kind="stable")
    starts = np.searchsorted(where[order], np.arange(len(distinct) + 1))
    members = [order[a:b] for a, b in pairwise(starts.tolist())]  # of each hash, the best photo first
    return _expanded(np.concatenate(found), members)


def _expanded(hash_pairs: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """Pairs of hashes -> pairs of photos. Where a crowd shares one hash, only its best photo meets the others."""
    pairs = [np.zeros((0, 2), np.int64)]
    for first, second in hash_pairs.tolist():
        a, b = members[first], members[second]
        if first == second and len(a) == 1:
            continue
        a_side, b_side = (a, b) if len(a) * len(b) <= CROWD**2 else (a[:1], b[:1])
        for x, y in ((a_side, b), (a, b_side)):
            both = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
            pairs.append(np.sort(both[both[:, 0] != both[:, 1]], axis=1))
            if a_side is a:
                break
    return np.concatenate(pairs)


def _by_vector(vectors: np.ndarray) -> np.ndarray:
    """Pairs [P, 2] of near vectors float16 [n, E]: a cosine of at least COSINE, among the NEIGHBOURS nearest."""
    import faiss

    count, dim = vectors.shape
    if count < FLAT_SEARCH:
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    else:  # what is nearly the same lies in the same cell or the next one
        cells = min(int(4 * np.sqrt(count)), count // 40)  # FAISS wants 39 vectors a cell to train on
        flat = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFScalarQuantizer(
            flat, dim, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        index.nprobe = 8
        sample = np.random.default_rng(0).choice(count, min(count, 40 * cells), replace=False)
        index.train(vectors[np.sort(sample)].astype(np.float32))
    for part in _blocks(count):
        index.add(vectors[part].astype(np.float32))
    found = [np.zeros((0, 2), np.int64)]
    for part in _blocks(count):
        cosines, ids = index.search(vectors[part].astype(np.float32), min(count, NEIGHBOURS + 1))
        rows, columns = np.nonzero((cosines >= COSINE) & (ids >= 0))
        pairs = np.sort(np.stack([rows + part.start, ids[rows, columns]], 1), axis=1)
        found.append(pairs[pairs[:, 0] != pairs[:, 1]])
    return np.unique(np.concatenate(found), axis=0)


def _blocks(count: int, size: int = 4096) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _adjacent(pairs: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(place, the later places that it is paired with) of each place that has any, in order."""
    starts = np.searchsorted(pairs[:, 0], np.arange(count + 1))
    for at in np.flatnonzero(np.diff(starts)).tolist():
        yield at, pairs[starts[at] : starts[at + 1], 1]


# -- likeness -----------------------------------------------------------------------------------------------


def _intervals(side: int, bins: int, shares: tuple[float, ...], shifts: int) -> np.ndarray:
    """[K, bins, side]: the means of `bins` equal parts of K intervals, each a share of the side, shifted along it."""
    found = []
    for share in shares:
        for shift in np.linspace(0, 1, shifts) if share < 1 else (0,):
            edges = side * ((1 - share) * shift + share * np.linspace(0, 1, bins + 1))
            low, high = edges[:-1, None], edges[1:, None]
            covered = np.minimum(high, np.arange(1, side + 1)) - np.maximum(low, np.arange(side))
            found.append(np.maximum(covered, 0) / (high - low))
    return np.stack(found).astype(np.float32)


_COARSE = _intervals(GREYS, 16, (1, 0.95, 0.9, 0.85), 3)  # 10 intervals a side: 100 ways to crop a picture
_FINE = _intervals(GREYS, 32, (1, 0.97, 0.94, 0.91, 0.88, 0.85), 4)  # 21: 441 ways
_HOPELESS = 0.1  # so far below what is asked, seen coarsely, no finer crop helps


def aligned_likeness(a: np.ndarray, b: np.ndarray, least: float = 0.0) -> float:
    """The correlation of two grey pictures [64, 64] where they fit best, one of them cropped by up to 15 % a side.

    Brightness and contrast make no difference. -> -1 to 1; 0 for a picture of one grey. Pictures that are far below
    `least` are looked at coarsely only.
    """
    coarse = _best_crop(a, b, _COARSE)
    return coarse if coarse < least - _HOPELESS else _best_crop(a, b, _FINE)


def plain_likeness(a: np.ndarray, b: np.ndarray) -> float:
    """As `aligned_likeness`, without crops."""
    return float(_crops(a, _FINE[:1])[0] @ _crops(b, _FINE[:1])[0])


def _best_crop(a: np.ndarray, b: np.ndarray, intervals: np.ndarray) -> float:
    """The best correlation of any crop of one picture with the whole of the other."""
    crops_a, crops_b = _crops(a, intervals), _crops(b, intervals)  # the first of each is the whole
    return float(max((crops_a @ crops_b[0]).max(), (crops_b @ crops_a[0]).max()))


def _crops(grey: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Crops of a picture as unit vectors [K * K, bins * bins] without their mean."""
    count, bins, side = intervals.shape
    parts = intervals.reshape(-1, side)
    views = (parts @ grey @ parts.T).reshape(count, bins, count, bins).transpose(0, 2, 1, 3)
    flat = views.reshape(count * count, -1)
    centred = flat - flat.mean(-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-3)


class _Likeness:
    """Looks at candidates through their thumbnails, the last few thousand of which stay in memory."""

    def __init__(self, catalog: Catalog, thumbnails: Path):
        self.catalog, self.thumbnails = catalog, thumbnails
        self._greys: dict[int, np.ndarray | None] = {}

    def likeness(self, photo_id: int, others: np.ndarray, least: float) -> list[float]:
        """Of one photo with each of the others; below `least`, some number below it; 0 where one cannot be read."""
        first = self._grey(int(photo_id))
        found = []
        for other in others.tolist():
            second = self._grey(other)
            value = 0.0 if first is None or second is None else plain_likeness(first, second)
            if first is not None and second is not None and value < least:
                value = aligned_likeness(first, second, least)
            found.append(min(1.0, max(0.0, value)))
        return found

    def _grey(self, photo_id: int) -> np.ndarray | None:
        if photo_id not in self._greys:
            if len(self._greys) >= GREY_CACHE:
                self._greys.clear()
            content_hash = self.catalog.scalar(select(Photo.content_hash).where(Photo.id == photo_id))
            self._greys[photo_id] = _read_grey(thumbnail_path(self.thumbnails, content_hash))
        grey = self._greys[photo_id]
        return None if grey is None else grey.astype(np.float32)


def _read_grey(file: Path) -> np.ndarray | None:
    """uint8 [64, 64], or None where the thumbnail cannot be read."""
    try:
        picture = open_image(file, target=GREYS)
    except UnreadablePhoto:
        return None
    return np.asarray(picture.convert("L").resize((GREYS, GREYS), Image.Resampling.BOX))


# -- the answer ---------------------------------------------------------------------------------------------


def _described(catalog: Catalog, best: int, others: dict[int, float]) -> DuplicateGroup:
    ids = [best, *sorted(others, key=others.get, reverse=True)]
    rows, paths = {}, {}
    for part in chunks(ids):
        rows |= {row.id: row for row in catalog.rows(select(*Photo.__table__.c).where(Photo.id.in_(part)))}
        query = select(File.photo_id, File.path).where(File.photo_id.in_(part), File.missing_since.is_(None))
        for row in catalog.rows(query.order_by(File.path)):
            paths.setdefault(row.photo_id, []).append(row.path)
    photos = [
        Duplicate(
            photo_id, tuple(paths.get(photo_id, ())), rows[photo_id].width, rows[photo_id].height,
            rows[photo_id].bytes, rows[photo_id].taken_at, round(others.get(photo_id, 1.0), 4),
        )
        for photo_id in ids
    ]  # fmt: skip
    total = sum(photo.bytes * len(photo.paths) for photo in photos)
    return DuplicateGroup(tuple(photos), total - photos[0].bytes)
