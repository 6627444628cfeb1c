"""Figures for people: tables for the terminal, and plots drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from blipcore.errors import ModelError
from blipcore.metrics import expected_calibration_error, reliability_bins

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
WAYS = {"t2i": "text to image", "i2t": "image to text"}


# -- tables -------------------------------------------------------------------------------------------------


def retrieval_table(rows: Sequence[dict]) -> Table:
    """Of `retrieval`'s rows."""
    table = Table("stage", "t2i R@1", "R@5", "R@10", "i2t R@1", "R@5", "R@10", "seconds")
    for row in rows:
        recalls = [f"{row[way][k]:.1f}" for way in ("t2i", "i2t") for k in ("r1", "r5", "r10")]
        table.add_row(row["stage"], *recalls, f"{row['seconds']:.0f}")
    return table


def first_stage_line(row: dict) -> str:
    """Of `retrieval`'s first row, which is there long before the others."""
    recalls = [f"{name} {' / '.join(f'{recall:.1f}' for recall in row[way].values())}" for way, name in WAYS.items()]
    return f"ITC alone, R@1/5/10: {', '.join(recalls)}"


def captioning_table(row: dict) -> Table:
    """Of `captioning`'s row."""
    table = Table("BLEU-4", "CIDEr", "beams", "candidates", "photos", "references", "seconds")
    counts = [str(row[name]) for name in ("beams", "candidates", "photos", "references")]
    table.add_row(f"{row['bleu4']:.1f}", f"{row['cider']:.1f}", *counts, f"{row['seconds']:.0f}")
    return table


def classification_table(rows: Sequence[dict]) -> Table:
    """Of `classification`'s rows."""
    table = Table("stage", "top-1", "top-5", "mean per class", "classes", "photos", "seconds")
    for row in rows:
        shares = [f"{row[name]:.1f}" for name in ("top1", "top5", "mean_per_class")]
        table.add_row(row["stage"], *shares, str(row["classes"]), str(row["photos"]), f"{row['seconds']:.0f}")
    return table


def vqa_table(row: dict) -> Table:
    """Of `vqa`'s row: all questions, then each type of answer."""
    table = Table("questions", "accuracy")
    table.add_row(f"all {row['questions']}", f"{row['accuracy']:.1f}")
    for kind, accuracy in row["by_type"].items():
        table.add_row(kind, f"{accuracy:.1f}")
    return table


# -- plots --------------------------------------------------------------------------------------------------


def need_plots(file: Path) -> None:
    """ModelError where `file` cannot become a plot: said before the hours of measuring, not after."""
    _figure()
    if file.suffix.lower() not in PLOT_SUFFIXES:
        raise ModelError(f"{file} is no plot's name: end it in {', '.join(PLOT_SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ModelError(f"the folder of {file} does not exist: make it first")


def plot_retrieval(rows: Sequence[dict], file: Path) -> None:
    """Recall at 1, 5, 10 in both directions, a colour a stage."""
    figure, axes = _figure()
    names = [(way, k) for way in ("t2i", "i2t") for k in ("r1", "r5", "r10")]
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        at = np.arange(len(names)) + (number - (len(rows) - 1) / 2) * width
        bars = axes.bar(at, [row[way][k] for way, k in names], width, label=row["stage"].upper())
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(names)), [f"{WAYS[way]}\nR@{k[1:]}" for way, k in names], fontsize=8)
    axes.set(ylabel="recall, %", ylim=(0, 112), title=f"{rows[0]['model']}: {rows[0]['photos']} photos")
    axes.legend(loc="upper left", ncols=len(rows))
    _save(figure, file)


def plot_captioning(row: dict, file: Path) -> None:
    """How the photos' CIDEr spreads."""
    figure, axes = _figure()
    axes.hist([photo["cider"] for photo in row["per_photo"]], bins=30)
    axes.axvline(row["cider"], color="black", linestyle="--", label=f"mean {row['cider']:.1f}")
    title = f"{row['model']}: {row['photos']} photos, BLEU-4 {row['bleu4']:.1f}"
    axes.set(xlabel="CIDEr of a photo", ylabel="photos", title=title)
    axes.legend()
    _save(figure, file)


def plot_classification(rows: Sequence[dict], file: Path) -> None:
    """Each class's top-1 in the last stage, the best first."""
    row = rows[-1]
    _bars(row["per_class"], f"{row['model']}, {row['stage'].upper()}: top-1 {row['top1']:.1f} %", "top-1, %", file)


def plot_vqa(row: dict, file: Path) -> None:
    """The accuracy of each type of answer."""
    _bars(
        row["by_type"], f"{row['model']}: {row['accuracy']:.1f} % of {row['questions']} questions", "accuracy, %", file
    )


def reliability_diagram(probability: np.ndarray, truth: np.ndarray, file: Path) -> None:
    """Probabilities and truth (0/1), both [P]: how often what was said with p is so, in 15 bins (Guo et al. 2017)."""
    held = reliability_bins(probability, truth)
    figure, axes = _figure((5.0, 5.0))
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot(held.confidence, held.accuracy, marker="o", label="measured")
    axes.bar(held.confidence, held.share, width=0.05, alpha=0.3, label="share of pairs")
    axes.set(xlabel="probability said", ylabel="matches among them", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(f"ECE {expected_calibration_error(probability, truth):.3f}")
    axes.legend(loc="upper left")
    _save(figure, file)


def _bars(values: dict[str, float], title: str, label: str, file: Path) -> None:
    """A horizontal bar a name, the highest on top."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    figure, axes = _figure((7.0, 1.2 + 0.16 * len(ordered)))
    axes.barh(range(len(ordered)), [value for _, value in ordered])
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=7)
    axes.set(title=title, xlabel=label, xlim=(0, 100), ylim=(-0.7, len(ordered) - 0.3))
    _save(figure, file)


def _figure(size: tuple[float, float] = (8.0, 4.5)):
    """-> (figure, axes). Made without pyplot, so nothing asks for a display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModelError("plots need matplotlib: run `pip install 'photoblip[evaluate]'`") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _save(figure, file: Path) -> None:
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be drawn ({error}): choose another name or folder") from error
