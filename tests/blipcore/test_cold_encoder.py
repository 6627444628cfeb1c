"""The encoder that does without PyTorch, against the one that is PyTorch."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blipcore import cold_encoder
from blipcore.checkpoint import save
from blipcore.cold_encoder import ColdEncoder, load_cold_encoder
from blipcore.encoder import BlipEncoder, ModelError, load_encoder
from blipcore.matcher import log_likelihoods, match_logits
from blipcore.models.numpy_blip import NumpyBlip
from blipcore.patches import FORMS, Patches
from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, drawn_photo, hub_mirror, pixels, tiny_blip

TEXTS = ["a cat", "two dogs in the snow", "a black dog runs on a very long red wall", "snow on two roofs"]
HALF = (0.5, 0.5, 0.5)
PAIRS = np.array([(image, text) for image in range(6) for text in range(len(TEXTS))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's folder; its weights are those of float16."""
    return save(tiny_blip(), tmp_path_factory.mktemp("cold") / "tiny", TextTokenizer(TOKENIZER), mean=HALF, std=HALF)


@pytest.fixture
def cold(folder):
    return load_cold_encoder(str(folder))


@pytest.fixture(scope="module")
def whole(folder):
    return load_encoder(str(folder), precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def pictures():
    return [drawn_photo(seed) for seed in range(6)]


def close(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_vectors_and_tokens_are_those_of_pytorch(cold, whole, pictures):
    assert isinstance(cold, ColdEncoder) and isinstance(whole, BlipEncoder)
    read = cold.pixels(pictures)
    assert (read == whole.pixels(pictures)).all()
    assert close(cold.image_tokens(read), whole.image_tokens(read))
    assert close(cold.embed_images(pictures), whole.embed_images(pictures))
    assert close(cold.embed_texts(TEXTS), whole.embed_texts(TEXTS))


@pytest.mark.parametrize("form", FORMS)
def test_scores_of_kept_tokens_are_those_of_pytorch(cold, whole, pictures, form):
    read = cold.pixels(pictures)
    records = cold.pack_tokens(cold.image_tokens(read), form)
    assert [len(each) for each in records] == [len(each) for each in whole.pack_tokens(whole.image_tokens(read), form)]
    tokens, theirs = cold.unpack_tokens(records), whole.unpack_tokens(records)
    for one in (PAIRS, PAIRS[PAIRS[:, 1] == 1], PAIRS[:1]):
        assert close(cold.match_tokens(tokens, TEXTS, one), whole.match_tokens(theirs, TEXTS, one))
        assert close(cold.likelihoods(tokens, TEXTS, one), whole.likelihoods(theirs, TEXTS, one))
    logits = cold.match_tokens(tokens, TEXTS, PAIRS, logits=True)
    assert close(logits, whole.match_tokens(theirs, TEXTS, PAIRS, logits=True))
    assert cold.match_tokens(tokens, TEXTS, PAIRS[:0]).shape == (0,)


def test_merged_tokens_draw_as_much_attention_as_they_stand_for(folder):
    ours, model = NumpyBlip(folder), load_encoder(str(folder), precision="fp32", device="cpu")._model.retrieval
    ids, mask = TextTokenizer(TOKENIZER).arrays(TEXTS[1:2])
    tokens, sizes = model.encode_images(pixels(3)).detach(), torch.tensor([[1.0, 3, 1, 7, 2]]).expand(3, -1)
    pairs = np.array([(image, 0) for image in range(3)])
    asked = torch.from_numpy(ids), torch.from_numpy(mask), pairs
    assert close(
        ours.match_logits(ids, tokens.numpy(), sizes.numpy()), match_logits(model, Patches(tokens, sizes), *asked)
    )
    assert close(
        ours.log_likelihoods(ids, tokens.numpy(), sizes.numpy()), log_likelihoods(model, Patches(tokens, sizes), *asked)
    )
    assert not close(ours.match_logits(ids, tokens.numpy()), match_logits(model, Patches(tokens, sizes), *asked))


def test_it_says_of_itself_what_the_whole_encoder_says(cold, whole):
    for name in ("name", "fingerprint", "input_size", "dim", "scoring", "has_likelihood", "multilingual", "can_match"):
        assert getattr(cold, name) == getattr(whole, name), name
    assert cold.word_pieces("two snowdogs") == whole.word_pieces("two snowdogs")


def test_the_built_in_model_is_read_as_it_is(pictures):
    cold, whole = load_cold_encoder("blip-mini"), load_encoder("blip-mini", precision="fp32", device="cpu")
    assert isinstance(cold, ColdEncoder) and cold.name == "blip-mini"
    assert cold.fingerprint == whole.fingerprint and cold.scoring == whole.scoring and cold.has_likelihood
    assert close(cold.embed_images(pictures[:1]), whole.embed_images(pictures[:1]))
    assert close(cold.embed_texts(TEXTS), whole.embed_texts(TEXTS))


def test_what_it_cannot_do_the_whole_encoder_does(cold, whole, pictures):
    assert cold._loaded is None and cold.can_caption and not cold.can_ask
    assert cold.caption(pictures[:1]) and isinstance(cold.whole, BlipEncoder)
    with pytest.raises(ModelError, match="cannot answer questions"):
        cold.ask(pictures[:1], ["what is it?"])
    assert not hasattr(cold, "nothing_of_the_kind")


@pytest.mark.parametrize("spent_before", ["images", "texts", "pairs"])
def test_what_takes_longer_than_the_import_is_left_to_pytorch(cold, whole, pictures, monkeypatch, spent_before):
    read = cold.pixels(pictures)
    tokens = cold.unpack_tokens(cold.pack_tokens(cold.image_tokens(read)))
    cold._left = 1.0
    if spent_before == "images":
        assert isinstance(cold.image_tokens(read), torch.Tensor)
    elif spent_before == "texts":
        cold.embed_texts(TEXTS)
    else:
        cold.match_tokens(tokens, TEXTS, PAIRS)
    assert cold._loaded is not None
    again = cold.image_tokens(
        read
    )  # from now on everything is PyTorch's, and what NumPy made before is read by it, too
    assert isinstance(again, torch.Tensor)
    records = cold.pack_tokens(again)
    assert isinstance(cold.unpack_tokens(records).features, torch.Tensor)
    kept = whole.unpack_tokens(records)
    for made in (tokens, cold.unpack_tokens(records)):
        margins, theirs = cold.match_tokens(made, TEXTS, PAIRS), whole.match_tokens(kept, TEXTS, PAIRS)
        assert np.abs(margins - theirs).max() < 0.05 * np.abs(theirs).max()  # in bfloat16, where that pays
        likelihoods, theirs = cold.likelihoods(made, TEXTS, PAIRS), whole.likelihoods(kept, TEXTS, PAIRS)
        assert np.abs(likelihoods - theirs).max() < 0.05 * np.abs(theirs).max()
    assert np.abs(cold.embed_tokens(again) - whole.embed_tokens(whole.image_tokens(read))).max() < 0.05


def test_published_checkpoints_are_read_too(tmp_path):
    mirror = hub_mirror(tmp_path / "hub") / "Salesforce"
    folder = tmp_path / "blip-base"
    shutil.copytree(mirror / "blip-itm-base-coco", folder / "retrieval")
    shutil.copytree(mirror / "blip-image-captioning-base", folder / "captioning")
    cold, whole = load_cold_encoder(str(folder)), load_encoder(str(folder), precision="fp32", device="cpu")
    assert isinstance(cold, ColdEncoder) and cold.fingerprint == whole.fingerprint
    assert not cold.has_likelihood and not whole.has_likelihood
    pictures = [drawn_photo(1)]
    assert close(cold.embed_images(pictures), whole.embed_images(pictures))
    pairs = np.array([(0, text) for text in range(len(TEXTS))])
    tokens = cold.image_tokens(cold.pixels(pictures))
    assert close(cold.match_tokens(tokens, TEXTS, pairs), whole.match(pictures, TEXTS))
    with pytest.raises(ModelError, match="no likelihood"):
        cold.likelihoods(tokens, TEXTS, pairs)


def test_weights_of_a_type_that_numpy_lacks_are_left_to_pytorch(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "bf16")
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, other / "model.safetensors")
    assert isinstance(load_cold_encoder(str(other)), BlipEncoder)


def test_a_model_that_is_no_blip_is_left_to_pytorch(tmp_path):
    mirror = hub_mirror(tmp_path / "hub") / "Salesforce"
    assert isinstance(load_cold_encoder(str(mirror / "blip-vqa-base")), BlipEncoder)
    assert isinstance(load_cold_encoder(str(mirror / "blip-image-captioning-base")), BlipEncoder)


@pytest.mark.parametrize("fault", ["incomplete", "cut short", "no config", "no tokenizer", "strange config"])
def test_a_damaged_folder_is_told_as_ever(folder, tmp_path, fault):
    other = shutil.copytree(folder, tmp_path / "damaged")
    weights, config = other / "model.safetensors", other / "config.json"
    if fault == "incomplete":
        state = load_file(weights)
        del state["text_encoder.encoder.layer.1.crossattention.self.key.weight"]
        save_file(state, weights)
    elif fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "no config":
        config.unlink()
    elif fault == "no tokenizer":
        (other / "tokenizer.json").unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"text_config": 3}))
    with pytest.raises(ModelError):
        load_cold_encoder(str(other))


def test_nothing_of_it_imports_pytorch():
    code = (
        "import sys; from blipcore.cold_encoder import load_cold_encoder as load; load('blip-mini').embed_texts(['a'])"
    )
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


def test_the_matrix_library_starts_no_threads_of_its_own(monkeypatch):
    from threadpoolctl import threadpool_info

    seen = cold_encoder._threaded(
        lambda _: [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"], [0]
    )
    assert seen[0] and set(seen[0]) == {1}


def test_the_error_function_is_the_libraries():
    from blipcore.models.numpy_blip import _gelu

    states = np.linspace(-9, 9, 10_001, dtype=np.float32).reshape(1, -1)
    theirs = torch.nn.functional.gelu(torch.from_numpy(states.copy()).double()).numpy()
    assert np.abs(_gelu(states) - theirs).max() < 1e-6
