"""The `photoblip` command: each command parses, makes one library call, and prints.

Results go to stdout, as text or (`--json`) one JSON object a line; progress and warnings go to stderr.
Exit 0 done, 1 the job failed or some input could not be used, 2 wrong usage.
"""

import json
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from indexer.errors import ModelError, PhotoblipError

app = typer.Typer(
    name="photoblip",
    help="Find any photo you own by describing it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models: list, download, info.", invoke_without_command=True)
app.add_typer(models_app, name="models")
finetune_app = typer.Typer(add_completion=False)  # `photoblip train finetune`: train itself passes options through
evaluate_app = typer.Typer(help="Measure a model on captioned photos.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Library = Annotated[Path | None, typer.Option("--library", envvar="PHOTOBLIP_LIBRARY", help="The library's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
ModelName = Annotated[str | None, typer.Option("--model", help="A known model or a model folder.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say why a warm process did not answer.")]


class _Stopped(BaseException):
    """Ctrl-C or a polite kill. Not a KeyboardInterrupt, which Typer turns into an exit status of its own."""


def main() -> None:
    """The entry point: errors a user can meet become one sentence and an exit status."""
    _quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except (PhotoblipError, ModelError) as error:
        err.print(f"[red]photoblip:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except _Stopped:
        err.print("stopped; what is done is kept, and the same command goes on from here")
        sys.exit(1)


def _stop(_number, _frame) -> None:
    raise _Stopped


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _open(folder: Path | None, *, create: bool = False, model: str | None = None):
    from indexer.library import PhotoLibrary

    return PhotoLibrary.open(folder, create=create, model=model)


def _emit(row: dict) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


@contextmanager
def _bar(label: str):
    """A progress bar on stderr with rate and time left; yields the callback that moves it."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=not err.is_terminal) as bar:
        task = bar.add_task(f"{label}: starting", total=None, rate="")

        def move(step) -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:.0f}/s" if speed else ""
            failed = f" [yellow]{step.failed} failed[/yellow]" if step.failed else ""
            bar.update(task, completed=step.done, total=step.total, rate=rate, description=label + failed)

        yield move


# -- the library --------------------------------------------------------------------------------------------


@app.command()
def index(
    folders: Annotated[list[Path], typer.Argument(help="Folders to add or refresh.")],
    library: Library = None,
    model: Annotated[str | None, typer.Option(help="What a new library is indexed with.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Decoding processes.")] = os.cpu_count() or 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos a batch.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Add folders to the library, or refresh them. Stop it whenever you like: it goes on where it stopped."""
    with _open(library, create=True, model=model) as photos, _bar("indexing") as move:
        _refuse_model_change(photos, model)
        report = photos.index(*folders, progress=move, workers=jobs, batch_size=batch_size)
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    counts = report.as_dict()
    counts.pop("warnings")
    if as_json:
        _emit({"event": "done", **counts})
    else:
        read = report.added + report.updated + report.moved
        rate = f" ({read / report.seconds:.1f} photos/s)" if read and report.seconds else ""
        done = ", ".join(f"{value} {name}" for name, value in counts.items() if name != "seconds")
        out.print(f"{done} in {report.seconds:.1f} s{rate}", soft_wrap=True)
        if report.failed:
            err.print("some files could not be used: `photoblip errors` says which and why")
    raise typer.Exit(1 if report.failed or report.warnings else 0)


def _refuse_model_change(photos, model: str | None) -> None:
    active = photos.catalog.active_model()
    if model and active and active.name != photos.model_name(model):
        raise PhotoblipError(
            f"this library uses {active.name}: `photoblip reindex --model {model}` changes that, "
            "and search goes on meanwhile"
        )


@app.command()
def status(library: Library = None, as_json: AsJson = False) -> None:
    """What the library holds."""
    with _open(library) as photos:
        values = photos.status()
    if as_json:
        _emit(values)
        return
    job = values.pop("job")
    for name, value in values.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        shown = f"{value / 1e6:,.1f} MB" if name == "bytes" else shown
        out.print(f"{name:>12}  {escape(str(shown))}", soft_wrap=True)
    if job and job["state"] in {"running", "interrupted", "failed"}:
        err.print(f"the last {job['kind']} job is {job['state']} at {job['done']} of {job['total'] or '?'}")


@app.command()
def errors(library: Library = None, as_json: AsJson = False) -> None:
    """Files that could not be used, and why."""
    with _open(library) as photos:
        rows = photos.errors()
    for row in rows:
        if as_json:
            _emit(row)
        else:
            out.print(f"[yellow]{row['reason']:>14}[/yellow]  {escape(row['path'])}", soft_wrap=True)
            out.print(f"{'':>14}  {escape(row['detail'])}", soft_wrap=True)
    if not rows and not as_json:
        err.print("every file could be used")


@app.command()
def verify(library: Library = None, as_json: AsJson = False) -> None:
    """Check catalog, index and thumbnails against each other."""
    with _open(library) as photos:
        problems = photos.verify()
    if as_json:
        _emit({"problems": problems})
    for problem in problems if not as_json else ():
        out.print(escape(problem), soft_wrap=True)
    if not problems and not as_json:
        out.print("the library is sound")
    raise typer.Exit(1 if problems else 0)


@app.command()
def reindex(
    model: Annotated[str, typer.Option(help="A known model, one of the library's own, or a model folder.")],
    library: Library = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0)] = os.cpu_count() or 2,
    as_json: AsJson = False,
) -> None:
    """Embed all photos with another model beside the active one, then switch to it.

    Search goes on with the active model until then. The old vectors stay: going back, as with `--model blip-mini`,
    embeds only photos that came since, and is done at once where there are none.
    """
    with _open(library) as photos, _bar("reindexing") as move:
        count, failed = photos.reindex(model, progress=move, workers=jobs)
    if as_json:
        _emit({"event": "done", "model": model, "photos": count, "failed": failed})
    else:
        out.print(f"{count} photos are now searched with {escape(model)}")
    if failed:
        err.print(f"{failed} photos could not be read: `photoblip verify` and `photoblip index` tell more")
    raise typer.Exit(1 if failed else 0)


# -- search -------------------------------------------------------------------------------------------------


@app.command()
def search(
    query: Annotated[str | None, typer.Argument(help="What the photo shows.")] = None,
    image: Annotated[str | None, typer.Option(help="An example photo.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Something the photo must not show.")] = None,
    where: Annotated[str | None, typer.Option(help="A filter: year=2023 camera=Pixel*")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 20,
    rerank: Annotated[int, typer.Option(min=0, help="Candidates that the matching model reads.")] = 100,
    no_rerank: Annotated[bool, typer.Option("--no-rerank", help="First stage only.")] = False,
    budget_ms: Annotated[float | None, typer.Option(min=0, help="Time for re-ranking.")] = None,
    min_probability: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    ask: Annotated[str | None, typer.Option(help="A question that each result is asked.")] = None,
    answer: Annotated[str | None, typer.Option(help="Keep these answers: >2, 2..5, yes, red|blue, !red")] = None,
    ask_model: Annotated[str | None, typer.Option(help="The model that answers: a known one or a folder.")] = None,
    library: Library = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Find photos by words, by an example photo, or by both; ask a question of those found."""
    if not (query and query.strip()) and image is None:
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
        "ask": ask,
        "answer": answer,
        "ask_model": ask_model,
    }
    _print_hits(_answer(library, "search", options, verbose), as_json)


def _answer(library: Path | None, command: str, options: dict, verbose: bool) -> dict:
    """The command's answer as JSON values, from the warm process where it runs (see `indexer.serve`)."""
    from indexer import serve

    def note(why: str) -> None:
        if verbose:
            err.print(escape(why), soft_wrap=True)

    return serve.answer(library, command, options, note)


@app.command()
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
    _print_hits(_answer(library, "similar", options, verbose), as_json)


def _print_hits(hits: dict, as_json: bool) -> None:
    if as_json:
        for row in hits["rows"]:
            _emit(row)
        return
    width = min(30, max((len(row["answer"] or "-") for row in hits["rows"] if "answer" in row), default=0))
    for row in hits["rows"]:
        caption = f"  [dim]{escape(row['caption'])}[/dim]" if row["caption"] else ""
        answer = f"  [bold]{escape((row['answer'] or '-').ljust(width))}[/bold]" if width else ""
        out.print(f"{_scores(row)}{answer}  {escape(row['path'])}{caption}", soft_wrap=True)
    if not hits["rows"]:
        err.print("no photo matches")
    elif hits["reranked"]:
        err.print(f"{hits['reranked']} candidates re-ranked in {hits['seconds']:.2f} s")


def _scores(row: dict) -> str:
    sure = "" if row["probability"] is None else f"{row['probability']:5.0%}"
    return f"[bold]{row['rank']:>3}[/bold]  {sure:>5}  {row['itc']:6.3f}"


@app.command()
def describe(
    image: Annotated[str, typer.Argument(help="A photo file.")],
    top: Annotated[int, typer.Option("--top", "-t", min=1)] = 5,
    candidates: Annotated[Path | None, typer.Option(help="A file with one text a line.")] = None,
    library: Library = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The texts that fit a photo best: of the library's captions, or of given lines."""
    lines = _read_lines(candidates) if candidates else None
    options = {"image": image, "candidates": lines, "top_k": top}
    for row in _answer(library, "describe", options, verbose)["rows"]:
        if as_json:
            _emit(row)
        else:
            out.print(f"{_scores(row)}  {escape(row['text'])}", soft_wrap=True)


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PhotoblipError(f"{file} cannot be read as lines of UTF-8 text ({error}): check the file") from error


@app.command()
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
    with _open(library) as opened, _bar("captioning") as move:
        named = dict.fromkeys(opened.photo_id(photo) for photo in photos or ())
        ids = opened.uncaptioned() if missing else list(named)
        written = opened.caption(ids, model=model, progress=move) if ids else {}
        rows = opened.catalog.photo_rows(written)
    for photo_id, (words, score) in written.items():
        row = {"photo_id": photo_id, "path": rows[photo_id]["path"], "caption": words, "score": score}
        if as_json:
            _emit(row)
        else:
            sure = "" if score is None else f"{score:5.0%}"
            out.print(f"{sure:>5}  {escape(words)}  [dim]{escape(str(row['path']))}[/dim]", soft_wrap=True)
    raise typer.Exit(0 if len(written) == len(ids) else 1)


@app.command()
def ask(
    photo: Annotated[str, typer.Argument(help="A photo's id or path; with --over, the question.")],
    question: Annotated[str | None, typer.Argument()] = None,
    over: Annotated[str | None, typer.Option(help="Ask the photos that a search for these words finds.")] = None,
    top: Annotated[int, typer.Option("--top", "-t", min=1, help="With --over, how many photos.")] = 20,
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
    if over is None:
        lines = _read_lines(answers) if answers else None
        options = {"photo": photo, "question": question, "answers": lines, "model": model, "cached": not fresh}
        _print_answer(question, _answer(library, "ask", options, verbose), as_json)
        return
    if answers:
        raise typer.BadParameter("--answers is for one photo")
    options = {"question": photo, "over": over, "top_k": top, "where": where, "model": model, "cached": not fresh}
    _print_groups(_answer(library, "ask_results", options, verbose)["rows"], as_json)


def _print_answer(question: str, found: dict, as_json: bool) -> None:
    if as_json:
        _emit({"photo_id": found["photo_id"], "question": question, "answer": found["answer"]})
    else:
        out.print(escape(found["answer"]))


def _print_groups(groups: list[dict], as_json: bool) -> None:
    table = Table("answer", "photos", "weight", "rests on")
    for row in groups:
        if as_json:
            _emit(row)
        paths = "\n".join(escape(photo["path"]) for photo in row["photos"])
        table.add_row(escape(row["answer"]), str(row["count"]), f"{row['weight']:.0%}", paths)
    if not groups and not as_json:
        err.print("no photo matches")
    elif not as_json:
        table.columns[-1].overflow = "fold"
        out.print(table)


@app.command()
def chat(
    photos: Annotated[list[str], typer.Argument(help="Ids or paths.")],
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Talk about photos: each line that you type is answered as it is written. Ctrl-D ends it."""
    turns = []
    with _open(library) as opened, suppress(_Stopped):
        ids = [opened.photo_id(photo) for photo in photos]
        opened.encoder_that("chat", model)  # before anything is typed
        for line in _typed_lines():
            turns.append({"role": "user", "content": line})
            said = "".join(_shown(opened.chat(ids, turns, model=model), not as_json))
            turns.append({"role": "assistant", "content": said.strip()})
            if as_json:
                _emit({"photo_ids": ids, "question": line, "answer": said.strip()})


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


@app.command()
def ground(
    photo: Annotated[str, typer.Argument(help="A photo's id or path.")],
    phrase: Annotated[str, typer.Argument(help="What to point at.")],
    file: Annotated[Path | None, typer.Option("--out", help="Also draw the boxes into this image file.")] = None,
    model: ModelName = None,
    library: Library = None,
    as_json: AsJson = False,
) -> None:
    """Where a photo shows something: boxes as left, top, right, bottom, in parts of its width and height."""
    with _open(library) as opened:
        if file and any(opened.catalog.find_photo(str(path)) is not None for path in (file, file.resolve())):
            raise PhotoblipError(f"{file} is a photo of the library, which is never written: choose another --out")
        photo_id = opened.photo_id(photo)
        boxes = opened.ground(photo_id, phrase, model=model)
        if file:
            _save(opened.draw_boxes(photo_id, boxes), file)
    for box in boxes:
        if as_json:
            corners = {"x0": box.x0, "y0": box.y0, "x1": box.x1, "y1": box.y1}
            _emit({"photo_id": photo_id, "label": box.label} | corners)
        else:
            out.print(f"{box.x0:.3f} {box.y0:.3f} {box.x1:.3f} {box.y1:.3f}  {escape(box.label)}", soft_wrap=True)
    if not boxes and not as_json:
        err.print("the model points at nothing")


def _save(image, file: Path) -> None:
    try:
        image.save(file)
    except (OSError, ValueError) as error:
        raise PhotoblipError(f"{file} cannot be written ({error}): name a .png or .jpg file in a folder") from error


@app.command()
def serve(
    library: Library = None,
    idle_minutes: Annotated[float, typer.Option(min=0.01, help="Ends when nobody has asked for so long.")] = 30,
    stop: Annotated[bool, typer.Option("--stop", help="End the one that runs.")] = False,
    show: Annotated[bool, typer.Option("--status", help="Say what the one that runs holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep models loaded in this process: search, similar, describe and ask of the same user then answer at once."""
    from indexer.config import default_library
    from indexer.serve import Unanswered, WarmProcess, ask_server, stop_server

    if stop or show:
        try:
            values = stop_server() if stop else ask_server("status")
        except Unanswered as why:
            err.print(escape(str(why)), soft_wrap=True)
            raise typer.Exit(0 if stop else 1) from None
        _print_values(values, as_json)
        return
    process = WarmProcess(idle_seconds=60 * idle_minutes)
    process.warm((library or default_library()).expanduser().absolute())
    err.print(f"serving until Ctrl-C, `photoblip serve --stop`, or {idle_minutes:g} minutes without a question")
    with suppress(_Stopped):
        process.run()


def _print_values(values: dict, as_json: bool) -> None:
    if as_json:
        _emit(values)
        return
    for name, value in values.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        out.print(f"{name:>15}  {escape(str(shown))}", soft_wrap=True)


# -- models -------------------------------------------------------------------------------------------------


@models_app.callback()
def models(context: typer.Context, library: Library = None) -> None:
    """List the models when no other command is given."""
    if context.invoked_subcommand is None:
        models_list(library)


@models_app.command("list")
def models_list(library: Library = None, as_json: AsJson = False) -> None:
    """The models that photoblip knows, which are on this machine, and the library's own with their figures."""
    from blipcore.hub import KNOWN_MODELS, is_downloaded, own_models

    rows = [
        {
            "name": known.name, "here": is_downloaded(known), "bundled": known.bundled, "gigabytes": known.gigabytes,
            "licence": known.licence, "what": known.what,
        } for known in KNOWN_MODELS.values()
    ]  # fmt: skip
    folder = _own_models(library)
    for name, made in own_models(folder).items():
        size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        what = f"this library's, from {made['base']}: {made['verdict']}" if made else "this library's"
        row = {"name": name, "here": True, "bundled": False, "gigabytes": round(size / 1e9, 2)}
        licence = KNOWN_MODELS[made["base"]].licence if made.get("base") in KNOWN_MODELS else "as its base"
        rows.append(row | {"licence": licence, "what": what} | made)
    table = Table("name", "here", "GB", "licence", "what it does")
    for row in rows:
        if as_json:
            _emit(row)
        here = "yes" if row["here"] else "no"
        table.add_row(row["name"], here, f"{row['gigabytes']:g}", row["licence"], escape(row["what"]))
    if not as_json:
        out.print(table)


def _own_models(library: Path | None) -> Path:
    from indexer.config import LibraryPaths, default_library

    return LibraryPaths((library or default_library()).expanduser().absolute()).models


@models_app.command("download")
def models_download(
    name: str,
    source: Annotated[Path | None, typer.Option("--from", help="A local mirror: DIR/<owner>/<repository>/.")] = None,
) -> None:
    """Bring a model from the hub to this machine."""
    from blipcore.hub import KNOWN_MODELS, download

    if known := KNOWN_MODELS.get(name):
        err.print(f"{known.name}: about {known.gigabytes} GB, licence {known.licence}")
    out.print(str(download(name, source)), soft_wrap=True)


@models_app.command("info")
def models_info(name: str, library: Library = None, as_json: AsJson = False) -> None:
    """A model's parameters, scoring and abilities; of a library's own also its data and figures.

    Of a system that can be trained (llava-1.5, blip2-opt, ...): its parts, and what each stage trains.
    """
    from blipcore.hub import KNOWN_MODELS, own_models, own_name

    models = _own_models(library)
    own = own_name(name, models)
    if not (own or name in KNOWN_MODELS or Path(name).is_dir()):
        from blipcore.training import describe_system

        if system := describe_system(name):
            return _emit(system) if as_json else _print_system(system)
    from blipcore.encoder import load_encoder

    info = load_encoder(str(models / own) if own else name).info()
    if own:
        info |= {"folder": models / own} | own_models(models)[own] | {"name": own}
    if as_json:
        _emit(info)
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


# -- train, evaluate, bench ---------------------------------------------------------------------------------


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
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

    with _open(library) as photos:
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
        _emit({"event": "done", **report.as_dict()})
        return
    table = Table("held out", "photo R@1", "R@5", "R@10", "words R@1", "R@5", "R@10")
    for when, recall in (("before", report.before), ("after", report.after)):
        table.add_row(when, *(f"{value:.1f}" for way in ("t2i", "i2t") for value in recall[way].values()))
    out.print(table)
    out.print(escape(report.verdict()), soft_wrap=True)
    if report.helped:
        out.print(f"search with it: photoblip reindex --model {report.name}", soft_wrap=True)


Plot = Annotated[Path | None, typer.Option(help="Also draw the figures into this .png, .svg or .pdf file.")]
Captioned = Annotated[Path, typer.Option(help="A folder of captions.tsv and its splits, or COCO's or Karpathy's JSON.")]
Split = Annotated[str, typer.Option(help="SPLIT.tar, or the folder SPLIT; '' for data without splits.")]
Images = Annotated[Path | None, typer.Option(help="The photos' folder, where it is not the data's own.")]
Evaluated = Annotated[str, typer.Option(help="A known model or a model folder.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first of them.")]


@evaluate_app.command("retrieval")
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
            data, split, model, rerank=rerank, fusion=fusion, limit=limit, images=images, progress=progress
        )
    _print_figures(rows, evaluation.report.retrieval_table(rows), as_json)
    if plot:
        evaluation.report.plot_retrieval(rows, plot)


@evaluate_app.command("captioning")
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


@evaluate_app.command("classification")
def evaluate_classification(
    data: Annotated[Path, typer.Option(help="A folder or a tar of <class>/<photo>.")],
    model: Evaluated = "blip-mini",
    prompt: Annotated[list[str] | None, typer.Option(help="A sentence with {} for the class; repeat it.")] = None,
    rerank: Annotated[int, typer.Option(min=0, help="Best classes that ITM reads, in the first prompt.")] = 0,
    limit_per_class: Annotated[int | None, typer.Option(min=1, help="Only the first photos of a class.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A class to leave out; repeat it.")] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Zero-shot top-1 and top-5 over classes known by their folders' names."""
    from blipcore import evaluation

    with _measuring(plot) as progress:
        rows = evaluation.classification(
            data,
            model,
            prompts=prompt or (),
            rerank=rerank,
            limit_per_class=limit_per_class,
            exclude=exclude or (),
            progress=progress,
        )
    _print_figures(rows, evaluation.report.classification_table(rows), as_json)
    if plot:
        evaluation.report.plot_classification(rows, plot)


@evaluate_app.command("vqa")
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

    ranked = _read_lines(answers) if answers else None
    with _measuring(plot) as progress:
        row = evaluation.vqa(data, model, answers=ranked, limit=limit, images=images, progress=progress)
    _print_figures([row], evaluation.report.vqa_table(row), as_json)
    if plot:
        evaluation.report.plot_vqa(row, plot)


@contextmanager
def _measuring(plot: Path | None):
    """Refuses an impossible plot before the work; yields the callback that moves a bar a stage on stderr."""
    from blipcore import evaluation

    if plot:
        evaluation.report.need_plots(plot)
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield move


def _print_figures(rows: list[dict], table: Table, as_json: bool) -> None:
    for row in rows if as_json else ():
        _emit(row)
    if not as_json:
        out.print(table)


@app.command()
def bench(library: Library = None, rounds: Annotated[int, typer.Option(min=1)] = 5, as_json: AsJson = False) -> None:
    """Time this library's stages: embed a photo, embed a query, search the vectors, re-rank 100."""
    from indexer.bench import time_stages

    with _open(library) as photos:
        rows = time_stages(photos, rounds)
    table = Table("stage", "median ms", "best ms")
    for row in rows:
        if as_json:
            _emit(row)
        table.add_row(row["stage"], f"{row['median_ms']:.1f}", f"{row['best_ms']:.1f}")
    if not as_json:
        out.print(table)


# -- the UI and the demo ------------------------------------------------------------------------------------


@app.command()
def ui(
    library: Library = None,
    port: Annotated[int, typer.Option(help="On localhost.")] = 8501,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open the web page on this machine."""
    from indexer.config import default_library

    os.environ["PHOTOBLIP_LIBRARY"] = str((library or default_library()).expanduser().absolute())
    _run_streamlit(port, browser)


def _run_streamlit(port: int, browser: bool) -> None:
    """Replace this process with Streamlit's: the app is found by name, so that indexer never imports it."""
    from importlib.util import find_spec

    script = Path(find_spec("app").origin).with_name("streamlit_app.py")
    options = {
        "server.address": "localhost",
        "server.port": str(port),
        "server.headless": "false" if browser else "true",
        "server.maxUploadSize": "50",
        "server.fileWatcherType": "none",  # it would load the page's modules anew and lose a running job
        "browser.gatherUsageStats": "false",
        "theme.light.primaryColor": "#2f6f86",
        "theme.dark.primaryColor": "#2f7890",
        "client.toolbarMode": "minimal",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(script), *flags])


@app.command()
def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Stop after the queries.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demo's photos and library go.")] = Path(".demo"),
    port: int = 8501,
) -> None:
    """Index sample photos from installed packages, run three queries, caption a photo, open the page."""
    from indexer.demo import copy_demo_photos, demo_manifest

    manifest, photos_folder = demo_manifest(), folder / "photos"
    copy_demo_photos(photos_folder)
    with _open(folder / "library", create=True) as photos, _bar("indexing") as move:
        report = photos.index(photos_folder, progress=move)
        known = photos.status()["photos"]
    out.print(f"{known} photos indexed in {report.seconds:.1f} s")
    with _open(folder / "library") as photos:
        wrong = [query for query in manifest["queries"] if not _demo_query(photos, query)]
        first = photos_folder / manifest["caption"]
        words, score = photos.caption(str(first))
        out.print(f"\n[bold]caption of {first.name}:[/bold] {escape(words)} ({score:.0%})")
    if wrong:
        raise PhotoblipError(f"the demo's query {wrong[0]['text']!r} did not put {wrong[0]['expect']} first")
    if not no_ui:
        os.environ["PHOTOBLIP_LIBRARY"] = str((folder / "library").absolute())
        _run_streamlit(port, browser=True)


def _demo_query(photos, query: dict) -> bool:
    """Print a query's first hits; -> whether the expected photo is first."""
    out.print(f"\n[bold]{escape(query['text'])}[/bold]")
    hits = photos.search(query["text"], top_k=3)
    for hit in hits:
        out.print(f"  {hit.rank}  {hit.probability:5.0%}  {Path(hit.path).name}")
    return bool(hits) and Path(hits[0].path).name == query["expect"]


if __name__ == "__main__":
    main()
