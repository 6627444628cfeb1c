"""Large imports, a tenth faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """For imports: their objects stay, and the garbage collector would look at them again and again.

    Nor does it look at them afterwards, or at what else there is by then, where anything was imported.
    """
    collects, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collects:
            gc.enable()
