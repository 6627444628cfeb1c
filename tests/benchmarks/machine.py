"""What a figure was measured on, and how to time two ways of doing one thing against each other."""

import os
import statistics
import time
from collections.abc import Callable

import torch


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


def versus(ways: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, tuple[float, float]]:
    """Run the ways in turn, A B A B ..., so that a machine's drift meets them alike. -> median and best seconds."""
    times = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_seconds(way))
    return {name: (statistics.median(each), min(each)) for name, each in times.items()}


def show(title: str, times: dict[str, tuple[float, float]], count: int = 1, unit: str = "call") -> None:
    """Print the ways of a comparison, and each one's ratio to the first."""
    first = next(iter(times.values()))[0]
    print(title)
    for name, (median, best) in times.items():
        rate = f"{count / median:10.1f} {unit}s/s"
        print(f"  {name:44} median {1000 * median:9.1f} ms  best {1000 * best:9.1f} ms  {rate}  x{first / median:.2f}")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
