"""`photoblip evaluate library`: how well this library is searched, measured on the captions that people wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from indexer.cli.common import AsJson, Library, emit, err, open_library, out, read_lines
from indexer.errors import PhotoblipError

WAYS = {"itc": "vectors (ITC)", "text": "words (full text)", "fused": "both, fused", "reranked": "re-ranked (ITM)"}


def evaluate_library(
    library: Library = None,
    queries: Annotated[
        Path | None, typer.Option(help="A file of PHOTO<tab>QUERY lines, instead of the library's own captions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos asked for, drawn at random.")] = None,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that the matching model reads.")] = 100,
    report: Annotated[
        Path | None, typer.Option(help="The saved report's folder; the library's own by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recall, MRR, nDCG and latency of this library's search: by vectors, by words, fused, re-ranked.

    The queries are captions that people wrote; each is kept out of the full text while it is asked for.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    asked = None if queries is None else list(_pairs(queries))
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with open_library(library) as photos, Progress(*columns, console=err.console, transient=True) as bar:
        task = bar.add_task("queries", total=None)
        found = photos.evaluate(
            asked,
            limit=limit,
            rerank=rerank,
            report=report,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        emit(found.as_dict())
        return
    table = Table("searched by", "R@1", "R@5", "R@10", "MRR", "nDCG@10", "p50 ms", "p99 ms")
    for name, row in found.channels.items():
        shares = (f"{row.r1:.1f}", f"{row.r5:.1f}", f"{row.r10:.1f}", f"{row.mrr:.3f}", f"{row.ndcg10:.3f}")
        table.add_row(WAYS[name], *shares, f"{row.p50_ms:.0f}", f"{row.p99_ms:.0f}")
    out.print(table)
    out.print(f"{found.queries} queries over {found.photos} photos with {found.model}, in {found.seconds:.0f} s")


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            photo, tab, words = line.partition("\t")
            if not (tab and photo.strip() and words.strip()):
                raise PhotoblipError(f"line {number} of {file} is no photo, a tab, and a query: mend it")
            yield photo.strip(), words.strip()
