"""What a folder's configuration tells of a model: it must be what the loaded model can do."""

import json
import subprocess
import sys

import pytest
import torch

from blipcore.encoder import load_encoder
from blipcore.errors import ModelError
from blipcore.hub import KNOWN_MODELS, abilities, download, is_downloaded, models_here
from blipcore.models.qwen2_vl import Qwen2Vl
from blipcore.models.systems import SYSTEMS
from blipcore.models.vlm import Vlm
from blipcore.vlm_checkpoint import LoadedVlm, make_reader, marked_tokenizer, save_vlm
from tests.tiny import BUNDLED, TOKENIZER, hub_mirror

SPEECH = ("ask", "chat", "ground")


def can(encoder) -> set[str]:
    return {ability for ability in SPEECH if getattr(encoder, f"can_{ability}")}


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_with_a_language_model_can_what_their_configuration_says(name, tmp_path):
    system, tokenizer = SYSTEMS[name], marked_tokenizer(TOKENIZER)
    torch.manual_seed(0)
    config = system.tiny()
    model = Qwen2Vl(config) if name == "qwen2-vl" else Vlm(config)
    reader = make_reader(system, config, tokenizer, tokenizer if model.reads_instruction else None)
    save_vlm(LoadedVlm(model, reader, system), tmp_path)
    assert abilities(tmp_path) == can(load_encoder(str(tmp_path)))


def test_blips_can_what_their_configuration_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    mirror = hub_mirror(tmp_path / "mirror")
    download("blip-vqa-base", mirror)
    download("blip-base", mirror)
    found = models_here(tmp_path / "none")
    assert list(found) == ["blip-mini", "blip-base", "blip-vqa-base"]
    for name, folder in found.items():
        assert abilities(folder) == can(load_encoder(name)), name
    assert abilities(found["blip-vqa-base"]) == {"ask"}


def test_hub_names_are_told_apart(tmp_path):
    for architecture, expected in {
        "LlavaForConditionalGeneration": {"ask", "chat"},
        "Qwen2VLForConditionalGeneration": {"ask", "chat", "ground"},
        "BlipForImageTextRetrieval": set(),
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}), encoding="utf-8")
        assert abilities(tmp_path) == expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": [["Vlm"]]}', '{"architectures": "Vlm"}'])
def test_broken_configuration_can_nothing(tmp_path, text):
    assert abilities(tmp_path) == set(), "no configuration at all"
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert abilities(tmp_path) == set()


def test_own_models_are_among_those_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    own = tmp_path / "own"
    for name in ("holiday", ".unfinished", "blip-large"):
        (own / name).mkdir(parents=True)
    assert models_here(own) == {"blip-mini": BUNDLED, "holiday": own / "holiday"}
    assert "blip-large" in KNOWN_MODELS, "a known name is no own model"


def test_weights_of_which_a_file_is_missing_are_no_download(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    mirror, known = tmp_path / "mirror", KNOWN_MODELS["qwen2-vl-2b"]
    origin = mirror / known.parts[""]
    origin.mkdir(parents=True)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (origin / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    for name in ("config.json", "tokenizer.json", shards["a"]):
        (origin / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="lacks"):
        download(known.name, mirror)
    assert not is_downloaded(known) and not (tmp_path / "models" / known.name).exists()
    (origin / shards["b"]).write_text("{}", encoding="utf-8")
    assert download(known.name, mirror) == tmp_path / "models" / known.name
    assert is_downloaded(known)
    (tmp_path / "models" / known.name / shards["b"]).unlink()
    assert not is_downloaded(known)


def test_a_download_takes_nothing_away(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    weights = tmp_path / "models" / "llava-1.5-7b" / "pytorch_model.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"mine")
    with pytest.raises(ModelError, match="move it away"):
        download("llava-1.5-7b", tmp_path / "mirror")
    assert weights.read_bytes() == b"mine"


def test_abilities_load_no_torch():
    code = (
        f"import sys; from blipcore.hub import abilities; abilities({str(BUNDLED)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
