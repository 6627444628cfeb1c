"""How long a command takes from its start to its end: search cold and through the warm process, status, help.

Each is a process of its own, with all files in the system's cache, beside what Python and PyTorch alone take to start.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from indexer import PhotoLibrary
from tests.benchmarks import photos
from tests.benchmarks.machine import arguments, comparison, draw_bars, machine, publish, versus

COUNT = 200  # photos, more than are re-ranked
WORDS = "a dog running on grass"
COMMAND = ("-m", "indexer.cli")


def python(*given: str, environment: dict | None = None) -> Callable[[], object]:
    """Run Python with these arguments to its end."""
    command = [sys.executable, *given]
    return lambda: subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def answers(environment: dict) -> int | None:
    """How many commands the warm process has answered; None where none runs."""
    command = [sys.executable, *COMMAND, "serve", "--status", "--json"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    return None if done.returncode else json.loads(done.stdout)["requests"]


@contextmanager
def warm_process(environment: dict):
    """A warm process that has loaded the library. Raises SystemExit where it does not start."""
    process = subprocess.Popen([sys.executable, *COMMAND, "serve"], env=environment, stderr=subprocess.DEVNULL)
    try:
        while answers(environment) is None:
            if process.poll() is not None:
                raise SystemExit("the warm process ended at once: `photoblip serve` says why")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--count", type=int, default=COUNT, help=f"photos of the library ({COUNT})")
    parser.add_argument("--photos", type=Path, help="a folder or tar of JPEGs (camera photos made 500 x 375)")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it each start compiles all that it imports
    with tempfile.TemporaryDirectory() as name:
        folder, library = Path(name) / "photos", Path(name) / "library"
        kind = photos.fill(folder, options.count, (500, 375), options.photos)
        with PhotoLibrary.open(library) as opened:
            opened.index(folder, workers=0)
            opened.search(WORDS)  # the candidates' image tokens are kept
        lines = [f"{machine()}. A library of {options.count} {kind}; {options.rounds} rounds.", ""]
        print(lines[0], flush=True)
        alone = os.environ | {"PHOTOBLIP_LIBRARY": str(library), "PHOTOBLIP_SERVE": "never"}
        warm = alone | {"PHOTOBLIP_SERVE": "", "XDG_RUNTIME_DIR": name}
        with warm_process(warm):
            times = versus({
                "import torch": python("-c", "import torch"),
                "python -c pass": python("-c", "pass"),
                "photoblip --help": python(*COMMAND, "--help", environment=alone),
                "photoblip status": python(*COMMAND, "status", environment=alone),
                "search, first stage": python(*COMMAND, "search", WORDS, "--no-rerank", environment=alone),
                "search, top 100 re-ranked": python(*COMMAND, "search", WORDS, environment=alone),
                "the same through the warm process": python(*COMMAND, "search", WORDS, environment=warm),
            }, options.rounds)  # fmt: skip
            by_it = answers(warm)
    if by_it != options.rounds + 1:
        raise SystemExit(
            f"the warm process answered {by_it} of {options.rounds + 1} searches, the others were cold: measure again "
            "where nothing else runs and no file of photoblip changes"
        )
    lines += comparison(times, unit="start")
    print("\n".join(lines))
    groups = {"start to end": {way: median for way, (median, _) in times.items()}}
    publish(options.out, "startup", "Start-up", lines, lambda file: draw_bars(groups, "s", file))


if __name__ == "__main__":
    main()
