"""Questions as VQA v2 measures them: an answer counts as far as people gave it too.

Antol et al. 2015 and Goyal et al. 2017; the comparison follows the description published at visualqa.org/evaluation.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blipcore.annotated import Question, load_questions
from blipcore.encoder import BlipEncoder
from blipcore.errors import ModelError
from blipcore.evaluation.common import Progress, need_encoder, picture, silent


def vqa(
    data: Path,
    model: str | BlipEncoder,
    *,
    answers: Sequence[str] | None = None,
    limit: int | None = None,
    images: Path | None = None,
    batch: int = 16,
    progress: Progress = silent,
) -> dict:
    """Ask every line of `data`. -> a row {"accuracy", "by_type", "questions", "seconds", ...} in percent.

    Args:
        data, images: JSON lines {"image", "question", "answers"}, as `blipcore.annotated.load_questions` takes them.
        answers: rank these instead of writing freely.

    Raises:
        ModelError: a line, a photo or the model cannot be used.
    """
    asked = read_questions(Path(data), images)[:limit]
    encoder = need_encoder(model)
    options = {} if answers is None else {"answers": _choices(answers)}
    started = time.monotonic()
    given = []
    for at in range(0, len(asked), batch):
        part = asked[at : at + batch]
        photos = [picture(file.read_bytes, str(file)) for question in part for file in question.images]
        given += encoder.ask(photos, [question.question for question in part], **options)
        progress("questions", len(given), len(asked))
    scores = [vqa_accuracy(answer, question.answers) for answer, question in zip(given, asked, strict=True)]
    return {
        "accuracy": _percent(scores),
        "questions": len(asked),
        "answers": len(options["answers"]) if options else "free",
        "by_type": _by_type(asked, scores),
        "model": encoder.name,
        "seconds": round(time.monotonic() - started, 1),
    }


def read_questions(file: Path, images: Path | None = None) -> list[Question]:
    """The lines that have answers; ModelError names the first that cannot be used."""
    try:
        return list(load_questions(file, images).rows)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error


def _choices(answers: Sequence[str]) -> list[str]:
    """The answers to rank, blank lines left out."""
    choices = [answer.strip() for answer in answers if answer.strip()]
    if not choices:
        raise ModelError("there are no answers to rank: write one a line, or leave the list away")
    return choices


def _by_type(asked: Sequence[Question], scores: Sequence[float]) -> dict[str, float]:
    groups = defaultdict(list)
    for question, score in zip(asked, scores, strict=True):
        groups[answer_type(question.answers)].append(score)
    return {kind: _percent(group) for kind, group in sorted(groups.items())}


def _percent(scores: Sequence[float]) -> float:
    return round(100 * float(np.mean(scores)), 2)


def answer_type(people: Sequence[str]) -> str:
    """VQA v2's types, "yes/no", "number" or "other", by what most people answered."""
    usual = Counter(map(normalise, people)).most_common(1)[0][0]
    if usual in {"yes", "no"}:
        return "yes/no"
    return "number" if re.match(r"\d", usual) else "other"


# -- the figure ---------------------------------------------------------------------------------------------


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """How far people agree with an answer, 0 to 1.

    Of ten people, min(those who said it / 3, 1) averaged over the ten subsets of nine, as VQA v2 has it. One answer is
    compared exactly; two must both agree for a 1; of other numbers three must.
    """
    said = normalise(answer)
    agree = np.array([normalise(person) == said for person in people])
    if len(people) == 10:
        return float(np.minimum((agree.sum() - agree) / 3, 1).mean())
    return min(float(agree.sum()) / min(3, len(people)), 1.0)


_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
# those whose letters alone are no other word: "were", "its" and "well" stay
_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm
    i've isn't it'd it'll let's might've mightn't must've mustn't needn't she's should've shouldn't somebody's
    someone's that'd that'll that's there'd there's they'd they'll they're they've wasn't we've weren't what'll
    what's where'd where's who'd who'll who's why'd why's won't would've wouldn't y'all you'd you'll you're you've
"""
_WITH_APOSTROPHE = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}


def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, digits for number words, no articles, apostrophes put right.

    Of the punctuation, apostrophes, colons and decimal points stay; a comma between digits goes without a space.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower().replace("’", "'"))  # noqa: RUF001 - the typographic one
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (_DIGITS.get(word, word) for word in text.split() if word not in {"a", "an", "the"})
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words)
