"""open_clip models as the first stage: names, loading, vectors as open_clip's own, downloads; a BLIP behind."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blipcore import hub, load
from blipcore.calibration import Scoring
from blipcore.errors import ModelError
from blipcore.open_clip_encoder import OpenClipEncoder
from blipcore.open_clip_names import OpenClipName, find_folder, parse
from tests.open_clip_models import blip_mini_towers, tiny_config, tiny_multilingual, tiny_open_clip, tiny_with_bert
from tests.tiny import BUNDLED, drawn_photo

TEXTS = ["two dogs in the snow", "a red car"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each kind."""
    root = tmp_path_factory.mktemp("open_clip")
    tiny_open_clip(root / "plain", {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"})
    tiny_multilingual(root / "many")
    tiny_with_bert(root / "bert")
    return root


@pytest.fixture(scope="module")
def plain(folders):
    return load(str(folders / "plain"), precision="fp32")


# -- names --------------------------------------------------------------------------------------------------------


def test_names_are_taken_apart(tmp_path):
    assert parse("open_clip:ViT-B-16-SigLIP2") == OpenClipName("ViT-B-16-SigLIP2", None, None, "blip-mini")
    assert parse("open_clip:ViT-B-32/laion2b_s34b_b79k+blip-base")[1::2] == ("laion2b_s34b_b79k", "blip-base")
    named = parse(f"open_clip:ViT-B-32@{tmp_path}/w.safetensors")
    assert named == OpenClipName("ViT-B-32", None, tmp_path / "w.safetensors", "blip-mini")
    (tmp_path / "a+b").mkdir()
    assert parse(f"open_clip:{tmp_path}/a+b").place == tmp_path / "a+b"
    assert parse(f"open_clip:{tmp_path}/a+b+blip-base")[2:] == (tmp_path / "a+b", "blip-base")


@pytest.mark.parametrize(
    "name", ["open_clip:ViT-B-16-SigLIP2", "open_clip:ViT-B-32/openai+blip-base", "open_clip:ViT-B-32@/w.safetensors"]
)
def test_a_name_has_one_spelling(name):
    assert str(parse(name)) == name == hub.canonical_name(name)


@pytest.mark.parametrize("name", ["open_clip:", "open_clip:a b", "open_clip:A/b/c", "open_clip:A/b@w", "open_clip:A+"])
def test_what_is_no_name_is_said(name):
    with pytest.raises(ModelError, match="names no open_clip model: write open_clip:ARCHITECTURE"):
        parse(name)


def test_a_model_that_is_not_here_names_the_command(tmp_path):
    with pytest.raises(ModelError, match="run `photoblip models download open_clip:ViT-B-32/openai`"):
        find_folder(parse("open_clip:ViT-B-32/openai"), tmp_path)
    for tag in ("one", "two"):
        tiny_open_clip(tmp_path / "open_clip" / "ViT-B-32" / tag)
    assert find_folder(parse("open_clip:ViT-B-32/one"), tmp_path).name == "one"
    with pytest.raises(ModelError, match="say which, open_clip:ViT-B-32/one or open_clip:ViT-B-32/two"):
        find_folder(parse("open_clip:ViT-B-32"), tmp_path)


def test_a_blip_is_needed_where_one_is_trained(folders):
    with pytest.raises(ModelError, match="searches, and does nothing else: name a BLIP"):
        hub.find_model(str(folders / "plain"))


# -- vectors --------------------------------------------------------------------------------------------------------


def test_vectors_are_open_clips_own(plain, folders):
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders / 'plain'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders / 'plain'}")
    photos = [drawn_photo(seed, (288, 288)) for seed in range(3)]
    with torch.no_grad():
        images = theirs.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]), normalize=True)
        texts = theirs.encode_text(tokenizer(TEXTS), normalize=True)
    np.testing.assert_allclose(plain.embed_texts(TEXTS), texts.numpy(), atol=1e-5)
    ours = plain.embed_images(photos)
    assert ours.dtype == np.float32 and ours.shape == (3, 16) == (3, plain.dim)
    # the same filter, but rounded to whole grey levels there
    assert ((ours * images.numpy()).sum(1) > 0.9999).all()


def test_the_pixels_of_indexing_and_a_pictures_own_are_the_same_vectors(plain):
    photos = [drawn_photo(seed, (300, 200)) for seed in range(2)]
    assert plain.input_size == 288  # blip-mini's, the larger
    pixels = plain.pixels(photos)
    assert np.array_equal(plain.embed_pixels(pixels), plain.embed_images(photos))
    assert np.array_equal(plain.embed_tokens(plain.image_tokens(pixels)), plain.embed_images(photos))


def test_the_edges_of_a_photo_are_seen_by_models_of_centre_crops(tmp_path):
    encoder = load(str(tiny_open_clip(tmp_path / "crop", {"resize_mode": "shortest"})))
    grey = Image.new("RGB", (900, 300), "grey")
    red = grey.copy()
    red.paste((255, 0, 0), (0, 0, 200, 300))  # a crop to the middle 300 would not show it
    first, second = encoder.embed_images([grey, red])
    assert first @ second < 0.999
    assert encoder.info()["preprocessing"] == "the whole photo squashed to a square; trained on a centre crop"


def test_text_towers_of_other_libraries_are_built_without_the_network(folders):
    for name in ("many", "bert"):
        encoder = load(f"open_clip:{folders / name}", precision="fp32")
        one, other = encoder.embed_texts(TEXTS)
        assert one.shape == (16,) and one @ other < 0.999
        assert encoder.multilingual == (name == "many")


def test_an_architecture_in_weights_of_ones_own(plain, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B-8", tiny_config())
    file = tmp_path / "weights.safetensors"
    shutil.copy(folders / "plain" / "open_clip_model.safetensors", file)
    encoder = load(f"open_clip:Tiny-B-8@{file}", precision="fp32")
    np.testing.assert_allclose(encoder.embed_texts(TEXTS), plain.embed_texts(TEXTS), atol=1e-6)
    assert encoder.name == f"open_clip:Tiny-B-8@{file}" and encoder.fingerprint != plain.fingerprint
    with pytest.raises(ModelError, match="no architecture 'Tiny-B-9': did you mean Tiny-B-8"):
        load(f"open_clip:Tiny-B-9@{file}")


def test_half_precision_gives_the_same_directions(plain, folders):
    half = load(str(folders / "plain"), precision="bf16")
    assert ((half.embed_texts(TEXTS) * plain.embed_texts(TEXTS)).sum(1) > 0.999).all()


# -- the BLIP behind ------------------------------------------------------------------------------------------------


def test_matching_is_the_blips_with_its_own_pixels(plain):
    blip = load("blip-mini", precision="fp32")
    photos = [drawn_photo(seed, (300, 200)) for seed in range(2)]
    pairs = np.array([[0, 0], [1, 0], [1, 1]])
    tokens = plain.image_tokens(plain.pixels(photos))
    expected = blip.match_tokens(blip.image_tokens(blip.pixels(photos)), TEXTS, pairs)
    np.testing.assert_allclose(plain.match_tokens(tokens, TEXTS, pairs), expected, atol=1e-4)
    records = plain.pack_tokens(tokens)
    np.testing.assert_allclose(
        plain.match_tokens(plain.unpack_tokens(records), TEXTS, pairs),
        blip.match_tokens(blip.unpack_tokens(records), TEXTS, pairs),
        atol=1e-4,
    )
    np.testing.assert_allclose(plain.match(photos, TEXTS), blip.match(photos, TEXTS), atol=1e-4)
    assert plain.can_match and plain.can_caption and not plain.can_ask
    assert plain.explain(photos[0], "a red car", ["car"])[0].weights.shape == (18, 18)
    assert plain.caption(photos[:1])[0].text == blip.caption(photos[:1])[0].text


def test_a_smaller_blip_reads_pixels_of_its_own_size(folders):
    class Small:
        input_size, can_match, can_caption, can_ask, name, fingerprint = 24, True, False, False, "small", "f"
        temperature, scoring, device, caption_styles = 0.07, Scoring(), torch.device("cpu"), {}

        def image_tokens(self, pixels):
            assert pixels.shape[1:] == (24, 24, 3)
            return pixels

        def match_tokens(self, tokens, texts, pairs):
            return tokens[pairs[:, 0]].mean((1, 2, 3))

    towers = load(str(folders / "plain"))._towers
    encoder = OpenClipEncoder("both", folders / "plain", towers, Small())
    assert encoder.input_size == 32
    grey = encoder.pixels([Image.new("RGB", (50, 40), (90, 90, 90))])
    assert encoder.match_tokens(grey, ["a"], np.array([[0, 0]])) == 90


def test_the_cosine_weighs_by_the_two_temperatures_and_the_probability_is_itms_own(plain, folders):
    blip = load("blip-mini")
    scale = float(load_file(folders / "plain" / "open_clip_model.safetensors")["logit_scale"].exp())
    scoring = plain.scoring
    assert scoring.itc_weight == pytest.approx(
        blip.scoring.without_crowding().itc_weight * blip.temperature * scale, rel=1e-4
    )
    assert not scoring.calibrated
    margins = np.array([-2.0, 0.0, 3.0])
    assert (np.diff(scoring.probability(margins, np.array([0.9, 0.5, 0.1]))) > 0).all()
    assert scoring.probability(0.0, 0.9) == 0.5


def test_the_fingerprint_covers_both_models(folders, tmp_path):
    first = load(str(folders / "plain")).fingerprint
    shutil.copytree(folders / "plain", tmp_path / "copy")
    assert load(str(tmp_path / "copy")).fingerprint == first  # the same models elsewhere
    weights = load_file(tmp_path / "copy" / "open_clip_model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "copy" / "open_clip_model.safetensors")
    assert load(str(tmp_path / "copy")).fingerprint != first
    shutil.copytree(BUNDLED, tmp_path / "blip")
    settings = json.loads((tmp_path / "blip" / "photoblip.json").read_text())
    (tmp_path / "blip" / "photoblip.json").write_text(json.dumps(settings))
    behind = load(f"open_clip:{folders / 'plain'}+{tmp_path / 'blip'}")
    assert behind.name.endswith(f"+{tmp_path / 'blip'}") and behind.fingerprint == first  # the very same weights
    shutil.rmtree(tmp_path / "blip")


def test_blip_mini_in_open_clips_clothes_scores_as_blip_mini_does(tmp_path):
    both, blip = load(str(blip_mini_towers(tmp_path / "mini")), precision="fp32"), load("blip-mini", precision="fp32")
    np.testing.assert_allclose(both.embed_texts(TEXTS), blip.embed_texts(TEXTS), atol=1e-4)
    assert both.scoring.itc_weight == pytest.approx(blip.scoring.without_crowding().itc_weight, rel=1e-3)
    photos = [drawn_photo(seed) for seed in range(3)]
    cosines = (both.embed_images(photos) * blip.embed_images(photos)).sum(1)
    assert (cosines > 0.9).all()  # at 224 px instead of 288


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def test_pickled_and_foreign_weights_are_refused(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "pickled")
    (tmp_path / "pickled" / "open_clip_model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights, and photoblip loads nothing else"):
        load(str(tmp_path / "pickled"))
    save_file({"something": torch.zeros(1)}, tmp_path / "pickled" / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(tmp_path / "pickled"))


def test_missing_parts_are_named(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "bert")
    (tmp_path / "bert" / "text_config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks text_config\.json: put the config\.json of somebody/bert there"):
        load(str(tmp_path / "bert"))
    shutil.copytree(folders / "many", tmp_path / "many")
    for file in (tmp_path / "many").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer: put the tokenizer\.json .*of somebody/words there"):
        load(str(tmp_path / "many"))
    (tmp_path / "many" / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(ModelError, match="is no configuration of an open_clip model"):
        load(str(tmp_path / "many"))


def test_a_model_that_cannot_match_cannot_stand_behind(folders):
    class Writer:
        name, can_match = "a writer", False

    with pytest.raises(
        ModelError, match="a writer cannot match, which is what stands behind both: use blip-mini there"
    ):
        OpenClipEncoder("both", folders / "plain", None, Writer())


# -- downloads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, folders, monkeypatch):
    """A hub of folders, and open_clip's table of weights pointing at it."""
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    known = {"ours": {"hf_hub": "us/many/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}}
    known["pickled"] = {"hf_hub": "us/pickled/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-B-8", known)
    text = {"vocab_size": 100_000, "width": 8, "hf_tokenizer_name": "somebody/words", "context_length": 24}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B-8", tiny_config(text))
    shutil.copytree(folders / "many", tmp_path / "hub" / "us" / "many")
    (tmp_path / "hub" / "us" / "pickled").mkdir()
    (tmp_path / "hub" / "us" / "pickled" / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config()}))
    return tmp_path / "hub"


def test_a_download_brings_all_that_loading_needs(mirror):
    folder = hub.download("open_clip:Tiny-B-8/ours", mirror)
    assert folder == hub.models_folder() / "open_clip" / "Tiny-B-8" / "ours"
    encoder = load("open_clip:Tiny-B-8")
    assert encoder.multilingual and encoder.embed_texts(["zwei Hunde"]).shape == (1, 16)
    assert hub.models_here(mirror)["open_clip:Tiny-B-8/ours"] == folder
    assert hub.download("open_clip:Tiny-B-8/ours", None) == folder  # it is here: nothing is asked


def test_a_repository_of_weights_alone_is_completed(mirror):
    repository = mirror / "us" / "many"
    (repository / "open_clip_config.json").unlink()
    words = mirror / "somebody" / "words"
    words.mkdir(parents=True)
    for file in repository.glob("tokenizer*"):
        file.rename(words / file.name)
    hub.download("open_clip:Tiny-B-8/ours", mirror)
    encoder = load("open_clip:Tiny-B-8/ours")
    assert encoder.info()["preprocessing"].endswith("trained on the photo squashed to a square")


def test_the_shape_of_a_text_tower_is_brought_along(mirror, folders, monkeypatch):
    shutil.rmtree(mirror / "us" / "many")
    shutil.copytree(folders / "bert", mirror / "us" / "many")
    bert = mirror / "somebody" / "bert"
    bert.mkdir(parents=True)
    (mirror / "us" / "many" / "text_config.json").rename(bert / "config.json")
    hub.download("open_clip:Tiny-B-8/ours", mirror)
    assert load("open_clip:Tiny-B-8/ours").embed_texts(["a dog"]).shape == (1, 16)


def test_what_cannot_be_downloaded_is_said(mirror):
    with pytest.raises(ModelError, match="say which weights of Tiny-B-8: open_clip:Tiny-B-8/ours, open_clip:Tiny-B-8/"):
        hub.download("open_clip:Tiny-B-8", mirror)
    with pytest.raises(ModelError, match="us/pickled has no safetensors weights"):
        hub.download("open_clip:Tiny-B-8/pickled", mirror)
    assert not (hub.models_folder() / "open_clip" / "Tiny-B-8" / "pickled").exists()
    with pytest.raises(ModelError, match="open_clip knows no such model"):
        hub.download("open_clip:Nothing-B-8", mirror)
    with pytest.raises(ModelError, match="lies on this machine already"):
        hub.download(f"open_clip:{mirror}", mirror)


def test_the_models_that_are_suggested_are_ones_that_open_clip_knows():
    for name, known in hub.OPEN_CLIP_MODELS.items():
        assert hub.open_clip_source(name)[1] == known.parts[""]
