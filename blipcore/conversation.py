"""What a system with a language model says about pictures: captions, answers, conversations, boxes."""

from collections.abc import Iterator, Sequence
from queue import Empty
from threading import Event, Lock, Thread
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, TextIteratorStreamer

from blipcore.errors import ModelError
from blipcore.grounding import Box, parse_boxes
from blipcore.models.templates import TEMPLATES, Turn, single
from blipcore.models.vlm_reader import Example
from blipcore.transforms import IGNORE
from blipcore.vlm_checkpoint import LoadedVlm

STREAM_SECONDS = 600.0  # without a new token in so long, a model is taken to hang


class Talker:
    """A loaded system, speaking.

    Pictures are PIL images, upright. Batches are a few pictures at a time: a language model's are large.
    Threads take turns: Qwen2-VL keeps the positions of the text it is at in the network itself.
    """

    def __init__(self, loaded: LoadedVlm):
        self.model, self.reader, self.system = loaded.model, loaded.reader, loaded.system
        self._turn = Lock()

    def caption(
        self, images: Sequence[Image.Image], candidates: int = 1, beams: int = 0, batch: int = 8
    ) -> list[list[str]]:
        """Captions of each picture, the likeliest first; `beams` are the system's own where 0."""
        options = self.system.generation["caption"] | ({"num_beams": beams} if beams else {})
        if candidates > 1:
            options |= {"num_beams": max(candidates, options.get("num_beams", 1)), "num_return_sequences": candidates}
        found = []
        for at in range(0, len(images), batch):
            examples = [Example(single(self.system.caption), [image]) for image in images[at : at + batch]]
            texts = self._write(examples, self.system.template, options)
            found += [texts[row : row + candidates] for row in range(0, len(texts), candidates)]
        return found

    def ask(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        answers: Sequence[str] | None = None,
        batch: int = 8,
    ) -> list[str]:
        """A short answer a (picture, question) pair: in the model's own words, or the likeliest of `answers`."""
        asked = [self.system.question.format(question) for question in questions]
        if answers is not None:
            pairs = zip(images, asked, strict=True)
            return [self._likeliest(image, question, answers, batch) for image, question in pairs]
        found = []
        for at in range(0, len(images), batch):
            pairs = zip(images[at : at + batch], asked[at : at + batch], strict=True)
            examples = [Example(single(question), [image]) for image, question in pairs]
            found += self._write(examples, self.system.template, self.system.generation["answer"])
        return [answer.rstrip(".") for answer in found]

    def chat(self, images: Sequence[Image.Image], turns: Sequence[Turn], **options: Any) -> Iterator[str]:
        """The next words of a conversation, piece by piece as they are written; closing it ends the writing.

        Args:
            turns: user and assistant in turn, the last one the user's.
            options: of transformers' `generate`, over the system's own.

        Raises:
            ValueError: the turns do not alternate.
            ModelError: more pictures than the system can hold; the model's own failure while it writes.
        """
        if len(images) > self.system.images:
            raise ModelError(f"{self.system.name} takes {self.system.images} photos a conversation, not {len(images)}")
        if not turns or turns[-1]["role"] != "user":
            raise ValueError("there is nothing to answer: the last turn of a conversation is the user's")
        options = self.system.generation["chat"] | options
        if options.get("num_beams", 1) > 1:  # beams are chosen at the end
            yield self._write([Example(turns, images)], self.system.chat, options)[0]
            return
        template = TEMPLATES[self.system.chat]
        batch = self._batch([Example(turns, images)], self.system.chat)
        streamer = TextIteratorStreamer(
            self.reader.tokenizer, skip_prompt=True, timeout=STREAM_SECONDS, skip_special_tokens=True
        )
        failures: list[BaseException] = []
        unheard = Event()

        def write() -> None:
            try:
                self._generate(batch, {"streamer": streamer, "stopping_criteria": [_Unheard(unheard)]} | options)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from _until(streamer, template.stop)
        except Empty:
            raise ModelError(f"{self.system.name} wrote nothing for {STREAM_SECONDS:.0f} s: ask again") from None
        finally:
            unheard.set()
        thread.join()
        if failures:
            raise ModelError(f"{self.system.name} stopped writing ({failures[0]})") from failures[0]

    def ground(self, image: Image.Image, phrase: str) -> list[Box]:
        """Where something is in a picture. Raises ModelError where the system does not write boxes."""
        if not self.system.boxes:
            raise ModelError(f"{self.system.name} cannot point at things: use minigpt-v2, qwen-vl or qwen2-vl")
        batch = self._batch([Example(single(self.system.grounding.format(phrase)), [image])], self.system.chat)
        written = self._generate(batch, {"max_new_tokens": 60, "do_sample": False})
        text = self.reader.tokenizer.decode(written[0], skip_special_tokens=False)
        boxes = parse_boxes(self.system.boxes, text)
        return [box if box.label else Box(box.x0, box.y0, box.x1, box.y1, phrase) for box in boxes]

    @torch.inference_mode()
    def likelihood(self, images: Sequence[Image.Image], prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Log-likelihood of each answer, all its tokens together, given its picture and prompt."""
        pairs = zip(images, prompts, answers, strict=True)
        examples = [Example(single(prompt, answer), [image]) for image, prompt, answer in pairs]
        batch = self._batch(examples, self.system.template, answering=False)
        with self._turn:
            logits = self.model(**batch).logits
        return sequence_likelihood(logits, batch["labels"], self.reader.two_sided).tolist()

    def _likeliest(self, image: Image.Image, question: str, answers: Sequence[str], batch: int) -> str:
        if not answers:
            raise ValueError("there is no answer to choose from: give at least one")
        scores = []
        for at in range(0, len(answers), batch):
            part = answers[at : at + batch]
            scores += self.likelihood([image] * len(part), [question] * len(part), part)
        return answers[max(range(len(answers)), key=scores.__getitem__)]

    def _batch(self, examples: Sequence[Example], template: str, *, answering: bool = True) -> dict[str, Tensor]:
        batch = self.reader(examples, template, answering=answering)
        dtype = self.model.dtype
        return {
            name: value.to(self.model.device, dtype if name == "pixel_values" else None)
            for name, value in batch.items()
        }

    def _write(self, examples: Sequence[Example], template: str, options: dict) -> list[str]:
        written = self._generate(self._batch(examples, template), {"do_sample": False} | options)
        return self.reader.decode(written, template)

    def _generate(self, batch: dict[str, Tensor], options: dict) -> Tensor:
        with self._turn:
            return self.model.write(batch, **self._options(options))

    def _options(self, options: dict) -> dict:
        """Generation options with the tokenizer's ends, and the template's where no token is one."""
        tokenizer = self.reader.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ends = [tokenizer.eos_token_id]
        for template in (TEMPLATES[self.system.chat], TEMPLATES[self.system.template]):
            for stop in (*template.stop, template.answer[1].strip()):
                ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
                # a mark that ends the template's answers need not be the tokenizer's own end; a full stop is no mark
                if len(ids) == 1 and (stop in template.stop or ids[0] in tokenizer.all_special_ids):
                    ends.append(ids[0])
        return {"pad_token_id": pad, "eos_token_id": list(dict.fromkeys(ends))} | options


class _Unheard(StoppingCriteria):
    """Ends the writing once nobody reads it any more."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def sequence_likelihood(logits: Tensor, labels: Tensor, two_sided: bool) -> Tensor:
    """Logits [B, T, V], labels [B, T] -> the labels' summed log-probability [B]; a decoder's labels are one ahead."""
    if not two_sided:
        logits, labels = logits[:, :-1], labels[:, 1:]
    known = labels != IGNORE
    each = F.cross_entropy(logits.float().transpose(1, 2), labels.masked_fill(~known, 0), reduction="none")
    return -(each * known).sum(1)


def _until(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of text up to the first of the stops, which may be spread over pieces; a stop is not passed on."""
    stops = [stop for stop in stops if stop.strip()]
    longest = max(map(len, stops), default=0)
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.find(stop) for stop in stops if stop in held]
        if ends:
            yield held[: min(ends)]
            return
        safe = len(held) - (longest - 1 if longest else 0)
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held
