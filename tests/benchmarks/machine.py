"""What a figure was measured on, how to time ways of doing one thing against each other, and how to show it."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

Times = dict[str, tuple[float, float]]  # way: median and best seconds


# -- measuring --------------------------------------------------------------------------------------------------


def machine() -> str:
    """Cores, threads, and the run's own limits: absolute times mean little without them."""
    rates = [
        f"{str(dtype).removeprefix('torch.')} {matmul_rate(dtype) / 1e9:.0f} GFLOP/s"
        for dtype in (torch.float32, torch.bfloat16)
    ]
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    memory = f"memory {memory_rate() / 1e9:.1f} GB/s"
    return f"{threads}, matmul {', '.join(rates)}, {memory}, torch {torch.__version__}"


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of PyTorch's own product of two matrices of 1024 by 1024, the best of some."""
    left = torch.randn(1024, 1024, dtype=dtype)
    left @ left
    return 2 * 1024**3 / min(_seconds(lambda: left @ left) for _ in range(5))


def memory_rate() -> float:
    """Bytes/s that a copy of 256 MiB, more than any cache holds, reads and writes together, the best of some."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(5))


def versus(ways: dict[str, Callable[[], object]], rounds: int = 5) -> Times:
    """Run the ways in turn, A B A B ..., so that a machine's drift meets them alike. -> median and best seconds."""
    times = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_seconds(way))
    return {name: (statistics.median(each), min(each)) for name, each in times.items()}


def ratios(times: Times, to: str | None = None) -> Times:
    """How many times faster than the way `to` (the first) each is: of the medians, and of the bests."""
    first = times[to] if to else next(iter(times.values()))
    return {way: (first[0] / median, first[1] / best) for way, (median, best) in times.items()}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def hush() -> None:
    """Have transformers not list the weights of ours that one of its classes has no use for."""
    import transformers

    transformers.logging.set_verbosity_error()


# -- showing ----------------------------------------------------------------------------------------------------


def arguments(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options that benchmarks share: --out, and --rounds where a number of rounds is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the table, and for the plot where there is one")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved runs of each way ({rounds})")
    return parser


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    lines = [heading, ["---"] * len(heading), *rows]
    return [*("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def comparison(times: Times, count: int = 1, unit: str = "call") -> list[str]:
    """A table of `versus`: the times, the rate of the median, and the ratios to the first way."""
    faster = ratios(times)
    heading = ("way", "median ms", "best ms", f"{unit}s/s", "x the first, median", "best")
    return table(heading, [
        (way, f"{1000 * median:,.1f}", f"{1000 * best:,.1f}", f"{count / median:,.1f}",
         f"{faster[way][0]:.2f}", f"{faster[way][1]:.2f}")
        for way, (median, best) in times.items()
    ])  # fmt: skip


def show(title: str, times: Times, count: int = 1, unit: str = "call") -> None:
    """Print the ways of a comparison, and each one's ratio to the first."""
    faster = ratios(times)
    print(title)
    for name, (median, best) in times.items():
        rate = f"{count / median:10.1f} {unit}s/s"
        ratio = f"x{faster[name][0]:.2f} (best x{faster[name][1]:.2f})"
        print(f"  {name:44} median {1000 * median:9.1f} ms  best {1000 * best:9.1f} ms  {rate}  {ratio}")


def publish(
    out: Path | None, name: str, title: str, lines: Sequence[str], draw: Callable[[Path], None] | None = None
) -> None:
    """Write NAME.md to the folder `out`, if there is one, and NAME.png where `draw` writes a plot to a path."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    text = [f"# {title}", "", f"Made by `python -m tests.benchmarks.bench_{name.replace('-', '_')}`.", ""]
    if draw:
        draw(out / f"{name}.png")
        text += [f"![{title}]({name}.png)", ""]
    (out / f"{name}.md").write_text("\n".join([*text, *lines]).rstrip() + "\n", encoding="utf-8")


@contextmanager
def plotted(file: Path, columns: int = 1, **options) -> Iterator:
    """Axes to draw in (an array of them where there are several columns), saved to a PNG file at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, 5 * columns), 4.2))
    yield figure.subplots(1, columns, **options)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw_bars(groups: dict[str, dict[str, float]], label: str, file: Path, logarithmic: bool = False) -> None:
    """{group: {way: value}} as bars beside each other, each with its value."""
    with plotted(file, len(groups), squeeze=False) as rows:
        for axes, (title, values) in zip(rows[0], groups.items(), strict=True):
            names = list(values)[::-1]
            bars = axes.barh(names, [values[name] for name in names], color="#3b6ea5")
            labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in bars.datavalues]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
            axes.set(title=title, xlabel=label)
            axes.tick_params(axis="y", labelsize=8)
            axes.margins(x=0.15)
            if logarithmic:
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter("")
