"""Conversations and pictures -> the tensors a system's model reads: prompts, image positions, labels, pixels."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig

from blipcore.errors import ModelError
from blipcore.models.systems import System
from blipcore.models.templates import CUT, TEMPLATES, Segment, Template, Turn
from blipcore.models.vlm import IMAGE, VlmConfig
from blipcore.transforms import IGNORE, Normalizer, squash

# special tokens that are part of what is said: boxes, and the phrases they belong to
SAID = frozenset(
    {
        *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
        *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        *("<|quad_start|>", "<|quad_end|>"),
    }
)


class Example(NamedTuple):
    """A conversation and its pictures."""

    turns: Sequence[Turn]
    images: Sequence[Image.Image]


class VlmReader:
    """What a system's model reads.

    Args:
        system: the preset. config: the model's own configuration, which decides sizes.
        tokenizer: the language model's. qformer_tokenizer: the instruction's, where a Q-Former reads it.
        normalize: the pixels.
        max_length: tokens of a training example; what is longer is cut at its end. A prompt to answer is not cut.

    What people and data say never becomes one of the tokenizer's special tokens or a template's stop: "<|im_end|>"
    in a question is ten characters and ends nothing. Only the marks of boxes (`SAID`) are read as such.
    """

    def __init__(
        self,
        system: System,
        config: VlmConfig | Qwen2VLConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        normalize: Normalizer,
        max_length: int = 2048,
    ):
        self.system, self.config, self.tokenizer = system, config, tokenizer
        self.qformer_tokenizer, self.max_length = qformer_tokenizer, max_length
        self.normalize = normalize
        self.pictures = _patches(config, normalize) if isinstance(config, Qwen2VLConfig) else None
        added = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special} - SAID

    def __call__(self, examples: Sequence[Example], template: str | Template = "", *, answering: bool = False) -> dict:
        """Examples -> a batch of tensors; with `answering` prompts end on the right and there are no labels.

        Args:
            template: a name of `TEMPLATES`; the system's own where empty.

        Raises:
            ModelError: an example's images alone take more than `max_length`.
        """
        template = TEMPLATES[template or self.system.template] if isinstance(template, str) else template
        if not self._writes(template.answer[1]):  # a line's end is nothing in BERT's vocabulary: an end must be learnt
            template = replace(template, answer=(template.answer[0], self.tokenizer.eos_token))
        batch, counts = self._pixels([image for example in examples for image in example.images])
        rows, slots = [], iter(counts)
        for example in examples:
            turns = [{**turn, "content": self._said(turn["content"], template)} for turn in example.turns]
            segments = template.render(turns, len(example.images))
            row = self._encode(segments, template, [next(slots) for _ in example.images])
            rows.append(row if answering else self._cut(row))
        batch |= self._two_sided(rows) if self.two_sided else self._joined(rows, left=answering)
        if answering:
            batch.pop("labels")
        if self.pictures:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.config.image_token_id).int()
        if self.qformer_tokenizer and "pixel_values" in batch:
            batch |= self._instructions(examples)
        return batch

    @property
    def two_sided(self) -> bool:
        """Whether the language model has an encoder, which reads the prompt."""
        return bool(self.config.get_text_config().is_encoder_decoder)

    def decode(self, written: Tensor, template: str | Template = "") -> list[str]:
        """Ids [B, U] -> what was said, up to the template's stop."""
        template = TEMPLATES[template or self.system.template] if isinstance(template, str) else template
        texts = []
        for row in written:
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            for stop in template.stop:
                if stop.strip():
                    text = text.split(stop)[0]
            texts.append(text.strip())
        return texts

    # -- text -----------------------------------------------------------------------------------------------

    def _encode(self, segments: list[Segment], template: Template, slots: list[int]) -> tuple[list[int], list[int]]:
        """-> (ids with image positions, labels) of one conversation."""
        ids, labels = [], []
        if template.bos and self.tokenizer.bos_token_id is not None:
            ids, labels = [self.tokenizer.bos_token_id], [IGNORE]
        remaining = iter(slots)
        for run in _runs(segments):
            if run[0].image:
                count = next(remaining)
                ids += [self._image_id] * count
                labels += [IGNORE] * count
            else:
                part, learnt = self._tokens(run)
                ids += part
                labels += [i if known else IGNORE for i, known in zip(part, learnt, strict=True)]
        return ids, labels

    def _said(self, text: str, template: Template) -> str:
        """What somebody says, cut after the first character of every mark in it."""
        marks = self._special | {stop for stop in template.stop if len(stop) > 1}
        mark = "|".join(map(re.escape, marks))
        return re.sub(rf"(?={mark})(.)", rf"\1{CUT}", text.replace(CUT, ""), flags=re.DOTALL) if mark else text

    def _tokens(self, run: list[Segment]) -> tuple[list[int], list[bool]]:
        """Neighbouring texts, tokenised as one, as the authors do. -> (ids, which of them are learnt)."""
        ids, learnt = [], []
        for piece in _pieces(run):
            spans, at = [], 0
            for segment in piece:
                if segment.learnt:
                    spans.append((at, at + len(segment.text)))
                at += len(segment.text)
            text = "".join(segment.text for segment in piece)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            learnt += [any(start < e and end > s for s, e in spans) for start, end in encoded["offset_mapping"]]
        return ids, learnt

    def _writes(self, text: str) -> bool:
        """Whether a text leaves any token."""
        return bool(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _image_id(self) -> int:
        return self.config.image_token_id if self.pictures else IMAGE

    def _cut(self, row: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        """A training row of at most `max_length`."""
        ids, labels = row
        if self._image_id in ids[self.max_length :]:
            raise ModelError(f"{self.max_length} tokens do not hold an example's images: give it a larger max_length")
        return ids[: self.max_length], labels[: self.max_length]

    def _joined(self, rows: list[tuple[list[int], list[int]]], left: bool) -> dict[str, Tensor]:
        """Rows of one decoder: prompt and answer in one sequence."""
        return {
            "input_ids": _padded([ids for ids, _ in rows], self._pad_id, left),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], 0, left),
            "labels": _padded([labels for _, labels in rows], IGNORE, left),
        }

    def _two_sided(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """The encoder reads up to the last answer; labels are that answer and the end."""
        prompts, answers = [], []
        for ids, labels in rows:
            tail = len(labels)
            while tail and labels[tail - 1] != IGNORE:
                tail -= 1
            prompt, answer = ids[:tail], labels[tail:]
            if not prompt or prompt[-1] != self.tokenizer.eos_token_id:
                prompt = [*prompt, self.tokenizer.eos_token_id]
            if not answer or answer[-1] != self.tokenizer.eos_token_id:
                answer = [*answer, self.tokenizer.eos_token_id]
            prompts.append(prompt)
            answers.append(answer)
        return {
            "input_ids": _padded(prompts, self._pad_id, left=False),
            "attention_mask": _padded([[1] * len(row) for row in prompts], 0, left=False),
            "labels": _padded(answers, IGNORE, left=False),
        }

    @property
    def _pad_id(self) -> int:
        found = self.tokenizer.pad_token_id
        return found if found is not None else self.tokenizer.eos_token_id

    def _instructions(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """What the Q-Former reads beside each image: all that the user says in its conversation."""
        asked = [" ".join(turn["content"] for turn in example.turns[::2]) for example in examples]
        texts = [text for text, example in zip(asked, examples, strict=True) for _ in example.images]
        encoded = self.qformer_tokenizer(
            texts, padding=True, truncation=True, max_length=128, split_special_tokens=True, return_tensors="pt"
        )
        return {"qformer_input_ids": encoded["input_ids"], "qformer_attention_mask": encoded["attention_mask"]}

    # -- pixels ---------------------------------------------------------------------------------------------

    def _pixels(self, images: list[Image.Image]) -> tuple[dict[str, Tensor], list[int]]:
        """-> (tensors, how many positions each image takes)."""
        if not images:
            return {}, []
        if self.pictures:
            made = self.pictures([image.convert("RGB") for image in images], return_tensors="pt")
            merged = self.config.vision_config.spatial_merge_size**2
            return dict(made), (made["image_grid_thw"].prod(1) // merged).tolist()
        if self.system.padding:
            images = [squared(image, self.normalize.mean) for image in images]
        pixels = np.stack([squash(image, self.config.image_size) for image in images])
        return {"pixel_values": self.normalize(pixels)}, [self.config.image_tokens] * len(images)


def squared(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture in the middle of a square of the mean colour (LLaVA-1.5's `expand2square`)."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _patches(config: Qwen2VLConfig, normalize: Normalizer):
    """Qwen2-VL's picture reader: each side a multiple of the merged patch, between a fewest and a most of patches."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    vision = config.vision_config
    unit = (vision.patch_size * vision.spatial_merge_size) ** 2
    return Qwen2VLImageProcessor(
        image_mean=list(normalize.mean),
        image_std=list(normalize.std),
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 4 * unit, "longest_edge": 1280 * unit},
    )


def _runs(segments: list[Segment]) -> list[list[Segment]]:
    """Segments in runs of neighbouring texts; each image alone."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if segment.image or not runs or runs[-1][0].image:
            runs.append([segment])
        else:
            runs[-1].append(segment)
    return runs


def _pieces(run: list[Segment]) -> list[list[Segment]]:
    """A run in the pieces that are tokenised by themselves."""
    pieces: list[list[Segment]] = [[]]
    for segment in run:
        first, *others = segment.text.split(CUT)
        pieces[-1].append(segment._replace(text=first))
        pieces += [[segment._replace(text=other)] for other in others]
    return pieces


def _padded(rows: list[list[int]], value: int, left: bool) -> Tensor:
    side = "left" if left else "right"
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)
