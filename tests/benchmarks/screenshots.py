"""Pictures of every page in light, dark and on a telephone, over the demo's photos.

    python -m tests.benchmarks.screenshots OUT [--only browse] [--keep FOLDER]

The demo's photos have no dates, places and cameras: the copies that are indexed here are given made-up ones, so that
every way to browse has something to show. `--keep` keeps the library for the next call.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from PIL import Image

from indexer import PhotoLibrary
from indexer.demo import copy_demo_photos

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
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


@contextmanager
def served(library: Path) -> Iterator[str]:
    """The address of the page over a library, through the command that users start it with."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "indexer.cli", "ui", "--no-browser", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"PHOTOBLIP_LIBRARY": str(library)})
    address, end = f"http://localhost:{port}", time.monotonic() + 60
    try:
        while time.monotonic() < end:
            try:
                with urlopen(f"{address}/_stcore/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def settle(page) -> None:
    """Wait until the script is done, its pictures are there and nothing moves."""
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]', timeout=60_000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(700)


def shoot(address: str, out: Path, pages: list[str], looks: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        for look in looks:
            page = browser.new_context(**LOOKS[look]).new_page()
            for name in pages:
                page.goto(f"{address}/{PAGES[name]}")
                settle(page)
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
            shoot(address, wanted.out, wanted.only, wanted.looks)


if __name__ == "__main__":
    main()
