"""Fine-tune BLIP to answer questions: `photoblip train finetune_vqa --data train.jsonl --dev dev.jsonl --out DIR`.

A line of a file is {"image": "a.jpg", "question": "what is this?", "answers": ["dog", "dog", "puppy"]}; the pictures
lie beside it or in --images. DIR/model is the result: `photoblip ask PHOTO QUESTION --model DIR/model`.
The settings are BLIP's own (Li et al. 2022, appendix; salesforce/BLIP `configs/vqa.yaml`).
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blipcore.annotated import Annotated, load_questions
from blipcore.checkpoint import LoadedModel, load_folder, save_vqa
from blipcore.evaluation.vqa import vqa_accuracy
from blipcore.hub import find_model
from blipcore.models.vqa import BlipVqa
from blipcore.training import distributed
from blipcore.training.datasets import augmentation
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.starts import drop_paths, resize_positions
from blipcore.transforms import Normalizer, TextTokenizer, clean_question, squash

MAX_TOKENS = 35  # of a question
EVALUATION_BATCH = 32


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # questions to train on
    dev: Path | None = None  # questions to measure on
    images: Path | None = None  # the pictures' folder, where it is not the files' own
    answers: Path | None = None  # one answer a line to choose from on dev; without it the model writes
    start: str = "blip-mini"  # a known name or a model folder: pretrained towers, or a VQA model to go on with
    image_size: int = 480
    min_scale: float = 0.5  # of RandomResizedCrop
    randaugment: bool = True
    drop_path: float = 0.1
    epochs: float = 10
    batch_size: int = 16
    rate: float = 2e-5


class VqaObjective(nn.Module):
    """Batches of `Collate` -> BLIP's VQA loss."""

    def __init__(self, model: BlipVqa, normalize: Normalizer):
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        question = batch["question_ids"], batch["question_mask"]
        answers = batch["answer_ids"], batch["answer_mask"]
        pixel_values = self.normalize(batch["pixels"])
        return {"loss": self.model.loss(pixel_values, question, answers, batch["counts"], batch["weights"])}


class Transform:
    """(question, its picture) -> (augmented pixels uint8 [S, S, 3], question, each answer's share)."""

    def __init__(self, s: Settings):
        self.augment = augmentation(s.image_size, s.min_scale, randaugment=s.randaugment)

    def __call__(self, sample, rng: np.random.Generator):
        row, (picture,) = sample
        return np.array(self.augment(picture)), row.question, row.shares()


class Collate:
    """Items of `Transform` -> tensors: pixels [B, S, S, 3], questions [B, T], their answers [A, L], counts, weights."""

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items) -> dict[str, Tensor]:
        pixels, questions, shares = zip(*items, strict=True)
        question_ids, question_mask = self.tokenizer(questions, clean_question)
        answer_ids, answer_mask = self.tokenizer([answer for each in shares for answer in each], str.lower)
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "question_ids": question_ids,
            "question_mask": question_mask,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "counts": torch.tensor([len(each) for each in shares]),
            "weights": torch.tensor([share for each in shares for share in each.values()]),
        }


def start_model(s: Settings) -> tuple[BlipVqa, LoadedModel]:
    """The start's towers at the run's image size. -> (model, what the start's folder held)."""
    loaded = load_folder(find_model(s.start), s.start)
    model = loaded.vqa
    if model is None:
        retrieval, captioner = loaded.need_blip(), loaded.need_captioner()
        model = BlipVqa(copy.deepcopy(retrieval.config))
        model.start_from(retrieval, captioner)
    resize_positions(model, s.image_size)
    drop_paths(model.vision_model, s.drop_path)
    return model, loaded


@torch.no_grad()
def answer_all(
    model: BlipVqa, questions: Annotated, tokenizer: TextTokenizer, normalize: Normalizer, choices: list[str] | None
) -> list[str]:
    """One answer a question: the likeliest of `choices`, or in the model's own words."""
    size, device = model.config.vision_config.image_size, next(model.parameters()).device
    candidates = choices and [tensor.to(device) for tensor in tokenizer(choices, str.lower)]
    answers = []
    for first in range(0, len(questions), EVALUATION_BATCH):
        rows = [questions[i] for i in range(first, min(first + EVALUATION_BATCH, len(questions)))]
        pixels = np.stack([squash(picture, size) for _, (picture,) in rows])
        ids, mask = tokenizer([row.question for row, _ in rows], clean_question)
        inputs = normalize(torch.from_numpy(pixels).to(device)), ids.to(device), mask.to(device)
        if choices:
            answers += [choices[best] for best in model.rank_answers(*inputs, *candidates).tolist()]
        else:
            answers += [tokenizer.decode(ids) for ids in model.answer(*inputs)]
    return answers


def train(s: Settings) -> dict:
    """Load, train, evaluate, save. -> the figures on dev."""
    model, start = start_model(s)
    tokenizer = start.tokenizer.with_max_length(MAX_TOKENS)
    questions = load_questions(s.data, s.images)
    dev = load_questions(s.dev, s.images) if s.dev else None
    choices = _read_answers(s.answers) if s.answers else None

    def evaluate() -> dict:
        answers = answer_all(model, dev, tokenizer, start.normalize, choices)
        right = [vqa_accuracy(answer, row.answers) for answer, row in zip(answers, dev.rows, strict=True)]
        return {"accuracy": round(100 * float(np.mean(right)), 2)}

    objective = VqaObjective(model, start.normalize)
    figures = fit(objective, questions, Transform(s), Collate(tokenizer), s, evaluate=evaluate if dev else None)
    if distributed.rank() == 0:
        save_vqa(model, s.out / "model", tokenizer, mean=start.normalize.mean, std=start.normalize.std)
    return figures


def _read_answers(file: Path) -> list[str]:
    answers = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not answers:
        raise ValueError(f"{file} holds no answers: it needs one a line")
    return answers


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
