"""blipcore trains and runs the models. `blipcore.load("blip-mini")` is the way in."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blipcore.encoder import BlipEncoder

__all__ = ["load"]


def load(name_or_folder: str = "blip-mini", **options) -> "BlipEncoder":
    """A ready model by name (`photoblip models list`) or from a folder in the hub's format.

    Options are those of `blipcore.encoder.load_encoder`. Raises `blipcore.errors.ModelError`.
    """
    from blipcore.encoder import load_encoder

    return load_encoder(name_or_folder, **options)
