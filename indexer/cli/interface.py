"""Commands that stay: the warm process (serve), the web page (ui), and the demo, which ends in the page."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from indexer.cli import Stopped
from indexer.cli.common import AsJson, Library, bar, emit, err, open_library, out
from indexer.errors import PhotoblipError


def serve(
    library: Library = None,
    idle_minutes: Annotated[float, typer.Option(min=0.01, help="Ends when nobody has asked for so long.")] = 30,
    stop: Annotated[bool, typer.Option("--stop", help="End the one that runs.")] = False,
    show: Annotated[bool, typer.Option("--status", help="Say what the one that runs holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep models loaded in this process: search, similar, describe and ask of the same user then answer at once."""
    from indexer.cli.commands import run_for
    from indexer.config import default_library
    from indexer.serve import Unanswered, WarmProcess, ask_server, stop_server

    if stop or show:
        try:
            values = stop_server() if stop else ask_server("status")
        except Unanswered as why:
            err.print(escape(str(why)), soft_wrap=True)
            raise typer.Exit(0 if stop else 1) from None
        _print_values(values, as_json)
        return
    process = WarmProcess(idle_seconds=60 * idle_minutes, run=run_for)
    process.warm((library or default_library()).expanduser().absolute())
    err.print(f"serving until Ctrl-C, `photoblip serve --stop`, or {idle_minutes:g} minutes without a question")
    with suppress(Stopped):
        process.run()


def _print_values(values: dict, as_json: bool) -> None:
    if as_json:
        emit(values)
        return
    for name, value in values.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        out.print(f"{name:>15}  {escape(str(shown))}", soft_wrap=True)


def ui(
    library: Library = None,
    port: Annotated[int, typer.Option(help="On localhost.")] = 8501,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open the web page on this machine."""
    from indexer.config import default_library

    os.environ["PHOTOBLIP_LIBRARY"] = str((library or default_library()).expanduser().absolute())
    _run_streamlit(port, browser)


def _run_streamlit(port: int, browser: bool) -> None:
    """Replace this process with Streamlit's: the app is found by name, so that indexer never imports it."""
    from importlib.util import find_spec

    script = Path(find_spec("app").origin).with_name("streamlit_app.py")
    options = {
        "server.address": "localhost",
        "server.port": str(port),
        "server.headless": "false" if browser else "true",
        "server.maxUploadSize": "50",
        "server.fileWatcherType": "none",  # it would load the page's modules anew and lose a running job
        "browser.gatherUsageStats": "false",
        "theme.light.primaryColor": "#2f6f86",
        "theme.dark.primaryColor": "#2f7890",
        "client.toolbarMode": "minimal",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(script), *flags])


def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Stop after the queries.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demo's photos and library go.")] = Path(".demo"),
    port: int = 8501,
) -> None:
    """Index sample photos from installed packages, run three queries, caption a photo, open the page."""
    from indexer.demo import copy_demo_photos, demo_manifest

    manifest, photos_folder = demo_manifest(), folder / "photos"
    copy_demo_photos(photos_folder)
    with open_library(folder / "library", create=True) as photos, bar("indexing") as move:
        report = photos.index(photos_folder, progress=move)
        known = photos.status()["photos"]
    out.print(f"{known} photos indexed in {report.seconds:.1f} s")
    with open_library(folder / "library") as photos:
        wrong = [query for query in manifest["queries"] if not _demo_query(photos, query)]
        first = photos_folder / manifest["caption"]
        words, score = photos.caption(str(first))
        out.print(f"\n[bold]caption of {first.name}:[/bold] {escape(words)} ({score:.0%})")
    if wrong:
        raise PhotoblipError(f"the demo's query {wrong[0]['text']!r} did not put {wrong[0]['expect']} first")
    if not no_ui:
        os.environ["PHOTOBLIP_LIBRARY"] = str((folder / "library").absolute())
        _run_streamlit(port, browser=True)


def _demo_query(photos, query: dict) -> bool:
    """Print a query's first hits; -> whether the expected photo is first."""
    out.print(f"\n[bold]{escape(query['text'])}[/bold]")
    hits = photos.search(query["text"], top_k=3)
    for hit in hits:
        out.print(f"  {hit.rank}  {hit.probability:5.0%}  {Path(hit.path).name}")
    return bool(hits) and Path(hits[0].path).name == query["expect"]
