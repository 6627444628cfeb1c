"""The demo's photos: real pictures that come inside well-known packages, copied out of them on demand.

`photoblip demo`. None of them is part of this project: data/README.md names each one's author and licence.
"""

import filecmp
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from indexer.errors import LibraryError

_HERE = Path(__file__).parent


def demo_manifest() -> dict:
    """The manifest of data/demo.json: `photos` and `queries`."""
    # the wheel carries the file beside this module; asked for first, because a `data` folder beside an
    # installed `indexer` would be somebody else's
    places = (_HERE / "demo.json", _HERE.parent / "data" / "demo.json")
    for path in places:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise LibraryError("the demo's list of photos is missing: reinstall photoblip.")


def copy_demo_photos(folder: Path) -> list[Path]:
    """Copy the demo's photos into `folder`, and return those that this call wrote.

    A photo that is there already with the same content is left alone, so a second call returns an empty list.
    `folder` belongs to the demo: a different file under one of the photos' names is replaced.
    """
    pairs = [(_packaged(photo), folder / photo["file"]) for photo in demo_manifest()["photos"]]
    folder.mkdir(parents=True, exist_ok=True)
    # the content, not the times, decides: a copy that was cut short is mended by the next call
    stale = [(src, dst) for src, dst in pairs if not dst.exists() or not filecmp.cmp(src, dst, shallow=False)]
    return [Path(shutil.copyfile(src, dst)) for src, dst in stale]


def _packaged(photo: dict) -> Path:
    """Where one photo lies, inside a package that is found but, for start-up time, never imported."""
    spec = find_spec(photo["package"])
    for root in (spec and spec.submodule_search_locations) or ():
        path = Path(root, photo["resource"])
        if path.is_file():
            return path
    name, package = photo["file"], photo["package"]
    raise LibraryError(f'the demo photo {name} comes with {package}: install "photoblip[demo]".')
