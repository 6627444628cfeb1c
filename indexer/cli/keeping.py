"""Commands that keep what people did safe: backup, restore, export, forget."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from indexer.cli.common import AsJson, Library, emit, err, open_library, out
from indexer.errors import PhotoblipError

Replace = Annotated[bool, typer.Option("--replace", help="In place of a file that is there.")]


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write, as photos.zip.")],
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help="Take the thumbnails along too.")] = False,
    replace: Replace = False,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Keep the library in one file: the catalog and its own models, not the photos. Jobs may run meanwhile."""
    with open_library(library) as photos:
        kept = photos.backup(file, thumbnails=thumbnails, replace=replace)
    _say(kept, f"{kept.photos} photos' records are in {kept.file}", as_json)


def restore(
    file: Annotated[Path, typer.Argument(help="What `photoblip backup` wrote.")],
    folder: Annotated[Path, typer.Argument(help="A folder that is empty or not there: the new library.")],
    as_json: AsJson = False,
) -> None:
    """Make a library of a backup. Nothing is overwritten."""
    from indexer.backup import restore_backup

    kept = restore_backup(file, folder)
    _say(kept, f"{kept.photos} photos' records of {kept.created_at} are in {folder}: give it as --library", as_json)


def _say(kept, words: str, as_json: bool) -> None:
    if as_json:
        emit(kept.as_dict())
    else:
        models = f", and the models {', '.join(kept.models)}" if kept.models else ""
        out.print(f"{escape(words)} ({kept.bytes / 1e6:,.1f} MB){escape(models)}", soft_wrap=True)


def export(
    kind: Annotated[str, typer.Option("--format", "-f", help="csv, json (one object a line) or parquet.")] = "csv",
    file: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write; else stdout.")] = None,
    replace: Replace = False,
    library: Library = None,
) -> None:
    """Write what is known of each photo as a table: paths, metadata, captions, tags, albums, ratings."""
    from indexer.exporting import FORMATS, WRITERS

    if kind not in FORMATS:
        raise typer.BadParameter(f"--format is {', '.join(FORMATS)}")
    if file is None and kind not in WRITERS:
        raise typer.BadParameter(f"{kind} needs a file: give --out")
    with open_library(library) as photos:
        if file is None:
            _to_stdout(WRITERS[kind], photos.catalog)
        else:
            count = photos.export(file, kind, replace=replace)
            err.print(f"{count} photos are in {escape(str(file))}", soft_wrap=True)


def _to_stdout(write, catalog) -> None:
    try:
        write(catalog, sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as `head`, has what it wants
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - what is left goes nowhere
        raise typer.Exit(1) from None


def forget(
    folder: Annotated[Path, typer.Argument(help="A folder that was indexed.")],
    purge: Annotated[bool, typer.Option(help="Also remove the thumbnails, vectors and generated words.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; without, only say what would be done.")] = False,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Take a folder out of the library. The photos themselves, and your words about them, stay."""
    with open_library(library) as photos:
        report = photos.forget(folder, purge=purge, dry_run=not yes)
    if as_json:
        emit(report.as_dict() | {"done": yes})
    else:
        _print_forgotten(report)
    if not yes:
        raise PhotoblipError("nothing is done yet: give --yes too")


def _print_forgotten(report) -> None:
    kept = {
        "captions": report.captions, "tags": report.tags, "places in albums": report.album_places,
        "titles": report.titles, "ratings": report.rated, "favourites": report.favourites,
    }  # fmt: skip
    words = ", ".join(f"{count} {name}" for name, count in kept.items() if count) or "none"
    out.print(f"{report.files} files leave the library, {report.photos} photos leave search", soft_wrap=True)
    out.print(f"what people said of them is kept for their return: {words}", soft_wrap=True)
    if report.purged:
        out.print("their thumbnails, vectors, generated captions, tags and answers go", soft_wrap=True)
    out.print(f"the files in {escape(report.folder)} are not touched", soft_wrap=True)
