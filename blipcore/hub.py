"""Model names: what is bundled, what can be downloaded, and where it lies. Free of torch.

Sizes and licences are those of the hub's cards; a download says them before it starts.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from blipcore import open_clip_names
from blipcore.errors import ModelError

NEEDED = ("config.json", "tokenizer.json")
EXTRAS = "photoblip.json"  # scoring and the caption prompt, beside the hub's own files
BUNDLED = Path(__file__).parent / "bundled"
FINETUNED = "finetuned.json"  # what a model was fine-tuned from and how well, in its folder


@dataclass(frozen=True)
class KnownModel:
    """A model photoblip knows by name.

    `parts` maps a folder of the model ("": the model's own) to the hub repository it comes from; a bundled model has
    none.
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
        *(
            KnownModel(name, what, gigabytes, licence, {"": repository})
            for name, repository, what, gigabytes, licence in (
                ("blip2-itm", "Salesforce/blip2-itm-vit-g", "search, matching; 32 vectors a photo", 4.7, "MIT"),
                ("blip2-itm-coco", "Salesforce/blip2-itm-vit-g-coco", "search, matching; tuned on COCO", 4.7, "MIT"),
                ("blip2-opt-2.7b", "Salesforce/blip2-opt-2.7b", "captions, answers", 15.0, "MIT, and OPT's own terms"),
                ("blip2-flan-t5-xl", "Salesforce/blip2-flan-t5-xl", "captions, answers", 15.8, "MIT"),
                (
                    "instructblip-flan-t5-xl",
                    "Salesforce/instructblip-flan-t5-xl",
                    "captions, answers, chat",
                    16.0,
                    "research only",
                ),
                (
                    "instructblip-vicuna-7b",
                    "Salesforce/instructblip-vicuna-7b",
                    "captions, answers, chat",
                    31.7,
                    "research only",
                ),
                ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", "captions, answers, chat", 14.1, "Llama 2's"),
                ("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", "captions, answers, chat", 26.7, "Llama 2's"),
                ("qwen2-vl-2b", "Qwen/Qwen2-VL-2B-Instruct", "captions, answers, chat, boxes", 4.4, "Apache-2.0"),
                ("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "captions, answers, chat, boxes", 16.6, "Apache-2.0"),
            )
        ),
    )
}


# Of open_clip's several hundred models, three to begin with; `blipcore.open_clip_names` says how the others are called.
OPEN_CLIP_MODELS = {
    name: KnownModel(name, what, gigabytes, licence, {"": repository})
    for name, repository, what, gigabytes, licence in (
        ("open_clip:ViT-B-16-SigLIP2", "timm/ViT-B-16-SigLIP2", "search in many languages", 1.5, "Apache-2.0"),
        (
            "open_clip:ViT-SO400M-14-SigLIP2",
            "timm/ViT-SO400M-14-SigLIP2",
            "search in many languages",
            4.5,
            "Apache-2.0",
        ),
        (
            "open_clip:ViT-B-32/laion2b_s34b_b79k",
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            "search, fast; English",
            0.6,
            "MIT",
        ),
    )
}


def canonical_name(name_or_folder: str) -> str:
    """The one name under which a library keeps a model: a known name, open_clip's, or a folder's whole path."""
    if name_or_folder.startswith(open_clip_names.PREFIX):
        return str(open_clip_names.parse(name_or_folder))
    folder = Path(name_or_folder).expanduser()
    return str(folder.absolute()) if name_or_folder not in KNOWN_MODELS and folder.is_dir() else name_or_folder


def own_name(name_or_folder: str, models: Path) -> str | None:
    """The short name of a model that lies in a library's own folder `models`; None for any other.

    A short name stays right when the library moves. It comes before a folder of that name elsewhere: write ./NAME.
    """
    folder = Path(name_or_folder).expanduser().absolute()
    name = folder.name if folder.parent == models.absolute() else name_or_folder
    return name if is_free_name(name) and (models / name).is_dir() else None


def is_free_name(name: str) -> bool:
    """Whether a new model can be called that: a plain word that is not a known model's."""
    return name not in KNOWN_MODELS and re.fullmatch(r"\w[\w.-]*", name) is not None


def own_models(models: Path) -> dict[str, dict]:
    """A library's own models by name, with what was recorded when each was fine-tuned (see `FINETUNED`)."""
    found = {}
    for folder in sorted(models.glob("*/")):
        if own_name(folder.name, models):
            file = folder / FINETUNED
            found[folder.name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


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
    if open_clip_names.is_open_clip(name_or_folder):
        raise ModelError(f"{name_or_folder} searches, and does nothing else: name a BLIP such as blip-mini for this")
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    names = ", ".join(KNOWN_MODELS)
    raise ModelError(f"there is no model or folder {name_or_folder!r}: known models are {names}")


VLM_ARCHITECTURES = frozenset(
    {
        "Vlm",
        "Qwen2Vl",
        "LlavaForConditionalGeneration",
        "Blip2ForConditionalGeneration",
        "InstructBlipForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "QWenLMHeadModel",
    }
)


GROUNDING = frozenset({"minigpt-v2", "qwen-vl", "Qwen2Vl", "Qwen2VLForConditionalGeneration"})  # they write boxes


def holds_vlm(folder: Path) -> bool:
    """Whether a folder is of a system with a language model: told by its configuration, without loading anything."""
    return bool(VLM_ARCHITECTURES & _kind(folder))


def abilities(folder: Path) -> frozenset[str]:
    """Of "ask", "chat" and "ground" what a model can do: told by its configuration, without loading anything."""
    if holds_vlm(folder):
        return frozenset({"ask", "chat", "ground"} if GROUNDING & _kind(folder) else {"ask", "chat"})
    answers = "BlipForQuestionAnswering" in _kind(folder) | _kind(Path(folder) / "vqa")
    return frozenset({"ask"} if answers else ())


def _kind(folder: Path) -> frozenset[str]:
    """The architectures that a configuration names, and the system; nothing where it cannot be read."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return frozenset([*(values.get("architectures") or ()), values.get("system")]) - {None}
    except (OSError, ValueError, TypeError, AttributeError):  # what is wrong with it is said where it is loaded
        return frozenset()


def part_folders(folder: Path) -> list[Path]:
    """The folders of a model's parts; a model of one part is its own."""
    parts = [folder / part for part in ("retrieval", "captioning", "vqa")]
    return [part for part in parts if (part / "config.json").exists()] or [folder]


def fingerprint(folders: list[Path]) -> str:
    """What tells two models apart: `files_fingerprint` of their weights."""
    return files_fingerprint(file for folder in folders for file in folder.glob("*.safetensors"))


def files_fingerprint(files: Iterable[Path]) -> str:
    """A hash of files' sizes, first and last MiB."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as data:
            digest.update(data.read(1 << 20))
            data.seek(max(0, size - (1 << 20)))
            digest.update(data.read())
    return digest.hexdigest()[:16]


def models_here(own: Path) -> dict[str, Path]:
    """The folders of all models on this machine by name: known ones, then a library's own, which lie in `own`."""
    known = {name: find_model(name) for name, model in KNOWN_MODELS.items() if is_downloaded(model)}
    known |= open_clip_names.downloaded(models_folder())
    return known | {folder.name: folder for folder in sorted(own.glob("*/")) if own_name(folder.name, own)}


def is_downloaded(known: KnownModel) -> bool:
    """Whether every part of the model is on this machine, whole."""
    if known.name in OPEN_CLIP_MODELS:
        parsed = open_clip_names.parse(known.name)
        folders = (models_folder() / "open_clip" / parsed.architecture).glob(parsed.tag or "*")
        return any(open_clip_names.is_whole(folder) for folder in folders)
    if known.bundled:
        return (BUNDLED / known.name / "config.json").exists()
    folder = models_folder() / known.name
    return all(_is_whole(folder / part) for part in known.parts)


def _is_whole(folder: Path) -> bool:
    """Whether a part's folder has what loading needs: of weights in several files, every one that their index names."""
    shards = folder / "model.safetensors.index.json"
    weights = {file.name for file in folder.glob("*.safetensors")}
    if not weights or not all((folder / name).exists() for name in NEEDED):
        return False
    if "model.safetensors" in weights or not shards.exists():
        return True
    try:
        return weights >= set(json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def download(name: str, source: Path | None = None) -> Path:
    """Bring a known model from the hub, or from a local mirror laid out as `source`/<owner>/<repository>/.

    Only safetensors weights are taken. A part is fetched into a folder aside and renamed when it is whole, so
    that a broken download never looks like a model. -> the model's folder.
    """
    if name.startswith(open_clip_names.PREFIX):
        return _download_open_clip(name, source)
    known = KNOWN_MODELS.get(name)
    if known is None:
        raise ModelError(f"there is no downloadable model {name!r}: see `photoblip models list`")
    folder = models_folder() / known.name
    for part, repository in known.parts.items():
        whole = folder / part
        if not _is_whole(whole):
            if whole.is_dir() and any(whole.iterdir()):  # ours appear whole: this may be somebody's own
                raise ModelError(f"{whole} holds something that is no whole model: move it away, then download again")
            aside = whole.with_name(f".{whole.name}.part")
            _fetch(repository, aside, source)
            if not _is_whole(aside):
                raise ModelError(
                    f"{repository} lacks {', '.join(NEEDED)} or safetensors weights, and photoblip loads nothing else"
                )
            if whole.is_dir():
                whole.rmdir()
            aside.rename(whole)
    return folder if known.parts else BUNDLED / known.name


def open_clip_source(name: str) -> tuple[Path, str, dict]:
    """Where an open_clip model would lie, its repository on the hub, and open_clip's own configuration of it.

    Raises ModelError for an architecture or weights that open_clip does not know, or that are not on the hub.
    """
    parsed = open_clip_names.parse(name)
    if parsed.architecture is None or parsed.place is not None:
        raise ModelError(f"{name} lies on this machine already: nothing is downloaded for it")
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(parsed.architecture)
    tag = parsed.tag or (tags[0] if len(tags) == 1 else "")
    if tag not in tags:
        known = ", ".join(f"{open_clip_names.PREFIX}{parsed.architecture}/{each}" for each in tags)
        raise ModelError(f"say which weights of {parsed.architecture}: {known or 'open_clip knows no such model'}")
    values = open_clip.get_pretrained_cfg(parsed.architecture, tag)
    repository = values.get("hf_hub", "").rpartition("/")[0]
    if not repository:
        raise ModelError(f"{name} is not published as safetensors on the hub: choose other weights of open_clip's list")
    config = {"model_cfg": open_clip.get_model_config(parsed.architecture), "preprocess_cfg": values}
    return models_folder() / "open_clip" / parsed.architecture / tag, repository, config


def _download_open_clip(name: str, source: Path | None) -> Path:
    whole, repository, config = open_clip_source(name)
    if open_clip_names.is_whole(whole):
        return whole
    aside = whole.with_name(f".{whole.name}.part")
    _fetch(repository, aside, source, ["*.json", "*.txt", "*.model", "open_clip*.safetensors"])
    if not (aside / open_clip_names.CONFIG).exists():  # older repositories have weights alone
        text = json.dumps({**config, "preprocess_cfg": _preprocessing(config["preprocess_cfg"])}, indent=2)
        (aside / open_clip_names.CONFIG).write_text(text, encoding="utf-8")
    _fetch_text_side(aside, source)
    if not open_clip_names.is_whole(aside):
        raise ModelError(f"{repository} has no safetensors weights, and photoblip loads nothing else: choose others")
    aside.rename(whole)
    return whole


def _fetch_text_side(folder: Path, source: Path | None) -> None:
    """What an open_clip model takes from other repositories: a tokenizer, and the shape of a text tower."""
    text = open_clip_names.read_config(folder)["model_cfg"]["text_cfg"]
    apart = folder / ".text"
    if text.get("hf_tokenizer_name") and not (folder / "tokenizer_config.json").exists():
        _fetch(text["hf_tokenizer_name"], apart, source, ["tokenizer*", "*.model", "special_tokens_map.json"])
        for file in apart.glob("*.*"):
            file.replace(folder / file.name)
    if text.get("hf_model_name"):
        _fetch(text["hf_model_name"], apart, source, ["config.json"])
        (apart / "config.json").replace(folder / open_clip_names.TEXT_CONFIG)
    shutil.rmtree(apart, ignore_errors=True)


def _preprocessing(values: dict) -> dict:
    """What open_clip's table says of pixels, without where the weights are."""
    return {key: values[key] for key in ("mean", "std", "interpolation", "resize_mode") if values.get(key) is not None}


def _fetch(
    repository: str, folder: Path, source: Path | None, patterns: Sequence[str] = ("*.json", "*.txt", "*.safetensors")
) -> None:
    if source is not None:
        origin = source / repository
        if not origin.is_dir():
            raise ModelError(f"there is no folder {origin} to take {repository} from")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in (file for pattern in patterns for file in origin.rglob(pattern)):
            target = folder / file.relative_to(origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, local_dir=folder, allow_patterns=list(patterns))
    except Exception as error:  # the hub library raises many kinds; the user needs one sentence
        raise ModelError(
            f"{repository} could not be downloaded ({type(error).__name__}): check the connection and run "
            "the same command again, it goes on where it stopped"
        ) from error
