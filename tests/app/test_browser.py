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
    page.get_by_text(f"{len(copied)} added").wait_for(timeout=180_000)
    page.close()
    return address


@pytest.fixture
def page(browser):
    """A page that remembers what went wrong in it."""
    page = browser.new_page()
    page.set_default_timeout(120_000)  # other tests run beside this one
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if is_fault(message) else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("requestfailed", lambda request: page.wrong.append(f"{request.url}: {request.failure}"))
    yield page
    page.close()


def is_fault(message) -> bool:
    """Whether a line of the console is an error, other than Streamlit's own search for the address of its server."""
    return message.type == "error" and "/_stcore/" not in (message.location or {}).get("url", "")


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
    page.locator(".st-key-found-words").wait_for()
    page.locator(RESULTS).first.wait_for()
    idle(page)
    return [picture.get_attribute("alt") for picture in page.locator(RESULTS).all()]


def idle(page) -> None:
    """Wait until nothing on the page is under way."""
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_timeout(300)  # what the script said last is drawn


def loaded(image, seconds: float = 30) -> bool:
    image.wait_for(timeout=1000 * seconds)
    return image.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")


def count_of_photos() -> int:
    return len(demo_manifest()["photos"])


def test_typed_query_finds_the_right_photo_and_hides_the_others_below_the_cut(page, indexed):
    page.goto(indexed)
    assert search(page, "a cat") == ["cat.png"]
    page.get_by_text("1 photo matches").wait_for()
    page.get_by_role("button", name="Show less likely ones").click()
    page.locator(RESULTS).nth(count_of_photos() - 1).wait_for()
    assert results(page)[0] == "cat.png"
    assert "all=1" in page.url
    page.go_back()
    page.get_by_text("1 photo matches").wait_for()
    assert results(page) == ["cat.png"]
    assert page.wrong == []


def test_photo_opens_moves_to_the_next_and_leads_back_to_the_same_results(page, indexed):
    page.goto(f"{indexed}/?q=a+cat&all=1")
    before = results(page)
    assert len(before) == count_of_photos()
    page.locator(RESULTS).nth(1).click(force=True)  # the name's link lies over the picture
    page.get_by_role("heading", name=before[1]).wait_for()
    assert "photo=" in page.url
    assert loaded(page.locator(".st-key-large img"))
    page.get_by_text(f"2 of {len(before)}").wait_for()
    page.get_by_role("button", name="Next").click()
    page.get_by_role("heading", name=before[2]).wait_for()
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    back = page.get_by_role("heading", name=before[1])
    for wait in range(60):
        if back.is_visible():
            break
        if wait % 15 == 0:  # a key that comes while the page is being made anew is lost
            page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(1000)
    back.wait_for()
    page.get_by_role("link", name="Back to the results").click()
    assert results(page) == before
    page.reload()
    assert results(page) == before
    assert page.get_by_label("Describe a photo").input_value() == "a cat"
    assert page.wrong == []


def test_dropped_photo_is_searched_for_alone_and_with_words_and_a_filter(page, indexed, tmp_path):
    page.goto(indexed)
    copy_demo_photos(tmp_path)
    page.locator(".st-key-drop input[type=file]").set_input_files(tmp_path / "cat.png")
    page.get_by_text("Photos like yours").wait_for()
    assert results(page)[0] == "cat.png"
    found = search(page, "a rocket")
    assert found, "both together"
    page.get_by_role("button", name="More").click()
    page.get_by_label("All filters, as text").fill("type=jpg")
    page.get_by_label("All filters, as text").press("Enter")
    page.get_by_role("button", name="type=jpg").wait_for()
    page.keyboard.press("Escape")
    assert all(name.endswith(".jpg") for name in results(page))
    page.reload()
    assert "example=" in page.url and "where=" in page.url
    assert results(page), "the dropped photo is still there after a reload"
    page.get_by_role("button", name="type=jpg").click()
    page.get_by_role("button", name="type=jpg").wait_for(state="detached")
    assert "where=" not in page.url
    assert page.wrong == []


def test_why_shows_where_the_words_are(page, indexed):
    page.goto(f"{indexed}/?q=a+red+motorcycle")
    assert results(page)[0] == "motorcycle.png"
    page.get_by_role("button", name="Why").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Match probability").wait_for()
    first_map = dialog.get_by_role("img", name="where the photo shows")
    assert loaded(first_map, seconds=120), "the first heat map of a process waits for what it is made with"
    dialog.get_by_role("radio", name="red").or_(dialog.get_by_role("button", name="red")).first.click()
    assert loaded(dialog.get_by_role("img", name="where the photo shows red"))
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.wrong == []


def test_photo_is_captioned_and_its_words_are_kept(page, indexed):
    page.goto(f"{indexed}/?photo=1")
    page.get_by_role("button", name="Write a caption").click()
    page.locator(".st-key-captions .pb-badge").wait_for()
    page.get_by_role("button", name="Your own words").click()
    words = page.get_by_role("textbox", name="Your own words")
    words.fill("what I call it")
    words.press("Enter")
    page.get_by_text("what I call it").first.wait_for()
    page.reload()
    page.get_by_text("what I call it").first.wait_for()
    assert page.wrong == []


def test_image_to_text_writes_compares_and_finds(page, indexed, tmp_path):
    copy_demo_photos(tmp_path)
    page.goto(indexed)
    page.get_by_role("link", name="Image to text").click()
    page.get_by_text("Which words, and which photos, fit this one?").wait_for()  # the search page takes photos too
    page.wait_for_url("**/image_to_text*")
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.locator('input[type="file"]').set_input_files(tmp_path / "cat.png")
    page.get_by_text("sampled", exact=True).wait_for()
    page.get_by_label("One text a line").fill("a motorcycle\na cat")
    page.get_by_role("button", name="Compare").click()
    page.locator(".pb-text", has_text="a motorcycle").wait_for()
    assert page.locator(".pb-text").first.inner_text() == "a cat"
    page.get_by_role("heading", name="Similar photos").wait_for()
    assert page.wrong == []


def test_page_fits_a_telephone(page, indexed):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{indexed}/?q=a+dog&all=1")
    results(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (page.locator(RESULTS).nth(place).bounding_box() for place in (0, 1))
    assert first["y"] == second["y"], "two columns"
    assert page.wrong == []


def test_two_browsers_search_at_once(browser, indexed):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page, words in zip(pages, ("a cat", "a cup of coffee"), strict=True):
        page.goto(f"{indexed}/?q={words.replace(' ', '+')}")
    assert [results(page)[0] for page in pages] == ["cat.png", "coffee.png"]
    for page in pages:
        page.context.close()


def test_only_pictures_of_the_page_are_served(page, indexed):
    """Neither files of the machine nor the library's own are behind the page's addresses."""
    for path in (
        "media/../../../../etc/passwd",
        "app/static/catalog.sqlite",
        "media/catalog.sqlite",
        "..%2f..%2fetc/passwd",
    ):
        answer = page.request.get(f"{indexed}/{path}")
        assert answer.status in {400, 404} or "<!doctype html>" in answer.text().lower(), path
