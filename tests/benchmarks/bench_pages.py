"""Time from Enter to the first thumbnails, as headless Chromium sees it, and what it is made of.

The library is made first (real photos where the shared data is, camera photos of 1024 x 768 with --large, drawn ones
elsewhere; every photo has a caption), or a made one is used again with --library FOLDER.

In the browser a script marks when Enter was pressed, when the page asked the server, when the server named the first
thumbnail, when it stood on the page, and when it was loaded: those parts add up. What the server does in its part is
then timed on the same library in this process, stage by stage; the rest of it is the page's script and Streamlit.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from app.finding import DEPTH
from indexer import PhotoLibrary
from indexer.query import Query
from tests.app.browsing import DONE, FLAGS, chromium, ready, served
from tests.benchmarks import photos
from tests.benchmarks.machine import arguments, machine, publish, table
from tests.benchmarks.things import SOUGHT
from tests.tiny import SHARED_DATA

QUERIES = ("a dog running on grass", "children on a playground", "a man on a snowboard", "people in a city street")
SIZE, PER_PAGE, RERANK = (1024, 768), 24, 100
FIRST, READ = "the first stage, with the five above", f"read {PER_PAGE} thumbnails"
FLICKR = SHARED_DATA / "flickr8k" / "train.tar"
FOUND = '[class*="st-key-grid-first"] img, .st-key-grid-hits img'  # either stage's photos, not those of the start page
WATCH = """
const marks = window.marks = {};
const mark = (name) => { marks.enter !== undefined && (marks[name] ??= performance.now()); };
addEventListener('keydown', (event) => { if (event.key === 'Enter') marks.enter = performance.now(); }, true);
const Plain = WebSocket;
window.WebSocket = class extends Plain {
  constructor(...how) {
    super(...how);
    this.addEventListener('message', ({ data }) => {
      if (marks.named || !(data instanceof ArrayBuffer)) return;
      if (new TextDecoder('latin1').decode(data).includes('/media/')) mark('named');
    });
  }
  send(data) { mark('asked'); super.send(data); }
};
const seen = () => {
  const found = [...document.querySelectorAll(FOUND)];
  if (!found.length) return;
  mark('drawn');
  if (found[0].complete && found[0].naturalWidth) mark('loaded');
  const shown = found.filter((one) => one.getBoundingClientRect().top < innerHeight);
  if (shown.every((one) => one.complete && one.naturalWidth)) mark('all');
  const last = document.querySelector('.st-key-grid-hits img');
  if (last && last.complete && last.naturalWidth) mark('reranked');
};
new MutationObserver(seen).observe(document, { childList: true, subtree: true, attributes: true });
addEventListener('load', seen, true);  // pictures tell when they are there
"""
PARTS = {  # (from, to): in words
    ("enter", "asked"): "browser: until the page asks the server",
    ("asked", "named"): "server: until it names the first thumbnails",
    ("named", "drawn"): "browser: until the first stands on the page",
    ("drawn", "loaded"): "fetching and decoding the first",
}
WHOLE = {
    "loaded": "Enter to the first thumbnail",
    "all": "Enter to all thumbnails that the window shows",
    "reranked": "Enter to the first re-ranked thumbnail",
}


def make_library(folder: Path, count: int, large: bool) -> None:
    """A library of so many photos, each with a caption of two things."""
    source = None if large or not FLICKR.exists() else FLICKR
    print(photos.fill(folder / "photos", count, SIZE, source), flush=True)
    things = list(SOUGHT)
    with PhotoLibrary.open(folder / "library") as library:
        report = library.index(folder / "photos")
        print(f"{report.added} photos indexed in {report.seconds:.0f} s", flush=True)
        for at, photo in enumerate(library.latest(count)):
            library.add_caption(photo["id"], f"{things[at % len(things)]} and {things[7 * at % 61]}")


def in_the_browser(address: str, rounds: int) -> list[dict[str, float]]:
    """Each query from the start page, by turns. -> milliseconds since Enter of each mark."""
    from playwright.sync_api import sync_playwright

    held = []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
        page.set_default_timeout(120_000)
        page.add_init_script(WATCH.replace("FOUND", repr(FOUND)))
        for turn in range(rounds + 1):
            for query in QUERIES:
                page.goto(address)
                ready(page)
                box = page.get_by_label("Describe a photo")
                box.fill(query)
                page.wait_for_timeout(500)  # what typing set off is over
                box.press("Enter")
                page.wait_for_function("window.marks.reranked && window.marks.all")
                page.wait_for_selector(DONE)
                marks = page.evaluate("window.marks")
                if turn:  # the first one of each loads models and fills caches
                    held.append({name: at - marks["enter"] for name, at in marks.items()})
        browser.close()
    return held


def on_the_server(library: PhotoLibrary, rounds: int) -> dict[str, float]:
    """Milliseconds of each stage, the median over queries and rounds."""
    searcher = library.searcher()
    vectors = {query: searcher.encoder.embed_texts([query])[0] for query in QUERIES}
    first = {query: first_stage(library, query) for query in QUERIES}
    ids = {query: [hit.photo_id for hit in hits] for query, hits in first.items()}
    searchable = searcher.index.ids()
    stages = {
        "parse the query": Query.parse,
        "embed the words": lambda query: searcher.encoder.embed_texts([query]),
        "search the vectors": lambda query: searcher.index.search(vectors[query][None], DEPTH),
        "search the full text": lambda query: searcher.texts.search(query, DEPTH, searchable),
        f"facts of {DEPTH} photos from the catalog": lambda query: library.catalog.photo_rows(ids[query]),
        FIRST: lambda query: first_stage(library, query),
        READ: lambda query: thumbnails(library, ids[query]),
    }
    return {name: median_ms(work, rounds) for name, work in stages.items()}


def first_stage(library: PhotoLibrary, query: str):
    return next(library.search_progressively(query, top_k=DEPTH, rerank=RERANK))


def thumbnails(library: PhotoLibrary, ids: list[int]) -> list[bytes]:
    return [library.thumbnail(photo_id).read_bytes() for photo_id in ids[:PER_PAGE]]


def median_ms(work: Callable[[str], object], rounds: int) -> float:
    spent = []
    for turn in range(rounds + 1):
        for query in QUERIES:
            started = time.perf_counter()
            work(query)
            if turn:
                spent.append(time.perf_counter() - started)
    return 1000 * statistics.median(spent)


def median_of(held: list[dict[str, float]], name: str, since: str = "enter") -> float:
    return statistics.median(marks[name] - marks[since] for marks in held)


def report(held: list[dict[str, float]], stages: dict[str, float], count: int, sent: list[int]) -> list[str]:
    """The lines of both tables."""
    whole = [
        (words, f"{median_of(held, name):,.0f}", f"{min(marks[name] for marks in held):,.0f}")
        for name, words in WHOLE.items()
    ]
    parts = []
    for (since, name), words in PARTS.items():
        parts.append((words, f"{median_of(held, name, since):,.0f}"))
        if name == "named":
            script = median_of(held, name, since) - stages[FIRST] - stages[READ]
            parts += [(f"&emsp;{stage}", f"{spent:,.1f}") for stage, spent in stages.items()]
            parts.append(("&emsp;the rest: the page's script, Streamlit", f"{script:,.0f}"))
    size = f"{PER_PAGE} thumbnails a page, {statistics.median(sent) / 1000:,.0f} kB"
    return [
        machine(), "", f"{count:,} photos; {len(held)} searches; {size}. Milliseconds.", "",
        *table(("as the browser sees it", "median", "best"), whole),
        *table(("what the first thumbnail waits for", "median"), parts),
        "Stages of the server are timed apart, in another process.",
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--large", action="store_true", help="camera photos of 1024 x 768: larger thumbnails")
    parser.add_argument("--library", type=Path, help="a folder: made where it is not there, and kept")
    wanted = parser.parse_args()
    if chromium() is None:
        sys.exit("no Chromium on PATH: install chromium, chromium-browser or google-chrome")
    place = nullcontext(wanted.library) if wanted.library else tempfile.TemporaryDirectory()
    with place as name:
        folder = Path(name).absolute()
        if not (folder / "library").exists():
            make_library(folder, wanted.photos, wanted.large)
        with served(folder / "library") as address:
            held = in_the_browser(address, wanted.rounds)
        with PhotoLibrary.open(folder / "library") as library:
            stages = on_the_server(library, wanted.rounds)
            count = library.status()["photos"]
            sent = [sum(map(len, thumbnails(library, [hit.photo_id for hit in first_stage(library, query)])))
                    for query in QUERIES]  # fmt: skip
    lines = report(held, stages, count, sent)
    print("\n".join(lines))
    publish(wanted.out, "pages", "From Enter to the first thumbnails", lines)


if __name__ == "__main__":
    main()
