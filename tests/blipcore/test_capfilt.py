"""CapFilt on drawn photos and a random tiny model: what is kept and why, and runs that are stopped and go on."""

import json
import tarfile

import numpy as np
import pytest
import torch

from blipcore.calibration import Scoring, sigmoid
from blipcore.captioned import open_captioned, open_photos
from blipcore.checkpoint import LoadedModel, save
from blipcore.encoder import BlipEncoder, ModelError
from blipcore.training import capfilt, run_recipe
from blipcore.training.capfilt import DOUBTED, EMPTY, REPEATS, SAME, SYNTHETIC, WEB, CaptionFilter, Choices, judge
from blipcore.transforms import Normalizer, TextTokenizer
from tests.tiny import TOKENIZER, drawn_photo, tiny_blip

COUNT = 7
SCORING = Scoring(itc_weight=3.0, scale=0.5, bias=-0.2, calibrated=True)


def tiny_model(seed: int = 0, captioner: bool = True, retrieval: bool = True) -> LoadedModel:
    model = tiny_blip(seed)
    return LoadedModel(
        name=f"tiny{seed}",
        fingerprint=f"fingerprint{seed}",
        tokenizer=TextTokenizer(TOKENIZER),
        normalize=Normalizer((0.5,) * 3, (0.5,) * 3),
        retrieval=model if retrieval else None,
        captioner=model if captioner else None,
        scoring=SCORING,
        prompt="a picture of ",
    )


def models(model: int = 0, **choices) -> CaptionFilter:
    loaded = tiny_model(model)
    defaults = {"batch_size": 2, "shard_size": 3}
    return CaptionFilter(loaded, loaded, Choices(**(defaults | choices)), device="cpu", precision="fp32")


@pytest.fixture
def photos(tmp_path):
    """Nested folders of seven photos, five with a web caption, one of them two."""
    for i in range(COUNT):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        drawn_photo(i).save(folder / f"{i}.png")
        if i < 4:
            (folder / f"{i}.txt").write_text(f"the web says {i}")
    (tmp_path / "photos" / "dog" / "4.json").write_text(json.dumps({"captions": ["one", "blue blue blue", "..."]}))
    return open_photos(tmp_path / "photos")


def shard_bytes(out) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.tar"))}


# -- one photo's texts --------------------------------------------------------------------------------------


def test_a_text_at_the_threshold_is_kept_and_one_just_below_is_not():
    texts = [("a", WEB), ("b", WEB), ("c", SYNTHETIC), ("d", SYNTHETIC)]
    judged = judge(texts, [0.5, np.nextafter(0.5, 0), 1.0, float("nan")], 0.5)
    assert [(j.kept, j.reason) for j in judged] == [(True, ""), (False, DOUBTED), (True, ""), (False, DOUBTED)]
    assert all(j.kept for j in judge(texts[:2], [0.0, 1e-9], 0.0))
    assert [j.kept for j in judge(texts[:2], [1.0, 0.999999], 1.0)] == [True, False]


def test_reasons_other_than_the_score_come_first_and_are_recorded():
    texts = [("?!.", WEB), ("!...", WEB), ("dog dog", WEB), ("A dog.", WEB), ("a dog", SYNTHETIC), ("a cat", SYNTHETIC)]
    judged = judge(texts, [0.9, None, 0.9, 0.9, 0.9, 0.1], 0.5)
    assert [j.reason for j in judged] == ["", EMPTY, REPEATS, "", SAME, DOUBTED]
    assert [(j.text, j.source) for j in judged] == texts


@pytest.mark.parametrize(
    "text, repeats",
    [("a hat on top of a hat on top of a hat", True), ("snoop snoop", True), ("dogs, cats, dogs, dogs, dogs", True),
     ("a man in a red shirt and a man in a blue shirt", False), ("a boy, boy is wide", False), ("dog", False),
     ("", False)],
)  # fmt: skip
def test_repeated_words_are_a_loop_or_a_list_of_tags(text, repeats):
    assert capfilt.repeats_words(text) == repeats


@pytest.mark.parametrize("wrong", [{"threshold": 1.01}, {"threshold": -0.1}, {"samples": 0}, {"score": "itc"}])
def test_impossible_choices_are_refused(wrong):
    with pytest.raises(ValueError, match=r"threshold|at least 1|one of itm, calibrated"):
        Choices(**wrong)


# -- a run --------------------------------------------------------------------------------------------------


def test_every_decision_is_recorded_and_kept_texts_read_back(photos, tmp_path):
    summary = capfilt.run(photos, models(samples=2), tmp_path / "out")
    records = list(capfilt.decisions(tmp_path / "out"))
    assert [r["key"] for r in records] == [photos.key(i) for i in range(COUNT)]
    assert sorted(shard_bytes(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar"]
    for row, record in enumerate(records):
        web = [c["text"] for c in record["candidates"] if c["source"] == WEB]
        assert web == photos.texts_of(row)
        assert 1 <= sum(c["source"] == SYNTHETIC for c in record["candidates"]) <= 2
        assert record["captions"] == [c["text"] for c in record["candidates"] if c["kept"]]
        assert all(c["kept"] == (not c["reason"]) for c in record["candidates"])
    kept = [r for r in records if r["captions"]]
    assert kept and len(kept) == summary["with_captions"]
    source = open_captioned(tmp_path / "out")
    assert [s.captions for s in source] == [r["captions"] for r in kept]
    originals = {photos.key(i): photos[i].encoded for i in range(COUNT)}
    assert [s.encoded for s in source] == [originals[r["key"]] for r in kept]


def test_probabilities_are_itms_own_or_the_calibrated_ones(photos, tmp_path):
    encoder = BlipEncoder(tiny_model(), "cpu", "fp32")
    drawn = {}
    for score in capfilt.SCORES:
        capfilt.run(photos, models(score=score), tmp_path / score)
        for row, record in enumerate(capfilt.decisions(tmp_path / score)):
            scored = [c for c in record["candidates"] if c["probability"] is not None]
            texts = [c["text"] for c in scored]
            margins = encoder.match([photos[row].image()], texts)
            itc = (encoder.embed_images([photos[row].image()]) * encoder.embed_texts(texts)).sum(1)
            expected = sigmoid(margins) if score == "itm" else SCORING.probability(margins, itc)
            np.testing.assert_allclose([c["probability"] for c in scored], expected, atol=1e-5)
            drawn.setdefault(score, []).append(texts)
    assert drawn["itm"] == drawn["calibrated"]  # scoring differently draws nothing else


def test_the_threshold_cuts_at_the_recorded_probability(photos, tmp_path):
    capfilt.run(photos, models(threshold=0.0), tmp_path / "all")
    scores = [c["probability"] for r in capfilt.decisions(tmp_path / "all") for c in r["candidates"] if c["kept"]]
    cut = sorted(scores)[len(scores) // 2]
    capfilt.run(photos, models(threshold=cut), tmp_path / "half")
    kept = [c["probability"] for r in capfilt.decisions(tmp_path / "half") for c in r["candidates"] if c["kept"]]
    assert min(kept) == cut and len(kept) == sum(score >= cut for score in scores) < len(scores)


def test_the_summary_counts_what_the_shards_say(photos, tmp_path):
    summary = capfilt.run(photos, models(), tmp_path / "out")
    texts = [c for r in capfilt.decisions(tmp_path / "out") for c in r["candidates"]]
    for source in (WEB, SYNTHETIC):
        of = [c for c in texts if c["source"] == source]
        counts = summary["texts"][source]
        assert counts["texts"] == len(of) == counts["kept"] + sum(counts["dropped"].values())
        assert counts["kept"] == sum(c["kept"] for c in of)
        assert counts["kept_share"] == pytest.approx(counts["kept"] / len(of), abs=1e-4)
    assert summary["texts"][WEB]["texts"] == 7
    assert {REPEATS, EMPTY} <= summary["texts"][WEB]["dropped"].keys()
    assert summary["photos"] == COUNT and summary["unreadable"] == 0
    assert summary["captioner"]["fingerprint"] == summary["filter"]["fingerprint"] == "fingerprint0"
    assert summary["settings"]["threshold"] == 0.5
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_without_web_texts_only_drawn_ones_are_judged(photos, tmp_path):
    summary = capfilt.run(photos, models(web=False), tmp_path / "out")
    assert list(summary["texts"]) == [SYNTHETIC]


def test_a_photo_that_cannot_be_read_is_recorded_and_passed_over(photos, tmp_path):
    (tmp_path / "photos" / "cat" / "1.png").write_bytes(b"no image")
    for name in ("0", "2", "4", "6"):
        (tmp_path / "photos" / "dog" / f"{name}.png").write_bytes(b"no image")
    summary = capfilt.run(open_photos(tmp_path / "photos"), models(), tmp_path / "out")
    assert summary["unreadable"] == 5 and summary["photos"] == COUNT
    unread = [r["key"] for r in capfilt.decisions(tmp_path / "out") if not r["read"]]
    assert unread == ["cat/1.png", "dog/0.png", "dog/2.png", "dog/4.png", "dog/6.png"]


def test_a_tar_of_unlabelled_photos_is_input_too(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "photos", "photos", filter=lambda m: m if not m.name.endswith(("txt", "json")) else None)
    summary = capfilt.run(open_photos(tmp_path / "photos.tar"), models(), tmp_path / "out")
    assert summary["photos"] == COUNT and list(summary["texts"]) == [SYNTHETIC]


# -- seeds and interruption ---------------------------------------------------------------------------------


class Stops(CaptionFilter):
    """A caption filter that dies in its batch number `after`."""

    after = 3

    def __call__(self, *inputs):
        if self.after == 0:
            raise KeyboardInterrupt
        self.after -= 1
        return super().__call__(*inputs)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_run_goes_on_to_the_same_shards(after, photos, tmp_path):
    capfilt.run(photos, models(), tmp_path / "whole")
    stopped = models()
    stopped.__class__, stopped.after = Stops, after
    with pytest.raises(KeyboardInterrupt):
        capfilt.run(photos, stopped, tmp_path / "out")
    begun = shard_bytes(tmp_path / "out")
    assert len(begun) == after // 2 and not (tmp_path / "out" / "summary.json").exists()
    inodes = {name: (tmp_path / "out" / name).stat().st_ino for name in begun}
    torch.manual_seed(99)  # what else was drawn in the process changes nothing
    capfilt.run(photos, models(), tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert inodes == {name: (tmp_path / "out" / name).stat().st_ino for name in begun}
    summaries = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("out", "whole")]
    assert summaries[0] == summaries[1]


def test_a_lost_shard_is_made_anew_without_the_others(photos, tmp_path):
    capfilt.run(photos, models(), tmp_path / "out")
    before = shard_bytes(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").rename(tmp_path / "out" / ".00001.tar.part")  # a kill left half of it
    again = models()
    calls = []
    again.draw = lambda tokens, samples: (
        calls.extend(s.key for s in samples) or type(again).draw(again, tokens, samples)
    )
    capfilt.run(photos, again, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == before
    assert calls == [photos.key(i) for i in (3, 4, 5)]


def test_decoding_ahead_in_processes_changes_nothing(photos, tmp_path):
    for workers in (0, 1):
        capfilt.run(photos, models(), tmp_path / str(workers), workers=workers)
    assert shard_bytes(tmp_path / "0") == shard_bytes(tmp_path / "1")


def test_the_seed_decides_what_is_drawn_and_the_processes_dice_stay_where_they_were(photos, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("other", 1)):
        torch.manual_seed(len(out))
        capfilt.run(photos, models(seed=seed), tmp_path / out)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")

    def drawn(out):
        return [c["text"] for r in capfilt.decisions(out) for c in r["candidates"] if c["source"] == SYNTHETIC]

    assert drawn(tmp_path / "other") != drawn(tmp_path / "a")
    other = models()
    tokens = other.encoder.image_tokens(other.encoder.pixels([photos[0].image()]))
    before = torch.get_rng_state()
    other.draw(tokens, [photos[0]])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"threshold": 0.6}, {"batch_size": 3}, {"samples": 2}, {"web": False}])
def test_a_folder_begun_otherwise_is_not_mixed(change, photos, tmp_path):
    capfilt.run(photos, models(), tmp_path / "out")
    before = shard_bytes(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{next(iter(change))} was"):
        capfilt.run(photos, models(**change), tmp_path / "out")
    with pytest.raises(ValueError, match="captioner fingerprint was 'fingerprint0'"):
        capfilt.run(photos, models(model=5), tmp_path / "out")
    (tmp_path / "photos" / "cat" / "9.png").write_bytes((tmp_path / "photos" / "cat" / "1.png").read_bytes())
    with pytest.raises(ValueError, match="source photos was 7 and is 8"):
        capfilt.run(open_photos(tmp_path / "photos"), models(), tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == before


def test_tars_of_another_making_are_left_alone(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="another making"):
        capfilt.run(photos, models(), tmp_path / "out")


# -- models -------------------------------------------------------------------------------------------------


def test_two_checkpoints_each_do_their_part(photos, tmp_path):
    writer, reader = tiny_model(1, retrieval=False), tiny_model(2, captioner=False)
    both = CaptionFilter(writer, reader, Choices(), device="cpu", precision="fp32")
    summary = capfilt.run(photos, both, tmp_path / "out")
    assert (summary["captioner"]["name"], summary["filter"]["name"]) == ("tiny1", "tiny2")
    judge_alone = BlipEncoder(reader, "cpu", "fp32")
    record = next(capfilt.decisions(tmp_path / "out"))
    texts = [c["text"] for c in record["candidates"]]
    expected = sigmoid(judge_alone.match([photos[0].image()], texts))
    np.testing.assert_allclose([c["probability"] for c in record["candidates"]], expected, atol=1e-5)
    own = CaptionFilter(tiny_model(1), tiny_model(1), Choices(), device="cpu", precision="fp32")
    tokens = own.encoder.image_tokens(own.encoder.pixels([photos[0].image()]))
    assert both.draw(tokens, [photos[0]]) == own.draw(tokens, [photos[0]])


@pytest.mark.parametrize("parts", [{"captioner": False}, {"retrieval": False}])
def test_a_model_that_lacks_a_part_is_named(parts):
    lacking = tiny_model(4, **parts)
    with pytest.raises(ModelError, match=r"tiny4 cannot (write|match).*--(captioner|filter)"):
        CaptionFilter(lacking, lacking, Choices(), device="cpu")


def test_folders_are_loaded_once_where_they_are_one(tmp_path):
    save(tiny_blip(), tmp_path / "m", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    both = capfilt.load_models(str(tmp_path / "m"), str(tmp_path / "m"), Choices(), device="cpu")
    assert both.one_network and both.sizes == {32}
    with pytest.raises(ModelError, match="no model or folder"):
        capfilt.load_models(str(tmp_path / "m"), str(tmp_path / "none"), Choices())


# -- the recipe ---------------------------------------------------------------------------------------------


def test_the_command_line_captions_a_folder(photos, tmp_path):
    model = save(tiny_blip(), tmp_path / "m", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    options = ["--photos", photos.name, "--model", str(model), "--out", str(tmp_path / "out"), "--web", "no"]
    run_recipe("capfilt", [*options, "--samples", "2", "--limit", "5", "--threshold", "0.25", "--device", "cpu"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["photos"] == 5 and list(summary["texts"]) == [SYNTHETIC]
    assert (summary["settings"]["samples"], summary["settings"]["threshold"]) == (2, 0.25)
    assert summary["captioner"]["fingerprint"] == summary["filter"]["fingerprint"]
    assert len(list(capfilt.decisions(tmp_path / "out"))) == 5
