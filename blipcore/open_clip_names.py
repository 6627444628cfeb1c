"""What open_clip models are called, and where they lie. Free of torch, and of open_clip, which imports it.

open_clip:ViT-B-16-SigLIP2                     an architecture; downloaded in the weights photoblip found it with
open_clip:ViT-B-32/laion2b_s34b_b79k           an architecture in certain weights, by open_clip's own names
open_clip:/path/to/folder                      a folder in open_clip's format: the hub's, or one that you wrote
open_clip:ViT-B-32@/path/to/file.safetensors   an architecture of open_clip's in weights of your own
...+blip-base                                  any of them, with another BLIP behind it than blip-mini
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from blipcore.errors import ModelError

PREFIX = "open_clip:"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
TEXT_CONFIG = "text_config.json"  # of a text tower that is a transformers model: its own config.json, beside the others
DEFAULT_MATCHER = "blip-mini"


class OpenClipName(NamedTuple):
    """A name, taken apart.

    Attributes:
        architecture, tag: open_clip's names; None for a folder, and a tag where none is given.
        place: a folder, or with an architecture a file of weights; None for what is downloaded.
        matcher: the BLIP behind it.
    """

    architecture: str | None
    tag: str | None
    place: Path | None
    matcher: str

    def __str__(self) -> str:
        """The one spelling of a name."""
        first = str(self.place) if self.architecture is None else "/".join(filter(None, (self.architecture, self.tag)))
        file = f"@{self.place}" if self.architecture and self.place else ""
        return PREFIX + first + file + (f"+{self.matcher}" if self.matcher != DEFAULT_MATCHER else "")


def is_open_clip(name_or_folder: str) -> bool:
    """Whether this is one of this module's names, or a folder in open_clip's format."""
    return name_or_folder.startswith(PREFIX) or (Path(name_or_folder).expanduser() / CONFIG).is_file()


def parse(name_or_folder: str) -> OpenClipName:
    """Raises ModelError for what is no name."""
    rest, matcher = name_or_folder.removeprefix(PREFIX), DEFAULT_MATCHER
    if "+" in rest and not _path(rest.partition("@")[2] or rest).exists():  # a path may hold a "+"
        rest, _, matcher = rest.rpartition("+")
    if not name_or_folder.startswith(PREFIX) or (rest and _path(rest).is_dir()):
        return OpenClipName(None, None, _path(rest).absolute(), matcher)
    first, _, file = rest.partition("@")
    architecture, _, tag = first.partition("/")
    plain = re.fullmatch(r"[\w.-]+", architecture) and re.fullmatch(r"[\w.-]*", tag)
    if not plain or (file and tag) or not matcher:
        raise ModelError(
            f"{name_or_folder!r} names no open_clip model: write open_clip:ARCHITECTURE, "
            "open_clip:ARCHITECTURE/WEIGHTS, open_clip:ARCHITECTURE@FILE.safetensors or open_clip:FOLDER"
        )
    return OpenClipName(architecture, tag or None, _path(file).absolute() if file else None, matcher)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def find_folder(name: OpenClipName, models: Path) -> Path:
    """The folder of a model, or the file of its weights. Raises ModelError with the command that brings it.

    Args:
        models: where downloaded models lie.
    """
    if name.place is not None:
        if not name.place.exists():
            raise ModelError(f"there is no {name.place}: give a folder or a .safetensors file of an open_clip model")
        return name.place
    known = models / "open_clip" / name.architecture
    folders = [known / name.tag] if name.tag else sorted(known.glob("*/"))
    here = [folder for folder in folders if is_whole(folder)]
    if len(here) == 1:
        return here[0]
    if here:
        names = " or ".join(f"{PREFIX}{name.architecture}/{folder.name}" for folder in here)
        raise ModelError(f"{name.architecture} is on this machine in several weights: say which, {names}")
    wanted = PREFIX + "/".join(filter(None, (name.architecture, name.tag)))
    raise ModelError(f"the model {wanted} is not on this machine: run `photoblip models download {wanted}`")


def is_whole(folder: Path) -> bool:
    """Whether a folder has what loading needs."""
    return (folder / CONFIG).is_file() and weights_file(folder) is not None


def weights_file(folder: Path) -> Path | None:
    """The safetensors file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    named = [folder / name for name in WEIGHTS if folder / name in files]
    return next(iter(named or files), None)


def downloaded(models: Path) -> dict[str, Path]:
    """The open_clip models on this machine by name."""
    folders = sorted((models / "open_clip").glob("*/*/"))
    return {f"{PREFIX}{folder.parent.name}/{folder.name}": folder for folder in folders if is_whole(folder)}


def read_config(folder: Path) -> dict:
    """A folder's configuration: {"model_cfg", "preprocess_cfg"}. Raises ModelError."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(values["model_cfg"]):
            raise ValueError("its model_cfg lacks embed_dim, vision_cfg or text_cfg")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is no configuration of an open_clip model ({error}): check or download it") from error
    return values
