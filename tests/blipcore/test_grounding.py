"""Boxes in three systems' words: read, written, taken out, drawn."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from blipcore.errors import ModelError
from blipcore.grounding import Box, draw_boxes, format_boxes, parse_boxes, strip_boxes
from tests.tiny import drawn_photo

STEPS = {"minigpt-v2": 100, "qwen-vl": 999, "qwen2-vl": 1000}
systems = pytest.mark.parametrize("system", STEPS)

edges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda pair: pair[1] - pair[0] > 0.02)
labels = st.text(st.characters(exclude_characters="<>{}", exclude_categories=["Cs"]), max_size=20)
boxes = st.builds(lambda x, y, label: Box(x[0], y[0], x[1], y[1], label), edges, edges, labels)


def corners(box: Box) -> tuple[float, ...]:
    return box.x0, box.y0, box.x1, box.y1


def test_what_the_published_models_write_is_read():
    """MiniGPT-v2's demonstration, Qwen-VL's and Qwen2-VL's documentation."""
    dogs = "<p>two dogs</p> {<10><20><30><40>}<delim>{<0><0><100><100>}"
    assert parse_boxes("minigpt-v2", dogs) == [Box(0.1, 0.2, 0.3, 0.4, "two dogs"), Box(0, 0, 1, 1, "two dogs")]
    assert parse_boxes("minigpt-v2", "{<25><50><75><100>}") == [Box(0.25, 0.5, 0.75, 1)]
    found = parse_boxes("qwen-vl", "<ref>击掌</ref><box>(536,509),(588,602)</box>")
    assert found == [Box(536 / 999, 509 / 999, 588 / 999, 602 / 999, "击掌")]
    sentence = (
        "In the image,<|object_ref_start|>a woman<|object_ref_end|><|box_start|>(462,371),(709,785)<|box_end|> is "
        "sitting on the beach with<|object_ref_start|> her dog<|object_ref_end|>"
        "<|box_start|>(224,442),(525,760)<|box_end|>"
    )
    found = [Box(0.462, 0.371, 0.709, 0.785, "a woman"), Box(0.224, 0.442, 0.525, 0.76, "her dog")]
    assert parse_boxes("qwen2-vl", sentence) == found
    assert strip_boxes("qwen2-vl", sentence) == "In the image, a woman is sitting on the beach with her dog"


def test_an_answer_inside_a_box_that_the_prompt_opened_is_read():
    """Qwen-VL's evaluation asks "<ref>the dog</ref><box>" and gets the rest."""
    assert parse_boxes("qwen-vl", "(0,333),(999,666)</box>") == [Box(0, 1 / 3, 1, 2 / 3)]


@systems
@given(st.lists(boxes, max_size=4))
@example([Box(0, 0, 0.5, 0.5, "a dog"), Box(0.5, 0.5, 1, 1, ""), Box(0, 0, 1, 1, "(1,2),(3,4)")])
def test_boxes_survive_writing_and_reading(system, written):
    read = parse_boxes(system, format_boxes(system, written))
    assert [box.label for box in read] == [" ".join(box.label.split()) for box in written]
    for one, other in zip(read, written, strict=True):
        assert np.allclose(corners(one), corners(other), rtol=0, atol=0.5001 / STEPS[system])
    assert format_boxes(system, read) == format_boxes(system, written)


@systems
def test_a_box_is_written_with_at_least_one_step_each_way(system):
    thin = [Box(0.5, 0.25, 0.5, 0.75), Box(1, 1, 1, 1), Box(0, 0, 0, 0)]
    read = parse_boxes(system, format_boxes(system, thin))
    assert len(read) == 3 and np.isclose(read[1].x1 - read[1].x0, 1 / STEPS[system])


def test_markup_in_a_label_is_not_written():
    assert format_boxes("minigpt-v2", [Box(0, 0, 1, 1, "a </p> {<1>} dog")]) == "<p>a /p 1 dog</p> {<0><0><100><100>}"


def test_corners_are_sorted_and_cut_to_the_photo():
    assert parse_boxes("minigpt-v2", "{<90><-20><10><250>}") == [Box(0.1, 0, 0.9, 1)]
    assert parse_boxes("qwen2-vl", "<|box_start|>(500, 1500),(0,250.0)<|box_end|>") == [Box(0, 0.25, 0.5, 1)]
    outside = "<box>(1200,0),(1500,90)</box><box>(5,5),(5,9)</box>"
    assert parse_boxes("qwen-vl", outside) == []


@systems
def test_a_text_cut_anywhere_gives_the_boxes_before_the_cut(system):
    written = [Box(0.1, 0.2, 0.83, 0.94, "a dog"), Box(0.55, 0.01, 0.66, 0.77, "a dog"), Box(0, 0.5, 1, 1, "grass")]
    text = format_boxes(system, written)
    whole = parse_boxes(system, text)
    counts = []
    for end in range(len(text) + 1):
        read = parse_boxes(system, text[:end])
        assert read == whole[: len(read)]
        counts.append(len(read))
    assert counts == sorted(counts) and counts[-1] == 3


_PIECES = ["<p>", "</p>", "{", "}", "<delim>", "<12>", "<-5>", "<box>", "</box>", "<ref>", "</ref>", "(1,2)", "(9", ","]
_PIECES += [
    "<|box_start|>",
    "<|box_end|>",
    "<|object_ref_start|>",
    "9" * 400,
    "1.5.2",
    " ",
    "\n",
    "a dog",
    "٣",
    "<quad>",
]


@systems
@given(st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=5)), max_size=12).map("".join))
def test_no_text_is_an_error_and_every_box_lies_in_the_photo(system, text):
    for box in parse_boxes(system, text):
        assert 0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1
    assert len(strip_boxes(system, text)) <= len(text)


def test_a_sentence_keeps_its_words_and_loses_its_marks():
    grounded = "A <p>brown dog</p> {<1><2><30><40>}<delim>{<5><6><70><80>} lies on <p>grass</p> {<0><0><100><50>}."
    assert strip_boxes("minigpt-v2", grounded) == "A brown dog lies on grass."
    assert strip_boxes("minigpt-v2", grounded + " Behind {<3><4") == "A brown dog lies on grass. Behind"
    read = "<ref>Stop</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad> it says"
    assert strip_boxes("qwen-vl", read) == "Stop it says"


@systems
@given(st.text(st.characters(exclude_characters="<>{}()")))
def test_a_text_without_boxes_is_left_as_it_is(system, text):
    assert strip_boxes(system, text) == text


@pytest.mark.parametrize("call", [parse_boxes, strip_boxes])
def test_a_system_without_boxes_says_which_have_them(call):
    with pytest.raises(ModelError, match=r"llava-1\.5 writes no boxes: minigpt-v2, qwen-vl, qwen2-vl do"):
        call("llava-1.5", "a dog")


# -- drawing ------------------------------------------------------------------------------------------------------


def test_a_box_is_outlined_where_it_is_and_the_photo_stays():
    photo = Image.new("RGB", (320, 200), "#808080")
    drawn = np.asarray(draw_boxes(photo, [Box(0.25, 0.5, 0.75, 1)]))
    changed = (drawn != 128).any(-1)
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    assert (rows[0], rows[-1]) == (100, 199) and (columns[0], columns[-1]) == (80, 239)
    assert not changed[110:190, 90:230].any()  # only an outline
    assert (np.asarray(photo) == 128).all()


def test_outlines_grow_with_the_photo():
    lines = []
    for side in (200, 3200):
        changed = np.asarray(draw_boxes(Image.new("L", (side, side)), [Box(0.5, 0, 1, 1)])).any(-1)
        lines.append(int(changed[side // 2, : side * 3 // 4].sum()))
    assert lines == [2, 20]


def test_labels_lie_above_their_boxes_and_apart_from_each_other():
    photo = Image.new("RGB", (400, 400))

    def height(boxes):
        return len(np.asarray(draw_boxes(photo, boxes))[:200].any((1, 2)).nonzero()[0])

    same = (0.25, 0.5, 0.75, 1)
    bare, one, two = (height([Box(*same, label) for label in labels]) for labels in ([""], ["dog"], ["dog", "pet"]))
    assert bare == 0 and 11 < one < 40  # the second label moves down, into the box
    lower = np.asarray(draw_boxes(photo, [Box(*same, "dog"), Box(*same, "pet")]))[210:220, 110:130]
    assert two == one and lower.any()


def test_labels_of_one_name_have_one_colour():
    photo = Image.new("RGB", (300, 300))
    drawn = draw_boxes(photo, [Box(0, 0.4, 0.2, 1, "dog"), Box(0.3, 0.4, 0.5, 1, "cat"), Box(0.6, 0.4, 1, 1, "dog")])
    dog, cat, other = (drawn.getpixel((round(x * 299), 250)) for x in (0, 0.3, 0.6))
    assert dog == other != cat != (0, 0, 0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7)])
def test_any_photo_can_be_drawn_on(mode, size):
    long = "a very long label " * 10
    drawn = draw_boxes(drawn_photo(1).convert(mode).resize(size), [Box(0, 0, 1, 1, long), Box(2, 1, -1, 0, "\n")])
    assert drawn.mode == "RGB" and drawn.size == size


def test_boxes_need_no_torch():
    code = "import sys, blipcore.grounding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
