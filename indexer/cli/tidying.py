"""Commands that put a library in order: tag (by hand or by model), audit, duplicates."""

from typing import Annotated

import typer
from rich.markup import escape

from indexer.cli.common import AsJson, Library, bar, emit, err, open_library, out


def tag(
    name: Annotated[str | None, typer.Argument(help="The tag.")] = None,
    named: Annotated[list[str] | None, typer.Argument(help="Ids or paths.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Let the model tag photos it has not tagged.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Let the model tag all photos anew.")] = False,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --missing or --again: the least probability of a tag.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --missing or --again: tags a photo at most.")] = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Hang a tag on photos, or let the model choose tags from its list of everyday things."""
    if missing or again:
        if name or (missing and again):
            raise typer.BadParameter("give a tag and photos, or --missing, or --again")
        _tag_things(library, again, threshold, limit, as_json)
        return
    if not name or not named or threshold is not None or limit is not None:
        raise typer.BadParameter("give a tag and photos, or let the model choose with --missing")
    with open_library(library) as photos:
        count = photos.tag(named, name)
    if as_json:
        emit({"added": count})
    else:
        out.print(f"{count} tagged {escape(name)}", soft_wrap=True)


def _tag_things(library, again: bool, threshold: float | None, limit: int | None, as_json: bool) -> None:
    with open_library(library) as photos, bar("tagging") as move:
        ids = photos.present() if again else photos.untagged()
        report = photos.tag_things(ids, threshold=threshold, limit=limit, progress=move)
        rows = photos.catalog.photo_rows(report.tags)
    for photo_id, tags in report.tags.items():
        path = rows[photo_id]["path"]
        if as_json:
            found = [{"name": name, "probability": probability} for name, probability in tags]
            emit({"photo_id": photo_id, "path": path, "tags": found})
        elif tags:
            words = ", ".join(f"{escape(name)} {probability:.0%}" for name, probability in tags)
            out.print(f"{words}  [dim]{escape(str(path))}[/dim]", soft_wrap=True)
    if not as_json:
        tagged = sum(bool(tags) for tags in report.tags.values())
        err.print(f"{tagged} of {len(ids)} photos got tags")
    if report.failed:
        err.print(f"{len(report.failed)} photos could not be read: `photoblip verify` tells more")
    raise typer.Exit(1 if report.failed else 0)


def audit(
    named: Annotated[list[str] | None, typer.Argument(help="Ids or paths; else all that people wrote about.")] = None,
    below: Annotated[float | None, typer.Option(min=0, max=1, help="Match probability that is suspicious.")] = None,
    top: Annotated[int | None, typer.Option("--top", "-t", min=1, help="Show so many at most.")] = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Captions and tags of people that the matching model believes wrong, the most suspicious first."""
    with open_library(library) as photos, bar("auditing") as move:
        found = photos.audit(named or None, below=below, progress=move)
    for one in found[:top]:
        if as_json:
            emit(one.as_dict())
            continue
        better = f"  [green]rather: {escape(one.suggestion)}[/green]" if one.suggestion else ""
        out.print(
            f"{one.probability:5.1%}  {one.kind:7}  {escape(one.text)}{better}  [dim]{escape(str(one.path))}[/dim]",
            soft_wrap=True,
        )
    if not found and not as_json:
        err.print("nothing that people wrote is suspicious")


def duplicates(
    threshold: Annotated[
        float | None, typer.Option(min=0.5, max=1, help="How alike two pictures must be, 0.5 to 1.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Only copies, byte for byte.")] = False,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Photos that are there more than once, the best of each first. Nothing is deleted."""
    with open_library(library) as photos, bar("comparing") as move:
        groups = photos.duplicates(likeness=threshold, exact=exact, progress=move)
    for group in groups:
        if as_json:
            emit(group.as_dict())
        else:
            _print_group(group)
    if not as_json:
        spare = sum(group.spare_bytes for group in groups)
        err.print(f"{len(groups)} groups; all but the first of each take {spare / 1e6:,.1f} MB")


def _print_group(group) -> None:
    for rank, photo in enumerate(group.photos):
        for copy, path in enumerate(photo.paths):
            what = "best" if rank == copy == 0 else "copy" if copy else f"{photo.likeness:.0%}"
            size = f"{photo.width} x {photo.height}, {photo.bytes / 1e6:.2f} MB"
            out.print(f"{what:>5}  {escape(path)}  [dim]{size}[/dim]", soft_wrap=True)
    out.print()
