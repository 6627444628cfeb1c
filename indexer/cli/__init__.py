"""The `photoblip` command: each command parses, makes one library call, and prints.

Results go to stdout, as text or (`--json`) one JSON object a line; progress and warnings go to stderr.
Exit 0 done, 1 the job failed or some input could not be used, 2 wrong usage.

Commands are registered in `indexer.cli.commands`, which takes longer to import than the warm process takes to answer:
a command that it answers whole needs nothing of it.
"""

import os
import signal
import sys

from blipcore.imports import collector_paused

__all__ = ["Stopped", "app", "main"]

# How long a thread of GNU OpenMP, which PyTorch uses on Linux, spins for its next piece of work before it sleeps. Its
# own 300,000 rounds keep a core from whoever has work: a search beside an indexing job left that a third of its speed
# (docs/benchmarks/side-by-side.md). This is enough from one piece of a forward to the next.
SPINS = "2000"
WHOLE = frozenset({"search", "similar", "describe", "ask"})  # what the warm process may answer whole


class Stopped(BaseException):
    """Ctrl-C or a polite kill. Not a KeyboardInterrupt, which Typer turns into an exit status of its own."""


def __getattr__(name: str):
    """`app`, the commands as one Typer application, when it is asked for."""
    if name == "app":
        with collector_paused():
            from indexer.cli.commands import app

        return app
    raise AttributeError(f"module 'indexer.cli' has no attribute {name!r}")


def main() -> None:
    """The entry point."""
    _set_up_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        sys.exit(_run(sys.argv[1:]))
    except Stopped:
        print("stopped; what is done is kept, and the same command goes on from here", file=sys.stderr)
        sys.exit(1)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in WHOLE and "--help" not in arguments:
        from indexer.serve import printed

        if whole := printed(arguments):
            return _show(whole)
    with collector_paused():
        from indexer.cli.commands import run

    return run()


def _show(whole: dict) -> int:
    """Print what the warm process printed. -> its exit status."""
    try:
        for stream, text in whole["pieces"]:
            getattr(sys, stream).write(text)
            getattr(sys, stream).flush()
    except BrokenPipeError:  # the reader has seen enough: nothing is left to say to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return whole["status"]


def _stop(_number, _frame) -> None:
    raise Stopped


def _set_up_libraries() -> None:
    """What libraries read from the environment when they are loaded, where the user has not said it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
