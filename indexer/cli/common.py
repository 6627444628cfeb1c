"""What the commands share: the two consoles, options by type, a progress bar, JSON, the library, the errors."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from indexer.errors import PhotoblipError


class Printer:
    """stdout or stderr, through rich.

    Attributes:
        console: rich's, for what takes one.
    """

    def __init__(self, **options):
        self._options = {"highlight": False, **options}
        self.console = Console(**self._options)
        self.print = self.console.print

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    @contextmanager
    def at(self, **options):
        """Print as for another terminal; `options` are those of rich's Console."""
        own = self.console
        self.console = Console(**self._options, **options)
        self.print = self.console.print
        try:
            yield
        finally:
            self.console, self.print = own, own.print


out, err = Printer(), Printer(stderr=True)

Library = Annotated[Path | None, typer.Option("--library", envvar="PHOTOBLIP_LIBRARY", help="The library's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
ModelName = Annotated[str | None, typer.Option("--model", help="A known model or a model folder.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say why a warm process did not answer.")]


def open_library(folder: Path | None, *, create: bool = False, model: str | None = None):
    from indexer import PhotoLibrary

    return PhotoLibrary.open(folder, create=create, model=model)


def answered(library: Path | None, command: str, options: dict, verbose: bool) -> dict:
    """The command's answer as JSON values, from the warm process where it runs (see `indexer.serve`)."""
    from indexer import serve

    def note(why: str) -> None:
        if verbose:
            err.print(escape(why), soft_wrap=True)

    return serve.answer(library, command, options, note)


def emit(row: dict) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


@contextmanager
def bar(label: str):
    """A progress bar on stderr with rate and time left; yields the callback that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err.console, transient=not err.is_terminal) as bar:
        task = bar.add_task(f"{label}: starting", total=None, rate="")

        def move(step) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.0f}/s" if speed else ""
            failed = f" [yellow]{step.failed} failed[/yellow]" if step.failed else ""
            bar.update(task, completed=step.done, total=step.total, rate=rate, description=label + failed)

        yield move


def read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PhotoblipError(f"{file} cannot be read as lines of UTF-8 text ({error}): check the file") from error


def refuse_photo(library, file: Path | None) -> None:
    """Raises PhotoblipError for a file to be written that is a photo of the library."""
    if file and any(library.catalog.find_photo(str(path)) is not None for path in (file, file.resolve())):
        raise PhotoblipError(f"{file} is a photo of the library, which is never written: choose another --out")


def save_picture(image, file: Path) -> None:
    """Write a PIL image. Raises PhotoblipError."""
    try:
        image.save(file)
    except (OSError, ValueError) as error:
        raise PhotoblipError(f"{file} cannot be written ({error}): name a .png or .jpg file in a folder") from error
