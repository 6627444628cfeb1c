"""The store of image tokens: within its budget, the oldest first, and never in the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest

from indexer import patch_store
from indexer.patch_store import PatchStore, patch_key

MEGABYTE = 1 << 20


def record(number: int, size: int = 20_000) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def key(number: int) -> bytes:
    return f"photo {number}".encode()


@pytest.fixture
def store(tmp_path):
    store = PatchStore(tmp_path / "patches", 4 * MEGABYTE)
    yield store
    store.close()


def test_what_is_put_is_found(store):
    assert store.put({key(n): record(n) for n in range(20)}) == 20
    assert store.get([key(3), key(99), key(7)]) == {key(3): record(3), key(7): record(7)}
    assert len(store) == 20


def test_it_never_outgrows_its_budget(store):
    for batch in range(60):
        store.put({key(n): record(n) for n in range(20 * batch, 20 * batch + 20)})
    file = store.folder / "data.mdb"
    assert file.stat().st_size <= store.budget
    assert 0.5 * store.budget < store.bytes_used() <= patch_store.FULL * store.budget
    assert store.get([key(1199)]) and not store.get([key(0)])


def test_what_is_used_stays(store):
    store.put({key(n): record(n) for n in range(100)})
    for batch in range(30):
        assert store.get([key(5)]), batch
        store.put({key(1000 + n): record(n) for n in range(20 * batch, 20 * batch + 20)})
    assert not store.get([key(6)])


def test_indexing_fills_room_and_evicts_nothing(store):
    assert store.put({key(0): record(0)}, evict=False) == 1
    kept = store.put({key(n): record(n) for n in range(1, 1000)}, evict=False)
    assert 100 < kept < 999
    assert store.put({key(2000): record(1)}, evict=False) == 0
    assert store.get([key(0)])


def test_a_record_that_is_there_is_replaced(store):
    store.put({key(1): record(1)})
    store.put({key(1): record(2)})
    assert store.get([key(1)]) == {key(1): record(2)} and len(store) == 1


def test_more_than_the_budget_at_once_keeps_the_last(store):
    store.put({key(n): record(n) for n in range(1000)})
    assert store.get([key(999)]) and not store.get([key(0)])


def test_it_opens_again_after_it_was_closed(store):
    store.put({key(1): record(1)})
    store.close()
    assert store.get([key(1)])


def test_two_libraries_of_one_process_share_the_file(store):
    other = PatchStore(store.folder, store.budget)
    store.put({key(1): record(1)})
    assert other.get([key(1)])
    store.close()
    assert other.get([key(1)])
    other.close()
    assert store.folder.absolute() not in patch_store._open


def test_without_a_budget_there_is_no_file(tmp_path):
    store = PatchStore(tmp_path / "patches", 0)
    assert store.put({key(1): record(1)}) == 0
    assert store.get([key(1)]) == {} and len(store) == 0 and store.bytes_used() == 0
    assert not store.folder.exists()


def test_a_damaged_file_is_made_anew(store):
    store.put({key(1): record(1)})
    store.close()
    (store.folder / "data.mdb").write_bytes(b"no database" * 2000)
    assert store.get([key(1)]) == {}
    assert store.put({key(2): record(2)}) == 1 and store.get([key(2)])


def test_a_place_that_cannot_hold_it_is_done_without(tmp_path, caplog):
    (tmp_path / "patches").write_text("a file is in the way")
    store = PatchStore(tmp_path / "patches", MEGABYTE)
    assert store.put({key(1): record(1)}) == 0
    assert store.get([key(1)]) == {}
    assert caplog.text.count("not kept") == 1


def test_a_full_disk_is_done_without(store, caplog, monkeypatch):
    def full(*_, **__):
        raise lmdb.DiskError("no space left on device")

    store.put({key(1): record(1)})
    monkeypatch.setattr(store, "_put", full)
    assert store.put({key(2): record(2)}) == 0
    assert store.get([key(1)]) == {} and "not kept" in caplog.text


def test_a_kill_in_the_middle_of_writing_harms_nothing(tmp_path):
    program = f"""
import itertools
from pathlib import Path
from indexer.patch_store import PatchStore
store = PatchStore(Path({str(tmp_path)!r}) / "patches", {4 * MEGABYTE})
for n in itertools.count():
    store.put({{f"photo {{n}}".encode(): n.to_bytes(4, "big") * 5000}})
    print(n, flush=True)
"""
    root = Path(patch_store.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root)
    for _ in range(50):
        last = int(process.stdout.readline())
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = PatchStore(tmp_path / "patches", 4 * MEGABYTE)
    assert store.get([key(last)]) == {key(last): record(last)}
    assert store.put({key(-1): record(1)}) == 1
    store.close()


def test_a_key_says_model_form_and_content():
    keys = {
        patch_key(f, form, c) for f in ("ab" * 8, "cd" * 8) for form in ("int8", "fp16") for c in ("00" * 32, "11" * 32)
    }
    assert len(keys) == 8
