"""The commands, in the order that `--help` lists them: one module a topic, each with plain functions."""

from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOBase

import typer
from rich.markup import escape

from indexer.cli import (
    evaluate_library,
    evaluation,
    explain,
    interface,
    keeping,
    language,
    library,
    models,
    organise,
    search,
    tidying,
    training,
)
from indexer.cli.common import err, out
from indexer.errors import ModelError, PhotoblipError

app = typer.Typer(
    name="photoblip",
    help="Find any photo you own by describing it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    library.index,
    library.status,
    library.errors,
    library.verify,
    library.reindex,
    search.search,
    search.similar,
    search.describe,
    language.caption,
    language.ask,
    language.chat,
    language.ground,
    explain.explain,
    organise.tags,
    tidying.tag,
    organise.untag,
    organise.favourite,
    organise.rate,
    organise.title,
    tidying.audit,
    tidying.duplicates,
    keeping.backup,
    keeping.restore,
    keeping.export,
    keeping.forget,
    interface.serve,
):
    app.command()(command)
app.command(context_settings=training.PASS_OPTIONS_ON)(training.train)
for command in (training.bench, interface.ui, interface.demo):
    app.command()(command)
app.add_typer(organise.album, name="album")
app.add_typer(organise.saved, name="saved")
app.add_typer(models.app, name="models")
evaluation.app.command("library")(evaluate_library.evaluate_library)
app.add_typer(evaluation.app, name="evaluate")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, this process's own by default. -> its exit status.

    Errors a user can meet become one sentence.
    """
    try:
        app(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    except (PhotoblipError, ModelError) as error:
        err.print(f"[red]photoblip:[/red] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


class _Kept(TextIOBase):
    """A stream that keeps what is written, in one list with the other stream's."""

    def __init__(self, name: str, pieces: list[tuple[str, str]]):
        self.name, self.pieces = name, pieces

    def write(self, text: str) -> int:
        self.pieces.append((self.name, text))
        return len(text)


def run_for(arguments: Sequence[str], terminal: dict) -> dict:
    """Run a command line for another process; see `indexer.serve.printed`. -> its exit status, and what it prints."""
    options = {"width": terminal["width"], "_environ": terminal["environment"]}
    pieces: list[tuple[str, str]] = []
    with (
        redirect_stdout(_Kept("stdout", pieces)),
        redirect_stderr(_Kept("stderr", pieces)),
        out.at(force_terminal=terminal["stdout"], **options),
        err.at(force_terminal=terminal["stderr"], **options),
    ):
        status = run(arguments)
    return {"status": status, "pieces": pieces}
