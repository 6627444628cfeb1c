"""Image tokens on disk, so that a photo is matched without being decoded and encoded again. Derived: delete it freely.

One LMDB file a library: memory-mapped, safe against a crash at any moment, shared by several processes (lmdb.tech). It
never grows beyond its budget: indexing fills free room, and what search needs replaces what was used least recently.
"""

import logging
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import lmdb

log = logging.getLogger(__name__)

FULL, PORTION = 0.8, 0.05  # of the budget: LMDB writes changed pages aside, and frees old ones later
STAMP = struct.Struct(">Q")
FRESH = 4  # a record is stamped again when a fourth of the store was stamped since: reading hardly ever writes

_open: dict[Path, tuple[lmdb.Environment, int]] = {}  # LMDB forbids opening a file twice in one process
_opening = threading.Lock()


def patch_key(fingerprint: str, form: str, content_hash: str) -> bytes:
    """The key of a photo's image tokens: the model, the form, and the content, whatever the catalog's ids say."""
    return f"{fingerprint[:16]} {form} ".encode() + bytes.fromhex(content_hash)


class PatchStore:
    """Records of bytes by key, the least recently used of which give way to new ones.

    A store that cannot be opened or written (a read-only or full disk, a network share) holds nothing, says so in the
    log once, and everything works without it. It opens when it is first used, and again after `close`. Safe to use from
    several threads and processes.

    Args:
        budget: the most bytes the file may take; 0 for no store.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        self._environment: lmdb.Environment | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many records."""
        try:
            with self._reading() as transaction:
                return transaction.stat(self._tables[0])["entries"] if transaction else 0
        except lmdb.Error as error:
            self._give_up(error)
            return 0

    def bytes_used(self) -> int:
        """What the records take on disk."""
        try:
            with self._reading() as transaction:
                return self._used(transaction) if transaction else 0
        except lmdb.Error as error:
            self._give_up(error)
            return 0

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The records that are here, which counts as a use of them."""
        found, stale = {}, []
        try:
            with self._reading() as transaction:
                if transaction is None:
                    return {}
                records, stamps, _ = self._tables
                newest, fresh = self._newest(transaction), transaction.stat(records)["entries"] // FRESH
                for key in keys:
                    record = transaction.get(key, db=records)
                    if record is not None:
                        found[key] = record
                        if newest - STAMP.unpack(transaction.get(key, db=stamps))[0] > fresh:
                            stale.append(key)
            if stale:
                self._stamp(stale)
        except lmdb.Error as error:
            self._give_up(error)
        return found

    def put(self, records: Mapping[bytes, bytes], *, evict: bool = True) -> int:
        """Keep records, in place of the least recently used ones, or without `evict` as far as there is room.

        -> how many were kept.
        """
        kept = 0
        try:
            for part in self._portions(records):
                if not self._opened():
                    break
                kept += (now := self._put(part, evict))
                if now < len(part):
                    break
        except lmdb.MapFullError:
            pass  # a budget of a few records: nothing of this portion was written
        except (lmdb.Error, OSError) as error:
            self._give_up(error)
        return kept

    def clear(self) -> None:
        """Forget everything."""
        if self._opened():
            with self._environment.begin(write=True) as transaction:
                for table in self._tables:
                    transaction.drop(table, delete=False)

    def close(self) -> None:
        """Let go of the file; not while another thread reads or writes."""
        with self._lock:
            if self._environment is not None:
                self._environment = None
                _release(self.folder)

    # -- parts ----------------------------------------------------------------------------------------------

    def _opened(self) -> bool:
        with self._lock:
            if self._environment is None and self.budget > 0:
                try:
                    self._open()
                except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError):
                    shutil.rmtree(self.folder, ignore_errors=True)  # derived: made anew
                    self._open_or_give_up()
                except (lmdb.Error, OSError) as error:
                    self._give_up(error)
            return self._environment is not None

    def _open_or_give_up(self) -> None:
        try:
            self._open()
        except (lmdb.Error, OSError) as error:
            self._give_up(error)

    def _open(self) -> None:
        environment = _shared(self.folder, self.budget)
        try:
            self._tables = [environment.open_db(name) for name in (b"records", b"stamps", b"order")]
        except lmdb.Error:
            _release(self.folder)
            raise
        self._environment = environment

    def _portions(self, records: Mapping[bytes, bytes]) -> Iterator[dict[bytes, bytes]]:
        """Small beside the room that FULL leaves, for pages freed by one commit are used two commits later."""
        held, size = {}, 0
        for key, record in records.items():
            held[key], size = record, size + len(record)
            if size > PORTION * self.budget:
                yield held
                held, size = {}, 0
        if held:
            yield held

    def _put(self, records: dict[bytes, bytes], evict: bool) -> int:
        size = sum(self._pages(record) for record in records.values())
        with self._environment.begin(write=True) as transaction:
            surplus = self._used(transaction) + size - FULL * self.budget
            if surplus > 0 and evict:
                self._evict(transaction, surplus)
        with self._environment.begin(write=True) as transaction:
            room, stamp, kept = FULL * self.budget - self._used(transaction), self._newest(transaction), 0
            for key, record in records.items():
                room -= self._pages(record)
                if room < 0:
                    break
                stamp += 1
                self._forget_stamp(transaction, key)
                for table, row in zip(
                    self._tables,
                    ((key, record), (key, STAMP.pack(stamp)), (STAMP.pack(stamp), key)),
                    strict=True,
                ):
                    transaction.put(*row, db=table)
                kept += 1
        return kept

    def _evict(self, transaction: lmdb.Transaction, surplus: float) -> None:
        records, stamps, order = self._tables
        with transaction.cursor(order) as cursor:
            cursor.first()
            while surplus > 0 and cursor.key():
                key = cursor.value()
                surplus -= self._pages(transaction.get(key, db=records) or b"")
                transaction.delete(key, db=records)
                transaction.delete(key, db=stamps)
                cursor.delete()  # and on to the next

    def _stamp(self, keys: Iterable[bytes]) -> None:
        _, stamps, order = self._tables
        with self._environment.begin(write=True) as transaction:
            stamp = self._newest(transaction)
            for key in keys:
                if self._forget_stamp(transaction, key):  # else it was evicted meanwhile
                    stamp += 1
                    transaction.put(key, STAMP.pack(stamp), db=stamps)
                    transaction.put(STAMP.pack(stamp), key, db=order)

    def _forget_stamp(self, transaction: lmdb.Transaction, key: bytes) -> bool:
        _, stamps, order = self._tables
        old = transaction.get(key, db=stamps)
        return old is not None and transaction.delete(old, db=order)

    def _newest(self, transaction: lmdb.Transaction) -> int:
        with transaction.cursor(self._tables[2]) as cursor:
            return STAMP.unpack(cursor.key())[0] if cursor.last() else 0

    def _used(self, transaction: lmdb.Transaction) -> int:
        tables = [transaction.stat(table) for table in self._tables]
        pages = sum(each["branch_pages"] + each["leaf_pages"] + each["overflow_pages"] for each in tables)
        return pages * tables[0]["psize"]

    def _pages(self, record: bytes) -> int:
        page = self._environment.stat()["psize"]
        return -(-(len(record) + 16) // page) * page  # LMDB's page header

    def _reading(self):
        return self._environment.begin() if self._opened() else nullcontext()

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "image tokens are not kept in %s (%s): matching takes longer, its results are the same", self.folder, error
        )
        self.close()
        self.budget = 0


def _shared(folder: Path, budget: int) -> lmdb.Environment:
    """This process's one open environment of a folder."""
    folder = folder.absolute()
    with _opening:
        environment, users = _open.get(folder, (None, 0))
        if environment is None:
            folder.mkdir(parents=True, exist_ok=True)
            environment = lmdb.open(
                str(folder),
                map_size=budget,
                max_dbs=3,
                metasync=False,  # a power failure may cost the last commit, never the file
                readahead=False,
                max_readers=512,
            )
        elif environment.info()["map_size"] < budget:
            environment.set_mapsize(budget)
        _open[folder] = (environment, users + 1)
        return environment


def _release(folder: Path) -> None:
    folder = folder.absolute()
    with _opening:
        environment, users = _open.pop(folder)
        if users > 1:
            _open[folder] = (environment, users - 1)
        else:
            environment.close()
