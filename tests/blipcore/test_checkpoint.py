"""Model folders: saved, loaded, opened by plain transformers, brought from a hub's layout."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor

from blipcore import load
from blipcore.calibration import Scoring
from blipcore.checkpoint import CAPTIONING_KEY_MAPPING, load_folder, save
from blipcore.encoder import BlipEncoder
from blipcore.errors import ModelError
from blipcore.hub import KNOWN_MODELS, download
from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, drawn_photo, hub_mirror, pixels, tiny_blip, tiny_config

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture
def saved(tmp_path):
    model = tiny_blip()
    save(model, tmp_path / "tiny", TextTokenizer(TOKENIZER), mean=MEAN, std=STD, scoring=Scoring(itc_weight=7.0))
    return model, tmp_path / "tiny"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local mirror of the hub with tiny checkpoints under the published names."""
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return hub_mirror(tmp_path / "mirror")


def test_a_saved_model_loads_with_the_same_outputs(saved):
    model, folder = saved
    loaded = load_folder(folder)
    ids, mask = loaded.tokenizer(["a dog", "two cats on a sofa"])
    for left, right in ((model, loaded.retrieval), (model, loaded.captioner)):
        tokens = left.encode_images(pixels())
        again = right.encode_images(pixels())
        torch.testing.assert_close(tokens, again, atol=2e-2, rtol=2e-2)  # saved in half precision
        torch.testing.assert_close(left.match(tokens, ids, mask), right.match(again, ids, mask), atol=3e-2, rtol=3e-2)
    assert loaded.scoring == Scoring(itc_weight=7.0)


def test_towers_come_in_the_precision_asked_for_and_heads_whole(saved):
    model, folder = saved
    loaded = load_folder(folder, dtype=torch.bfloat16).retrieval
    types = {name: weight.dtype for name, weight in loaded.named_parameters()}
    blocks = {types[name] for name in types if ".mlp." in name or name.startswith(("text_encoder.", "text_decoder."))}
    heads = {types[name] for name in types if name.startswith(("vision_proj", "text_proj", "itm_head", "temp"))}
    assert (blocks, heads) == ({torch.bfloat16}, {torch.float32})
    encoder = BlipEncoder(load_folder(folder, dtype=torch.bfloat16), "cpu", "bf16")
    assert torch.equal(encoder._model.retrieval.itm_head.weight, model.itm_head.weight.half().float())
    assert loaded.text_decoder.cls.predictions.decoder.weight is loaded.text_encoder.embeddings.word_embeddings.weight


def test_each_shared_tensor_is_saved_once(saved):
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters())
    assert {t.dtype for t in state.values()} == {torch.float16}


@torch.no_grad()
def test_a_saved_model_opens_in_plain_transformers(saved):
    _, folder = saved
    ids, mask = TextTokenizer(TOKENIZER)(["a dog on a beach"])
    retrieval = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    score = retrieval(input_ids=ids, attention_mask=mask, pixel_values=pixels(1), use_itm_head=False).itm_score
    ours = load_folder(folder).retrieval
    expected = ours.project_images(ours.encode_images(pixels(1))) @ ours.encode_texts(ids, mask).T
    torch.testing.assert_close(score.float(), expected, atol=1e-4, rtol=1e-4)
    captioner = BlipForConditionalGeneration.from_pretrained(folder, key_mapping=CAPTIONING_KEY_MAPPING).eval()
    logits = captioner(pixel_values=pixels(1), input_ids=ids, attention_mask=mask).logits
    tokens = ours.encode_images(pixels(1))
    mine = ours.text_decoder(ids, mask, tokens)
    torch.testing.assert_close(logits.float(), mine, atol=1e-4, rtol=1e-4)


def test_the_processor_of_plain_transformers_reads_pixels_as_we_do(saved):
    _, folder = saved
    processor = BlipProcessor.from_pretrained(folder)
    photo = drawn_photo(0)
    inputs = processor(images=photo, text="a dog", return_tensors="pt")
    encoder = BlipEncoder(load_folder(folder), "cpu", "fp32")
    ours = encoder._model.normalize(encoder.pixels([photo]))
    assert (inputs["pixel_values"] - ours).abs().max() < 0.02  # one of 255 steps of rounding in the resize
    assert inputs["input_ids"][0].tolist() == encoder._model.tokenizer(["a dog"])[0][0].tolist()


def test_hub_checkpoints_download_load_match_and_caption(mirror):
    folder = download("blip-base", mirror)
    assert (folder / "retrieval" / "config.json").exists()
    encoder = load("blip-base", device="cpu", precision="fp32")
    photos = [drawn_photo(seed) for seed in range(3)]
    assert encoder.embed_images(photos).shape == (3, 256)
    assert encoder.match(photos, ["a dog"]).shape == (3,)
    captions = encoder.caption(photos)
    assert len(captions) == 3 and all(0 <= c.score <= 1 for c in captions)
    retrieval = BlipForImageTextRetrieval.from_pretrained(folder / "retrieval").eval()
    ids, mask = encoder._model.tokenizer(["a dog"])
    ids[:, 0] = 30523
    inputs = encoder._model.normalize(encoder.pixels(photos[:1]))
    with torch.no_grad():
        logits = retrieval(input_ids=ids, attention_mask=mask, pixel_values=inputs).itm_score[0]
    assert encoder.match(photos[:1], ["a dog"])[0] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-4)


def test_a_model_not_downloaded_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path))
    with pytest.raises(ModelError, match="photoblip models download blip-base"):
        load("blip-base")


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(ModelError, match="blip-mini, blip-base"):
        load("blip-huge")


def test_an_offline_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", _refused)
    with pytest.raises(ModelError, match="could not be downloaded"):
        download("blip-base")
    assert not (tmp_path / "blip-base" / "retrieval").exists()


def _refused(*_, **__):
    raise ConnectionError("no route")


def test_a_broken_download_is_taken_up_again(mirror, tmp_path):
    (tmp_path / "models" / "blip-base" / ".retrieval.part").mkdir(parents=True)
    (tmp_path / "models" / "blip-base" / ".retrieval.part" / "config.json").write_text("{")
    download("blip-base", mirror)
    assert load("blip-base", device="cpu").can_match


def test_pickled_weights_are_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    with pytest.raises(ModelError, match="no safetensors"):
        load(str(tmp_path))


def test_missing_weights_are_named(saved):
    from safetensors.torch import save_file

    _, folder = saved
    state = load_file(folder / "model.safetensors")
    del state["itm_head.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"itm_head\.weight"):
        load(str(folder))


def test_damaged_weights_are_one_sentence(saved):
    _, folder = saved
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="damaged"):
        load(str(folder))


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    with pytest.raises(ModelError, match="not a BLIP"):
        load(str(tmp_path))


def test_answers_do_not_depend_on_the_batch(mirror):
    download("blip-vqa-base", mirror)
    encoder = load("blip-vqa-base", device="cpu", precision="fp32")
    photo = drawn_photo(0)
    question, long = "what is it", "how many very small people in red coats are standing behind the house"
    alone = encoder.ask([photo], [question])
    assert encoder.ask([photo, photo], [question, long])[0] == alone[0]


def test_a_model_without_answers_says_which_has_them(saved):
    _, folder = saved
    with pytest.raises(ModelError, match="blip-vqa-base"):
        load(str(folder)).ask([drawn_photo(0)], ["what is it"])


def test_every_known_model_states_size_and_licence():
    for known in KNOWN_MODELS.values():
        assert known.gigabytes > 0 and known.licence and known.what


def test_fingerprints_tell_weights_apart(tmp_path):
    for seed in (0, 1):
        save(tiny_blip(seed), tmp_path / str(seed), TextTokenizer(TOKENIZER), mean=MEAN, std=STD)
    first, second = (load(str(tmp_path / str(seed))).fingerprint for seed in (0, 1))
    assert first != second
    assert np.char.isalnum(first)


def test_a_folders_name_loads_it_again(saved, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(folder.parent)
    name = load(folder.name, device="cpu").name
    monkeypatch.chdir("/")
    assert load(name, device="cpu").can_match
