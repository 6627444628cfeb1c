"""What a conversation looks like to each language model, byte for byte as its authors published it.

A template makes segments of a conversation: text, or the place of an image; what the model learns to write is marked.
Sources: haotian-liu/LLaVA `conversation.py`, Vision-CAIR/MiniGPT-4 `conversation.py` and its training configurations,
salesforce/LAVIS `blip2_*.py`, QwenLM/Qwen-VL `qwen_generation_utils.py` and the paper's appendix, QwenLM/Qwen2-VL's
chat template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

CUT = "\0"  # in a text: its two sides are tokenised by themselves, so that no token and no mark stands across


class Turn(TypedDict):
    """One utterance: `role` is "user" or "assistant"."""

    role: str
    content: str


class Segment(NamedTuple):
    """A piece of a prompt: `text`, or an image's place where `image` is set. `learnt`: the model is to write it."""

    text: str
    image: bool = False
    learnt: bool = False


@dataclass(frozen=True)
class Template:
    """How turns become one text. Images stand in the first turn, before its words.

    Attributes:
        opening: before everything.
        user: what stands before and after a user's words.
        assistant: what stands before the model's turn.
        answer: what the model writes before and after its words; the end is how it learns to stop.
        earlier: after an answer that another turn follows, its end and what stands between; None: its end alone.
        image: what stands before and after each image, {n} being its number from 1. after_images: then, once.
        images_first: whether images stand before what opens the first turn as well.
        bos: whether the tokenizer's own first token opens the prompt. (A T5's encoder always reads its last one.)
        stop: texts at which generation ends, beside the tokenizer's own end.
    """

    opening: str = ""
    user: tuple[str, str] = ("", "")
    assistant: str = ""
    answer: tuple[str, str] = ("", "")
    earlier: tuple[str, str] | None = None
    image: tuple[str, str] = ("", "")
    after_images: str = ""
    images_first: bool = False
    bos: bool = False
    stop: tuple[str, ...] = ()

    def render(self, turns: Sequence[Turn], images: int = 1) -> list[Segment]:
        """Turns -> segments. After a last turn of the user's, what opens the model's turn stands at the end.

        Raises ValueError where the turns do not alternate, beginning with the user's.
        """
        expected = ["user", "assistant"] * len(turns)
        if not turns or [turn["role"] for turn in turns] != expected[: len(turns)]:
            raise ValueError("a conversation begins with the user, and user and assistant take turns")
        made = [Segment(self.opening)]
        for number, turn in enumerate(turns):
            if turn["role"] == "user":
                pictures = self._images(images) if number == 0 else []
                opening, words = Segment(self.user[0]), Segment(turn["content"] + self.user[1] + self.assistant)
                made += [*pictures, opening, words] if self.images_first else [opening, *pictures, words]
            else:
                last = number == len(turns) - 1
                end, between = (self.answer[1], "") if last or self.earlier is None else self.earlier
                made += [Segment(self.answer[0] + turn["content"] + end, learnt=True), Segment(between)]
        return _joined(made)

    def _images(self, count: int) -> list[Segment]:
        made = []
        for number in range(1, count + 1):
            before, after = (part.replace("{n}", str(number)) for part in self.image)
            made += [Segment(before), Segment("", image=True), Segment(after)]
        return [*made, Segment(self.after_images)] if count else []


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring texts of one kind as one; empty ones left out."""
    made: list[Segment] = []
    for segment in segments:
        if not segment.image and not segment.text:
            continue
        if made and not segment.image and not made[-1].image and made[-1].learnt == segment.learnt:
            made[-1] = segment._replace(text=made[-1].text + segment.text)
        else:
            made.append(segment)
    return made


def single(question: str, answer: str | None = None) -> list[Turn]:
    """One exchange, or a question that waits for its answer."""
    asked: list[Turn] = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
_LLAVA = {
    "user": ("USER: ", " "),
    "assistant": "ASSISTANT:",
    "answer": (" ", "</s>"),
    "after_images": "\n",
    "bos": True,
}
_MINIGPT4_OPENING = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)
_IMG = ("<Img>", "</Img> ")
_LLAMA2 = ("</s>", "<s>")  # Llama 2 begins each exchange anew

TEMPLATES = {
    # the caption follows the image: LLaVA's first stage ("plain"), MiniGPT-4's first stage
    "plain": Template(answer=("", "\n"), bos=True),
    # BLIP-2: the queries come first; OPT's own first token, </s>, stands after them. The chats are LAVIS's notebook's
    "blip2-opt": Template(after_images="</s>" + CUT, answer=(" ", "\n"), stop=("\n",)),
    "blip2-opt-chat": Template(
        after_images="</s>" + CUT,
        images_first=True,
        user=("Question: ", ""),
        assistant=" Answer:",
        answer=(" ", "\n"),
        earlier=("", ". "),
        stop=("\n",),
    ),
    "blip2-t5": Template(answer=(" ", ""), earlier=("", " ")),
    "blip2-t5-chat": Template(
        images_first=True, user=("Question: ", ""), assistant=" Answer:", answer=(" ", ""), earlier=("", ". ")
    ),
    # its authors give Vicuna's tokenizer </s> for a first token as well
    "instructblip-vicuna": Template(after_images="</s>" + CUT, answer=(" ", "</s>")),
    "llava": Template(
        "A chat between a curious human and an artificial intelligence assistant. " + _ASSISTANT.format("human"),
        **_LLAVA,
    ),
    "llava-1.5": Template(
        "A chat between a curious user and an artificial intelligence assistant. " + _ASSISTANT.format("user"), **_LLAVA
    ),
    # MiniGPT-4's authors tokenise answers by themselves: the space before one is a token of the prompt's
    "minigpt4": Template(
        _MINIGPT4_OPENING + "###",
        user=("Human: ", "###"),
        assistant="Assistant: " + CUT,
        answer=("", "###"),
        image=_IMG,
        bos=True,
        stop=("###",),
    ),
    # what its second stage trains on: one exchange, and a space before the assistant's mark
    "minigpt4-training": Template(
        "###",
        user=("Human: ", " ###"),
        assistant="Assistant: " + CUT,
        answer=("", "###"),
        image=_IMG,
        bos=True,
        stop=("###",),
    ),
    "minigpt4-llama2": Template(
        _MINIGPT4_OPENING + "<s>",
        user=("[INST] ", " [/INST] " + CUT),
        answer=("", "</s>"),
        earlier=_LLAMA2,
        image=_IMG,
        bos=True,
    ),
    "minigpt4-llama2-training": Template(
        user=("[INST] ", " [/INST] " + CUT), answer=("", "</s>"), earlier=_LLAMA2, image=_IMG, bos=True
    ),
    "minigpt-v2": Template(user=("[INST] ", " [/INST]"), answer=(" ", "</s>"), earlier=_LLAMA2, image=_IMG, bos=True),
    # what its first two stages train on: "Generate the caption in English:" and the like, and questions
    "qwen-vl": Template(image=("<img>", "</img>"), answer=(" ", "<|endoftext|>")),
    "qwen-vl-vqa": Template(image=("<img>", "</img>"), assistant=" Answer:", answer=(" ", "<|endoftext|>")),
    "qwen-vl-chat": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>",
        user=("\n<|im_start|>user\n", "<|im_end|>"),
        assistant="\n<|im_start|>assistant\n",
        answer=("", "<|im_end|>"),
        image=("Picture {n}: <img>", "</img>\n"),
        stop=("<|im_end|>",),
    ),
    # not published: as Qwen-VL's
    "qwen2-vl": Template(image=("<|vision_start|>", "<|vision_end|>"), answer=(" ", "<|endoftext|>")),
    "qwen2-vl-chat": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        answer=("", "<|im_end|>\n"),
        image=("<|vision_start|>", "<|vision_end|>"),
        stop=("<|im_end|>",),
    ),
}
