"""How long a command takes from its start to its end: search cold and through the warm process, status, help.

Each is a process of its own, with all files in the system's cache, beside what Python and PyTorch alone take to start.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from indexer import PhotoLibrary
from tests.benchmarks.bench_library import photos
from tests.benchmarks.machine import machine, show, versus

COUNT = 200  # photos, more than are re-ranked
WORDS = "a dog running on grass"


def python(*arguments: str, environment: dict | None = None) -> Callable[[], object]:
    """Run Python with these arguments to its end."""
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


@contextmanager
def warm_process(environment: dict):
    """A warm process that has loaded the library."""
    process = subprocess.Popen(
        [sys.executable, "-m", "indexer.cli", "serve"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        status = [sys.executable, "-m", "indexer.cli", "serve", "--status"]
        while process.poll() is None and subprocess.call(status, env=environment, stderr=subprocess.DEVNULL):
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder, library = Path(name) / "photos", Path(name) / "library"
        folder.mkdir()
        kind = photos(folder)
        for extra in sorted(file for file in folder.rglob("*") if file.is_file())[COUNT:]:
            extra.unlink()
        with PhotoLibrary.open(library) as opened:
            opened.index(folder, workers=0)
            opened.search(WORDS)  # the candidates' image tokens are kept
        alone = os.environ | {"PHOTOBLIP_LIBRARY": str(library), "PHOTOBLIP_SERVE": "never"}
        warm = alone | {"PHOTOBLIP_SERVE": "", "XDG_RUNTIME_DIR": name}
        command = ("-m", "indexer.cli")
        with warm_process(warm):
            times = versus({
                "import torch": python("-c", "import torch"),
                "python -c pass": python("-c", "pass"),
                "photoblip --help": python(*command, "--help", environment=alone),
                "photoblip status": python(*command, "status", environment=alone),
                "search, first stage": python(*command, "search", WORDS, "--no-rerank", environment=alone),
                "search, top 100 re-ranked": python(*command, "search", WORDS, environment=alone),
                "the same through the warm process": python(*command, "search", WORDS, environment=warm),
            })  # fmt: skip
        show(f"{COUNT} photos ({kind}), start to end", times, unit="start")


if __name__ == "__main__":
    main()
