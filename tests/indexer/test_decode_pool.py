"""Worker processes: order, a bounded window, and hangs, crashes, interrupts and kills that stay contained."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexer import decode_pool
from indexer.decode_pool import decode_all
from indexer.errors import LibraryError, PhotoblipError, UnreadablePhoto
from indexer.images import DecodedPhoto, Limits

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Item:
    path: str


def make_photos(folder: Path, count: int) -> list[Item]:
    """count JPEGs, the grey level of each saying which one it is."""
    items = []
    for number in range(count):
        path = folder / f"{number:03}.jpg"
        Image.new("RGB", (32, 24), (number * 5,) * 3).save(path)
        items.append(Item(str(path)))
    return items


def run(items, folder: Path, **options):
    options = {"workers": 2, "input_size": 16, "thumbnails": folder / "thumbnails", **options}
    return decode_all(items, **options)


def scripted_decode(path, *rest):
    """What a worker runs instead of _decode where a test wants trouble: the file's name says which."""
    name = Path(path).stem
    if name == "hang":
        time.sleep(60)
    if name == "stuck":  # in C, as a decoder would be: no Python signal handler runs meanwhile
        hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "modules":
        return sorted(sys.modules)
    if name == "pid":
        return os.getpid()
    return name


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(decode_pool, "_decode", scripted_decode)


@pytest.mark.parametrize("workers", [0, 2])
def test_photos_come_back_in_the_order_of_the_items(tmp_path, workers):
    items = make_photos(tmp_path, 20)
    Path(items[7].path).write_bytes(b"not an image")
    results = list(run(items, tmp_path, workers=workers))
    assert [item for item, _ in results] == items
    assert results[7][1].reason == "not-an-image"
    for number, (_, photo) in enumerate(results):
        if number != 7:
            assert isinstance(photo, DecodedPhoto)
            assert abs(int(np.median(photo.pixels)) - number * 5) <= 2
    assert len(list((tmp_path / "thumbnails").rglob("*.jpg"))) == 19


@pytest.mark.parametrize("workers", [0, 2])
def test_no_items_is_no_work(tmp_path, workers):
    assert list(run([], tmp_path, workers=workers)) == []


def test_no_more_workers_start_than_there_are_items(tmp_path, scripted):
    results = run([Item("a"), Item("b")], tmp_path, workers=50)
    next(results)
    names = [process.name for process in multiprocessing.active_children()]
    assert len([name for name in names if "pebble" in name]) == 2
    assert len(list(results)) == 1


def test_limits_reach_the_workers(tmp_path):
    ((_, problem),) = run(make_photos(tmp_path, 1), tmp_path, workers=1, limits=Limits(max_pixels=10))
    assert problem.reason == "too-large"


@pytest.mark.parametrize(("workers", "window"), [(0, 1), (2, 3)])
def test_items_are_taken_at_most_a_window_ahead(tmp_path, workers, window):
    taken = 0

    def items():
        nonlocal taken
        for item in make_photos(tmp_path, 12):
            taken += 1
            yield item

    for yielded, _ in enumerate(run(items(), tmp_path, workers=workers, window=window)):
        assert taken <= yielded + window
    assert taken == 12


def test_a_photo_that_hangs_times_out_and_the_rest_goes_on(tmp_path, scripted):
    items = [Item("a"), Item("hang"), Item("b"), Item("c")]
    started = time.monotonic()
    results = [result for _, result in run(items, tmp_path, timeout=0.5)]
    assert time.monotonic() - started < 15
    assert isinstance(results[1], UnreadablePhoto) and results[1].reason == "timeout"
    assert [results[0], *results[2:]] == ["a", "b", "c"]


@pytest.mark.skipif(os.name == "nt", reason="kills its own process the POSIX way")
def test_a_photo_that_crashes_the_decoder_is_reported_and_the_rest_goes_on(tmp_path, scripted):
    items = [Item(name) for name in ("a", "crash", "b", "crash", "crash", "c", "d")]
    results = [result for _, result in run(items, tmp_path, workers=2)]
    assert [getattr(result, "reason", result) for result in results] == [
        *("a", "crashed", "b", "crashed", "crashed", "c", "d")
    ]


@pytest.mark.skipif(os.name == "nt", reason="kills a process the POSIX way")
def test_an_idle_worker_that_is_killed_does_not_end_the_batch(tmp_path, scripted):
    results = run([Item("pid"), Item("a"), Item("b")], tmp_path, workers=1, window=1)
    _, pid = next(results)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)  # pebble notices that nobody was at work, and declares its pool broken
    assert [result for _, result in results] == ["a", "b"]


def test_workers_that_can_never_start_end_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "_prepare_worker", os._exit)
    with pytest.raises(PhotoblipError, match="--jobs"):
        list(run(make_photos(tmp_path, 1), tmp_path, workers=1))


def test_a_thumbnail_folder_that_cannot_be_written_is_the_librarys_error_not_the_photos(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(LibraryError, match="thumbnails"):
            list(run(make_photos(tmp_path, 2), tmp_path, workers=workers, thumbnails=tmp_path / "file"))


def test_closing_the_generator_stops_the_workers_even_in_the_middle_of_a_decode(tmp_path, scripted):
    results = run([Item("pid"), *[Item("stuck")] * 6], tmp_path, workers=2)
    _, pid = next(results)
    time.sleep(0.3)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 2
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_start_light(tmp_path, scripted):
    ((_, modules),) = run([Item("modules")], tmp_path, workers=1)
    assert "PIL.Image" in modules
    assert not {"torch", "transformers", "faiss", "sqlalchemy", "streamlit"} & set(modules)


# --- whole programs ----------------------------------------------------------------------------------------


def program(tmp_path: Path, text: str) -> list[str]:
    """A script without the __main__ guard, with its own copy of the scripted decode beside it."""
    (tmp_path / "trouble.py").write_text("import time\n\n\ndef hang(*_):\n    time.sleep(60)\n")
    head = """
        import os, sys
        print("top", flush=True)
        sys.path[:0] = [{repository!r}, {folder!r}]
        from pathlib import Path
        from types import SimpleNamespace as Item
        from indexer import decode_pool
        from indexer.decode_pool import decode_all
        items = [Item(path=str(path)) for path in sorted(Path({folder!r}).glob("*.jpg"))]
        options = dict(input_size=16, thumbnails={thumbnails!r}, workers=2)
    """.format(repository=str(REPOSITORY), folder=str(tmp_path), thumbnails=str(tmp_path / "thumbnails"))
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(head) + textwrap.dedent(text))
    return [sys.executable, str(script)]


def test_an_unguarded_script_runs_once(tmp_path):
    make_photos(tmp_path, 3)
    command = program(tmp_path, "print([photo.bytes > 0 for _, photo in decode_all(items, **options)])")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["top", "[True, True, True]"]


def test_stopping_while_workers_still_start_prints_nothing(tmp_path):
    make_photos(tmp_path, 1)
    text = """
        options["workers"] = 4
        for _ in range(2):
            results = decode_all(items * 9, **options)
            print(next(results)[1].bytes > 0)
            results.close()
    """
    done = subprocess.run(program(tmp_path, text), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["top", "True", "True"]


HANGING = """
    import trouble
    decode_pool._decode = trouble.hang
    import multiprocessing, threading, time
    def tell():
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.05)
        time.sleep(float(sys.argv[1]))
        print("busy", flush=True)
    threading.Thread(target=tell, daemon=True).start()
    list(decode_all(items, **options))
"""


def start_and_wait_until_busy(tmp_path: Path, after: float = 0.5, **options) -> subprocess.Popen:
    make_photos(tmp_path, 3)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*program(tmp_path, HANGING), str(after)], **pipes, **options)
    assert process.stdout.readline() == "top\n"
    assert process.stdout.readline() == "busy\n"
    return process


def ends_with_all_its_workers(process: subprocess.Popen) -> str:
    """The rest of stderr. The workers hold the same pipes, so these end only when all workers are dead."""
    try:
        return process.communicate(timeout=10)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("a worker outlived its parent")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_workers_die_with_a_parent_that_is_killed_in_the_middle_of_a_decode(tmp_path):
    process = start_and_wait_until_busy(tmp_path)
    process.kill()
    ends_with_all_its_workers(process)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("after", [0, 0.5], ids=["while the workers start", "while they decode"])
def test_ctrl_c_reaches_the_parent_only_and_stops_everything_at_once(tmp_path, after):
    process = start_and_wait_until_busy(tmp_path, after, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    errors = ends_with_all_its_workers(process)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")


def test_workers_that_cannot_start_are_an_error_and_not_a_hang(tmp_path, monkeypatch):
    (item,) = make_photos(tmp_path, 1)
    monkeypatch.setattr(decode_pool, "STARTUP_SECONDS", 0.5)
    monkeypatch.setattr(decode_pool, "_prepare_worker", time.sleep)  # its argument is the limit on pixels: for ever
    with pytest.raises(PhotoblipError, match="do not start"):
        list(run([item], tmp_path, workers=1, timeout=0.5))
