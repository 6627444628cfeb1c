"""Commands for the user's own order: album, tag, untag, tags, favourite, rate, title, saved."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from indexer.cli.common import AsJson, Library, Verbose, answered, emit, err, open_library, out

Photos = Annotated[list[str], typer.Argument(help="Ids or paths.")]
AlbumName = Annotated[str, typer.Argument(help="The album's name.")]
SearchName = Annotated[str, typer.Argument(help="The saved search's name.")]

album = typer.Typer(no_args_is_help=True, help="Albums: photos that you put together.")
saved = typer.Typer(no_args_is_help=True, help="Saved searches: a search under a name.")


# -- albums -------------------------------------------------------------------------------------------------


@album.command("list")
def list_albums(library: Library = None, as_json: AsJson = False) -> None:
    """All albums and how many photos each holds."""
    with open_library(library) as photos:
        rows = photos.albums()
    table = Table("album", "photos", "missing", "since")
    for row in rows:
        if as_json:
            emit(row)
        since = f"{row['created_at']:%Y-%m-%d}"
        table.add_row(escape(row["name"]), str(row["photos"]), str(row["missing"] or ""), since)
    _show(table, as_json, "there is no album: `photoblip album create NAME` makes one")


@album.command("show")
def show_album(name: AlbumName, library: Library = None, as_json: AsJson = False) -> None:
    """The photos of an album that are on disk."""
    with open_library(library) as photos:
        ids = photos.album(name)
        rows = photos.catalog.photo_rows(ids)
    for photo_id in ids:
        row = {key: rows[photo_id][key] for key in ("path", "title", "caption", "taken_at")}
        if as_json:
            emit({"photo_id": photo_id} | row)
        else:
            words = row["title"] or row["caption"]
            out.print(f"{photo_id:>7}  {escape(row['path'])}{_dim(words)}", soft_wrap=True)


@album.command("create")
def create_album(name: AlbumName, library: Library = None) -> None:
    """Make an album."""
    with open_library(library) as photos:
        photos.create_album(name)


@album.command("add")
def add_to_album(name: AlbumName, named: Photos, library: Library = None, as_json: AsJson = False) -> None:
    """Put photos into an album. They stay where they are."""
    with open_library(library) as photos:
        count = photos.add_to_album(name, named)
    _counted(count, "added", f"into {name}", as_json)


@album.command("remove")
def remove_from_album(name: AlbumName, named: Photos, library: Library = None, as_json: AsJson = False) -> None:
    """Take photos out of an album. They stay in the library."""
    with open_library(library) as photos:
        count = photos.remove_from_album(name, named)
    _counted(count, "removed", f"from {name}", as_json)


@album.command("rename")
def rename_album(
    name: AlbumName, new_name: Annotated[str, typer.Argument(help="Its new name.")], library: Library = None
) -> None:
    """Give an album another name."""
    with open_library(library) as photos:
        photos.rename_album(name, new_name)


@album.command("delete")
def delete_album(name: AlbumName, library: Library = None, as_json: AsJson = False) -> None:
    """Take an album apart. Its photos stay in the library."""
    with open_library(library) as photos:
        count = photos.delete_album(name)
    _counted(count, "removed", f"with the album {name}", as_json)


# -- tags, favourites, ratings, titles ------------------------------------------------------------------------


def untag(
    name: Annotated[str, typer.Argument(help="The tag.")],
    named: Photos,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Take a tag off photos, whoever gave it."""
    with open_library(library) as photos:
        count = photos.untag(named, name)
    _counted(count, "removed", f"from {name}", as_json)


def tags(library: Library = None, as_json: AsJson = False) -> None:
    """All tags and how many photos have each: of yours, of the files' own keywords, of a model's."""
    with open_library(library) as photos:
        rows = photos.tags()
    table = Table("tag", "photos", "yours", "files'", "generated")
    for row in rows:
        if as_json:
            emit(row)
        table.add_row(escape(row["name"]), *(str(row[key] or "") for key in ("photos", "user", "file", "generated")))
    _show(table, as_json, "no photo has a tag: `photoblip tag NAME PHOTO...` gives one")


def favourite(
    named: Photos,
    off: Annotated[bool, typer.Option("--off", help="No favourites any more.")] = False,
    library: Library = None,
) -> None:
    """Mark photos as favourites."""
    with open_library(library) as photos:
        photos.set_favourite(named, not off)


def rate(
    stars: Annotated[int, typer.Argument(min=0, max=5, help="0 to 5.")],
    named: Photos,
    library: Library = None,
) -> None:
    """Give photos 0 to 5 stars."""
    with open_library(library) as photos:
        photos.rate(named, stars)


def title(
    words: Annotated[str, typer.Argument(help='The title; "" takes it away.')],
    named: Photos,
    library: Library = None,
) -> None:
    """Give photos a title."""
    with open_library(library) as photos:
        photos.set_title(named, words)


# -- saved searches -----------------------------------------------------------------------------------------


@saved.command("list")
def list_saved(library: Library = None, as_json: AsJson = False) -> None:
    """All saved searches."""
    with open_library(library) as photos:
        rows = photos.saved_searches()
    table = Table("name", "search")
    for row in rows:
        if as_json:
            emit(row)
        said = ", ".join(f"{key}={value!r}" for key, value in row["query"].items())
        table.add_row(escape(row["name"]), escape(said))
    _show(table, as_json, "there is no saved search: `photoblip saved add NAME QUERY` keeps one")


@saved.command("add")
def add_saved(
    name: SearchName,
    query: Annotated[str | None, typer.Argument(help="What the photos show.")] = None,
    image: Annotated[Path | None, typer.Option(help="An example photo.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Something the photos must not show.")] = None,
    where: Annotated[str | None, typer.Option(help="A filter: year=2023 camera=Pixel*")] = None,
    top: Annotated[int | None, typer.Option("--top", "-t", min=1)] = None,
    min_probability: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    replace: Annotated[bool, typer.Option("--replace", help="In place of the one of that name.")] = False,
    library: Library = None,
) -> None:
    """Keep a search under a name."""
    options = {
        "text": query,
        "image": None if image is None else str(image.expanduser().absolute()),
        "without": without or None,
        "where": where,
        "top_k": top,
        "min_probability": min_probability,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        raise typer.BadParameter("there is nothing to keep: give words, --image or a filter")
    with open_library(library) as photos:
        photos.save_search(name, given, replace=replace)


@saved.command("run")
def run_saved(name: SearchName, library: Library = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """What a saved search finds now."""
    from indexer.cli.search import print_hits

    with open_library(library) as photos:
        query = photos.saved_search(name)
    print_hits(answered(library, "search", query, verbose), as_json)


@saved.command("delete")
def delete_saved(name: SearchName, library: Library = None) -> None:
    """Forget a saved search."""
    with open_library(library) as photos:
        photos.delete_saved_search(name)


# -- printing -----------------------------------------------------------------------------------------------


def _counted(count: int, what: str, where: str, as_json: bool) -> None:
    if as_json:
        emit({what: count})
    else:
        out.print(f"{count} {what} {escape(where)}", soft_wrap=True)


def _show(table: Table, as_json: bool, nothing: str) -> None:
    if as_json:
        return
    if table.row_count:
        out.print(table)
    else:
        err.print(escape(nothing))


def _dim(words: str | None) -> str:
    return f"  [dim]{escape(words)}[/dim]" if words else ""
