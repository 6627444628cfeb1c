"""Photos with questions, conversations, or statements about two of them: JSON-lines files beside the pictures.

    {"image": "a.jpg", "question": "what is this?", "answers": ["dog", "dog", "puppy"]}
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "A dog."}]}
    {"images": ["a.jpg", "b.jpg"], "sentence": "both show a dog", "label": true}

Pictures lie beside the file or in a folder of their own; other keys are ignored.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from blipcore.captioned import decode


class Question(NamedTuple):
    """A question about one picture, and what people answered, repetitions and all."""

    images: tuple[Path]
    question: str
    answers: list[str]

    def shares(self) -> dict[str, float]:
        """Each different answer's share among the answers, as BLIP weighs them; the shares sum to 1."""
        return {answer: self.answers.count(answer) / len(self.answers) for answer in dict.fromkeys(self.answers)}


class Statement(NamedTuple):
    """A statement about a left and a right picture, and whether it is true."""

    images: tuple[Path, Path]
    sentence: str
    label: bool


class Conversation(NamedTuple):
    """What was said about one picture: turns {"role", "content"}, user and assistant in turn."""

    images: tuple[Path]
    turns: list[dict[str, str]]


Row = Question | Conversation | Statement


class Annotated:
    """Questions, conversations or statements with their pictures, which are read when asked."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Row, list[Image.Image]]:
        """-> (the row, its pictures, upright and RGB). Raises OSError for a picture that cannot be read."""
        row = self.rows[index]
        return row, [_picture(file) for file in row.images]


def _picture(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except Exception as error:  # decoders fail in many ways
        raise OSError(f"{file} cannot be read as a picture ({error}): mend it, or take out its lines") from error


def load_questions(file: Path, images: Path | None = None) -> Annotated:
    """Questions, each with at least one answer. Raises as `load_statements`."""
    needed = {"image": str, "question": str, "answers": list}
    rows = [
        Question((row["image"],), row["question"], [str(answer) for answer in row["answers"]])
        for row in _read_rows(file, needed)
        if row["answers"]
    ]
    return _placed(rows, Path(file), images)


def load_instructions(file: Path, images: Path | None = None) -> Annotated:
    """Questions, and conversations in LLaVA's format (Liu et al. 2023), mixed as they come.

    Raises as `load_statements`.
    """
    rows = []
    for number, row in enumerate(_read_rows(file, {"image": str}), 1):
        if isinstance(row.get("conversations"), list):
            rows.append(Conversation((row["image"],), _turns(row["conversations"], f"{file}, conversation {number}")))
        elif isinstance(row.get("question"), str) and row.get("answers"):
            rows.append(Question((row["image"],), row["question"], [str(answer) for answer in row["answers"]]))
        else:
            raise ValueError(f'{file}, row {number} needs "conversations", or "question" and "answers"')
    return _placed(rows, Path(file), images)


def _turns(spoken: list, place: str) -> list[dict[str, str]]:
    """LLaVA's utterances as turns, `<image>` and the line's end beside it left out."""
    roles = ("human", "user"), ("gpt", "assistant")
    turns = []
    for number, each in enumerate(spoken):
        speaker, role = roles[number % 2]
        if not isinstance(each, dict) or each.get("from") != speaker or not isinstance(each.get("value"), str):
            raise ValueError(f'{place}: "human" and "gpt" take turns, the human first, each with a "value"')
        turns.append({"role": role, "content": each["value"].replace("<image>", "").strip()})
    if len(turns) < 2:
        raise ValueError(f"{place} has no answer to learn from")
    return turns


def load_statements(file: Path, images: Path | None = None) -> Annotated:
    """Statements about two pictures.

    Args:
        images: the pictures' folder; by default the file's own.

    Raises:
        ValueError: a line is not what the format says. FileNotFoundError: a file or pictures are not there.
    """
    needed = {"images": list, "sentence": str, "label": bool}
    rows = []
    for number, row in enumerate(_read_rows(file, needed), 1):
        if len(row["images"]) != 2:
            raise ValueError(f"{file}: statement {number} has {len(row['images'])} images: give the left and the right")
        rows.append(Statement(tuple(row["images"]), row["sentence"], row["label"]))
    return _placed(rows, Path(file), images)


def _read_rows(file: Path, needed: dict[str, type]) -> Iterator[dict]:
    """Each line's object, checked to have what is needed."""
    wanted = ", ".join(f'"{name}" ({kind.__name__})' for name, kind in needed.items())
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}: it needs one JSON object a line, with {wanted}")
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error}): it needs one object a line") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in needed.items()):
                raise ValueError(f"{file}, line {number} needs {wanted}")
            yield row


def _placed(rows: list, file: Path, images: Path | None) -> Annotated:
    """The rows with whole paths; pictures that are not there are an error before training starts."""
    folder = Path(images) if images else file.parent
    rows = [row._replace(images=tuple(folder / name for name in row.images)) for row in rows]
    if not rows:
        raise ValueError(f"{file} holds nothing to train on: it needs one object a line")
    missing = [picture for picture in dict.fromkeys(p for row in rows for p in row.images) if not picture.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{file} names {len(missing)} pictures that are not in {folder} (the first is {missing[0].name}): "
            "give their folder with --images"
        )
    return Annotated(rows)
