"""Commands whose model writes or points: caption, ask, chat, ground."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from indexer.cli import Stopped
from indexer.cli.common import (
    AsJson,
    Library,
    ModelName,
    Verbose,
    answered,
    bar,
    emit,
    err,
    open_library,
    out,
    read_lines,
    refuse_photo,
    save_picture,
)


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
    with open_library(library) as opened, bar("captioning") as move:
        named = dict.fromkeys(opened.photo_id(photo) for photo in photos or ())
        ids = opened.uncaptioned() if missing else list(named)
        written = opened.caption(ids, model=model, progress=move) if ids else {}
        rows = opened.catalog.photo_rows(written)
    for photo_id, (words, score) in written.items():
        row = {"photo_id": photo_id, "path": rows[photo_id]["path"], "caption": words, "score": score}
        if as_json:
            emit(row)
        else:
            sure = "" if score is None else f"{score:5.0%}"
            out.print(f"{sure:>5}  {escape(words)}  [dim]{escape(str(row['path']))}[/dim]", soft_wrap=True)
    raise typer.Exit(0 if len(written) == len(ids) else 1)


def ask(
    photo: Annotated[str, typer.Argument(help="A photo's id or path; with --over, the question.")],
    question: Annotated[str | None, typer.Argument()] = None,
    over: Annotated[str | None, typer.Option(help="Ask the photos that a search for these words finds.")] = None,
    top: Annotated[int | None, typer.Option("--top", "-t", min=1, help="With --over, how many photos: 20.")] = None,
    where: Annotated[str | None, typer.Option(help="With --over, a filter.")] = None,
    answers: Annotated[Path | None, typer.Option(help="A file with one possible answer a line.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what was answered before.")] = False,
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Answer a question about a photo, in the model's own words or by the likeliest of given answers.

    With --over, ask all photos that a search finds, and count their answers.
    """
    if (over is None) == (question is None):
        raise typer.BadParameter("give a photo and a question, or --over WORDS and a question")
    if over is None and (top is not None or where is not None):
        raise typer.BadParameter("--top and --where go with --over WORDS, which asks what a search finds")
    if over is None:
        lines = read_lines(answers) if answers else None
        options = {"photo": photo, "question": question, "answers": lines, "model": model, "cached": not fresh}
        _print_answer(question, answered(library, "ask", options, verbose), as_json)
        return
    if answers:
        raise typer.BadParameter("--answers is for one photo")
    options = {"question": photo, "over": over, "top_k": top or 20, "where": where, "model": model, "cached": not fresh}
    _print_groups(answered(library, "ask_results", options, verbose)["rows"], as_json)


def _print_answer(question: str, found: dict, as_json: bool) -> None:
    if as_json:
        emit({"photo_id": found["photo_id"], "question": question, "answer": found["answer"]})
    else:
        out.print(escape(found["answer"]))


def _print_groups(groups: list[dict], as_json: bool) -> None:
    table = Table("answer", "photos", "weight", "rests on")
    for row in groups:
        if as_json:
            emit(row)
        paths = "\n".join(escape(photo["path"]) for photo in row["photos"])
        table.add_row(escape(row["answer"]), str(row["count"]), f"{row['weight']:.0%}", paths)
    if not groups and not as_json:
        err.print("no photo matches")
    elif not as_json:
        table.columns[-1].overflow = "fold"
        out.print(table)


def chat(
    photos: Annotated[list[str], typer.Argument(help="Ids or paths.")],
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Talk about photos: each line that you type is answered as it is written. Ctrl-D ends it."""
    turns = []
    with open_library(library) as opened, suppress(Stopped):
        ids = [opened.photo_id(photo) for photo in photos]
        opened.encoder_that("chat", model)  # before anything is typed
        for line in _typed_lines():
            turns.append({"role": "user", "content": line})
            said = "".join(_shown(opened.chat(ids, turns, model=model), not as_json))
            turns.append({"role": "assistant", "content": said.strip()})
            if as_json:
                emit({"photo_ids": ids, "question": line, "answer": said.strip()})


def _typed_lines():
    """Lines of stdin that are not blank, with a prompt for each where a person types them."""
    while True:
        if sys.stdin.isatty():
            err.print("[bold]>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _shown(pieces, show: bool):
    """The same pieces of text, each printed as it comes."""
    for piece in pieces:
        if show:
            sys.stdout.write(piece)
            sys.stdout.flush()
        yield piece
    if show:
        out.print()


def ground(
    photo: Annotated[str, typer.Argument(help="A photo's id or path.")],
    phrase: Annotated[str, typer.Argument(help="What to point at.")],
    file: Annotated[Path | None, typer.Option("--out", help="Also draw the boxes into this image file.")] = None,
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Where a photo shows something: boxes as left, top, right, bottom, in parts of its width and height."""
    with open_library(library) as opened:
        refuse_photo(opened, file)
        photo_id = opened.photo_id(photo)
        boxes = opened.ground(photo_id, phrase, model=model)
        if file:
            save_picture(opened.draw_boxes(photo_id, boxes), file)
    for box in boxes:
        if as_json:
            corners = {"x0": box.x0, "y0": box.y0, "x1": box.x1, "y1": box.y1}
            emit({"photo_id": photo_id, "label": box.label} | corners)
        else:
            out.print(f"{box.x0:.3f} {box.y0:.3f} {box.x1:.3f} {box.y1:.3f}  {escape(box.label)}", soft_wrap=True)
    if not boxes and not as_json:
        err.print("the model points at nothing")
