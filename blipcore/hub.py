"""Model names: what is bundled, what can be downloaded, and where it lies. Free of torch.

Sizes and licences are those of the hub's cards; a download says them before it starts.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from blipcore.errors import ModelError

NEEDED = ("config.json", "tokenizer.json")
BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class KnownModel:
    """A model photoblip knows by name.

    `parts` maps a folder of the model to the hub repository it comes from; a bundled model has none.
    """

    name: str
    what: str
    gigabytes: float
    licence: str
    parts: dict[str, str]

    @property
    def bundled(self) -> bool:
        return not self.parts


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            "blip-mini",
            "search, matching, captions; built in, trained by this project",
            0.07,
            "BSD-3-Clause",
            {},
        ),
        KnownModel(
            "blip-base",
            "search, matching, captions; ViT-B/16 at 384",
            1.8,
            "BSD-3-Clause",
            {
                "retrieval": "Salesforce/blip-itm-base-coco",
                "captioning": "Salesforce/blip-image-captioning-base",
            },
        ),
        KnownModel(
            "blip-large",
            "search, matching, captions; ViT-L/16 at 384",
            3.6,
            "BSD-3-Clause",
            {
                "retrieval": "Salesforce/blip-itm-large-coco",
                "captioning": "Salesforce/blip-image-captioning-large",
            },
        ),
        KnownModel(
            "blip-vqa-base",
            "answers questions about a photo",
            1.5,
            "BSD-3-Clause",
            {"vqa": "Salesforce/blip-vqa-base"},
        ),
        KnownModel(
            "blip-vqa-capfilt-large",
            "answers questions about a photo, trained with CapFilt",
            1.5,
            "BSD-3-Clause",
            {"vqa": "Salesforce/blip-vqa-capfilt-large"},
        ),
    )
}


def canonical_name(name_or_folder: str) -> str:
    """The one name under which a library keeps a model: a known name, or a folder's whole path."""
    folder = Path(name_or_folder).expanduser()
    return str(folder.absolute()) if name_or_folder not in KNOWN_MODELS and folder.is_dir() else name_or_folder


def models_folder() -> Path:
    """Where downloaded models lie: `PHOTOBLIP_MODELS`, or the platform's data directory."""
    return Path(os.environ.get("PHOTOBLIP_MODELS") or user_data_path("photoblip") / "models")


def find_model(name_or_folder: str) -> Path:
    """A model's folder. Raises ModelError with the command that brings the model."""
    if name_or_folder in KNOWN_MODELS:
        known = KNOWN_MODELS[name_or_folder]
        folder = (BUNDLED if known.bundled else models_folder()) / known.name
        if is_downloaded(known):
            return folder
        raise ModelError(
            f"the model {known.name} is not on this machine ({known.gigabytes} GB): "
            f"run `photoblip models download {known.name}`"
        )
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    names = ", ".join(KNOWN_MODELS)
    raise ModelError(f"there is no model or folder {name_or_folder!r}: known models are {names}")


def is_downloaded(known: KnownModel) -> bool:
    """Whether every part of the model is on this machine, whole."""
    if known.bundled:
        return (BUNDLED / known.name / "config.json").exists()
    folder = models_folder() / known.name
    return all(_is_whole(folder / part) for part in known.parts)


def _is_whole(folder: Path) -> bool:
    """Whether a part's folder has what loading needs."""
    return all((folder / name).exists() for name in NEEDED) and any(folder.glob("*.safetensors"))


def download(name: str, source: Path | None = None) -> Path:
    """Bring a known model from the hub, or from a local mirror laid out as `source`/<owner>/<repository>/.

    Only safetensors weights are taken. A part is fetched into a folder aside and renamed when it is whole, so
    that a broken download never looks like a model. -> the model's folder.
    """
    known = KNOWN_MODELS.get(name)
    if known is None:
        raise ModelError(f"there is no downloadable model {name!r}: see `photoblip models list`")
    folder = models_folder() / known.name
    for part, repository in known.parts.items():
        if not _is_whole(folder / part):
            aside = folder / f".{part}.part"
            _fetch(repository, aside, source)
            if not _is_whole(aside):
                raise ModelError(
                    f"{repository} lacks {', '.join(NEEDED)} or safetensors weights, and photoblip loads nothing else"
                )
            shutil.rmtree(folder / part, ignore_errors=True)
            aside.rename(folder / part)
    return folder if known.parts else BUNDLED / known.name


def _fetch(repository: str, folder: Path, source: Path | None) -> None:
    patterns = ["*.json", "*.txt", "*.safetensors"]
    if source is not None:
        origin = source / repository
        if not origin.is_dir():
            raise ModelError(f"there is no folder {origin} to take {repository} from")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for pattern in patterns:
            for file in origin.glob(pattern):
                shutil.copy2(file, folder)
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, local_dir=folder, allow_patterns=patterns)
    except Exception as error:  # the hub library raises many kinds; the user needs one sentence
        raise ModelError(
            f"{repository} could not be downloaded ({type(error).__name__}): check the connection and run "
            "the same command again, it goes on where it stopped"
        ) from error
