"""A run's figures: a JSON-lines log, and its curves as a picture."""

import json
import logging
import time
from pathlib import Path
from statistics import mean

log = logging.getLogger(__name__)


class RunLog:
    """One JSON object a line: what a plot or a person reads later. Figures are averaged between writes."""

    def __init__(self, file: Path, every: int = 10):
        self.file, self.every, self.start = Path(file), every, time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._sums: dict[str, list[float]] = {}

    def minutes(self) -> float:
        """Since the run began."""
        return (time.monotonic() - self.start) / 60

    def step(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._sums.setdefault(name, []).append(float(value))
        if step % self.every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Write the means of what was gathered since the last line."""
        if self._sums:
            self.write({"step": step, **{name: float(f"{mean(held):.5g}") for name, held in self._sums.items()}})
            self._sums = {}

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run logged beyond the checkpoint that it goes on from."""
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            rows = [line for line in lines if json.loads(line)["step"] <= step]
            self.file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    def write(self, row: dict) -> None:
        row = {**row, "seconds": round(time.monotonic() - self.start, 1)}
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def draw_curves(log_file: Path, picture: Path) -> None:
    """The log's losses and evaluation figures over steps, as a PNG. Without matplotlib, a warning instead."""
    try:
        import matplotlib as mpl
    except ImportError:
        log.warning("curves.png needs matplotlib: pip install 'photoblip[train]'")
        return
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = log_file.read_text(encoding="utf-8").splitlines() if log_file.exists() else []
    rows = [json.loads(line) for line in lines]
    losses = [row for row in rows if "evaluation" not in row]
    figures = [{"step": row["step"], **flattened(row["evaluation"])} for row in rows if "evaluation" in row]
    panels = [("losses", losses, {"step", "seconds", "rate"}), ("evaluation", figures, {"step"})]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (title, points, hidden) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(key for point in points for key in point if key not in hidden):
            line = [(point["step"], point[name]) for point in points if name in point]
            axis.plot(*zip(*line, strict=True), marker="." if len(line) < 30 else None, label=name)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def flattened(figures: dict, prefix: str = "") -> dict[str, float]:
    """Nested figures -> {"t2i r1": 30.4, ...}, numbers only."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat
