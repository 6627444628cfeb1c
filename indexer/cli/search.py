"""Commands that find: search, similar, and describe, which finds the words for a photo."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from indexer.cli.common import AsJson, Library, Verbose, answered, emit, err, out, read_lines


def search(
    query: Annotated[
        str | None, typer.Argument(help='What the photo shows; also: no X, 2:dogs + snow, "exact words", year=2023.')
    ] = None,
    image: Annotated[str | None, typer.Option(help="An example photo.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Something the photo must not show.")] = None,
    where: Annotated[str | None, typer.Option(help="A filter: year=2023 camera=Pixel*")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 20,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that the matching model reads.")] = 100,
    no_rerank: Annotated[bool, typer.Option("--no-rerank", help="First stage only.")] = False,
    budget_ms: Annotated[float | None, typer.Option(min=0, help="Time for re-ranking.")] = None,
    min_probability: Annotated[float | None, typer.Option(min=0, max=1, help="Only matches so probable.")] = None,
    likely: Annotated[
        bool, typer.Option("--likely", help="Only what is above the cut: nothing where nothing fits.")
    ] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="BLIP-2: by one vector a photo first; faster, misses some.")
    ] = False,
    ask: Annotated[str | None, typer.Option(help="A question that each result is asked.")] = None,
    answer: Annotated[str | None, typer.Option(help="Keep these answers: >2, 2..5, yes, red|blue, !red")] = None,
    ask_model: Annotated[str | None, typer.Option(help="The model that answers: a known one or a folder.")] = None,
    library: Library = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Find photos by words, by an example photo, or by both; ask a question of those found."""
    if not (query and query.strip()) and image is None and not where and not without:
        raise typer.BadParameter("give words, an example photo with --image, or both")
    if ask is None and (answer is not None or ask_model is not None):
        raise typer.BadParameter("--answer and --ask-model need a question: --ask 'how many people?'")
    options = {
        "text": query,
        "image": image,
        "without": without or [],
        "where": where,
        "top_k": top,
        "rerank": 0 if no_rerank else rerank,
        "budget_ms": budget_ms,
        "min_probability": min_probability,
        "likely": likely,
        "approximate": approximate,
        "ask": ask,
        "answer": answer,
        "ask_model": ask_model,
    }
    hits = answered(library, "search", options, verbose)
    if query and hits["query"] != " ".join(query.split()) and not as_json:
        err.print(f"understood as: {escape(hits['query'])}", soft_wrap=True)
    print_hits(hits, as_json)


def similar(
    photo: Annotated[str, typer.Argument(help="A photo's id or path.")],
    where: Annotated[str | None, typer.Option(help="A filter.")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 20,
    library: Library = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Photos that look like one of the library."""
    options = {"photo": photo, "top_k": top, "where": where}
    print_hits(answered(library, "similar", options, verbose), as_json)


def print_hits(hits: dict, as_json: bool) -> None:
    if notice := hits.get("notice"):
        err.print(f"[yellow]warning:[/yellow] {escape(notice)}", soft_wrap=True)
    if as_json:
        for row in hits["rows"]:
            emit(row)
        return
    width = min(30, max((len(row["answer"] or "-") for row in hits["rows"] if "answer" in row), default=0))
    for row in hits["rows"]:
        caption = f"  [dim]{escape(row['caption'])}[/dim]" if row["caption"] else ""
        answer = f"  [bold]{escape((row['answer'] or '-').ljust(width))}[/bold]" if width else ""
        out.print(f"{_scores(row)}{answer}  {escape(row['path'])}{caption}", soft_wrap=True)
    if not hits["rows"]:
        err.print("no photo matches")
    elif hits["reranked"]:
        err.print(f"{_likely(hits)}{hits['reranked']} candidates re-ranked in {hits['seconds']:.2f} s")


def _likely(hits: dict) -> str:
    cut, shown = hits["cut"], len(hits["rows"])
    if cut is None or cut == shown:
        return ""
    return f"the first {cut} are likely matches; " if cut else "none is a likely match, these are the nearest; "


def _scores(row: dict) -> str:
    sure = "" if row["probability"] is None else f"{row['probability']:5.0%}"
    cosine = "" if row["itc"] is None else f"{row['itc']:6.3f}"
    return f"[bold]{row['rank']:>3}[/bold]  {sure:>5}  {cosine:>6}"


def describe(
    image: Annotated[str, typer.Argument(help="A photo file.")],
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 5,
    candidates: Annotated[Path | None, typer.Option(help="A file with one text a line.")] = None,
    things: Annotated[bool, typer.Option("--things", help="Of the list of everyday things.")] = False,
    library: Library = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The texts that fit a photo best: of the library's captions, of given lines, or of a list of everyday things."""
    if candidates and things:
        raise typer.BadParameter("give --candidates or --things, not both")
    lines = read_lines(candidates) if candidates else None
    options = {"image": image, "candidates": lines, "things": things, "top_k": top}
    for row in answered(library, "describe", options, verbose)["rows"]:
        if as_json:
            emit(row)
        else:
            out.print(f"{_scores(row)}  {escape(row['text'])}", soft_wrap=True)
