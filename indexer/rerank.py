"""Second stage: the matching model reads the best candidates against the words, within a time budget."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from indexer.errors import UnreadablePhoto

CHUNK = 25  # candidates between two looks at the clock
CACHE_BYTES = 256 << 20  # image tokens kept in memory: 75 kB a photo with blip-mini in 16 bits


class Reranker:
    """ITM over candidates, with the image side of recent photos kept in memory.

    Args:
        encoder: a blipcore encoder that can match.
        load_picture: photo id -> a picture; raises UnreadablePhoto where there is none any more.
    """

    def __init__(self, encoder, load_picture: Callable, cache_bytes: int = CACHE_BYTES):
        self.encoder, self.load_picture, self.cache_bytes = encoder, load_picture, cache_bytes
        self._tokens: OrderedDict[int, object] = OrderedDict()
        self._lock = threading.Lock()

    def score(self, text: str, photo_ids: Sequence[int], budget_seconds: float | None = None) -> dict[int, float]:
        """ITM margins of as many photos as the budget allows, in the given order; the first chunk always."""
        started, margins = time.monotonic(), {}
        for at in range(0, len(photo_ids), CHUNK):
            if at and budget_seconds is not None and time.monotonic() - started >= budget_seconds:
                break
            margins |= self._score_chunk(text, photo_ids[at : at + CHUNK])
        return margins

    def _score_chunk(self, text: str, photo_ids: Sequence[int]) -> dict[int, float]:
        tokens, readable = self.tokens(photo_ids)
        if not readable:
            return {}
        pairs = np.stack([np.arange(len(readable)), np.zeros(len(readable), int)], 1)
        margins = self.encoder.match_tokens(tokens, [text], pairs)
        return dict(zip(readable, margins.tolist(), strict=True))

    def tokens(self, photo_ids: Sequence[int]):
        """-> (image tokens of n photos, [N, D] each, and the n ids whose picture could be read)."""
        with self._lock:
            held = {photo_id: self._tokens[photo_id] for photo_id in photo_ids if photo_id in self._tokens}
        held |= self._compute([photo_id for photo_id in photo_ids if photo_id not in held])
        if not held:
            return [], []
        with self._lock:
            for photo_id, tokens in held.items():  # all of one size
                self._tokens[photo_id] = tokens
                self._tokens.move_to_end(photo_id)
            while len(self._tokens) * tokens.nbytes > self.cache_bytes:
                self._tokens.popitem(last=False)
        readable = [photo_id for photo_id in photo_ids if photo_id in held]
        return [held[photo_id] for photo_id in readable], readable

    def _compute(self, photo_ids: Sequence[int]) -> dict[int, object]:
        pictures = {}
        for photo_id in photo_ids:
            try:
                pictures[photo_id] = self.load_picture(photo_id)
            except UnreadablePhoto:
                continue
        if not pictures:
            return {}
        tokens = self.encoder.separate_tokens(self.encoder.pixels(list(pictures.values())))
        return dict(zip(pictures, tokens, strict=True))
