"""The page in a real browser: `photoblip ui` on the demo's photos, with the bundled model."""

import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

from indexer.demo import copy_demo_photos, demo_manifest

pytestmark = pytest.mark.browser
RESULTS = ".st-key-grid-hits img"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on PATH: chromium, chromium-browser or google-chrome")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    """Where the page is served, through the command that users start it with; the library is new."""
    library = tmp_path_factory.mktemp("demo") / "library"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "indexer.cli", "ui", "--no-browser", "--port", str(port)]
    environment = os.environ | {"PHOTOBLIP_LIBRARY": str(library)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(server, f"http://localhost:{port}/_stcore/health")
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        output = server.communicate(timeout=20)[0].decode()
    assert "Traceback" not in output and "deprecated" not in output.lower(), output


@pytest.fixture(scope="module")
def indexed(browser, address, tmp_path_factory):
    """The same address, once the demo's photos are added through the library page."""
    photos = tmp_path_factory.mktemp("photos")
    copied = copy_demo_photos(photos)
    page = browser.new_page()
    page.goto(address)
    page.get_by_role("link", name="Add photos").click()
    page.get_by_label("Add a folder").fill(str(photos))
    page.get_by_role("button", name="Add").click()
    page.get_by_text(f"{len(copied)} added").wait_for(timeout=60_000)
    page.close()
    return address


@pytest.fixture
def page(browser):
    """A page that remembers what went wrong in it."""
    page = browser.new_page()
    page.set_default_timeout(30_000)
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda request: page.wrong.append(f"{request.url}: {request.failure}"))
    yield page
    page.close()


def wait_for(server: subprocess.Popen, url: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    server.terminate()
    pytest.fail(f"the page did not come up:\n{server.communicate(timeout=20)[0].decode()}")


def search(page, words: str) -> list[str]:
    box = page.get_by_label("Describe a photo")
    box.fill(words)
    box.press("Enter")
    return results(page)


def results(page) -> list[str]:
    """What the photos found are called, best first: their alternative text is the caption or the file name."""
    page.get_by_text("re-ranked").wait_for()
    pictures = page.locator(RESULTS)
    pictures.nth(len(demo_manifest()["photos"]) - 1).wait_for()  # the last one is drawn last
    return [picture.get_attribute("alt") for picture in pictures.all()]


def test_typed_query_puts_the_right_photo_first(page, indexed):
    page.goto(indexed)
    assert search(page, "a cat")[0] == "cat.png"
    assert page.wrong == []


def test_photo_opens_and_back_leads_to_the_same_results(page, indexed):
    page.goto(indexed)
    before = search(page, "a cat")
    page.locator(RESULTS).nth(1).click(force=True)  # the Open link lies over the picture
    page.get_by_role("heading", name=before[1]).wait_for()
    assert "photo=" in page.url
    assert loaded(page.locator(".st-key-large img"))
    page.go_back()
    assert results(page) == before
    assert page.get_by_label("Describe a photo").input_value() == "a cat"
    page.reload()
    assert results(page) == before
    assert page.get_by_label("Describe a photo").input_value() == "a cat"
    assert page.wrong == []


def test_page_fits_a_telephone(page, indexed):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(indexed)
    search(page, "a dog")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (page.locator(RESULTS).nth(place).bounding_box() for place in (0, 1))
    assert first["y"] == second["y"], "two columns"
    assert page.wrong == []


def loaded(image) -> bool:
    image.wait_for()
    return image.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")
