"""`photoblip evaluate`: retrieval, captioning, classification and VQA on captioned photos."""

from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from indexer.cli.common import AsJson, emit, err, out, read_lines

app = typer.Typer(help="Measure a model on captioned photos.", no_args_is_help=True)

Plot = Annotated[Path | None, typer.Option(help="Also draw the figures into this .png, .svg or .pdf file.")]
Captioned = Annotated[Path, typer.Option(help="A folder of captions.tsv and its splits, or COCO's or Karpathy's JSON.")]
Split = Annotated[str, typer.Option(help="SPLIT.tar, or the folder SPLIT; '' for data without splits.")]
Images = Annotated[Path | None, typer.Option(help="The photos' folder, where it is not the data's own.")]
Evaluated = Annotated[str, typer.Option(help="A known model or a model folder.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first of them.")]


@app.command("retrieval")
def evaluate_retrieval(
    data: Captioned,
    split: Split = "test",
    model: Evaluated = "blip-mini",
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that ITM reads; 0 for ITC alone.")] = 32,
    fusion: Annotated[
        Literal["model", "paper"], typer.Option(help="ITM and ITC as recorded with the model, or as BLIP's paper.")
    ] = "model",
    limit: Limit = None,
    images: Images = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Recall at 1, 5, 10 in both directions, for ITC and re-ranked by ITM. BLIP's: --fusion paper --rerank 256."""
    from blipcore import evaluation

    with _measuring(plot) as progress:
        rows = evaluation.retrieval(
            data,
            split,
            model,
            rerank=rerank,
            fusion=fusion,
            limit=limit,
            images=images,
            progress=progress,
            measured=_tell_first_stage,
        )
    _print_figures(rows, evaluation.report.retrieval_table(rows), as_json)
    if plot:
        evaluation.report.plot_retrieval(rows, plot)


def _tell_first_stage(row: dict) -> None:
    """What is known long before re-ranking ends."""
    from blipcore import evaluation

    if row["stage"] == "itc":
        err.print(evaluation.report.first_stage_line(row), soft_wrap=True)


@app.command("captioning")
def evaluate_captioning(
    data: Captioned,
    split: Split = "test",
    model: Evaluated = "blip-mini",
    beams: Annotated[int, typer.Option(min=1)] = 3,
    candidates: Annotated[int, typer.Option(min=1, help="Beams that ITM picks from; 1 is plain beam search.")] = 1,
    limit: Limit = None,
    images: Images = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """BLEU-4 and CIDEr of written captions against all references."""
    from blipcore import evaluation

    with _measuring(plot) as progress:
        row = evaluation.captioning(
            data, split, model, beams=beams, candidates=candidates, limit=limit, images=images, progress=progress
        )
    _print_figures([row], evaluation.report.captioning_table(row), as_json)
    if plot:
        evaluation.report.plot_captioning(row, plot)


@app.command("classification")
def evaluate_classification(
    data: Annotated[Path, typer.Option(help="A folder or a tar of <class>/<photo>.")],
    model: Evaluated = "blip-mini",
    prompt: Annotated[list[str] | None, typer.Option(help="A sentence with {} for the class; repeat it.")] = None,
    rerank: Annotated[int, typer.Option(min=0, help="Best classes that ITM reads, in the first prompt.")] = 0,
    limit_per_class: Annotated[int | None, typer.Option(min=1, help="Only the first photos of a class.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A class to leave out; repeat it.")] = None,
    names: Annotated[
        Path | None, typer.Option(help="Lines of a class's folder, a tab and its name, for those called otherwise.")
    ] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Zero-shot top-1 and top-5 over classes known by their folders' names, or by those of --names."""
    from blipcore import evaluation

    called = evaluation.read_names(names) if names else None
    with _measuring(plot) as progress:
        rows = evaluation.classification(
            data,
            model,
            prompts=prompt or (),
            rerank=rerank,
            limit_per_class=limit_per_class,
            exclude=exclude or (),
            names=called,
            progress=progress,
        )
    _print_figures(rows, evaluation.report.classification_table(rows), as_json)
    if plot:
        evaluation.report.plot_classification(rows, plot)


@app.command("vqa")
def evaluate_vqa(
    data: Annotated[Path, typer.Option(help='JSON lines {"image", "question", "answers"} beside their images.')],
    model: Evaluated = "blip-vqa-base",
    answers: Annotated[Path | None, typer.Option(help="Rank these, one a line, instead of writing freely.")] = None,
    limit: Limit = None,
    images: Images = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """VQA accuracy: an answer counts as far as people gave it too."""
    from blipcore import evaluation

    ranked = read_lines(answers) if answers else None
    with _measuring(plot) as progress:
        row = evaluation.vqa(data, model, answers=ranked, limit=limit, images=images, progress=progress)
    _print_figures([row], evaluation.report.vqa_table(row), as_json)
    if plot:
        evaluation.report.plot_vqa(row, plot)


@contextmanager
def _measuring(plot: Path | None):
    """Refuses an impossible plot before the work; yields the callback that moves a bar a stage on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from blipcore import evaluation

    if plot:
        evaluation.report.need_plots(plot)
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err.console, transient=True, disable=not err.is_terminal) as bars:
        tasks = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield move


def _print_figures(rows: list[dict], table: Table, as_json: bool) -> None:
    for row in rows if as_json else ():
        emit(row)
    if not as_json:
        out.print(table)
