"""The `photoblip` command: each command parses, makes one library call, and prints.

Results go to stdout, as text or (`--json`) one JSON object a line; progress and warnings go to stderr.
Exit 0 done, 1 the job failed or some input could not be used, 2 wrong usage.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from blipcore.hub import canonical_name
from indexer.errors import ModelError, PhotoblipError

app = typer.Typer(
    name="photoblip",
    help="Find any photo you own by describing it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models: list, download, info.", invoke_without_command=True)
app.add_typer(models_app, name="models")
evaluate_app = typer.Typer(help="Measure a model on captioned photos.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Library = Annotated[Path | None, typer.Option("--library", envvar="PHOTOBLIP_LIBRARY", help="The library's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
ModelName = Annotated[str | None, typer.Option("--model", help="A known model or a model folder.")]


class _Stopped(BaseException):
    """Ctrl-C or a polite kill. Not a KeyboardInterrupt, which Typer turns into an exit status of its own."""


def main() -> None:
    """The entry point: errors a user can meet become one sentence and an exit status."""
    _quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except (PhotoblipError, ModelError) as error:
        err.print(f"[red]photoblip:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except _Stopped:
        err.print("stopped; what is done is kept, and the same command goes on from here")
        sys.exit(1)


def _stop(_number, _frame) -> None:
    raise _Stopped


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _open(folder: Path | None, *, create: bool = False, model: str | None = None):
    from indexer.library import PhotoLibrary

    return PhotoLibrary.open(folder, create=create, model=model)


def _emit(row: dict) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


@contextmanager
def _bar(label: str):
    """A progress bar on stderr with rate and time left; yields the callback that moves it."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=not err.is_terminal) as bar:
        task = bar.add_task(f"{label}: starting", total=None, rate="")

        def move(step) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.0f}/s" if speed else ""
            failed = f" [yellow]{step.failed} failed[/yellow]" if step.failed else ""
            bar.update(task, completed=step.done, total=step.total, rate=rate, description=label + failed)

        yield move


# -- the library --------------------------------------------------------------------------------------------


@app.command()
def index(
    folders: Annotated[list[Path], typer.Argument(help="Folders to add or refresh.")],
    library: Library = None,
    model: Annotated[str | None, typer.Option(help="What a new library is indexed with.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Decoding processes.")] = os.cpu_count() or 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos a batch.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Add folders to the library, or refresh them. Stop it whenever you like: it goes on where it stopped."""
    with _open(library, create=True, model=model) as photos, _bar("indexing") as move:
        _refuse_model_change(photos, model)
        report = photos.index(*folders, progress=move, workers=jobs, batch_size=batch_size)
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    counts = report.as_dict()
    counts.pop("warnings")
    if as_json:
        _emit({"event": "done", **counts})
    else:
        read = report.added + report.updated + report.moved
        rate = f" ({read / report.seconds:.1f} photos/s)" if read and report.seconds else ""
        done = ", ".join(f"{value} {name}" for name, value in counts.items() if name != "seconds")
        out.print(f"{done} in {report.seconds:.1f} s{rate}", soft_wrap=True)
        if report.failed:
            err.print("some files could not be used: `photoblip errors` says which and why")
    raise typer.Exit(1 if report.failed or report.warnings else 0)


def _refuse_model_change(photos, model: str | None) -> None:
    active = photos.catalog.active_model()
    if model and active and active.name != canonical_name(model):
        raise PhotoblipError(
            f"this library uses {active.name}: `photoblip reindex --model {model}` changes that, "
            "and search goes on meanwhile"
        )


@app.command()
def status(library: Library = None, as_json: AsJson = False) -> None:
    """What the library holds."""
    with _open(library) as photos:
        values = photos.status()
    if as_json:
        _emit(values)
        return
    job = values.pop("job")
    for name, value in values.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        shown = f"{value / 1e6:,.1f} MB" if name == "bytes" else shown
        out.print(f"{name:>12}  {escape(str(shown))}", soft_wrap=True)
    if job and job["state"] in {"running", "interrupted", "failed"}:
        err.print(f"the last {job['kind']} job is {job['state']} at {job['done']} of {job['total'] or '?'}")


@app.command()
def errors(library: Library = None, as_json: AsJson = False) -> None:
    """Files that could not be used, and why."""
    with _open(library) as photos:
        rows = photos.errors()
    for row in rows:
        if as_json:
            _emit(row)
        else:
            out.print(f"[yellow]{row['reason']:>14}[/yellow]  {escape(row['path'])}", soft_wrap=True)
            out.print(f"{'':>14}  {escape(row['detail'])}", soft_wrap=True)
    if not rows and not as_json:
        err.print("every file could be used")


@app.command()
def verify(library: Library = None, as_json: AsJson = False) -> None:
    """Check catalog, index and thumbnails against each other."""
    with _open(library) as photos:
        problems = photos.verify()
    if as_json:
        _emit({"problems": problems})
    for problem in problems if not as_json else ():
        out.print(escape(problem), soft_wrap=True)
    if not problems and not as_json:
        out.print("the library is sound")
    raise typer.Exit(1 if problems else 0)


@app.command()
def reindex(
    model: Annotated[str, typer.Option(help="A known model or a model folder.")],
    library: Library = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0)] = os.cpu_count() or 2,
    as_json: AsJson = False,
) -> None:
    """Embed all photos with another model beside the active one, then switch to it."""
    with _open(library) as photos, _bar("reindexing") as move:
        count, failed = photos.reindex(model, progress=move, workers=jobs)
    if as_json:
        _emit({"event": "done", "model": model, "photos": count, "failed": failed})
    else:
        out.print(f"{count} photos are now searched with {escape(model)}")
    if failed:
        err.print(f"{failed} photos could not be read: `photoblip verify` and `photoblip index` tell more")
    raise typer.Exit(1 if failed else 0)


# -- search -------------------------------------------------------------------------------------------------


@app.command()
def search(
    query: Annotated[str | None, typer.Argument(help="What the photo shows.")] = None,
    image: Annotated[str | None, typer.Option(help="An example photo.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Something the photo must not show.")] = None,
    where: Annotated[str | None, typer.Option(help="A filter: year=2023 camera=Pixel*")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 20,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that the matching model reads.")] = 100,
    no_rerank: Annotated[bool, typer.Option("--no-rerank", help="First stage only.")] = False,
    budget_ms: Annotated[float | None, typer.Option(min=0, help="Time for re-ranking.")] = None,
    min_probability: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Find photos by words, by an example photo, or by both."""
    if not (query and query.strip()) and image is None:
        raise typer.BadParameter("give words, an example photo with --image, or both")
    with _open(library) as photos:
        hits = photos.search(
            query,
            image=image,
            without=without or (),
            where=where,
            top_k=top,
            rerank=0 if no_rerank else rerank,
            budget_ms=budget_ms,
            min_probability=min_probability,
        )
    _print_hits(hits, as_json)


@app.command()
def similar(
    photo: Annotated[str, typer.Argument(help="A photo's id or path.")],
    where: Annotated[str | None, typer.Option(help="A filter.")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 20,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Photos that look like one of the library."""
    with _open(library) as photos:
        hits = photos.similar(photo, top_k=top, where=where)
    _print_hits(hits, as_json)


def _print_hits(hits: Iterable, as_json: bool) -> None:
    if as_json:
        for hit in hits:
            _emit(hit.as_dict())
        return
    for hit in hits:
        sure = "" if hit.probability is None else f"{hit.probability:5.0%}"
        line = f"[bold]{hit.rank:>3}[/bold]  {sure:>5}  {hit.itc:6.3f}  {escape(hit.path)}"
        out.print(line + (f"  [dim]{escape(hit.caption)}[/dim]" if hit.caption else ""), soft_wrap=True)
    if not hits:
        err.print("no photo matches")
    elif hits.reranked:
        err.print(f"{hits.reranked} candidates re-ranked in {hits.seconds:.2f} s")


@app.command()
def describe(
    image: Annotated[str, typer.Argument(help="A photo file.")],
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 5,
    candidates: Annotated[Path | None, typer.Option(help="A file with one text a line.")] = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """The texts that fit a photo best: of the library's captions, or of given lines."""
    lines = _read_lines(candidates) if candidates else None
    with _open(library) as photos:
        hits = photos.describe(image, candidates=lines, top_k=top)
    for hit in hits:
        if as_json:
            _emit(hit.as_dict())
        else:
            sure = "" if hit.probability is None else f"{hit.probability:5.0%}"
            out.print(f"[bold]{hit.rank:>3}[/bold]  {sure:>5}  {hit.itc:6.3f}  {escape(hit.text)}", soft_wrap=True)


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PhotoblipError(f"{file} cannot be read as lines of UTF-8 text ({error}): check the file") from error


@app.command()
def caption(
    photos: Annotated[list[str] | None, typer.Argument(help="Ids or paths.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="All photos without a caption.")] = False,
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Write captions: of several beams the one that the matching model believes, kept with its score."""
    if bool(photos) == missing:
        raise typer.BadParameter("name photos, or give --missing")
    with _open(library) as opened, _bar("captioning") as move:
        named = dict.fromkeys(opened.photo_id(photo) for photo in photos or ())
        ids = opened.uncaptioned() if missing else list(named)
        written = opened.caption(ids, model=model, progress=move) if ids else {}
        rows = opened.catalog.photo_rows(written)
    for photo_id, (words, score) in written.items():
        row = {"photo_id": photo_id, "path": rows[photo_id]["path"], "caption": words, "score": score}
        if as_json:
            _emit(row)
        else:
            sure = "" if score is None else f"{score:5.0%}"
            out.print(f"{sure:>5}  {escape(words)}  [dim]{escape(str(row['path']))}[/dim]", soft_wrap=True)
    raise typer.Exit(0 if len(written) == len(ids) else 1)


@app.command()
def ask(
    photo: Annotated[str, typer.Argument(help="A photo's id or path.")],
    question: Annotated[str, typer.Argument()],
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about a photo."""
    with _open(library) as photos:
        photo_id = photos.photo_id(photo)
        answer = photos.ask(photo_id, question, model=model)
    if as_json:
        _emit({"photo_id": photo_id, "question": question, "answer": answer})
    else:
        out.print(escape(answer))


# -- models -------------------------------------------------------------------------------------------------


@models_app.callback()
def models(context: typer.Context) -> None:
    """List the models when no other command is given."""
    if context.invoked_subcommand is None:
        models_list()


@models_app.command("list")
def models_list(as_json: AsJson = False) -> None:
    """The models that photoblip knows, and which are on this machine."""
    from blipcore.hub import KNOWN_MODELS, is_downloaded

    table = Table("name", "here", "GB", "licence", "what it does")
    for known in KNOWN_MODELS.values():
        here = is_downloaded(known)
        if as_json:
            row = {"name": known.name, "here": here, "bundled": known.bundled, "gigabytes": known.gigabytes}
            _emit(row | {"licence": known.licence, "what": known.what})
        table.add_row(known.name, "yes" if here else "no", f"{known.gigabytes:g}", known.licence, known.what)
    if not as_json:
        out.print(table)


@models_app.command("download")
def models_download(
    name: str,
    source: Annotated[Path | None, typer.Option("--from", help="A local mirror: DIR/<owner>/<repository>/.")] = None,
) -> None:
    """Bring a model from the hub to this machine."""
    from blipcore.hub import KNOWN_MODELS, download

    if known := KNOWN_MODELS.get(name):
        err.print(f"{known.name}: about {known.gigabytes} GB, licence {known.licence}")
    out.print(str(download(name, source)), soft_wrap=True)


@models_app.command("info")
def models_info(name: str, as_json: AsJson = False) -> None:
    """A model's folder, parameters, scoring and abilities."""
    from blipcore.encoder import load_encoder

    info = load_encoder(name).info()
    if as_json:
        _emit(info)
    else:
        for key, value in info.items():
            out.print(f"{key:>14}  {escape(str(value))}", soft_wrap=True)


# -- train, evaluate, bench ---------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context, recipe: Annotated[str, typer.Argument(help="pretrain_blip, ...")] = "") -> None:
    """Run a training recipe; `photoblip train RECIPE --help` lists its options."""
    from blipcore.training import recipe_names, run_recipe

    if recipe not in recipe_names():
        raise typer.BadParameter(f"recipes are {', '.join(recipe_names())}")
    run_recipe(recipe, context.args)


@evaluate_app.command("retrieval")
def evaluate_retrieval(
    data: Annotated[Path, typer.Option(help="captions.tsv with SPLIT.tar or a folder SPLIT beside it.")],
    split: Annotated[str, typer.Option()] = "test",
    model: Annotated[str, typer.Option()] = "blip-mini",
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that ITM reads; 0 for ITC alone.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Only the first photos.")] = None,
    as_json: AsJson = False,
) -> None:
    """Recall at 1, 5, 10 in both directions, for ITC and re-ranked by ITM."""
    from blipcore.evaluation import retrieval

    rows = retrieval(data, split, model, rerank=rerank, limit=limit)
    table = Table("stage", "t2i R@1", "R@5", "R@10", "i2t R@1", "R@5", "R@10", "seconds")
    for row in rows:
        if as_json:
            _emit(row)
        figures = [f"{row[way][k]:.1f}" for way in ("t2i", "i2t") for k in ("r1", "r5", "r10")]
        table.add_row(row["stage"], *figures, f"{row['seconds']:.0f}")
    if not as_json:
        out.print(table)


@app.command()
def bench(library: Library = None, rounds: Annotated[int, typer.Option(min=1)] = 5, as_json: AsJson = False) -> None:
    """Time this library's stages: embed a photo, embed a query, search the vectors, re-rank 100."""
    from indexer.bench import time_stages

    with _open(library) as photos:
        rows = time_stages(photos, rounds)
    table = Table("stage", "median ms", "best ms")
    for row in rows:
        if as_json:
            _emit(row)
        table.add_row(row["stage"], f"{row['median_ms']:.1f}", f"{row['best_ms']:.1f}")
    if not as_json:
        out.print(table)


# -- the UI and the demo ------------------------------------------------------------------------------------


@app.command()
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


@app.command()
def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Stop after the queries.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demo's photos and library go.")] = Path(".demo"),
    port: int = 8501,
) -> None:
    """Index sample photos from installed packages, run three queries, caption a photo, open the page."""
    from indexer.demo import copy_demo_photos, demo_manifest

    manifest, photos_folder = demo_manifest(), folder / "photos"
    copy_demo_photos(photos_folder)
    with _open(folder / "library", create=True) as photos, _bar("indexing") as move:
        report = photos.index(photos_folder, progress=move)
        known = photos.status()["photos"]
    out.print(f"{known} photos indexed in {report.seconds:.1f} s")
    with _open(folder / "library") as photos:
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


if __name__ == "__main__":
    main()
