"""Where things are in a photo: boxes as each system writes them in its words, read, written, taken out and drawn.

Chen et al., "MiniGPT-v2", 2023; Bai et al., "Qwen-VL", 2023; Wang et al., "Qwen2-VL", 2024. Free of torch.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from blipcore.errors import ModelError

# Okabe and Ito's colours, which colour-blind people tell apart
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Pixels = tuple[int, int, int, int]  # left, upper, right, lower


@dataclass(frozen=True)
class Box:
    """Left, upper, right and lower edge as parts of the photo's width and height, 0 to 1, and what is there."""

    x0: float
    y0: float
    x1: float
    y1: float
    label: str = ""


@dataclass(frozen=True)
class _Markup:
    """How a system writes: `steps` is the coordinate of the right and of the lower edge.

    `spot` finds a box, whole or damaged, and `number` the whole coordinates in one.
    """

    steps: int
    phrase: tuple[str, str]
    gap: str
    box: str
    between: str
    spot: str
    number: str


_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_PAIR = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"


def _qwen(steps: int, phrase: tuple[str, str], box: tuple[str, str]) -> _Markup:
    """Both Qwens': `<box>` may be missing where it stood at the prompt's end, `</box>` where the text was cut."""
    opening, closing = map(re.escape, box)
    quad = opening.replace("box", "quad"), closing.replace("box", "quad")  # of text: taken out, not read
    return _Markup(
        steps,
        phrase,
        gap="",
        box=box[0] + "({},{}),({},{})" + box[1],
        between="",
        spot=rf"(?:{opening}|{quad[0]})[0-9\s(),.-]*(?:{closing}|{quad[1]})?|{_PAIR}\s*,\s*{_PAIR}(?:{closing})?",
        number=rf"({_NUMBER})\s*(?=[,)])",
    )


_MARKUPS = {
    "minigpt-v2": _Markup(
        100,
        ("<p>", "</p>"),
        gap=" ",
        box="{{<{}><{}><{}><{}>}}",
        between="<delim>",
        spot=r"\{\s*(?:<[<>0-9\s.-]*\}?|$)",
        number=rf"<\s*({_NUMBER})\s*>",
    ),
    # its own evaluation divides by 999: coordinates are below 1000
    "qwen-vl": _qwen(999, ("<ref>", "</ref>"), ("<box>", "</box>")),
    "qwen2-vl": _qwen(1000, ("<|object_ref_start|>", "<|object_ref_end|>"), ("<|box_start|>", "<|box_end|>")),
}


def _markup(system: str) -> _Markup:
    if system not in _MARKUPS:
        raise ModelError(f"{system} writes no boxes: {', '.join(_MARKUPS)} do")
    return _MARKUPS[system]


def parse_boxes(system: str, text: str) -> list[Box]:
    """The boxes in what a model wrote, in its order, each with the phrase that stands before it.

    What lies outside the photo is cut off; a box that is damaged, cut short or empty is left out.
    Raises ModelError where the system writes no boxes.
    """
    markup = _markup(system)
    boxes, label = [], ""
    for match in re.finditer(rf"{re.escape(markup.phrase[0])}(?P<phrase>[^<{{]*)|{markup.spot}", text):
        if match["phrase"] is not None:
            label = _plain(match["phrase"])
        elif box := _read(re.findall(markup.number, match[0]), markup.steps, label):
            boxes.append(box)
    return boxes


def _read(numbers: Sequence[str], steps: int, label: str) -> Box | None:
    if len(numbers) != 4:
        return None
    box = _inside(Box(*(float(number) / steps for number in numbers), label))
    return box if box.x0 < box.x1 and box.y0 < box.y1 else None


def _inside(box: Box) -> Box:
    """The box with its corners in order and inside the photo."""
    (x0, x1), (y0, y1) = (
        sorted(min(max(edge, 0.0), 1.0) for edge in edges) for edges in ((box.x0, box.x1), (box.y0, box.y1))
    )
    return Box(x0, y0, x1, y1, box.label)


def _plain(label: str) -> str:
    """A label in single spaces, without what markup is made of."""
    return " ".join(re.sub("[<>{}]", "", label).split())


def format_boxes(system: str, boxes: Iterable[Box]) -> str:
    """Boxes -> what the system would write; neighbours with one label share one phrase.

    Coordinates are rounded to the system's steps, and a box is at least one step wide and high.
    Raises ModelError where the system writes no boxes.
    """
    markup = _markup(system)
    written = []
    for label, group in groupby(boxes, key=lambda box: _plain(box.label)):
        spots = markup.between.join(markup.box.format(*_steps(box, markup.steps)) for box in group)
        # an empty phrase ends the one before it
        phrase = label.join(markup.phrase) + markup.gap if label or written else ""
        written.append(phrase + spots)
    return " ".join(written)


def _steps(box: Box, steps: int) -> tuple[int, int, int, int]:
    box = _inside(box)
    (x0, x1), (y0, y1) = (
        _apart(round(low * steps), round(high * steps), steps) for low, high in ((box.x0, box.x1), (box.y0, box.y1))
    )
    return x0, y0, x1, y1


def _apart(low: int, high: int, steps: int) -> tuple[int, int]:
    if low < high:
        return low, high
    return (low, low + 1) if low < steps else (steps - 1, steps)


def strip_boxes(system: str, text: str) -> str:
    """What a model wrote as a plain sentence: boxes and marks taken out, phrases kept; other text is left as it is.

    Raises ModelError where the system writes no boxes.
    """
    markup = _markup(system)
    opening, closing = map(re.escape, markup.phrase)
    plain = re.sub(rf"(?<=[A-Za-z0-9,;:.])({opening})(?=\S)", r" \1", text)  # Qwen writes "with<ref>her dog</ref>"
    plain = re.sub("|".join(filter(None, (opening, closing, re.escape(markup.between)))), "", plain)
    plain = re.sub(markup.spot, "", plain)
    if plain == text:
        return text
    return re.sub(r" +([.,;:!?])", r"\1", re.sub(r" {2,}", " ", plain)).strip()


# -- drawing ------------------------------------------------------------------------------------------------------


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy of the photo (RGB) with each box outlined and labelled; one label, one colour."""
    drawn = image.convert("RGB")
    boxes = [_inside(box) for box in boxes]
    labels = list(dict.fromkeys(box.label for box in boxes))
    colours = {label: _COLOURS[number % len(_COLOURS)] for number, label in enumerate(labels)}
    pen = ImageDraw.Draw(drawn)
    line = max(2, round(min(drawn.size) / 160))
    font = ImageFont.load_default(max(11, round(min(drawn.size) / 28)))
    corners = [_pixels(box, drawn.size) for box in boxes]
    for box, corner in zip(boxes, corners, strict=True):
        pen.rectangle(corner, outline=colours[box.label], width=line)
    signs = []
    for box, (left, top, *_) in zip(boxes, corners, strict=True):  # over the outlines of all boxes
        if text := _plain(box.label):
            text, sign = _sign(text, font, (left, top), drawn.size, line)
            while any(_overlap(sign, other) for other in signs) and sign[3] < drawn.height:
                sign = sign[0], sign[1] + 1, sign[2], sign[3] + 1
            signs.append(sign)
            pen.rectangle(sign, fill=colours[box.label])
            pen.text((sign[0] + line, sign[1]), text, font=font, fill=_readable_on(colours[box.label]))
    return drawn


def _pixels(box: Box, size: tuple[int, int]) -> Pixels:
    right, lower = size[0] - 1, size[1] - 1
    return round(box.x0 * right), round(box.y0 * lower), round(box.x1 * right), round(box.y1 * lower)


def _sign(text: str, font, at: tuple[int, int], size: tuple[int, int], margin: int) -> tuple[str, Pixels]:
    """A label, cut to the photo's width, and its place: over the box's corner, or inside where no room is above."""
    text = _shortened(text, font, size[0] - 2 * margin)
    high, wide = sum(font.getmetrics()) + margin, round(font.getlength(text)) + 2 * margin
    left = max(0, min(at[0], size[0] - wide))
    top = at[1] - high if at[1] >= high else at[1]
    return text, (left, top, left + wide, top + high)


def _overlap(one: Pixels, other: Pixels) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _shortened(text: str, font, room: int) -> str:
    if font.getlength(text) <= room:
        return text
    kept = next((cut for cut in range(len(text) - 1, 0, -1) if font.getlength(text[:cut] + "…") <= room), 0)
    return text[:kept].rstrip() + "…"


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
