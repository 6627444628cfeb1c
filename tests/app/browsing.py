"""The page in a real browser, for tests and benchmarks: a server as users start it, Chromium, what a reader does."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

RESULTS = ".st-key-grid-hits img"
DONE = '[data-testid="stApp"][data-test-script-state="notRunning"]'
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """The browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def served(library: Path, output: BinaryIO | None = None, **environment: str) -> Iterator[str]:
    """The address of the page over a library, through the command that users start it with.

    Args:
        output: takes what the server prints. environment: more variables for it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "indexer.cli", "ui", "--no-browser", "--port", str(port)]
    variables = os.environ | {"PHOTOBLIP_LIBRARY": str(library)} | environment
    server = subprocess.Popen(command, env=variables, stdout=output, stderr=output and subprocess.STDOUT)
    try:
        wait_for(server, f"http://localhost:{port}/_stcore/health")
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(20)


def wait_for(server: subprocess.Popen, url: str, seconds: float = 60.0) -> None:
    """Until the address answers. Raises RuntimeError where the server ends first, or time is up."""
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the page did not come up")


def watched(page):
    """A page whose `wrong` lists errors of the console, of scripts and of requests."""
    page.set_default_timeout(120_000)  # other tests run beside this one
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if is_fault(message) else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda request: page.wrong.append(f"{request.url}: {request.failure}"))
    return page


def is_fault(message) -> bool:
    """Whether a line of the console is an error, other than Streamlit's own search for the address of its server."""
    return message.type == "error" and "/_stcore/" not in (message.location or {}).get("url", "")


def search(page, words: str) -> list[str]:
    """Type words and send them. -> what the photos found are called."""
    box = page.get_by_label("Describe a photo")
    box.fill(words)
    box.press("Enter")
    return results(page)


def results(page) -> list[str]:
    """What the photos found are called, best first: their alternative text is the caption or the file name."""
    page.locator(".st-key-found-words").wait_for()
    page.locator(RESULTS).first.wait_for()
    idle(page)
    return [picture.get_attribute("alt") for picture in page.locator(RESULTS).all()]


def idle(page) -> None:
    """Wait until nothing on the page is under way."""
    page.wait_for_selector(DONE)
    page.wait_for_timeout(300)  # what the script said last is drawn


def ready(page) -> None:
    """Wait until a page that was opened is there as a whole."""
    page.wait_for_selector(DONE)
    page.locator(".st-key-menu-links a").last.wait_for()
    page.locator('[data-testid="stSkeleton"]').first.wait_for(state="detached")
    page.wait_for_timeout(500)  # what fades in has its colours only then


def loaded(image, seconds: float = 30) -> bool:
    """Whether a picture is one."""
    image.wait_for(timeout=1000 * seconds)
    return image.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")


def drop_photo(page, file: Path) -> None:
    """Search for photos like one of this machine."""
    page.locator(".st-key-drop input[type=file]").set_input_files(file)
    page.get_by_text("Photos like yours").wait_for()


def filter_by(page, where: str) -> None:
    """Write the filter, and wait for its chip."""
    page.get_by_role("button", name="More").click()
    box = page.get_by_label("All filters, as text")
    box.fill(where)
    box.press("Enter")
    page.get_by_role("button", name=where).wait_for()
    page.keyboard.press("Escape")


def look_why(page, word: str) -> None:
    """Open "Why" of the first result, look at its first heat map and at that of a word, and close it."""
    page.get_by_role("button", name="Why").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Match probability").wait_for()
    first_map = dialog.get_by_role("img", name="where the photo shows")
    assert loaded(first_map, seconds=120), "the first heat map of a process waits for what it is made with"
    dialog.get_by_role("radio", name=word).or_(dialog.get_by_role("button", name=word)).first.click()
    assert loaded(dialog.get_by_role("img", name=f"where the photo shows {word}"))
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")


def add_folder(page, folder: Path) -> None:
    """On the library page."""
    page.get_by_label("Add a folder").fill(str(folder))
    page.get_by_role("button", name="Add").click()


def serious_violations(page) -> list[str]:
    """What axe finds wrong in the page that counts as serious or critical."""
    import pytest

    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in {"serious", "critical"}]
    nodes = [(each["id"], node) for each in serious for node in each["nodes"]]
    return [f"{rule}: {node['html'][:300]} {node['failureSummary'][:300]}" for rule, node in nodes]
