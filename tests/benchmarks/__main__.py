"""`make bench`: runs every benchmark, one after another, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    names = sorted(file.stem for file in Path(__file__).parent.glob("bench_*.py"))
    chosen = [name for name in names if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    for name in chosen:
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=True)
