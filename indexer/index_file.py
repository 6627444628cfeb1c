"""What an index file says of itself: notes behind FAISS's own bytes, written with them and read without FAISS.

FAISS reads a file up to where its index ends, so the notes travel in the same file and are renamed into place with it.
"""

import json
import os
from pathlib import Path

MARK = b"photoblip notes\n"  # the last bytes of a file that has notes; before it the notes' length, 8 bytes
FLAT = "flat-fp16"


def append_notes(file: Path, notes: dict) -> None:
    """Write notes behind what the file holds, and see the file safe on the disk."""
    text = json.dumps(notes).encode()
    with file.open("ab") as stream:
        stream.write(text + len(text).to_bytes(8, "little") + MARK)
        stream.flush()
        os.fsync(stream.fileno())  # a rename may reach the disk before what it names


def read_notes(file: Path) -> dict:
    """A file's notes; empty where it has none: it is absent, damaged, or was written before there were notes."""
    try:
        with file.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            tail = 8 + len(MARK)
            stream.seek(max(0, end - tail))
            length, mark = stream.read(8), stream.read()
            start = end - tail - int.from_bytes(length, "little")
            if mark != MARK or start < 0:
                return {}
            stream.seek(start)
            notes = json.loads(stream.read(end - tail - start))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def index_kind(file: Path) -> str:
    """How a saved index searches, in a line for people."""
    return kind_of(read_notes(file))


def kind_of(notes: dict) -> str:
    """The line of `index_kind`: "flat-fp16", or how many lists, with the margin and what it was measured to find."""
    lists, margin = notes.get("lists", 1), notes.get("margin")
    if lists == 1:
        return FLAT
    queries = f"{notes.get('captions') or 'no'} captions"
    return f"ivf{lists}-fp16, margin {margin:.3f}, recall {notes.get('recall', 0):.3f} at 100 ({queries})"
