"""The page in a real browser over a thousand photos: real ones where the shared data is, drawn ones elsewhere.

The demo's photos lie beside them: what they show is known.
"""

import re
import tarfile
from pathlib import Path

import pytest

from indexer import PhotoLibrary
from indexer.demo import copy_demo_photos
from tests.app.browsing import (
    DONE,
    RESULTS,
    add_folder,
    drop_photo,
    filter_by,
    idle,
    loaded,
    look_why,
    ready,
    results,
    search,
    serious_violations,
    watched,
)
from tests.tiny import SHARED_DATA, drawn_photo

pytestmark = [pytest.mark.browser, pytest.mark.slow]
COUNT, NEW = 1000, 240
WAYS = ("months", "folders", "albums", "tags", "favourites", "cameras", "places", "duplicates")
PAGES = ["", "?q=a+dog&all=1", "?q=a+dog&all=1&page=2", "?where=type%3Dpng", "?photo=1", "?similar=1"]
PAGES += [*(f"browse?by={way}" for way in WAYS), "image_to_text", "library", "evaluate"]


def draw(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        drawn_photo(number, (320, 240)).save(folder / f"{number:04}.jpg", quality=90)


@pytest.fixture(scope="module")
def library(browser, tmp_path_factory):
    """The folder of a library of a thousand photos and the demo's; one is captioned by a person."""
    folder = tmp_path_factory.mktemp("thousand")
    archive = SHARED_DATA / "flickr8k" / "dev.tar"
    if archive.exists():
        with tarfile.open(archive) as members:
            members.extractall(folder / "photos", filter="data")
    else:
        draw(folder / "photos", range(COUNT))
    copy_demo_photos(folder / "demo")
    with PhotoLibrary.open(folder / "library") as photos:
        photos.index(folder / "photos", folder / "demo")
        photos.add_caption(photos.photo_id(folder / "demo" / "rocket.jpg"), "a rocket before the start")
        assert photos.status()["embedded"] > COUNT
    return folder / "library"


@pytest.fixture(scope="module")
def site(serve, library):
    """Where the page is; no model but the bundled one is on this machine."""
    return serve(library, PHOTOBLIP_MODELS=str(library.parent / "models"))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_page_opens_without_a_serious_accessibility_problem(page, site, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    for place in PAGES:
        page.goto(f"{site}/{place}")
        ready(page)
        assert page.get_by_text("Something went wrong").count() == 0, place
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
        assert serious_violations(page) == [], place
    assert page.wrong == []


def test_words_find_the_photo_and_the_cut_hides_the_others(page, site):
    page.goto(site)
    likely = search(page, "a cup of coffee")
    assert likely[0] == "coffee.png"
    found = page.get_by_text(re.compile(r"^\d+ photos? match(es)?$"))
    assert int(found.inner_text().split()[0]) < COUNT / 10
    page.get_by_role("button", name="Show less likely ones").click()
    page.wait_for_url("**all=1*")
    page.get_by_text(re.compile(r"^\d+\+? photos$")).wait_for()
    every = results(page)
    assert len(every) > len(likely), "a page full of them"
    assert every[: len(likely)] == likely
    page.get_by_role("button", name="Page 2", exact=True).click()
    page.wait_for_url("**page=2*")
    assert not set(results(page)) & set(every), "each photo is on one page"
    page.get_by_role("button", name="Only those that match").click()
    found.wait_for()
    assert results(page) == likely
    assert page.wrong == []


def test_photo_finds_itself_and_with_words_and_a_filter_what_passes(page, site, library):
    page.goto(site)
    drop_photo(page, library.parent / "demo" / "motorcycle.png")
    assert results(page)[0] == "motorcycle.png"
    search(page, "a red motorcycle")
    filter_by(page, "type=png")
    names = results(page)
    assert names[0] == "motorcycle.png"
    assert all(name.endswith(".png") for name in names), "no JPEG passes"
    page.reload()
    assert results(page) == names
    assert page.wrong == []


def test_why_is_shown(page, site):
    page.goto(f"{site}/?q=a+red+motorcycle")
    assert "motorcycle.png" in results(page)
    look_why(page, "red")
    assert page.wrong == []


def test_address_of_a_photo_in_a_search_survives_reload_and_back(page, site):
    page.goto(f"{site}/?q=a+dog&where=type%3Djpg&all=1")
    names = results(page)
    page.locator(RESULTS).nth(2).click(force=True)
    page.wait_for_url("**photo=*")
    page.get_by_text(re.compile(r"^3 of \d+$")).wait_for()
    for again in (page.reload, lambda: page.goto(page.url)):
        again()
        page.get_by_role("heading", name=names[2]).wait_for()
        page.get_by_text(re.compile(r"^3 of \d+$")).wait_for()
        assert loaded(page.locator(".st-key-large img"))
    page.get_by_role("button", name="Next").click()
    page.get_by_role("heading", name=names[3]).wait_for()
    page.go_back()
    page.get_by_role("heading", name=names[2]).wait_for()
    page.get_by_role("link", name="Back to the results").click()
    assert results(page) == names
    assert page.wrong == []


def test_photo_is_captioned_and_a_question_leads_to_a_model(page, site):
    page.goto(f"{site}/?photo=2")
    page.get_by_role("button", name="Write a caption").click()
    page.locator(".st-key-captions .pb-badge").wait_for()
    words = page.locator(".st-key-captions .pb-text").first.inner_text()
    assert len(words.split()) > 2
    page.get_by_text("No model on this machine can answer questions or hold a conversation").wait_for()
    page.get_by_text("photoblip models download blip-vqa-base").wait_for()
    page.reload()
    page.locator(".st-key-captions .pb-text", has_text=words).wait_for()
    page.goto(f"{site}/?q=a+dog&ask=how+many%3F")  # as a link from a machine with such a model
    page.get_by_text("No model on this machine can answer questions").wait_for()
    assert results(page)
    assert page.wrong == []


def test_two_sessions_search_while_a_new_folder_is_indexed_paused_and_resumed(browser, page, site, library):
    new = library.parent / "new"
    draw(new, range(COUNT, COUNT + NEW))
    page.goto(f"{site}/library")
    ready(page)
    before = photos_in(page)
    add_folder(page, new)
    page.get_by_role("button", name="Pause").click()  # at once: a quick machine is soon done
    page.get_by_text("Paused after").wait_for()
    page.reload()
    page.get_by_text(re.compile(rf"Paused after \d+ of {NEW}")).wait_for()
    others = [watched(browser.new_context().new_page()) for _ in range(2)]
    for other in others:
        other.goto(site)
        ready(other)
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Pause").wait_for()
    queries = {"a cup of coffee": "coffee.png", "a rocket": "a rocket before the start"}
    for other, words in zip(others, queries, strict=True):  # both are under way before either is waited for
        box = other.get_by_label("Describe a photo")
        box.fill(words)
        box.press("Enter")
    assert [results(other)[0] for other in others] == list(queries.values())
    page.get_by_role("link", name="Search your photos").wait_for(timeout=300_000)
    page.wait_for_selector(DONE)
    idle(page)
    assert photos_in(page) == before + NEW
    for other in others:
        assert other.wrong == []
        other.context.close()
    assert page.wrong == []


def photos_in(page) -> int:
    """The number of photos that the library page tells."""
    return int(page.locator(".pb-numbers dd").first.inner_text().replace(",", ""))
