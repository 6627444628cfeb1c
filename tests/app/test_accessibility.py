"""The pages in a real browser: no serious accessibility problem, and what only a browser shows of a running index."""

import time
from contextlib import suppress
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from app.texts import COOKIE
from tests.app.browsing import add_folder, ready, serious_violations
from tests.app.test_pages import draw_photo

pytestmark = pytest.mark.browser
PAGES = ["", "?q=a+cat", "?photo=1", "browse", "browse?by=folders", "image_to_text", "library", "evaluate"]


# opened as wide as one and then made as wide as the other: a page takes longer to open than to be checked
@pytest.mark.parametrize(("scheme", "widths"), [("light", (1280, 390)), ("dark", (390, 1280))])
def test_no_page_has_a_serious_accessibility_problem(page, indexed, scheme, widths):
    page.emulate_media(color_scheme=scheme)
    wrong = {}
    for place in PAGES:
        page.set_viewport_size({"width": widths[0], "height": 844})
        page.goto(f"{indexed}/{place}")
        for width in widths:
            page.set_viewport_size({"width": width, "height": 844})
            ready(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, place
            if found := serious_violations(page):
                wrong[place, width] = found
    assert not wrong, "\n".join(f"/{place} {width}\n  " + "\n  ".join(found) for (place, width), found in wrong.items())
    assert page.wrong == []


def test_every_photo_has_an_alternative_text(page, indexed):
    for place in ("", "?q=a+cat", "?photo=1", "browse?by=folders"):
        page.goto(f"{indexed}/{place}")
        ready(page)
        texts = page.locator('[data-testid="stImage"] img').evaluate_all("all => all.map(one => one.alt)")
        assert texts, place
        assert all(text is not None for text in texts)
    assert page.wrong == []


def test_menu_and_search_work_from_the_keyboard_and_show_where_the_focus_is(page, indexed):
    page.goto(indexed)
    ready(page)
    page.locator("body").press("Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.textContent").strip().endswith("Browse"):
            break
        page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus can be seen"
    page.keyboard.press("Enter")
    page.wait_for_url("**/browse*")
    assert page.wrong == []


def test_index_run_shows_progress_pauses_and_goes_on_while_others_search(page, browser, indexed, tmp_path):
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    for at in range(900):
        draw_photo(tmp_path / f"{at}.png", (at % 256, at // 4, (7 * at) % 256))
    page.goto(f"{indexed}/library")
    add_folder(page, tmp_path)
    page.get_by_text("of 900").first.wait_for(timeout=60_000)
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("Paused after").wait_for(timeout=60_000)
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Pause").wait_for(timeout=60_000)
    page.get_by_text("Paused after").wait_for(state="hidden")
    page.reload()
    page.get_by_text("of 900").first.wait_for(timeout=60_000)
    other = browser.new_page()
    other.goto(f"{indexed}/?q=a+cat")
    other.locator(".st-key-grid-hits img").first.wait_for(timeout=60_000)
    other.close()
    with suppress(PlaywrightTimeout):  # unless it has ended; that it does the rest is shown by test_library_page.py
        page.get_by_role("button", name="Pause").click(timeout=5_000)
        page.get_by_text("Paused after").wait_for(timeout=60_000)
    assert page.wrong == []


def test_language_follows_the_browser_and_the_choice_is_kept(browser, indexed):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(indexed)
    page.get_by_role("link", name="图库").wait_for()
    page.locator(".st-key-settings button").first.click()
    page.get_by_role("radio", name="English").or_(page.get_by_role("button", name="English")).first.click()
    page.get_by_role("link", name="Library").wait_for()
    end = time.monotonic() + 10
    while not any(cookie["name"] == COOKIE for cookie in context.cookies()) and time.monotonic() < end:
        page.wait_for_timeout(100)
    page.reload()
    page.get_by_role("link", name="Library").wait_for()
    context.close()


@pytest.mark.parametrize("path", ["/media/../../../../etc/passwd", "/app/static/../../pyproject.toml", "/etc/passwd"])
def test_server_gives_no_file_of_the_machine(indexed, path):
    try:
        with urlopen(indexed + path) as answer:
            body = answer.read()
    except HTTPError:
        return
    assert b"root:" not in body
    assert b"[project]" not in body
    assert b"<html" in body.lower(), "the page itself"
