"""Pictures of every page in light, dark and on a telephone, over the demo's photos.

    python -m tests.benchmarks.screenshots OUT [--only browse] [--keep FOLDER]

The demo's photos have no dates, places and cameras: the copies that are indexed here are given made-up ones, so that
every way to browse has something to show. `--keep` keeps the library for the next call.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from indexer import PhotoLibrary
from indexer.demo import copy_demo_photos
from tests.app.browsing import FLAGS, chromium, ready, served

LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "chinese": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light", "locale": "zh-CN"},  # needs a font
}
PAGES = {
    "start": "",
    "search": "?q=a+cat",
    "photo": "?photo=1",
    "browse": "browse",
    "folders": "browse?by=folders",
    "places": "browse?by=places",
    "month": "browse?by=months&key=2023-06",
    "image_to_text": "image_to_text",
    "library": "library",
    "evaluate": "evaluate",
    "results": "?q=a+red+motorcycle&all=1",
    "why": "?q=a+red+motorcycle",
}
PLACES = [((48, 51, 24), (2, 21, 7)), ((52, 31, 12), (13, 24, 18)), ((35, 40, 30), (139, 45, 0))]
CAMERAS = [("Google", "Pixel 8"), ("Canon", "Canon EOS R6"), ("Apple", "iPhone 14")]


def fill(folder: Path) -> PhotoLibrary:
    """A library of the demo's photos, with dates, places, tags, an album and captions."""
    photos = PhotoLibrary.open(folder / "library")
    if photos.latest(1):
        return photos
    pictures = folder / "Pictures"
    for at, file in enumerate(copy_demo_photos(folder / "originals")):
        describe(file, pictures / f"{2022 + at % 3}" / file.name, at)
    photos.index(pictures, workers=0)
    ids = [row["id"] for row in photos.latest(100)]
    photos.caption(ids)
    by_name = {Path(photos.photo(one)["path"]).stem: one for one in ids}
    for name, words in (
        ("cat", "our cat Chelsea looks up"),
        ("coffee", "espresso in a red cup"),
        ("rocket", "a rocket before the start"),
        ("motorcycle", "the red motorcycle in the garage"),
    ):
        photos.add_caption(by_name[name], words)
    photos.set_favourite([by_name["cat"], by_name["temple"]])
    photos.tag([by_name["cat"]], ["pets", "home"])
    photos.tag([by_name["flower"], by_name["grass"]], ["garden"])
    photos.create_album("Best of")
    photos.add_to_album("Best of", [by_name[name] for name in ("temple", "flower", "rocket")])
    photos.evaluate(rerank=50)
    return photos


def describe(source: Path, target: Path, at: int) -> None:
    """A copy with a date, a camera, and for some a place."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = CAMERAS[at % 3]
    exif[0x0132] = f"{2022 + at % 3}:{5 + at % 4:02}:{1 + at:02} 1{at % 10}:20:00"
    if at % 2:
        north, east = PLACES[at % 3]
        exif[0x8825] = {1: "N", 2: tuple(map(float, north)), 3: "E", 4: tuple(map(float, east))}
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        picture.convert("RGB").save(target, exif=exif)


def settle(page) -> None:
    """Wait until the script is done, its pictures are there and nothing moves."""
    ready(page)
    page.wait_for_load_state("networkidle")


def act(page, name: str, folder: Path) -> None:
    """What a reader does on a page before its picture is taken."""
    if name == "why":
        page.locator('[class*="st-key-why-hits-"] button').first.click()
        page.locator('[role="dialog"] .st-key-large img').wait_for(timeout=120_000)
    elif name == "image_to_text":
        page.locator('input[type="file"]').set_input_files(folder / "originals" / "cat.png")
        page.locator('[class*="st-key-grid-similar"] img').first.wait_for(timeout=120_000)
    settle(page)


def shoot(address: str, folder: Path, out: Path, pages: list[str], looks: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        for look in looks:
            page = browser.new_context(**LOOKS[look]).new_page()
            page.set_default_timeout(120_000)
            for name in pages:
                page.goto(f"{address}/{PAGES[name]}")
                settle(page)
                act(page, name, folder)
                page.screenshot(path=out / f"{name}-{look}.png")
                width = page.evaluate("document.documentElement.scrollWidth")
                print(f"{name} {look}: {width} px wide")
            page.context.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=PAGES, default=list(PAGES))
    parser.add_argument("--looks", nargs="*", choices=LOOKS, default=list(LOOKS))
    parser.add_argument("--keep", type=Path)
    wanted = parser.parse_args()
    wanted.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (wanted.keep or Path(scratch)).absolute()
        fill(folder).close()
        with served(folder / "library") as address:
            shoot(address, folder, wanted.out, wanted.only, wanted.looks)


if __name__ == "__main__":
    main()
