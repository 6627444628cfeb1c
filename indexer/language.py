"""Whether a model can read a query: one in a language that it never learned is said so, not answered with noise.

Another script than Latin is certain. Among languages in Latin letters names travel ("Köln", "piñata"), so two witnesses
must agree: the model's own vocabulary has few of the words whole, and py3langid (Lui and Baldwin, "langid.py", 2012)
takes them for another language than English. And then it is a warning only.
"""

import re
import unicodedata
from functools import cache
from typing import NamedTuple

MULTILINGUAL = "open_clip:ViT-B-16-SigLIP2"  # one that reads many languages, for the way out
KNOWN = 0.67  # of the words, at most, are whole words of an English vocabulary where the query is not English
SURE = 0.5  # the probability of the likeliest other language from which a query is not English
DOUBT = 0.1  # the probability of English below which words of which some are unknown are not matched
ELSEWHERE = ("MODIFIER LETTER", "FEMININE ORDINAL", "MASCULINE ORDINAL", "MICRO SIGN")  # letters of no script
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


class Reading(NamedTuple):
    """What a model makes of a query.

    Attributes:
        finds: the first stage can read it. matches: the matching model, which reads English, can.
        notice: one sentence for people, with the way out, where their words are not read as they mean them.
    """

    finds: bool = True
    matches: bool = True
    notice: str | None = None


def reading(text: str, encoder) -> Reading:
    """How an encoder reads a query.

    Args:
        encoder: with `multilingual`, `name` and `word_pieces`; one that lacks them reads everything.
    """
    if not hasattr(encoder, "word_pieces"):
        return Reading()
    words = _WORD.findall(text)
    foreign = [word for word in words if not _is_latin(word)]
    if encoder.multilingual:
        return Reading(matches=bool(words) and not foreign and _may_be_english(words, encoder.word_pieces(text)))
    if len(foreign) == len(words):
        what = f"cannot read {text.strip()!r}" if words else f"finds no word in {text.strip()!r}"
        return Reading(False, False, f"{encoder.name} reads English and {what}: {_way_out()}")
    if foreign:
        unread = " ".join(foreign)
        return Reading(notice=f"{encoder.name} reads English and passes over {unread!r}: {_way_out()}")
    if _is_foreign(words, encoder.word_pieces(text)):
        return Reading(notice=f"{encoder.name} reads English, and {text.strip()!r} does not look like it: {_way_out()}")
    return Reading()


def _way_out() -> str:
    return (
        f"ask in English, or run `photoblip models download {MULTILINGUAL}` and "
        f"`photoblip reindex --model {MULTILINGUAL}`, which reads many languages"
    )


def _is_latin(word: str) -> bool:
    """Whether a word's letters are Latin ones; a number has none, and a single Greek letter is a sign."""
    names = [unicodedata.name(letter, "") for letter in word if letter.isalpha()]
    sign = len(word) == 1 and names and names[0].startswith("GREEK")
    return bool(sign) or all("LATIN" in name or name.startswith(ELSEWHERE) for name in names)


def _is_foreign(words: list[str], pieces: list[tuple[str, list[str]]]) -> bool:
    """Whether a query of several words is surely not English."""
    if len(words) < 2 or _share_known(pieces) > KNOWN:
        return False
    english, best = _english(" ".join(words))
    return english < SURE <= best


def _may_be_english(words: list[str], pieces: list[tuple[str, list[str]]]) -> bool:
    """Whether the matching model should read a query: it knows most of the words, and nothing says otherwise."""
    known = _share_known(pieces)
    if known < 0.5 or known == 1:
        return known == 1
    return len(words) < 2 or _english(" ".join(words))[0] >= DOUBT


def _share_known(pieces: list[tuple[str, list[str]]]) -> float:
    """The share of words that are whole words of the vocabulary; single letters and numbers say nothing."""
    telling = [each for word, each in pieces if len(word) > 1 and not word.isdecimal()]
    return sum(len(each) == 1 for each in telling) / len(telling) if telling else 1.0


def _english(text: str) -> tuple[float, float]:
    """The probabilities of English, and of the likeliest other language."""
    ranked = dict(_identifier().rank(text))
    english = float(ranked.pop("en"))
    return english, float(max(ranked.values()))


@cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # half a second that English queries do without

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
