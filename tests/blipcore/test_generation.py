"""Texts from a decoder against transformers' `generate`: the same tokens, whatever else is in the batch."""

import tarfile
from itertools import pairwise

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from blipcore.checkpoint import CAPTIONING_KEY_MAPPING, load_folder
from blipcore.generate import NO_REPEAT, caption_candidates, prompt_ids
from blipcore.models.decoding import Decoding
from blipcore.models.generation import Limits, Nucleus, beam_search, nucleus_samples
from blipcore.transforms import TextTokenizer, squash
from tests.blipcore.hub_decoder import hub_decoder
from tests.tiny import BUNDLED, SHARED_DATA, TOKENIZER, drawn_photo, needs_shared_data, pixels, tiny_blip

END, PAD = 102, 0
PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of


def tiny_decoder(seed: int, eager: float = 0.0):
    """A random decoder, and image tokens [4, N, D]; the more `eager`, the sooner its texts end."""
    model = tiny_blip(seed)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[END] += eager
        return model.text_decoder, model.encode_images(pixels(4, seed=seed + 10)).detach()


def by_transformers(decoder, sources, start, limits, *, beams, keep=1, sources_mask=None) -> list[list[list[int]]]:
    """As `beam_search`."""
    ids = torch.tensor(start).expand(len(sources), -1)
    written = (
        hub_decoder(decoder)
        .generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=sources,
            encoder_attention_mask=sources_mask,
            eos_token_id=END,
            pad_token_id=PAD,
            max_length=limits.max_length,
            min_length=limits.min_length,
            no_repeat_ngram_size=limits.no_repeat,
            num_beams=beams,
            num_return_sequences=keep,
            do_sample=False,
        )[:, len(start) :]
        .tolist()
    )
    texts = [text[: text.index(END)] if END in text else text for text in written]
    return [texts[row : row + keep] for row in range(0, len(texts), keep)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("start", "beams", "keep", "limits"),
    [
        (PROMPT[:1], 3, 3, Limits(20, 5, 3)),  # as captions are written
        (PROMPT, 3, 3, Limits(20, 5, 3)),
        (PROMPT[:1], 3, 1, Limits(10, 1)),  # as answers are
        (PROMPT, 5, 2, Limits(12, 8, 2)),
        (PROMPT, 2, 2, Limits(5, 0)),  # a single token
        (PROMPT[:1], 1, 1, Limits(20, 5, 3)),  # greedy
    ],
)
def test_tokens_equal_those_of_transformers(seed, start, beams, keep, limits):
    ended = set()
    for eager in (0.0, 5.0, 9.0):
        decoder, sources = tiny_decoder(seed, eager)
        ours = beam_search(decoder, sources, torch.tensor(start), limits, beams=beams)
        theirs = by_transformers(decoder, sources, start, limits, beams=beams, keep=keep)
        assert [texts[:keep] for texts in ours] == theirs
        ended |= {len(text) + len(start) < limits.max_length for texts in theirs for text in texts}
    assert True in ended  # some texts end, and so some images leave before others


def doubled(text):
    return any(token == after for token, after in pairwise(text))


def test_no_token_follows_itself_where_that_is_asked():
    start = torch.tensor(PROMPT)
    for seed in range(4):
        decoder, sources = tiny_decoder(seed)
        with torch.no_grad():
            decoder.cls.predictions.bias[2000] += 9.0  # a favourite word
        free, bound = (beam_search(decoder, sources, start, Limits(12, 6, no_double=no)) for no in (False, True))
        assert any(doubled(text) for texts in free for text in texts)
        assert not any(doubled(text) for texts in bound for text in texts)
        assert all(len(text) + len(PROMPT) >= 6 for texts in bound for text in texts)


def test_what_is_read_may_be_padded():
    decoder, sources = tiny_decoder(0)
    mask = torch.ones(sources.shape[:2], dtype=torch.long)
    mask[1, 3:], mask[2, 1:] = 0, 0
    limits, start = Limits(10, 1), torch.tensor(PROMPT[:1])
    ours = [texts[:1] for texts in beam_search(decoder, sources, start, limits, sources_mask=mask)]
    assert ours == by_transformers(decoder, sources, PROMPT[:1], limits, beams=3, sources_mask=mask)
    assert ours[1] == beam_search(decoder, sources[1:2, :3], start, limits)[0][:1]
    assert ours != [texts[:1] for texts in beam_search(decoder, sources, start, limits)]


@pytest.mark.parametrize(("seed", "eager"), [(0, 5.0), (2, 6.0), (3, 6.0)])
def test_a_text_is_the_same_whoever_leaves_before_it(seed, eager):
    decoder, sources = tiny_decoder(seed, eager)
    start, limits = torch.tensor(PROMPT), Limits(20, 5, 3)
    together = beam_search(decoder, sources, start, limits)
    assert len({len(texts[0]) for texts in together}) > 2
    for row, texts in enumerate(together):
        assert beam_search(decoder, sources[row : row + 1], start, limits)[0] == texts


@torch.no_grad()
def test_branches_are_read_as_whole_texts_are():
    decoder, sources = tiny_decoder(2)
    decoding = Decoding(decoder, sources, slots=20)
    ids = torch.randint(1000, 2000, (4, 3, 2), generator=torch.Generator().manual_seed(0))
    logits = decoding.start(torch.tensor(PROMPT))
    torch.testing.assert_close(logits[:, 0], plain_logits(decoder, sources, [PROMPT] * 4), atol=1e-4, rtol=1e-4)
    decoding.step(torch.zeros(4, 3, dtype=torch.long), ids[..., 0])
    assert decoding.leave([0, 2]) == [3, 1] and decoding.images == 2  # the last fills the first's place
    rows, parents = [3, 1], torch.tensor([[2, 0, 2], [1, 1, 0]])
    logits = decoding.step(parents, ids[rows, :, 1])
    for row, image in enumerate(rows):
        texts = [[*PROMPT, int(ids[image, parent, 0]), int(ids[image, beam, 1])]
                 for beam, parent in enumerate(parents[row].tolist())]  # fmt: skip
        expected = plain_logits(decoder, sources[image].expand(3, -1, -1), texts)
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def plain_logits(decoder, sources, texts) -> torch.Tensor:
    """Logits [B, V] after whole texts."""
    ids = torch.tensor(texts)
    return decoder(ids, torch.ones_like(ids), sources)[:, -1]


def test_a_start_that_leaves_no_room_is_refused():
    decoder, sources = tiny_decoder(0)
    for write in (beam_search, lambda *given: nucleus_samples(*given, count=1)):
        with pytest.raises(ValueError, match="starts with 4 tokens has no room"):
            write(decoder, sources, torch.tensor(PROMPT), Limits(4))


@pytest.mark.parametrize("options", [{}, {"candidates": 1, "beams": 1}, {"sample": True}])
def test_many_photos_are_captioned_some_at_a_time(monkeypatch, options):
    model, tokenizer = tiny_blip(), TextTokenizer(TOKENIZER)
    tokens = model.encode_images(pixels(5)).detach()

    def captions():
        torch.manual_seed(0)
        return caption_candidates(model, tokens, tokenizer, **options)

    whole = captions()
    monkeypatch.setattr("blipcore.generate.IMAGES", 2)
    assert captions() == whole or "sample" in options
    assert len(captions()) == 5 and caption_candidates(model, tokens[:0], tokenizer, **options) == []


# -- by chance ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_probabilities_equal_those_of_transformers():
    decoder, sources = tiny_decoder(3, 6.0)
    ids = torch.tensor([[*PROMPT, 2158, 2158, 2158]]).expand(4, -1)
    limits, nucleus = Limits(len(PROMPT) + 7, 9, 2), Nucleus()
    found = hub_decoder(decoder).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=sources,
        eos_token_id=END,
        pad_token_id=PAD,
        max_length=limits.max_length,
        min_length=limits.min_length,
        no_repeat_ngram_size=limits.no_repeat,
        do_sample=True,
        top_p=nucleus.top_p,
        repetition_penalty=nucleus.repetition_penalty,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    drawable = []
    for step, (logits, scores) in enumerate(zip(found.logits, found.scores, strict=True)):
        written = [[text] for text in found.sequences[:, : ids.shape[1] + step].tolist()]
        ours = logits[:, None].float().clone()
        nucleus.penalise(ours, written)
        limits.forbid(ours, written, END)
        chances, tokens = nucleus.probabilities(ours)
        spread = torch.zeros_like(ours).scatter(2, tokens, chances)[:, 0]
        torch.testing.assert_close(spread, scores.softmax(-1), atol=1e-6, rtol=1e-4)
        drawable += (spread > 0).sum(1).tolist()
    assert 1 < min(drawable) < max(drawable) <= 50


def test_a_generator_decides_what_is_drawn():
    decoder, sources = tiny_decoder(0, 9.0)

    def draw(seed):
        dice = torch.Generator().manual_seed(seed)
        return nucleus_samples(decoder, sources, torch.tensor(PROMPT), Limits(20, 5, 3), count=3, generator=dice)

    state = torch.random.get_rng_state()
    first = draw(0)
    assert first == draw(0) != draw(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(texts) for texts in first] == [3] * 4 and len({tuple(text) for texts in first for text in texts}) > 6
    assert all(END not in text and 1 <= len(text) <= 16 for texts in first for text in texts)


def test_tokens_are_drawn_as_often_as_they_should():
    decoder, sources = tiny_decoder(4)
    start, limits = torch.tensor(PROMPT), Limits(5)
    with torch.no_grad():
        logits = Decoding(decoder, sources[:1], slots=4).start(start)
    nucleus = Nucleus(top_k=4, repetition_penalty=1.0)
    chances, tokens = (each.flatten().tolist() for each in nucleus.probabilities(logits))
    dice = torch.Generator().manual_seed(0)
    drawn = nucleus_samples(decoder, sources[:1], start, limits, count=4000, nucleus=nucleus, generator=dice)[0]
    shares = [sum(text == [token] for text in drawn) / len(drawn) for token in tokens]
    assert shares == pytest.approx(chances, abs=0.03) and sum(shares) == 1


# -- trained weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return load_folder(BUNDLED)


@pytest.fixture(scope="module")
def hub_captioner():
    return BlipForConditionalGeneration.from_pretrained(BUNDLED, key_mapping=CAPTIONING_KEY_MAPPING).eval()


def same_captions(bundled, hub_captioner, photos: list[Image.Image], prompt: str) -> list[list[str]]:
    """Compare candidates with transformers' own pipeline. -> what was written."""
    inputs = bundled.normalize(torch.stack([torch.from_numpy(squash(photo, 288).copy()) for photo in photos]))
    network = bundled.captioner
    with torch.inference_mode():
        sources = network.encode_images(inputs)
        start = prompt_ids(bundled.tokenizer, prompt, network.dec_token_id)[0]
        ours = beam_search(network.text_decoder, sources, start, Limits(20, 5, NO_REPEAT))
        ids = torch.cat([start, torch.tensor([END])]).expand(len(photos), -1)  # it leaves the last one out
        options = {"num_beams": 3, "max_length": 20, "min_length": 5, "no_repeat_ngram_size": NO_REPEAT}
        theirs = hub_captioner.generate(
            inputs, ids, torch.ones_like(ids), num_return_sequences=3, do_sample=False, **options
        )
        written = caption_candidates(network, sources, bundled.tokenizer, prompt=prompt)
    texts = [text[: text.index(END)] if END in text else text for text in theirs[:, len(start) :].tolist()]
    assert ours == [texts[row : row + 3] for row in range(0, len(texts), 3)]
    return written


@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_bundled_captions_equal_those_of_transformers(bundled, hub_captioner, prompt):
    written = same_captions(bundled, hub_captioner, [drawn_photo(seed, (120, 90)) for seed in range(2)], prompt)
    assert all(len(text.split()) > 1 for texts in written for text in texts)


@needs_shared_data
def test_captions_of_real_photos_equal_those_of_transformers(bundled, hub_captioner):
    photos = []
    with tarfile.open(SHARED_DATA / "flickr8k" / "dev.tar") as archive:
        while len(photos) < 4 and (member := archive.next()):
            if member.isfile():
                photos.append(Image.open(archive.extractfile(member)).convert("RGB"))
    written = same_captions(bundled, hub_captioner, photos, "")
    assert len({texts[0] for texts in written}) > 2 and len({len(texts[0].split()) for texts in written}) > 1
