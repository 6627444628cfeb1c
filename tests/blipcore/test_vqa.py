"""Questions: the loss against plain arithmetic, ranking against brute force, padding, folders, and the recipe."""

import json

import pytest
import torch
from PIL import Image
from transformers import BlipForQuestionAnswering

from blipcore.annotated import load_questions
from blipcore.checkpoint import load_folder, save, save_vqa
from blipcore.encoder import BlipEncoder, load_encoder
from blipcore.errors import ModelError
from blipcore.models.blip import Blip
from blipcore.models.presets import blip_config
from blipcore.models.vqa import BlipVqa
from blipcore.training.recipes import finetune_vqa
from blipcore.training.starts import drop_paths, resize_positions
from blipcore.transforms import TextTokenizer, clean_question
from tests.blipcore import plain
from tests.tiny import TOKENIZER, drawn_photo, pixels, tiny_blip, tiny_config

QUESTIONS = ["what is it?", "how many dogs are playing in the snow behind the red house?"]
ANSWERS = ["yes", "two dogs", "2:30", "a very long answer", "two", "no"]
MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(TOKENIZER)


def tiny_vqa(config=None, seed: int = 0, dtype=torch.float32) -> BlipVqa:
    """Random, in evaluation mode, with weights large enough that differences show."""
    torch.manual_seed(seed)
    model = BlipVqa(config or tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_vqa()


def unpadded(ids, mask) -> list[list[int]]:
    return [row[: int(length)].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]


def plain_answer_log_probabilities(model, image, question: list[int], answer: list[int]) -> torch.Tensor:
    """log p over the vocabulary [L - 1, V] at each token of an answer, in plain arithmetic."""
    w = dict(model.named_parameters())
    vision, text = model.config.vision_config, model.config.text_config
    states = plain.text(w, "text_encoder", [30523, *question[1:]], plain.vision(w, image, vision), text)
    decoded = plain.text(w, "text_decoder.bert", [30522, *answer[1:-1]], states, text, causal=True)
    return plain.next_token_log_probabilities(w, "text_decoder", decoded, text.layer_norm_eps)


def plain_loss(model, images, questions, answers, counts, weights) -> torch.Tensor:
    """BLIP's VQA loss, answer by answer and token by token."""
    total, row = 0.0, 0
    for image, question, count in zip(images, questions, counts, strict=True):
        for answer, weight in zip(answers[row : row + count], weights[row : row + count], strict=True):
            log_p = plain_answer_log_probabilities(model, image, question, answer)
            for position, token in enumerate(answer[1:]):
                total = total - weight * (0.9 * log_p[position, token] + 0.1 * log_p[position].mean())
        row += count
    return total / len(images)


def test_the_loss_and_its_gradients_equal_plain_arithmetic(tokenizer):
    model = tiny_vqa(blip_config(vision=(24, 2, 3), text=(32, 2, 2), image_size=32, dropout=0.0), dtype=torch.float64)
    images, question = pixels(2).double(), tokenizer(QUESTIONS, clean_question)
    answers = tokenizer(["yes", "two dogs", "a very long answer"], str.lower)
    counts, weights = [1, 2], torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    loss = model.loss(images, question, answers, torch.tensor(counts), weights)
    expected = plain_loss(model, images, unpadded(*question), unpadded(*answers), counts, weights)
    torch.testing.assert_close(loss, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    for name, left, right in zip(names, ours, theirs, strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4, msg=name)  # logits go through float32
    assert sum(gradient is not None for gradient in ours) > 0.9 * len(names)


@torch.no_grad()
def test_ranking_equals_brute_force(model, tokenizer):
    question, answers = tokenizer(QUESTIONS, clean_question), tokenizer(ANSWERS, str.lower)
    for smoothing in (0.0, 0.1):
        expected = []
        for image, text in zip(pixels(2), unpadded(*question), strict=True):
            scores = []
            for answer in unpadded(*answers):
                log_p = plain_answer_log_probabilities(model, image, text, answer)
                tokens = (log_p[at, token] for at, token in enumerate(answer[1:]))
                scores.append((1 - smoothing) * sum(tokens) + smoothing * log_p.mean(1).sum())
            expected.append(int(torch.stack(scores).argmax()))
        assert model.rank_answers(pixels(2), *question, *answers, smoothing=smoothing).tolist() == expected


@torch.no_grad()
def test_only_answers_with_the_k_likeliest_first_tokens_are_scored_whole(model, tokenizer):
    question, answers = tokenizer(QUESTIONS[:1], clean_question), tokenizer(ANSWERS, str.lower)
    first = plain_answer_log_probabilities(model, pixels(1)[0], unpadded(*question)[0], [101, 102])[0]
    favourite = int(first[answers[0][:, 1]].argmax())
    assert model.rank_answers(pixels(1), *question, *answers, k=1).tolist() == [favourite]
    whole = {model.rank_answers(pixels(1, seed=seed), *question, *answers).item() for seed in range(8)}
    few = {model.rank_answers(pixels(1, seed=seed), *question, *answers, k=1).item() for seed in range(8)}
    assert whole != few  # the first token alone decides otherwise than the whole answer


def test_an_answer_does_not_depend_on_the_questions_beside_it(model, tokenizer):
    answers = tokenizer(ANSWERS, str.lower)
    for seed in range(4):
        images = pixels(3, seed=seed)
        ids, mask = tokenizer([QUESTIONS[0], *QUESTIONS], clean_question)
        written, ranked = model.answer(images, ids, mask), model.rank_answers(images, ids, mask, *answers)
        alone = tokenizer(QUESTIONS[:1], clean_question)
        assert alone[0].shape[1] < ids.shape[1]
        for row in (0, 1):
            assert model.answer(images[row : row + 1], *alone)[0] == written[row]
            assert model.rank_answers(images[row : row + 1], *alone, *answers).item() == ranked[row].item()
            states = [
                model.read_question(images[row : row + 1], *alone)[0],
                model.read_question(images, ids, mask)[row],
            ]
            torch.testing.assert_close(states[0], states[1][: len(states[0])], atol=1e-5, rtol=1e-5)


def test_padding_of_answers_changes_no_loss(model, tokenizer):
    states, ones = torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.long)
    ids, mask = tokenizer(["yes", "a very long answer"], str.lower)
    both = model.answer_losses(states.expand(2, -1, -1), ones.expand(2, -1), ids, mask)
    alone = model.answer_losses(states, ones, *tokenizer(["yes"], str.lower))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_start_fills_both_text_towers_and_ties_nothing_between_them():
    blip, model = tiny_blip(), tiny_vqa(seed=5)
    model.start_from(blip, blip)
    for ours, theirs in ((model.vision_model, blip.vision_model), (model.text_encoder, blip.text_encoder),
                         (model.text_decoder, blip.text_decoder)):  # fmt: skip
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    encoder = {id(p) for p in model.text_encoder.parameters()}
    assert not encoder & {id(p) for p in model.text_decoder.parameters()}
    head = model.text_decoder.cls.predictions.decoder.weight
    assert head is model.text_decoder.bert.embeddings.word_embeddings.weight


def test_where_widths_differ_only_the_decoders_keys_and_values_stay_random():
    config = blip_config(vision=(24, 2, 3), text=(32, 2, 2), image_size=32)
    torch.manual_seed(0)
    blip, model = Blip(config), BlipVqa(config)
    model.start_from(blip, blip)
    theirs = blip.text_decoder.state_dict()
    kept = {name for name, value in model.text_decoder.state_dict().items()
            if value.shape != theirs[name].shape or not torch.equal(value, theirs[name])}  # fmt: skip
    layers = {f"bert.encoder.layer.{n}.crossattention.self.{part}" for n in (0, 1) for part in ("key", "value")}
    assert kept == {f"{layer}.weight" for layer in layers}


def test_a_saved_model_answers_as_before_and_opens_in_transformers(model, tokenizer, tmp_path):
    save_vqa(model, tmp_path, tokenizer, mean=MEAN, std=STD)
    loaded = load_folder(tmp_path)
    assert loaded.retrieval is None and loaded.captioner is None
    question, answers = tokenizer(QUESTIONS, clean_question), tokenizer(ANSWERS, str.lower)
    counts, weights = torch.tensor([2, 4]), torch.ones(6)
    before = model.loss(pixels(2), question, answers, counts, weights)
    torch.testing.assert_close(
        loaded.vqa.loss(pixels(2), question, answers, counts, weights), before, rtol=1e-2, atol=0
    )
    theirs, info = BlipForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = loaded.vqa.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


def test_asking_the_encoder_writes_or_ranks(model, tokenizer, tmp_path):
    save_vqa(model, tmp_path, tokenizer, mean=MEAN, std=STD)
    encoder = BlipEncoder(load_folder(tmp_path), "cpu", "fp32")
    photos = [drawn_photo(0), drawn_photo(1)]
    assert encoder.can_ask and not encoder.can_match
    ranked = encoder.ask(photos, QUESTIONS, ["Yes", "No", "2:30"])
    assert set(ranked) <= {"Yes", "No", "2:30"}
    assert [encoder.ask([p], [q], ["Yes", "No", "2:30"])[0] for p, q in zip(photos, QUESTIONS, strict=True)] == ranked
    assert encoder.ask(photos, QUESTIONS) == [encoder.ask([p], [q])[0] for p, q in zip(photos, QUESTIONS, strict=True)]
    with pytest.raises(ValueError, match="at least one"):
        encoder.ask(photos, QUESTIONS, [])
    with pytest.raises(ValueError, match="as many questions"):
        encoder.ask(photos, QUESTIONS[:1])


def test_punctuation_that_means_something_stays_in_an_answer(tokenizer):
    (clock, plain_words), _ = tokenizer(["2:30", "2 30"], str.lower)
    assert clock.tolist() != plain_words.tolist()
    assert clean_question("What's on  the U.S. flag?") == "what's on the us flag?"


# -- ready for another size, and for stochastic depth ---------------------------------------------------------


@torch.no_grad()
def test_positions_resize_bicubically_and_the_class_token_keeps_its_own(model):
    resized = tiny_vqa()
    resize_positions(resized, 64)
    before, after = (m.vision_model.embeddings.position_embedding[0] for m in (model, resized))
    assert after.shape == (17, 32) and torch.equal(after[0], before[0])
    grid = before[1:].T.reshape(1, 32, 2, 2)
    expected = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after[1:], expected[0].flatten(1).T)
    assert resized.config.vision_config.image_size == 64 and model.config.vision_config.image_size == 32
    assert resized.read_question(pixels(1, 64), torch.tensor([[101, 102]]), torch.ones(1, 2)).shape == (1, 2, 32)
    resize_positions(resized, 64)
    assert torch.equal(resized.vision_model.embeddings.position_embedding[0], after)
    with pytest.raises(ValueError, match="multiple of 16"):
        resize_positions(resized, 50)


@torch.no_grad()
def test_dropped_paths_keep_the_mean_and_leave_evaluation_alone():
    tower = tiny_vqa().vision_model
    before = tower(pixels(1))
    drop_paths(tower, 0.5)
    torch.testing.assert_close(tower(pixels(1)), before)
    layers, hidden = tower.encoder.layers, torch.randn(4000, 1, 32)[:1].expand(4000, -1, -1)
    branch = layers[1].mlp
    whole = branch(hidden)[0]
    torch.manual_seed(0)
    dropped = branch.train()(hidden)
    kept = dropped.abs().sum((1, 2)) > 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept][0], 2 * whole)
    assert torch.equal(layers[0].mlp.train()(hidden)[0], layers[0].mlp.eval()(hidden)[0])  # the first block stays


# -- the recipe -----------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
TINY = {"image_size": 32, "randaugment": False, "drop_path": 0.0, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a random tiny Blip."""
    folder = tmp_path_factory.mktemp("start")
    save(tiny_blip(), folder, TextTokenizer(TOKENIZER), mean=MEAN, std=STD)
    return str(folder)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Squares of three colours, and what is asked of them: train.jsonl, dev.jsonl and the pictures' folder."""
    folder = tmp_path_factory.mktemp("squares")
    torch.manual_seed(0)
    (folder / "pictures").mkdir()
    for split, count in (("train", 48), ("dev", 24)):
        lines = []
        for number in range(count):
            colour, name = list(COLOURS)[number % 3], f"{split}{number}.png"
            picture = Image.new("RGB", (40, 40), tuple(int(v) for v in torch.randint(100, 160, (3,))))
            left, top = torch.randint(0, 16, (2,)).tolist()
            picture.paste(COLOURS[colour], (left, top, left + 24, top + 24))
            picture.save(folder / "pictures" / name)
            row = {"image": name, "question": "What colour is the square?", "answers": [colour] * 9 + ["grey"]}
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "answers.txt").write_text("red\ngreen\n\nblue\ngrey\n", encoding="utf-8")
    return folder


def settings(squares, start, out, **values):
    files = {"data": squares / "train.jsonl", "dev": squares / "dev.jsonl", "images": squares / "pictures"}
    return finetune_vqa.Settings(out=out, start=start, **(files | TINY | values))


def test_the_recipe_learns_colours_and_its_folder_answers(squares, start, tmp_path):
    figures = finetune_vqa.train(settings(squares, start, tmp_path, steps=60, batch_size=12, rate=5e-3, warmup=10))
    assert figures["accuracy"] > 90  # by chance 33
    encoder = load_encoder(str(tmp_path / "model"), device="cpu", precision="fp32")
    photos = [Image.open(squares / "pictures" / f"dev{number}.png") for number in range(6)]
    questions = ["what colour is the square?"] * 6
    right = list(COLOURS) * 2
    for answers in (encoder.ask(photos, questions), encoder.ask(photos, questions, ["Grey", *COLOURS])):
        assert sum(said == known for said, known in zip(answers, right, strict=True)) >= 5


def test_the_command_line_trains_at_the_papers_size_and_goes_on_from_a_vqa_model(squares, start, tmp_path):
    """480 px and BLIP's augmentation; then on from the result, choosing among answers on dev."""
    files = ["--data", str(squares / "train.jsonl"), "--images", str(squares / "pictures"), "--device", "cpu"]
    files += ["--dev", str(squares / "dev.jsonl"), "--precision", "fp32", "--steps", "1", "--batch-size", "2"]
    finetune_vqa.main([*files, "--start", start, "--out", str(tmp_path / "a")])
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 480
    assert config["architectures"] == ["BlipForQuestionAnswering"]
    again = settings(squares, str(tmp_path / "a" / "model"), tmp_path / "b", steps=1, answers=squares / "answers.txt")
    assert 0 <= finetune_vqa.train(again)["accuracy"] <= 100
    assert (tmp_path / "b" / "log.jsonl").exists()


def test_starts_that_cannot_answer_say_so(squares, tmp_path, tokenizer):
    save_vqa(tiny_vqa(), tmp_path / "captioner", tokenizer, mean=MEAN, std=STD)
    config = json.loads((tmp_path / "captioner" / "config.json").read_text())
    config["architectures"] = ["BlipForConditionalGeneration"]
    (tmp_path / "captioner" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot search"):
        finetune_vqa.train(settings(squares, str(tmp_path / "captioner"), tmp_path / "out"))


def test_batches_hold_each_questions_answers_with_their_shares(squares, tokenizer):
    questions = load_questions(squares / "train.jsonl", squares / "pictures")
    assert len(questions) == 48 and questions[0][0].shares() == {"red": 0.9, "grey": 0.1}
    transform = finetune_vqa.Transform(settings(squares, "", squares))
    batch = finetune_vqa.Collate(tokenizer)([transform(questions[i], None) for i in (0, 1)])
    assert batch["pixels"].shape == (2, 32, 32, 3) and batch["pixels"].dtype == torch.uint8
    assert batch["counts"].tolist() == [2, 2]
    torch.testing.assert_close(batch["weights"], torch.tensor([0.9, 0.1, 0.9, 0.1]))
    assert [tokenizer.decode(ids.tolist()) for ids in batch["answer_ids"]] == ["red", "grey", "green", "grey"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 is not JSON"), ('{"image": "a.png"}', "line 2 needs"), ('["a"]', "line 2 needs"),
     ('{"image": "b.png", "question": "?", "answers": ["x"]}', r"names 1 pictures .* --images")],
)  # fmt: skip
def test_lines_that_cannot_be_used_are_named(line, message, tmp_path):
    drawn_photo(0).save(tmp_path / "a.png")
    good = '{"image": "a.png", "question": "what?", "answers": ["x"]}'
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_questions(tmp_path / "q.jsonl")


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "what?", "answers": ["x"]}\n')
    with pytest.raises(OSError, match=r"a\.png cannot be read"):
        load_questions(tmp_path / "q.jsonl")[0]
