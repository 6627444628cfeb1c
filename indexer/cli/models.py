"""`photoblip models`: list, download, info; use, compare and remove what a library holds."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from indexer.cli.common import AsJson, Library, emit, err, open_library, out

app = typer.Typer(help="The models: list, download, info, use, compare, remove.", invoke_without_command=True)


@app.callback()
def models(context: typer.Context, library: Library = None) -> None:
    """List the models when no other command is given."""
    if context.invoked_subcommand is None:
        models_list(library)


@app.command("list")
def models_list(library: Library = None, as_json: AsJson = False) -> None:
    """The models that photoblip knows, and the library's own; which are on this machine, and what this library holds.

    `photos` is how many of the library's photos have vectors of a model, `active` which one search uses.
    """
    rows = _known_rows() + _own_rows(_own_models(library))
    held = {each.name: each for each in _held(library)}
    rows += [{"name": name, "here": True, "bundled": False} for name in held if name not in {r["name"] for r in rows}]
    table = Table("name", "here", "photos", "GB", "licence", "what it does")
    for row in rows:
        mine = held.get(row["name"])
        row |= {"photos": mine.photos if mine else None, "active": bool(mine and mine.active)}
        if as_json:
            emit(row)
        here, size = "yes" if row["here"] else "no", f"{row['gigabytes']:g}" if "gigabytes" in row else ""
        table.add_row(
            escape(row["name"]), here, _coverage(mine), size, row.get("licence", ""), escape(row.get("what", ""))
        )
    if not as_json:
        out.print(table)


def _coverage(held) -> str:
    if held is None:
        return ""
    return f"{held.photos}{f' of {held.photos + held.missing}' if held.missing else ''}{', active' * held.active}"


def _known_rows() -> list[dict]:
    from blipcore.hub import KNOWN_MODELS, OPEN_CLIP_MODELS, is_downloaded

    return [
        {
            "name": known.name, "here": is_downloaded(known), "bundled": known.bundled, "gigabytes": known.gigabytes,
            "licence": known.licence, "what": known.what,
        } for known in (KNOWN_MODELS | OPEN_CLIP_MODELS).values()
    ]  # fmt: skip


def _own_rows(folder: Path) -> list[dict]:
    from blipcore.hub import KNOWN_MODELS, own_models

    rows = []
    for name, made in own_models(folder).items():
        size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        what = f"this library's, from {made['base']}: {made['verdict']}" if made else "this library's"
        row = {"name": name, "here": True, "bundled": False, "gigabytes": round(size / 1e9, 2)}
        licence = KNOWN_MODELS[made["base"]].licence if made.get("base") in KNOWN_MODELS else "as its base"
        rows.append(row | {"licence": licence, "what": what} | made)
    return rows


def _held(library: Path | None) -> list:
    """What the library holds, where there is one."""
    from indexer.config import LibraryPaths, default_library

    if not LibraryPaths((library or default_library()).expanduser().absolute()).catalog.exists():
        return []
    with open_library(library) as photos:
        return photos.models()


def _own_models(library: Path | None) -> Path:
    from indexer.config import LibraryPaths, default_library

    return LibraryPaths((library or default_library()).expanduser().absolute()).models


@app.command("download")
def models_download(
    name: str,
    source: Annotated[Path | None, typer.Option("--from", help="A local mirror: DIR/<owner>/<repository>/.")] = None,
) -> None:
    """Bring a model from the hub to this machine."""
    from blipcore.hub import KNOWN_MODELS, OPEN_CLIP_MODELS, download, open_clip_source
    from blipcore.open_clip_names import PREFIX

    if known := KNOWN_MODELS.get(name) or OPEN_CLIP_MODELS.get(name):
        err.print(f"{known.name}: about {known.gigabytes} GB, licence {known.licence}")
    elif name.startswith(PREFIX):
        err.print(
            f"{name}: its size and licence stand on the hub's page of {open_clip_source(name)[1]}", soft_wrap=True
        )
    out.print(str(download(name, source)), soft_wrap=True)


@app.command("use")
def models_use(name: str, library: Library = None) -> None:
    """Search with another model from now on: one of which every photo has vectors (see `photoblip reindex`)."""
    with open_library(library) as photos:
        photos.use_model(name)
    err.print(f"search now uses {escape(name)}", soft_wrap=True)


@app.command("remove")
def models_remove(name: str, library: Library = None) -> None:
    """Drop a model's vectors from the library. The model itself stays; `photoblip reindex` brings the vectors back."""
    with open_library(library) as photos:
        count = photos.remove_model(name)
    err.print(f"the vectors of {count} photos are gone", soft_wrap=True)


@app.command("compare")
def models_compare(
    first: str,
    second: str,
    queries: Annotated[Path, typer.Option(help="One query a line; where it is known, a tab and the photo it means.")],
    top: Annotated[int, typer.Option("--top", "-t", min=1, help="Results that are compared.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that the matching model reads; 0 for none.")] = 100,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Ask two models the same queries: how much their results overlap, and which finds the photos that are meant.

    Both need vectors of every photo: `photoblip reindex --model NAME --no-switch` makes them beside the active ones.
    """
    with open_library(library) as photos:
        found = photos.compare_models(first, second, queries, k=top, rerank=rerank)
    summary = found.summary()
    if as_json:
        for row in (*(row.as_dict() for row in found.rows), {"event": "done", **summary}):
            emit(row)
        return
    table = Table("query", "overlap", "rank-biased", f"rank by {first}", f"by {second}")
    for row in found.rows:
        ranks = ("" if row.photo_id is None else str(rank or "-") for rank in row.ranks)
        table.add_row(escape(row.query), f"{row.overlap:.0%}", f"{row.rbo:.2f}", *ranks)
    out.print(table)
    out.print(f"overlap at {summary['k']}: {summary['overlap']:.0%}, rank-biased overlap {summary['rbo']:.2f}")
    for name, recall in zip(found.models, summary["recall"], strict=True):
        if recall:
            shown = ", ".join(f"R@{key[1:]} {value:.1f}" for key, value in recall.items())
            out.print(f"{escape(name)}: {shown} over {summary['with_photo']} queries", soft_wrap=True)


@app.command("info")
def models_info(name: str, library: Library = None, as_json: AsJson = False) -> None:
    """A model's parameters, scoring and abilities; of a library's own also its data and figures.

    Of a system that can be trained (llava-1.5, blip2-opt, ...): its parts, and what each stage trains.
    """
    from blipcore.hub import KNOWN_MODELS, own_models, own_name
    from blipcore.open_clip_names import PREFIX

    models = _own_models(library)
    own = own_name(name, models)
    if not (own or name in KNOWN_MODELS or name.startswith(PREFIX) or Path(name).is_dir()):
        from blipcore.training import describe_system

        if system := describe_system(name):
            return emit(system) if as_json else _print_system(system)
    from blipcore.encoder import load_encoder

    info = load_encoder(str(models / own) if own else name).info()
    if own:
        info |= {"folder": models / own} | own_models(models)[own] | {"name": own}
    if as_json:
        emit(info)
    else:
        for key, value in info.items():
            out.print(f"{key:>14}  {escape(str(value))}", soft_wrap=True)
    return None


def _print_system(info: dict) -> None:
    """A system's parts, and a table of its stages."""

    def parts(counts: dict[str, int], between: str = "\n") -> str:
        return between.join(f"{part} {count / 1e6:,.1f}M" for part, count in counts.items() if count) or "none"

    held = parts(info["parameters"], ", ")
    out.print(f"{info['system']}: {held}; starts from {escape(info['start'])}", soft_wrap=True)
    table = Table("stage", "trained", "frozen", "rate", "batch", "template")
    for row in info["stages"]:
        trained = parts(row["trained"]) + " in adapters" * row["adapters"]
        rate = f"{row['rate']:g} to {row['min_rate']:g}"
        table.add_row(row["stage"], trained, parts(row["frozen"]), rate, str(row["batch"]), row["template"])
    out.print(table)
