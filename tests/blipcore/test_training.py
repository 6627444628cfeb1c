"""The recipes, on drawn photos and a tiny model: they run, they learn, they write what they should."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from blipcore.captioned import CaptionedPhotos, load_captioned, open_captioned
from blipcore.checkpoint import load_folder, save
from blipcore.encoder import load_encoder
from blipcore.errors import ModelError
from blipcore.evaluation import Pool, retrieval
from blipcore.layouts import write_shard
from blipcore.models import presets
from blipcore.models.weights import renamed
from blipcore.training import prototypes, recipe_names, run_recipe
from blipcore.training.datasets import CaptionedBatches, FrozenPrefixCache
from blipcore.training.distillation import divergence
from blipcore.training.loop import AveragedWeights, cosine_with_warmup, parameter_groups
from blipcore.training.prototypes import ClassNames, ClassPrototypes
from blipcore.training.recipes import (
    blip_mini,
    finetune_captioning,
    finetune_retrieval,
    names,
    package_model,
    pretrain_blip,
)
from blipcore.training.starts import TIMM_VIT, load_text_start
from blipcore.training.wordnet import WordNet
from blipcore.transforms import Normalizer, TextTokenizer, squash
from tests.tiny import (
    SHARED_DATA,
    TOKENIZER,
    drawn_photo,
    needs_shared_data,
    starting_weights,
    tiny_blip,
    tiny_config,
)

WORDS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]


@pytest.fixture
def captioned(tmp_path):
    """Eight drawn photos a split, each with two captions."""
    lines = ["file\tcaption_index\tcaption"]
    for split, offset in (("train", 0), ("dev", 100)):
        (tmp_path / split).mkdir()
        for number, word in enumerate(WORDS):
            name = f"{split}{number}.png"
            drawn_photo(offset + number).save(tmp_path / split / name)
            lines += [f"{name}\t0\tA {word} thing .", f'{name}\t1\tsomething "{word}" here']
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny_config)


def settings(data, out, **values) -> blip_mini.Settings:
    vision, text = starting_weights(data)
    defaults = {"preset": "tiny", "frozen_blocks": 1, "views": 2, "minutes": 0.05, "batch_size": 8, "joint_size": 8}
    defaults |= {"group": 4, "texts_per_image": 3, "warmup": 1, "evaluate_every": 0, "prototypes": 4}
    return blip_mini.Settings(
        data=(f"{data}:train",), dev=f"{data}:dev", out=out, tokenizer=TOKENIZER, vision_start=vision, text_start=text,
        **(defaults | values),
    )  # fmt: skip


def test_the_joint_stage_trains_what_is_not_frozen(captioned, tmp_path, tiny_preset):
    run = blip_mini.Run(settings(captioned, tmp_path / "out"))
    run.model.train()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    losses = run.step(next(run.batches()))
    for name, parameter in run.model.named_parameters():
        frozen = name.startswith(("vision_model.embeddings", "vision_model.encoder.layers.0."))
        # the decoder's pooler and the like do not exist; every other weight has a gradient
        assert torch.equal(parameter, before[name]) == frozen, name
    assert {"itc", "itm", "listwise", "lm", "prototype", "drift", "temp"} <= losses.keys()


def test_the_matching_stage_leaves_the_whole_tower_and_reads_its_final_tokens(
    captioned, tmp_path, tiny_preset, tiny_wordnet
):
    blip_mini.train(settings(captioned, tmp_path / "joint"))
    earlier = torch.load(tmp_path / "joint" / "weights.pt", weights_only=True)
    start = str(tmp_path / "joint" / "weights.pt")
    run = blip_mini.Run(settings(captioned, tmp_path / "matching", stage="matching", start=start, **tiny_wordnet))
    with torch.no_grad():
        size = run.model.config.vision_config.image_size
        pixels = run.normalize(squash(run.corpus.photos.image(3), size)[None])
        tokens = run.model.eval().encode_images(pixels)
    hidden, _ = run.cache.batch(np.array([3]), np.array([0]))
    torch.testing.assert_close(hidden, tokens, atol=0.1, rtol=0.1)  # bf16, then fp16
    run.model.train()
    run.step(next(run.batches()))
    for name, parameter in run.model.vision_model.named_parameters():
        assert torch.equal(parameter, earlier["vision_model." + name]), name
    assert not torch.equal(run.model.itm_head.weight, earlier["itm_head.weight"])


def test_training_lowers_the_losses_and_logs(captioned, tmp_path, tiny_preset):
    plain = {"dropout": 0.0, "word_masking": 0.0, "soften": 0.0, "prototype_weight": 0.0, "alignment_weight": 0.0}
    rates = {"rate": 1e-3, "text_rate": 1e-3, "vision_rate": 1e-3}
    torch.manual_seed(0)
    run = blip_mini.Run(settings(captioned, tmp_path / "out", **plain, **rates))
    run.model.train()
    run.settings.minutes = 60
    batches = run.batches()
    losses = [run.step(next(batches)) for _ in range(150)]
    for name in ("itc", "lm"):
        first, last = (np.mean([row[name].item() for row in part]) for part in (losses[:5], losses[-5:]))
        assert last < 0.8 * first, name
    figures = run.evaluate(queries=8, k=4)
    assert {"t2i", "i2t", "itm_r1", "fused_r1"} <= figures.keys()


def test_every_text_meets_as_many_images_and_never_its_own_twice():
    columns = blip_mini.pairings(16, 4, 4, np.random.default_rng(0))
    assert (columns[:, 0] == np.arange(16)).all()
    assert all(sorted(column) == list(range(16)) for column in columns.T)
    assert all(len(set(row)) == 4 for row in columns.tolist())
    assert (columns[:, 1:3] // 4 == np.arange(16)[:, None] // 4).all()  # look-alikes
    assert (columns[:, 3] // 4 != np.arange(16) // 4).all()  # any other


def test_matching_losses_against_plain_arithmetic_with_a_near_twin_left_out():
    margins = torch.tensor([[2.0, -1.0], [0.3, 0.2]])
    columns, counted = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, False], [True, True]])
    prior = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    binary, listwise, accuracy = blip_mini.matching_losses(margins, columns, counted, prior)
    positive = -(torch.sigmoid(margins[:, 0]).log().mean())
    negative = -(1 - torch.sigmoid(margins[1, 1])).log()  # the only pair that counts
    torch.testing.assert_close(binary, (positive + 2 * negative) / 3)
    ranked = margins + prior
    of_images = -ranked[1].log_softmax(0)[0] / 2  # image 0 has no negative left: nothing to lose
    of_texts = -torch.stack([ranked[0, 0], ranked[1, 1]]).log_softmax(0)[0] / 2
    torch.testing.assert_close(listwise, (of_images + of_texts) / 2)
    assert accuracy == pytest.approx((1 + 2 * 0) / 3)


def test_groups_hold_look_alikes_and_an_epoch_repeats_nobody():
    centres = torch.eye(4).repeat_interleave(12, 0)
    features = torch.nn.functional.normalize(centres + 0.01 * torch.randn(48, 4), dim=1)
    batches = blip_mini.grouped_batches(features, 4, 8, np.random.default_rng(0))
    rows = np.concatenate(batches)
    assert len(rows) == 48 == len(set(rows.tolist()))
    kinds = [len(set(group)) for group in (rows.reshape(-1, 4) // 12).tolist()]
    assert np.mean(kinds) < 2.4  # random groups of 4 hold 2.8 of 4 kinds


def test_dropout_keeps_the_mean_and_rests_in_evaluation():
    drop = blip_mini.Dropout(0.25, size=1 << 16)
    ones = torch.ones(100, 100, requires_grad=True)
    dropped = drop(ones)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    with torch.no_grad():
        assert torch.equal(drop(ones), ones)


def test_a_run_becomes_a_model_folder(captioned, tmp_path, tiny_preset, monkeypatch):
    blip_mini.train(settings(captioned, tmp_path / "run"))
    monkeypatch.setattr(package_model, "fit_platt", lambda *_: (2.0, 0.5))  # two steps separate nothing
    package_model.package(tmp_path / "run", captioned, tmp_path / "model", k=4, queries=8)
    encoder = load_encoder(str(tmp_path / "model"), device="cpu")
    assert encoder.scoring.calibrated and encoder.scoring.scale == 2.0
    itc, itm = retrieval(captioned, "dev", encoder, rerank=4)
    assert (itc["stage"], itm["stage"]) == ("itc", "itm")
    assert itc["photos"] == 8 and itc["texts"] == 16
    assert 0 <= itc["t2i"]["r1"] <= itc["t2i"]["r5"] <= itc["t2i"]["r10"] <= 100


def test_the_probability_is_fitted_on_what_people_type_too():
    captions = [["A brown dog is on the grass.", "the dogs run"], ["two dogs play"], ["a cat looks at the camera"]] * 4
    texts = [text for own in captions for text in own]
    owners = np.array([photo for photo, own in enumerate(captions) for _ in own])
    pool = Pool(torch.zeros(12, 1, 1), texts, owners, np.zeros((len(texts), 12)), np.zeros(12), np.zeros(len(texts)))
    package = package_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "COMMON", 0.7)
        found = {name: said.nonzero()[0].tolist() for name, said in package.spoken_of(pool).items()}
    assert found["dog"] == [0, 1, 3, 4, 6, 7, 9, 10] and found["brown dog"] == [0, 3, 6, 9]
    assert "camera" not in found


def test_packaging_refuses_a_matcher_that_tells_nothing(captioned, tmp_path, tiny_preset, monkeypatch):
    blip_mini.train(settings(captioned, tmp_path / "run"))
    monkeypatch.setattr(package_model, "fit_platt", lambda *_: (-1.0, 0.0))
    with pytest.raises(ValueError, match="train longer"):
        package_model.package(tmp_path / "run", captioned, tmp_path / "model", k=4, queries=8)


@pytest.mark.parametrize("options", [[], ["--queue", "0"]])
def test_retrieval_fine_tuning_learns_and_writes_a_model(captioned, tmp_path, options):
    start = write_tiny(tmp_path)
    arguments = ["--data", str(captioned), "--split", "train", "--dev", "dev", "--start", str(start)]
    arguments += ["--out", str(tmp_path / "out"), "--steps", "40", "--batch-size", "8", "--rate", "1e-3"]
    figures = finetune_retrieval.main([*arguments, *(options or ["--queue", "16"]), "--precision", "fp32"])
    assert {"t2i", "i2t"} <= figures.keys()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    encoder = load_encoder(str(tmp_path / "out" / "model"), device="cpu")
    assert encoder.can_match and encoder.fingerprint != load_encoder(str(start), device="cpu").fingerprint


def test_caption_fine_tuning_learns_the_words(captioned, tmp_path):
    start = write_tiny(tmp_path)
    arguments = ["--data", str(captioned), "--split", "train", "--start", str(start), "--out", str(tmp_path / "out")]
    finetune_captioning.main(
        [*arguments, "--steps", "60", "--batch-size", "8", "--rate", "5e-3", "--precision", "fp32"]
    )
    encoder = load_encoder(str(tmp_path / "out" / "model"), device="cpu")
    captions = [caption.text for caption in encoder.caption([drawn_photo(0)], candidates=1)]
    assert "thing" in captions[0] or "something" in captions[0]


def test_a_captioner_alone_is_fine_tuned_and_opens_again(captioned, tmp_path):
    save(tiny_blip(retrieval=False), tmp_path / "start", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    arguments = ["--data", str(captioned), "--split", "train", "--start", str(tmp_path / "start"), "--steps", "2"]
    finetune_captioning.main([*arguments, "--batch-size", "4", "--out", str(tmp_path / "out"), "--precision", "fp32"])
    encoder = load_encoder(str(tmp_path / "out" / "model"), device="cpu")
    assert encoder.can_caption and not encoder.can_match


def test_the_same_seed_is_the_same_run(captioned, tmp_path, tiny_preset):
    arguments = ["--data", str(captioned), "--split", "train", "--tokenizer", str(TOKENIZER), "--preset", "tiny"]
    arguments += ["--steps", "2", "--batch-size", "4", "--queue", "8", "--image-size", "32", "--precision", "fp32"]
    weights = []
    for out in ("one", "two"):
        torch.manual_seed(len(weights))  # whatever was drawn before
        pretrain_blip.main([*arguments, "--out", str(tmp_path / out)])
        weights.append(torch.load(tmp_path / out / "weights.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_photos_of_two_shards_with_the_same_names_are_two_photos(tmp_path):
    for number in range(2):
        drawn_photo(number).save(held := BytesIO(), "PNG")
        write_shard(tmp_path / f"{number}.tar", [("000", {"png": held.getvalue(), "txt": b"a thing"})])
    source = open_captioned(tmp_path)
    batches = CaptionedBatches(TextTokenizer(TOKENIZER), Normalizer((0.5,) * 3, (0.5,) * 3), 32)
    ids = batches.collate([batches.transform(source[i], np.random.default_rng(0)) for i in (0, 1, 0)])["ids"]
    assert ids[0] == ids[2] != ids[1]


def test_pretraining_as_the_paper_runs_from_public_towers(captioned, tmp_path, tiny_preset):
    vision, text = starting_weights(tmp_path)
    arguments = ["--data", str(captioned), "--split", "train", "--dev", "dev", "--tokenizer", str(TOKENIZER)]
    arguments += ["--preset", "tiny", "--image-size", "64", "--vision-start", str(vision), "--text-start", str(text)]
    arguments += ["--steps", "3", "--batch-size", "4", "--queue", "8", "--warmup", "1", "--out", str(tmp_path / "out")]
    figures = pretrain_blip.main([*arguments, "--precision", "fp32", "--accumulate", "2"])
    assert {"t2i", "i2t"} <= figures.keys()
    weights = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    assert weights["vision_model.embeddings.position_embedding"].shape == (1, 17, 32)


def test_what_a_user_gets_wrong_is_one_sentence(captioned, tmp_path):
    with pytest.raises(ModelError, match="neither"):
        finetune_captioning.main(["--data", str(captioned), "--split", "nowhere", "--out", str(tmp_path / "out")])


def write_tiny(folder):
    save(tiny_blip(), folder / "start", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    return folder / "start"


def test_recipes_are_found_by_name():
    names = {"blip_mini", "pretrain_blip", "finetune_retrieval", "finetune_captioning", "package_model"}
    assert names <= set(recipe_names())
    with pytest.raises(SystemExit) as stopped:
        run_recipe("pretrain_blip", ["--help"])
    assert stopped.value.code == 0


def test_the_frozen_prefix_gives_what_the_tower_gives(tmp_path):
    model, normalize = tiny_blip(), Normalizer((0.5,) * 3, (0.5,) * 3)
    blobs = []
    for seed in range(3):
        drawn_photo(seed).save(held := BytesIO(), "PNG")
        blobs.append(held.getvalue())
    photos = CaptionedPhotos(["a", "b", "c"], blobs, [["x"]] * 3)
    cache = FrozenPrefixCache(tmp_path, photos, views=2, block=1)
    cache.build(model, normalize)
    hidden, class_tokens = cache.batch(np.array([2, 0]), np.array([0, 0]))
    inputs = normalize(np.stack([squash(photos.image(i), 32) for i in (2, 0)]))
    with torch.no_grad():
        whole = model.encode_images(inputs)
        torch.testing.assert_close(model.encode_from(hidden, 1), whole, atol=0.1, rtol=0.1)  # bf16, then fp16
    torch.testing.assert_close(class_tokens, whole[:, 0], atol=0.1, rtol=0.1)
    stamp = (tmp_path / "class_token-3x2-block1.npy").stat().st_mtime_ns
    FrozenPrefixCache(tmp_path, photos, views=2, block=1).build(model, normalize)
    assert (tmp_path / "class_token-3x2-block1.npy").stat().st_mtime_ns == stamp


def test_captions_without_the_columns_are_named(tmp_path):
    (tmp_path / "captions.tsv").write_text("name\ttext\na.png\tx\n")
    with pytest.raises(ValueError, match="columns file and caption"):
        load_captioned(tmp_path, None)


def test_a_missing_split_says_what_was_looked_for(captioned):
    with pytest.raises(FileNotFoundError, match=r"test\.tar"):
        load_captioned(captioned, "test")


def test_prototypes_lie_where_the_classifier_names_them():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (10, 16))
    features = np.concatenate([centre + 0.3 * rng.normal(0, 1, (200, 16)) for centre in centres])
    within = np.linalg.inv(0.09 * np.eye(16))
    rows = torch.tensor((centres - centres.mean(0)) @ within, dtype=torch.float32)
    bias = -0.5 * (rows * torch.tensor(centres, dtype=torch.float32)).sum(1)
    names = ClassNames([[f"class{i}"] for i in range(10)], [["even", "thing"] if i % 2 == 0 else [] for i in range(10)])
    learnt = ClassPrototypes(rows, bias, names, features)
    assert learnt.top1() > 0.9
    drawn, classes = learnt.sample(5, np.random.default_rng(1))
    assert drawn.shape == (5, 16) and len(set(classes.tolist())) == 5
    texts, drawn_names, same = learnt.describe(np.array([0, 2, 3] * 20), np.random.default_rng(1))
    general = next(i for i, text in enumerate(texts) if "even" in text)
    assert same[:, general].tolist() == [True, True, False] * 20
    specific = next(i for i, text in enumerate(texts) if "class3" in text)
    assert same[:, specific].tolist() == [False, False, True] * 20
    assert drawn_names[specific] == "class3"
    # texts that ask exactly what the classifier asks are aligned, whatever they share; others are not
    own = [f"class{i}" for i in range(10)]
    asked = learnt.rows + torch.randn(16)
    assert learnt.misalignment(torch.eye(16), asked, own).item() == pytest.approx(0, abs=1e-4)
    assert learnt.misalignment(torch.eye(16), asked.roll(1, 0), own).item() > 0.5
    assert learnt.drift(drawn, drawn).item() == pytest.approx(0, abs=1e-6)
    assert learnt.drift(drawn + 1, drawn).item() > 0


WORDNET = """
00000010 06 n 02 airliner 0 jetliner 0 001 @ 00000020 n 0000 | a big one
00000020 06 n 02 airplane 0 plane 1 002 @ 00000025 n 0000 ~ 00000010 n 0000 | it flies
00000025 06 n 01 aircraft 0 001 @ 00000030 n 0000 | what flies
00000026 06 n 01 helicopter 0 001 @ 00000025 n 0000 | it hovers
00000030 06 n 01 vehicle 0 000 | it moves
00000040 18 n 01 airliner 1 000 | another sense
00000050 05 n 01 tench 0 001 @ 00000060 n 0000 | a fish
00000060 05 n 01 fish 0 000 | it swims
00000061 05 n 01 carp 0 001 @ 00000060 n 0000 | it swims too
00000062 05 n 01 Cyprinus_carpio_12 0 001 @ 00000060 n 0000 | not a plain word
00000063 13 n 01 bass 0 001 @ 00000064 n 0000 | its lean flesh
00000064 13 n 01 dish 0 000 | what is eaten
00000065 05 n 01 bass 1 001 @ 00000060 n 0000 | a spiny fish
00000070 12 n 01 joy 0 001 @ 00000030 n 0000 | not concrete
00000080 06 n 01 stone 0 000 | near nothing
"""


@pytest.fixture
def wordnet(tmp_path):
    """A few meanings in WordNet's own format."""
    write_wordnet(tmp_path, WORDNET)
    return WordNet(tmp_path)


def write_wordnet(folder, meanings: str) -> None:
    senses: dict[str, list[str]] = {}
    for line in meanings.strip().splitlines():
        fields = line.split()
        for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
            senses.setdefault(word.lower(), []).append(fields[0])
    index = [f"{w} n {len(at)} 1 @ {len(at)} 0 {' '.join(at)}  " for w, at in senses.items()]
    for name, lines in (("data.noun", meanings.strip().splitlines()), ("index.noun", index)):
        (folder / name).write_text("\n".join(["  1 a line of the licence", *lines]) + "\n")


def test_kinds_come_from_wordnets_files(wordnet):
    own = [["airliner", "jetliner"], ["unheard of"]]
    names = ClassNames(own, prototypes._kinds(own, wordnet))
    assert names.kinds == [["airplane", "plane", "aircraft", "vehicle"], []]
    drawn = set(names.draw(np.zeros(400, int), np.random.default_rng(0)))
    assert drawn == {"airliner", "jetliner", "airplane", "plane", "aircraft", "vehicle"}
    assert wordnet.is_noun("planes") and not wordnet.is_noun("runs")


@pytest.fixture
def weights_of_tiny(tmp_path):
    return str(save(tiny_blip(), tmp_path / "tiny", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3))


SENSES = """
00000041 27 n 01 leopard 0 001 @ 00000030 n 0000 | its fur
00000042 12 n 01 mean 0 001 @ 00000030 n 0000 | a feeling
00000043 12 n 01 mean 1 001 @ 00000030 n 0000 | another
00000044 12 n 01 mean 2 001 @ 00000030 n 0000 | a third
00000066 05 n 01 leopard 1 001 @ 00000060 n 0000 | a spotted cat
00000067 06 n 01 mean 3 001 @ 00000030 n 0000 | a device that nobody means
00000068 05 n 01 silver_carp 0 001 @ 00000060 n 0000 | it swims as well
"""


def test_names_come_with_what_wordnet_says_known_ones_and_single_words_first(tmp_path):
    write_wordnet(tmp_path, WORDNET.rstrip() + SENSES)
    wordnet = WordNet(tmp_path)
    known = names.known_names([["two Carps", "a carp"], ["a big thing"]], 2, imagenet=False)
    assert known("carp") and not known("thing") and not known("carp thing")
    found = names.names_of_things(wordnet, known, 100)
    assert (found[0].name, found[-1].name) == ("carp", "silver carp")
    by_name = {name.name: name for name in found}
    assert "stone" not in by_name and "fish" not in by_name and "joy" not in by_name  # no kind, or not to be seen
    assert by_name["plane"].synonyms == ["airplane"] and by_name["plane"].kind == "aircraft"
    assert by_name["carp"].described() == ("carp, a kind of fish", "carp, it swims too")
    assert by_name["bass"].kind == "fish"  # the animal before the dish that people speak of more
    assert by_name["leopard"].gloss == "a spotted cat"  # not its fur, which is meant more often
    assert "mean" not in by_name  # the device is hardly ever meant
    assert {name: by_name[name].drawn() for name in ("carp", "plane", "silver carp")} == {
        "carp": 3,
        "plane": 3,
        "silver carp": 1,
    }
    assert names.names_of_things(wordnet, known, 1)[0].name == "carp"  # what is known is there to be held
    assert len(names.names_of_things(wordnet, known, 3)) == 3


def test_the_names_of_imagenets_classes_may_count_as_known():
    known = names.known_names([], 2, imagenet=True)
    assert known("goldfish") and not known("ibis")


def names_settings(captioned, tmp_path, start: str, out: str, **values) -> names.Settings:
    defaults = {"steps": 50, "batch_size": 16, "rate": 1e-3, "device": "cpu", "precision": "fp32", "read": 4}
    defaults |= {"captions": 8, "pairs": 4, "often": 2, "warmup": 1}
    return names.Settings(
        data=captioned, split="train", wordnet=tmp_path, start=start, out=tmp_path / out, **(defaults | values)
    )


def test_bare_names_learn_what_the_described_ones_find_and_the_rest_stays(
    captioned, tmp_path, wordnet, weights_of_tiny
):
    loaded = load_folder(Path(weights_of_tiny))
    s = names_settings(captioned, tmp_path, weights_of_tiny, "out", dev="dev")
    known = names.known_names([["a tench"]], 1, imagenet=False)
    things = names.names_of_things(wordnet, known, s.names)
    before = names.what_it_knows(loaded, open_captioned(captioned, "train"), things, s)
    assert before.photos.shape == (8, 256) and len(before.tokens) == 4
    bare = names._embed(loaded.retrieval, loaded.tokenizer, [thing.name for thing in things])
    stays = torch.isclose(bare, before.wanted, atol=1e-3).all(1)
    assert [thing.name for thing, each in zip(things, stays, strict=True) if each] == ["tench"]  # which is known

    def away(model) -> tuple[float, float]:
        """How far the bare names' order of the photos is from that of the described, and captions from the start's."""
        with torch.no_grad():
            bare = names._embed(model, loaded.tokenizer, [thing.name for thing in things])
            lines = [text for word in WORDS for text in (f"A {word} thing .", f'something "{word}" here')]
            ids, mask = loaded.tokenizer(lines)
            moved = 1 - (names.text_vectors(model, ids, mask) * names.text_vectors(loaded.retrieval, ids, mask)).sum(1)
            scores = [each @ before.photos.T / s.temperature for each in (bare, before.wanted)]
            return divergence(*scores).item(), moved.max().item()

    figures = names.train(s)
    assert {"t2i", "i2t"} <= figures.keys()
    after = load_folder(tmp_path / "out" / "model").retrieval
    assert away(after)[0] < 0.5 * away(loaded.retrieval)[0]
    assert away(after)[1] < 0.05
    trained = "text_encoder.encoder.layer."
    for name, parameter in loaded.retrieval.state_dict().items():
        own = name.replace("text_decoder.bert.", "text_encoder.")  # shared, but for self-attention
        shared = own.startswith(trained) and (name == own or ".attention." not in name)
        learnt = (
            (shared and ".crossattention." not in name)
            or "word_embeddings" in name
            or "cls.predictions.decoder" in name
        )
        if not learnt:
            torch.testing.assert_close(after.state_dict()[name], parameter, atol=1e-3, rtol=1e-3, msg=name)
    words = "text_encoder.embeddings.word_embeddings.weight"
    ids = {word: loaded.tokenizer([word])[0][0, 1].item() for word in ("red", "carp")}
    moved = (after.state_dict()[words] - loaded.retrieval.state_dict()[words]).abs().amax(1)
    assert moved[ids["red"]] < 1e-3 < moved[ids["carp"]]  # captions say red; float16 rounds


def test_what_itm_and_the_decoder_say_is_held(captioned, tmp_path, wordnet, weights_of_tiny):
    """They share weights with the text tower, and move by a fraction of what they would."""
    loaded = load_folder(Path(weights_of_tiny))
    s = names_settings(captioned, tmp_path, weights_of_tiny, "held")
    photos = open_captioned(captioned, "train")
    things = names.names_of_things(wordnet, lambda _: False, 9)
    before = names.what_it_knows(loaded, photos, things, s)
    texts = names.Texts(things, [photos.texts_of(row) for row in range(4)], loaded.tokenizer, s)
    batch = texts.collate([texts.transform(0, np.random.default_rng(seed)) for seed in range(8)])
    objective = names.Naming(loaded.retrieval, before, s)

    def moved(**values) -> tuple[float, float]:
        run = names_settings(captioned, tmp_path, weights_of_tiny, f"run{len(values)}", **values)
        names.train(run)
        after = load_folder(run.out / "model").retrieval
        with torch.no_grad():
            pairs = zip(objective._read(after, batch), objective._read(loaded.retrieval, batch), strict=True)
            return tuple((now - then).abs().mean().item() for now, then in pairs)

    held, free = moved(), moved(hold_matching=0.0, hold_writing=0.0)
    assert held[0] < 0.5 * free[0] and held[1] < 0.5 * free[1], (held, free)


def test_names_need_a_wordnet_that_names_something(captioned, tmp_path, wordnet, weights_of_tiny):
    (tmp_path / "data.noun").write_text("00000080 06 n 01 stone 0 000 | near nothing\n")
    (tmp_path / "index.noun").write_text("stone n 1 0 1 0 00000080  \n")
    with pytest.raises(ModelError, match="names no things that can be seen"):
        names.train(names_settings(captioned, tmp_path, weights_of_tiny, "x"))


def test_other_nouns_know_the_classes_nearest_to_them(wordnet):
    own = [["airliner", "jetliner"], ["tench"]]
    classes = ClassNames(own, prototypes._kinds(own, wordnet))
    others = prototypes.OtherNouns(classes, wordnet, common={"carp"})
    near = dict(zip(others.names, others.nearest.tolist(), strict=True))
    # names and kinds of the classes, what is not concrete or plain, and what is near to no class are left out
    assert near == {"helicopter": [True, False], "carp": [False, True]}
    assert others.weights[others.names.index("carp")] > 5 * others.weights[others.names.index("helicopter")]
    texts, nearest = others.sample(2, np.random.default_rng(0))
    assert all(("carp" in text) == bool(row[1]) for text, row in zip(texts, nearest, strict=True))


def test_caption_nouns_are_said_of_photos(wordnet, monkeypatch):
    monkeypatch.setattr(prototypes.CaptionNouns, "FEWEST", 1)
    captions = [["a fish and planes", "the fish"], ["vehicle"], ["two planes run"], ["run"], ["it"], ["it"], ["it"]]
    nouns = prototypes.CaptionNouns(captions, wordnet)
    said = {name: nouns.said[:, column].nonzero().ravel().tolist() for column, name in enumerate(nouns.names)}
    assert said == {"fish": [0], "planes": [0, 2], "vehicle": [1]}


def test_names_that_people_use_of_other_things_are_dropped(wordnet, monkeypatch):
    monkeypatch.setattr(prototypes.CaptionNouns, "FEWEST", 1)
    captions = [["a fish"], ["an airliner and a vehicle"], ["a plane"], *[["people"]] * 17]
    nouns = prototypes.CaptionNouns(captions, wordnet)
    belief = torch.full((20, 2), 0.01)  # an airliner, a fish
    belief[1:3, 0], belief[5, 1] = 0.9, 0.9
    names = ClassNames([["airliner", "plane"], ["tench", "fish"]], [["vehicle"], []])
    assert names.drop_other_meanings(nouns, belief) == ["fish"]
    assert names.own == [["airliner", "plane"], ["tench"]] and names.kinds == [["vehicle"], []]
    assert set(names.members) == {"airliner", "plane", "vehicle", "tench"}


def test_what_is_behind_the_camera_is_not_said_of_a_photo(wordnet, monkeypatch):
    monkeypatch.setattr(prototypes.CaptionNouns, "FEWEST", 1)
    monkeypatch.setattr(wordnet, "is_noun", lambda word: word in {"camera", "man"})
    captions = [["A man looks at the camera"], ["a man holds a camera"], *[["it"]] * 8]
    nouns = prototypes.CaptionNouns(captions, wordnet)
    said = {name: nouns.said[:, column].nonzero().ravel().tolist() for column, name in enumerate(nouns.names)}
    assert said == {"man": [0, 1], "camera": [1]}
    assert prototypes.without_camera("Two boys pose for a picture .") == "Two boys pose ."
    assert (
        prototypes.without_camera("He takes pictures for the photographer") == "He takes pictures for the photographer"
    )


def test_classes_near_to_the_drawn_nouns_are_drawn_with_them():
    rng = np.random.default_rng(0)
    names = ClassNames([[f"name {c}"] for c in range(9)], [[] for _ in range(9)])
    learnt = ClassPrototypes(torch.randn(9, 4), torch.zeros(9), names, torch.randn(50, 4).numpy())
    nearest = torch.zeros(2, 9, dtype=torch.bool)
    nearest[0, 7], nearest[1, 2:4] = True, True
    for _ in range(5):
        features, classes = learnt.sample(3, rng, nearest)
        assert features.shape == (3, 4) and len(set(classes)) == 3
        assert 7 in classes and set(classes) & {2, 3}


def test_plurals():
    assert [prototypes.plural(n) for n in ("airplane", "cherry", "fox", "tow boy", "finch")] == [
        "airplanes", "cherries", "foxes", "tow boys", "finches",
    ]  # fmt: skip


@pytest.fixture
def tiny_wordnet(wordnet, tmp_path, monkeypatch):
    """Settings with which a recipe reads the tiny WordNet, whose nouns are the captions' words."""
    monkeypatch.setattr(prototypes.CaptionNouns, "FEWEST", 1)
    monkeypatch.setattr(wordnet, "is_noun", lambda word: word in WORDS)
    monkeypatch.setattr(blip_mini, "WordNet", lambda folder: wordnet)
    return {"wordnet": tmp_path, "others": 1, "nouns": 4}


def test_the_texts_stage_teaches_words_and_leaves_the_tower(captioned, tmp_path, tiny_preset, wordnet, tiny_wordnet):
    imagenet = ClassNames.of_imagenet()
    # the tiny WordNet knows two of ImageNet's thousand classes
    assert wordnet.synset_of(imagenet.own[0]) == "00000050" and ["airliner"] in imagenet.own
    run = blip_mini.Run(settings(captioned, tmp_path / "out", stage="texts", **tiny_wordnet))
    run.model.train()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    losses = run.step(next(run.batches()))
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"prototype", "misalignment", "belief", "nouns", "tags", "others"} <= losses.keys()
    assert {"vision_proj.weight", "text_proj.weight"} <= changed
    assert not any(name.startswith(("vision_model.", "itm_head.")) or ".crossattention." in name for name in changed)
    with pytest.raises(ValueError, match="--wordnet"):
        blip_mini.Run(settings(captioned, tmp_path / "other", stage="texts"))


def test_itm_learns_the_decoders_order_of_a_texts_images():
    margins = torch.tensor([[0.0, 1.0], [2.0, 0.5]])
    likelihood = torch.tensor([[-3.0, -5.0], [-4.0, -4.5]])
    columns, counted = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])
    loss = blip_mini.ranking_distillation(margins, likelihood, columns, counted)
    # text 0 meets its own image with margin 0 (likelihood -3); image 1's pair with it does not count
    # text 1 meets its own with 2 (-4) and image 0 with 1 (-5)
    teacher = torch.tensor([-4.0, -5.0]).softmax(0)
    target = (teacher + torch.tensor([1.0, 0.0])) / 2
    expected = -(target * torch.tensor([2.0, 1.0]).log_softmax(0)).sum() / 2
    torch.testing.assert_close(loss, expected)


def test_imagenets_names_are_timms():
    names = ClassNames.of_imagenet()
    assert len(names.own) == 1000 and names.own[0] == ["tench", "tinca tinca"]
    assert names.same(np.array([0, 1]), ["tench"]).tolist() == [[True], [False]]


def test_timm_names_map_onto_blips_tower():
    blip = set(tiny_blip().vision_model.state_dict())
    timm = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.norm1.weight", "blocks.0.attn.qkv.bias",
            "blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.bias", "norm.weight"]  # fmt: skip
    assert {renamed(key, TIMM_VIT) for key in timm} <= blip


@torch.no_grad()
def test_folding_the_token_type_row_is_the_same_function(tmp_path):
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128),
        add_pooling_layer=False,
    ).eval()
    save_file(bert.state_dict(), tmp_path / "bert.safetensors")
    model = tiny_blip()
    load_text_start(model, tmp_path / "bert.safetensors")
    ids = torch.tensor([[101, 2048, 6077, 102]])
    ours = model.text_encoder(ids, torch.ones_like(ids))
    torch.testing.assert_close(ours, bert(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_rates_follow_names_and_norms_are_not_decayed():
    model = tiny_blip()
    groups = parameter_groups(model, {"vision_model": 1e-5}, default=1e-4, weight_decay=0.05)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rate[id(model.vision_model.post_layernorm.weight)] == (1e-5, 0.0)
    assert rate[id(model.itm_head.weight)] == (1e-4, 0.05)


def test_the_schedule_warms_up_and_falls():
    factor = cosine_with_warmup(10, 100, floor=0.1)
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.55, abs=0.01) and factor(100) == pytest.approx(0.1)


def test_averaged_weights_swap_in_and_out():
    model = torch.nn.Linear(2, 1, bias=False)
    average = AveragedWeights(model, decay=0.5)
    start = model.weight.detach().clone()
    model.weight.data.add_(1.0)
    average.update()
    average.swap()
    assert torch.all(model.weight > start) and torch.all(model.weight < start + 1)
    average.swap()
    torch.testing.assert_close(model.weight.detach(), start + 1)


@needs_shared_data
def test_flickr8k_splits_read_as_published():
    photos = load_captioned(SHARED_DATA / "flickr8k", "dev", limit=50)
    texts, owners = photos.texts()
    assert len(photos) == 50 and len(texts) == 250 and owners[4] == 0 and owners[5] == 1
    assert photos.image(0).mode == "RGB"
