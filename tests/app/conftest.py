"""A browser, and the page over the demo's photos with the bundled model, for the tests that are marked `browser`."""

from contextlib import ExitStack

import pytest

from indexer.demo import copy_demo_photos
from tests.app.browsing import FLAGS, add_folder, chromium, served, watched


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if chromium() is None:
        pytest.skip("no Chromium on PATH: chromium, chromium-browser or google-chrome")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serve(browser, tmp_path_factory):
    """Serves a library until the module's tests are done. -> the address"""
    output = tmp_path_factory.mktemp("server") / "output"
    with ExitStack() as held:
        printed = held.enter_context(output.open("wb"))
        yield lambda library, **environment: held.enter_context(served(library, printed, **environment))
    said = output.read_text()
    assert "Traceback" not in said and "deprecated" not in said.lower(), said


@pytest.fixture(scope="module")
def address(serve, tmp_path_factory):
    """Where the page is served; the library is new."""
    return serve(tmp_path_factory.mktemp("demo") / "library")


@pytest.fixture(scope="module")
def indexed(browser, address, tmp_path_factory):
    """The same address, once the demo's photos are added through the library page."""
    photos = tmp_path_factory.mktemp("photos")
    copied = copy_demo_photos(photos)
    page = browser.new_page()
    page.goto(address)
    page.get_by_role("link", name="Add photos").click()
    add_folder(page, photos)
    page.get_by_text(f"{len(copied)} added").wait_for(timeout=180_000)
    page.close()
    return address


@pytest.fixture
def page(browser):
    """A page that remembers what went wrong in it."""
    page = browser.new_page()
    yield watched(page)
    page.close()
