"""Commands that keep the library: index, status, errors, verify, reindex."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from indexer.cli.common import AsJson, Library, bar, emit, err, open_library, out
from indexer.errors import PhotoblipError


def index(
    folders: Annotated[list[Path], typer.Argument(help="Folders to add or refresh.")],
    library: Library = None,
    model: Annotated[str | None, typer.Option(help="What a new library is indexed with.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Decoding processes.")] = os.cpu_count() or 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos a batch.")] = 32,
    profile: Annotated[bool, typer.Option("--profile", help="Say how busy each stage was.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add folders to the library, or refresh them. Stop it whenever you like: it goes on where it stopped."""
    with open_library(library, create=True, model=model) as photos, bar("indexing") as move:
        _refuse_model_change(photos, model)
        report = photos.index(*folders, progress=move, workers=jobs, batch_size=batch_size)
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    counts = report.as_dict()
    counts.pop("warnings")
    if as_json:
        emit({"event": "done", **counts})
    else:
        read = report.added + report.updated + report.moved
        rate = f" ({read / report.seconds:.1f} photos/s)" if read and report.seconds else ""
        done = ", ".join(f"{value} {name}" for name, value in counts.items() if name != "seconds")
        out.print(f"{done} in {report.seconds:.1f} s{rate}", soft_wrap=True)
        if report.failed:
            err.print("some files could not be used: `photoblip errors` says which and why")
    if profile:
        _print_profile(report.times, as_json)
    raise typer.Exit(1 if report.failed or report.warnings else 0)


def _print_profile(times, as_json: bool) -> None:
    for row in times.rows():
        if as_json:
            emit({"event": "stage", **row})
            continue
        alone = "" if row["photos_per_second"] is None else f"{row['photos_per_second']:.1f} photos/s alone"
        err.print(f"{row['stage']:>8}  {row['seconds']:8.2f} s  busy {row['share']:4.0%} of the run  {alone}")
    if times.photos and not as_json:
        err.print(f"the bottleneck is {times.bottleneck()}; the model waited {times.wait:.2f} s for photos")


def _refuse_model_change(photos, model: str | None) -> None:
    active = photos.catalog.active_model()
    if model and active and active.name != photos.model_name(model):
        raise PhotoblipError(
            f"this library uses {active.name}: `photoblip reindex --model {model}` changes that, "
            "and search goes on meanwhile"
        )


def status(library: Library = None, as_json: AsJson = False) -> None:
    """What the library holds."""
    with open_library(library) as photos:
        values = photos.status()
    if as_json:
        emit(values)
        return
    job = values.pop("job")
    for name, value in values.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        shown = f"{value / 1e6:,.1f} MB" if name == "bytes" else shown
        out.print(f"{name:>12}  {escape(str(shown))}", soft_wrap=True)
    if job and job["state"] in {"running", "interrupted", "failed"}:
        err.print(f"the last {job['kind']} job is {job['state']} at {job['done']} of {job['total'] or '?'}")


def errors(library: Library = None, as_json: AsJson = False) -> None:
    """Files that could not be used, and why."""
    with open_library(library) as photos:
        rows = photos.errors()
    for row in rows:
        if as_json:
            emit(row)
        else:
            out.print(f"[yellow]{row['reason']:>14}[/yellow]  {escape(row['path'])}", soft_wrap=True)
            out.print(f"{'':>14}  {escape(row['detail'])}", soft_wrap=True)
    if not rows and not as_json:
        err.print("every file could be used")


def verify(library: Library = None, as_json: AsJson = False) -> None:
    """Check catalog, index and thumbnails against each other."""
    with open_library(library) as photos:
        problems = photos.verify()
    if as_json:
        emit({"problems": problems})
    for problem in problems if not as_json else ():
        out.print(escape(problem), soft_wrap=True)
    if not problems and not as_json:
        out.print("the library is sound")
    raise typer.Exit(1 if problems else 0)


def reindex(
    model: Annotated[str, typer.Option(help="A known model, one of the library's own, or a model folder.")],
    no_switch: Annotated[bool, typer.Option("--no-switch", help="Leave search with the model that it uses.")] = False,
    library: Library = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0)] = os.cpu_count() or 2,
    as_json: AsJson = False,
) -> None:
    """Embed all photos with another model beside the active one, then switch to it.

    Search goes on with the active model until then. The old vectors stay: going back, as with `--model blip-mini`,
    embeds only photos that came since, and is done at once where there are none. With --no-switch, `photoblip models
    compare` and `photoblip models use` come next.
    """
    with open_library(library) as photos, bar("reindexing") as move:
        count, failed = photos.reindex(model, progress=move, workers=jobs, switch=not no_switch)
    if as_json:
        emit({"event": "done", "model": model, "photos": count, "failed": failed})
    else:
        out.print(f"{count} photos {'have vectors of' if no_switch else 'are now searched with'} {escape(model)}")
    if failed:
        err.print(f"{failed} photos could not be read: `photoblip verify` and `photoblip index` tell more")
    raise typer.Exit(1 if failed else 0)
