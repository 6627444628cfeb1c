"""The page in a real browser: `photoblip ui` on the demo's photos, with the bundled model."""

import pytest

from indexer.demo import copy_demo_photos, demo_manifest
from tests.app.browsing import DONE, RESULTS, drop_photo, filter_by, loaded, look_why, results, search

pytestmark = pytest.mark.browser


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
    page.wait_for_selector(DONE)
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
    drop_photo(page, tmp_path / "cat.png")
    assert results(page)[0] == "cat.png"
    found = search(page, "a rocket")
    assert found, "both together"
    filter_by(page, "type=jpg")
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
    look_why(page, "red")
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
    page.wait_for_selector(DONE)
    page.locator('input[type="file"]').set_input_files(tmp_path / "cat.png")
    page.get_by_text("sampled", exact=True).wait_for()
    page.get_by_label("One text a line").fill("a motorcycle\na cat")
    page.get_by_role("button", name="Compare").click()
    page.locator(".pb-text", has_text="a motorcycle").wait_for()
    assert page.locator(".pb-text").first.inner_text() == "a cat"
    page.get_by_role("heading", name="Similar photos").wait_for()
    assert page.wrong == []


def test_words_that_the_model_cannot_read_are_said_so(page, indexed):
    page.goto(indexed)
    box = page.get_by_label("Describe a photo")
    box.fill("狗")
    box.press("Enter")
    page.get_by_text("blip-mini reads English and cannot read").wait_for()
    assert search(page, "a cat 狗")[0] == "cat.png", "what it can read is searched for"
    page.get_by_text("passes over").wait_for()
    assert page.wrong == []


def test_arrows_move_in_the_grid_and_enter_opens_the_photo(page, indexed):
    page.set_viewport_size({"width": 1280, "height": 900})  # four columns
    page.goto(f"{indexed}/?q=a+cat&all=1")
    names = results(page)
    page.get_by_role("link", name=names[0], exact=True).focus()
    for key, at in (("ArrowRight", 1), ("ArrowDown", 5), ("ArrowLeft", 4), ("ArrowUp", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == names[at], key
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=names[4]).wait_for()
    assert page.wrong == []


def test_newcomer_finds_a_photo_in_under_five_clicks(page, serve, tmp_path):
    page.add_init_script("addEventListener('click', () => { window.clicks = 1 + (window.clicks ?? 0); }, true)")
    page.goto(serve(tmp_path / "library"))
    page.get_by_role("link", name="Add photos").click()
    page.get_by_role("button", name="Try the sample photos").click()
    page.get_by_role("link", name="Search your photos").click()
    page.get_by_label("Describe a photo").click()
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    assert results(page) == ["cat.png"]
    assert 2 < page.evaluate("window.clicks") < 5
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
