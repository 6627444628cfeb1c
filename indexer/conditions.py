"""What an answer in words is worth: the number it says, the words it holds, and whether it fulfils a condition.

Conditions: `>2` `>=2` `<2` `<=2`, `3` or `=3`, `!=3`, `2..5`, `yes`, `red|blue`, `!red`. Words hold wherever the answer
has them, in any case and without articles; in them `*` and `?` stand for letters. A number may be written out.
"""

import operator
import re
from collections.abc import Callable
from functools import lru_cache

from indexer.errors import QueryError

Condition = Callable[[str], bool]

EXAMPLES = ">2, 2..5, yes, red|blue or !red"
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_FORM = re.compile(r"\s*(>=|<=|==|!=|[<>=!]?)\s*(.*?)\s*", re.DOTALL)
_WORD = re.compile(r"\w+(?:['.-]\w+)*")
_WORD_OR_WILDCARDS = re.compile(r"[\w*?]+(?:['.-][\w*?]+)*")
_ARTICLES = {"a", "an", "the"}

_ONES = "one|two|three|four|five|six|seven|eight|nine"
_SMALL = f"zero|{_ONES}|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_SCALES = {"couple": 2, "pair": 2, "dozen": 12, "hundred": 100, "thousand": 1000}
_VALUES = {word: value for value, word in enumerate(_SMALL.split("|"))}
_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split("|"), start=2)}
_NUMBER = re.compile(
    r"(?P<digits>(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?)"
    r"|\b(?P<nothing>no[ -]?one|none|nobody|nothing|no(?= [a-z]))\b"
    rf"|\b(?:(?P<tens>{_TENS})(?:[ -](?P<ones>{_ONES}))?|(?P<small>{_SMALL}))"
    r"(?: (?P<times>dozen|hundred|thousand))?\b"
    rf"|\b(?:an? )?(?P<scale>{'|'.join(_SCALES)})\b"
)


@lru_cache(256)
def parse_condition(text: str) -> Condition:
    """A condition's text -> whether an answer fulfils it. Raises QueryError, which names the place."""
    sign, operand = (form := _FORM.fullmatch(text)).groups()
    place = form.start(2)
    if not operand:
        raise _unreadable(text, place, "a number or a word is missing")
    if stray := re.search(r"[<>=!]", operand):
        raise _unreadable(text, place + stray.start(), "<, >, = and ! stand at the beginning only")
    if sign in _COMPARE:
        return _compares(_COMPARE[sign], _bound(text, place, operand))
    holds = _between(text, place, operand) if ".." in operand else _any_of(text, place, operand)
    return (lambda answer: not holds(answer)) if sign.startswith("!") else holds


def fulfils(answer: str, condition: str) -> bool:
    """Whether an answer fulfils a condition; the catalog has it as the SQL function `fulfils`."""
    return parse_condition(condition)(answer)


def number_in(answer: str) -> float | None:
    """The first number that an answer says, in digits or words; "no one" and the like are 0."""
    found = _NUMBER.search(answer.casefold())
    return _value(found) if found else None


def whole_number(text: str) -> float | None:
    """The number, where the text is a number and nothing else."""
    found = _NUMBER.fullmatch(text.casefold().strip().rstrip(".!"))
    return _value(found) if found else None


def plain_words(text: str, word: re.Pattern = _WORD) -> str:
    """A text without case, punctuation and articles: what two equal answers have in common."""
    words = word.findall(text.casefold())
    return " ".join([part for part in words if part not in _ARTICLES] or words)


def plain_answer(answer: str) -> str:
    """The key under which answers are equal: "Two." is "2", "A dog" is "dog"."""
    number = whole_number(answer)
    return plain_words(answer) if number is None else f"{number:.15g}"


def plain_question(question: str) -> str:
    """The key under which answers to a question are kept. Raises QueryError for a question without words."""
    key = " ".join(question.casefold().split()).rstrip(" ?!.")
    if not key:
        raise QueryError("there is no question: ask something, as --ask 'how many people?'")
    return key


def _value(found: re.Match) -> float:
    part = found.groupdict()
    if part["digits"]:
        return float(part["digits"].replace(",", ""))
    if part["nothing"]:
        return 0.0
    if part["scale"]:
        return float(_SCALES[part["scale"]])
    value = sum(_VALUES[part[name]] for name in ("tens", "ones", "small") if part[name])
    return float(value * _SCALES.get(part["times"], 1))


def _compares(compare: Callable, bound: float) -> Condition:
    return lambda answer: (number := number_in(answer)) is not None and compare(number, bound)


def _between(text: str, place: int, operand: str) -> Condition:
    low, high = operand.split("..", 1)
    first, last = _bound(text, place, low), _bound(text, place + len(low) + 2, high)
    if first > last:
        raise _unreadable(text, place, "a range goes from the smaller number to the larger")
    return lambda answer: (number := number_in(answer)) is not None and first <= number <= last


def _bound(text: str, place: int, operand: str) -> float:
    number = whole_number(operand.strip())
    if number is None:
        raise _unreadable(text, place, "here stands a number, as 2 or two")
    return number


def _any_of(text: str, place: int, operand: str) -> Condition:
    choices = []
    for part in operand.split("|"):
        if not _WORD_OR_WILDCARDS.search(part):
            raise _unreadable(text, place, "a number or a word is missing")
        choices.append(_says(part))
        place += len(part) + 1
    return lambda answer: any(says(answer) for says in choices)


def _says(part: str) -> Condition:
    if (number := whole_number(part.strip())) is not None:
        return lambda answer: number_in(answer) == number
    words = plain_words(part, _WORD_OR_WILDCARDS)
    first, *others = (re.escape(letters).replace(r"\?", "[^ ]") for letters in words.split("*"))
    # what stands between two stars is taken where it is first found: trying all places would take for ever
    others = [f"(?>[^ ]*?{letters})" for letters in others[:-1]] + [f"[^ ]*{letters}" for letters in others[-1:]]
    pattern = re.compile(f"(?:^| ){first}{''.join(others)}(?: |$)")
    return lambda answer: pattern.search(plain_words(answer)) is not None


def _unreadable(text: str, place: int, why: str) -> QueryError:
    return QueryError(
        f"the condition {text!r} cannot be read at position {place + 1} ({text[place:]!r}): {why} "
        f"(a condition looks like {EXAMPLES})"
    )
