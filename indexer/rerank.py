"""Second stage: the matching model reads the best candidates against the words, within a time budget."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Sequence

import numpy as np
from sqlalchemy import select

from blipcore.calibration import centred
from indexer.catalog import Catalog
from indexer.config import PATCH_FORM
from indexer.errors import UnreadablePhoto
from indexer.patch_store import PatchStore, patch_key
from indexer.schema import Photo

CHUNK = 50  # candidates between two looks at the clock
FRESH_CHUNK = 16  # of them at most are photos that must be decoded first
CACHE_BYTES = 256 << 20  # records kept in memory: 62 kB a photo with blip-mini


def patch_keys(catalog: Catalog, fingerprint: str, form: str, photo_ids: Iterable[int]) -> dict[int, bytes]:
    """Photo ids -> their keys in the patch store."""
    query = select(Photo.id, Photo.content_hash).where(Photo.id.in_(list(photo_ids)))
    return {row.id: patch_key(fingerprint, form, row.content_hash) for row in catalog.rows(query)}


def _chunk(photo_ids: Sequence[int], known: Container[int]) -> Sequence[int]:
    """As many of the first photos as have no more than `FRESH_CHUNK` unknown ones among them."""
    unknown = [place for place, photo_id in enumerate(photo_ids) if photo_id not in known]
    return photo_ids[: unknown[FRESH_CHUNK]] if len(unknown) > FRESH_CHUNK else photo_ids


def _with_one_text(records: Collection) -> np.ndarray:
    """Pairs [n, 2] of each record and the first text."""
    return np.stack([np.arange(len(records)), np.zeros(len(records), int)], 1)


class Reranker:
    """ITM over candidates; the image side of photos read before is kept, in memory and in the patch store.

    Args:
        encoder: a blipcore encoder that can match.
        load_picture: photo id -> a picture; raises UnreadablePhoto where there is none any more.
        store, keys: where image tokens lie, and photo ids -> their keys there.
        form: how image tokens are kept, one of blipcore.patches.FORMS.
    """

    def __init__(
        self,
        encoder,
        load_picture: Callable,
        store: PatchStore | None = None,
        keys: Callable[[Iterable[int]], dict[int, bytes]] | None = None,
        form: str = PATCH_FORM,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.encoder, self.load_picture, self.cache_bytes = encoder, load_picture, cache_bytes
        self.store, self.keys, self.form = store, keys, form
        self._held: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def score(self, text: str, photo_ids: Sequence[int], budget_seconds: float | None = None) -> dict[int, float]:
        """ITM margins of as many photos as the budget allows, in the given order; the first chunk always."""
        started, margins, known, at, asked = time.monotonic(), {}, {}, 0, 0
        while at < len(photo_ids):
            if at and budget_seconds is not None and time.monotonic() - started >= budget_seconds:
                break
            known |= self._known(photo_ids[asked : at + CHUNK])
            asked = at + CHUNK
            chunk = _chunk(photo_ids[at : at + CHUNK], known)
            margins |= self._score_chunk(text, chunk, {p: known.pop(p) for p in chunk if p in known})
            at += len(chunk)
        return margins

    def likelihoods(self, text: str, photo_ids: Sequence[int]) -> dict[int, float]:
        """How likely the decoder finds the text given each photo that can be read, in nats above their mean."""
        records = self.records(photo_ids)
        if not records:
            return {}
        tokens = self.encoder.unpack_tokens(list(records.values()))
        found = centred(self.encoder.likelihoods(tokens, [text], _with_one_text(records)))
        return dict(zip(records, found.tolist(), strict=True))

    def records(self, photo_ids: Sequence[int]) -> dict[int, bytes]:
        """Image tokens of the photos that can be read."""
        return self._complete(photo_ids, self._known(photo_ids))

    def _score_chunk(self, text: str, photo_ids: Sequence[int], known: dict[int, bytes]) -> dict[int, float]:
        records = self._complete(photo_ids, known)
        if not records:
            return {}
        tokens = self.encoder.unpack_tokens(list(records.values()))
        margins = self.encoder.match_tokens(tokens, [text], _with_one_text(records))
        return dict(zip(records, margins.tolist(), strict=True))

    def _known(self, photo_ids: Sequence[int]) -> dict[int, bytes]:
        with self._lock:
            found = {photo_id: self._held[photo_id] for photo_id in photo_ids if photo_id in self._held}
            for photo_id in found:
                self._held.move_to_end(photo_id)
        others = [photo_id for photo_id in photo_ids if photo_id not in found]
        if others and self.store is not None:
            keys = self.keys(others)
            stored = self.store.get(keys.values())
            fetched = {photo_id: stored[key] for photo_id, key in keys.items() if key in stored}
            self._hold(fetched)
            found |= fetched
        return found

    def _complete(self, photo_ids: Sequence[int], known: dict[int, bytes]) -> dict[int, bytes]:
        computed = self._compute([photo_id for photo_id in photo_ids if photo_id not in known])
        if computed:
            self._hold(computed)
            if self.store is not None:
                keys = self.keys(computed)
                self.store.put({keys[photo_id]: record for photo_id, record in computed.items() if photo_id in keys})
        known = known | computed
        return {photo_id: known[photo_id] for photo_id in photo_ids if photo_id in known}

    def _compute(self, photo_ids: Sequence[int]) -> dict[int, bytes]:
        pictures = {}
        for photo_id in photo_ids:
            try:
                pictures[photo_id] = self.load_picture(photo_id)
            except UnreadablePhoto:
                continue
        if not pictures:
            return {}
        tokens = self.encoder.image_tokens(self.encoder.pixels(list(pictures.values())))
        return dict(zip(pictures, self.encoder.pack_tokens(tokens, self.form), strict=True))

    def _hold(self, records: dict[int, bytes]) -> None:
        with self._lock:
            self._held.update(records)
            size = len(next(iter(self._held.values()), b"")) or 1  # all of one size
            while len(self._held) * size > self.cache_bytes:
                self._held.popitem(last=False)
