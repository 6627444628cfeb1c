"""Commands that train and time: train, with `photoblip train finetune`, and bench."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from indexer.cli.common import AsJson, Library, emit, open_library, out

finetune_app = typer.Typer(add_completion=False)  # `photoblip train finetune`: train itself passes options through
PASS_OPTIONS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(
    context: typer.Context, recipe: Annotated[str, typer.Argument(help="finetune, pretrain_blip, ...")] = ""
) -> None:
    """Teach a model your library (`finetune`), or run a training recipe; `photoblip train RECIPE --help` says how."""
    from blipcore.training import recipe_names, run_recipe

    if recipe == "finetune":
        raise typer.Exit(finetune_app(context.args, prog_name="photoblip train finetune", standalone_mode=False) or 0)
    if recipe not in recipe_names():
        raise typer.BadParameter(f"recipes are finetune (your own library), {', '.join(recipe_names())}")
    run_recipe(recipe, context.args)


@finetune_app.command()
def finetune(
    library: Library = None,
    name: Annotated[str | None, typer.Option(help="The new model's; own, own-2, ... by default.")] = None,
    model: Annotated[str | None, typer.Option(help="What to begin with; the active model by default.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often each photo is seen.")] = 5,
    minutes: Annotated[float, typer.Option(min=0, help="About so long, where the epochs take longer.")] = 0,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the photos that only measures.")] = 0.1,
    rate: Annotated[float, typer.Option(min=0, help="Of learning; 1e-5 suits the larger blip-base.")] = 3e-5,
    batch_size: Annotated[int, typer.Option(min=2, help="Photos a step.")] = 32,
    generated: Annotated[bool, typer.Option("--generated", help="Learn from sure generated captions too.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Decoding processes; 0 for none.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on your own captions. It becomes a new model beside the others; search stays as it is.

    Recall is measured on held-out photos before and after. Stop it whenever you like: the same command goes on.
    `photoblip reindex --model NAME` adopts the new model.
    """
    from blipcore.training import finetune as recipe

    with open_library(library) as photos:
        report = photos.finetune(
            recipe,
            name=name,
            model=model,
            generated=generated,
            epochs=epochs,
            minutes=minutes,
            held_out=held_out,
            rate=rate,
            batch_size=batch_size,
            workers=jobs,
        )
    if as_json:
        emit({"event": "done", **report.as_dict()})
        return
    table = Table("held out", "photo R@1", "R@5", "R@10", "words R@1", "R@5", "R@10")
    for when, recall in (("before", report.before), ("after", report.after)):
        table.add_row(when, *(f"{value:.1f}" for way in ("t2i", "i2t") for value in recall[way].values()))
    out.print(table)
    out.print(escape(report.verdict()), soft_wrap=True)
    if report.helped:
        out.print(f"search with it: photoblip reindex --model {report.name}", soft_wrap=True)


def bench(library: Library = None, rounds: Annotated[int, typer.Option(min=1)] = 5, as_json: AsJson = False) -> None:
    """Time this library's stages: embed a photo, embed a query, search the vectors, re-rank 100."""
    from indexer.bench import time_stages

    with open_library(library) as photos:
        rows = time_stages(photos, rounds)
    table = Table("stage", "median ms", "best ms")
    for row in rows:
        if as_json:
            emit(row)
        table.add_row(row["stage"], f"{row['median_ms']:.1f}", f"{row['best_ms']:.1f}")
    if not as_json:
        out.print(table)
