"""`make bench`: runs every benchmark, one after another, each in a process of its own.

    python -m tests.benchmarks [NAME ...] [--out docs/benchmarks]

A name is part of a benchmark's, `decode` of bench_decode; none means all of them. One that fails does not stop the
rest, and makes the exit code 1.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# the short ones first, what heats the machine for minutes last; any other benchmark comes between
FIRST = ("decode", "towers", "model", "matching", "captions", "startup")
LAST = ("peers", "vector_index", "indexing", "blip2_search")


def ordered(names: list[str]) -> list[str]:
    between = [name for name in names if name not in FIRST + LAST]
    return [name for name in (*FIRST, *between, *LAST) if name in names]


def writes(name: str) -> bool:
    """Whether a benchmark takes --out: its own, or that of machine.arguments."""
    source = (HERE / f"bench_{name}.py").read_text(encoding="utf-8")
    return '"--out"' in source or " arguments(" in source


def main() -> int:
    names = [file.stem.removeprefix("bench_") for file in sorted(HERE.glob("bench_*.py"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(ordered(names)))
    parser.add_argument("--out", type=Path, help="a folder for their tables and plots")
    options = parser.parse_args()
    chosen = [name for name in ordered(names) if not options.names or any(part in name for part in options.names)]
    if not chosen:
        parser.error(f"there is no such benchmark: choose from {', '.join(ordered(names))}")
    failed = []
    for name in chosen:
        print(f"\n== {name}", flush=True)
        given = ["--out", str(options.out)] if options.out and writes(name) else []
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", f"tests.benchmarks.bench_{name}", *given], check=False).returncode
        print(f"== {name}: {time.perf_counter() - started:.0f} s" + (f", FAILED ({code})" if code else ""), flush=True)
        failed += [name] if code else []
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
