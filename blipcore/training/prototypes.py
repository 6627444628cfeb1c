"""Class prototypes: what a classifier's rows know, taught to the text tower without one photo of the class.

A softmax classifier over features with a shared covariance S has rows w_c = S^-1 (mu_c - mu): so mu + S w_c is
where the features of class c lie (linear discriminant analysis; Hastie et al., "The Elements of Statistical
Learning", section 4.3). Features drawn around that point stand in for photos of the class, and "a photo of a
{class}" for their caption. A thousand ImageNet classes then have a place among the captions of a small data set.
"""

import itertools
import re
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blipcore.training.wordnet import CONCRETE, WordNet

TEMPLATES = ("a photo of a {}", "a {}", "a picture of a {}", "a close up of a {}", "{}", "a {} in the photo")
PLURALS = 0.25  # of the names, people write "airplanes" as well
WIDEST = 130  # classes under one general name: "artifact" and "living thing" say nothing


class ClassNames:
    """What the classes of ImageNet-1k are called: their own names, and what WordNet calls their kinds.

    An airliner is an airplane, an aircraft and a vehicle: people search by the general word.

    Attributes:
        own: [C] lists of names of each class. kinds: [C] lists of general names, the nearest first.
        members: name -> bool [C], the classes that it may be said of.
    """

    def __init__(self, own: list[list[str]], kinds: list[list[str]]):
        self.own, self.kinds = own, kinds
        self.members: dict[str, np.ndarray] = {}
        for number, names in enumerate(zip(own, kinds, strict=True)):
            for name in {*names[0], *names[1]}:
                self.members.setdefault(name, np.zeros(len(own), bool))[number] = True
        self.kinds = [[name for name in names if self.members[name].sum() <= WIDEST] for names in kinds]

    @classmethod
    def of_imagenet(cls, wordnet: WordNet | None = None) -> "ClassNames":
        """Synonyms as timm lists them; kinds from WordNet, where it is given.

        Args:
            wordnet: where the kinds come from; none without it.
        """
        import timm.data

        info = Path(timm.data.__file__).parent / "_info"
        synsets = (info / "imagenet_synsets.txt").read_text(encoding="utf-8").split()
        lines = (info / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
        lemmas = dict(line.split("\t") for line in lines)
        own = [[name.strip().lower() for name in lemmas[synset].split(",")] for synset in synsets]
        return cls(own, _kinds(own, wordnet) if wordnet else [[] for _ in own])

    def drop_other_meanings(self, nouns: "CaptionNouns", belief: Tensor) -> list[str]:
        """Forget synonyms and kinds that people say of something else. -> those names.

        WordNet calls a book's wrapper a jacket; where captions say "jacket", a classifier sees no more book wrappers
        than elsewhere. A class keeps its first name.

        Args:
            belief: [I, C], the classifier's probabilities of the photos that the nouns are said of.
        """
        dropped = []
        for name, said in zip(nouns.names, nouns.said.T, strict=True):
            if name in self.members:
                seen = belief[:, self.members[name]].sum(1)
                if seen[said].mean() < seen.mean():
                    dropped.append(name)
        for name in dropped:
            first = np.array([names[0] == name for names in self.own])
            if first.any():
                self.members[name] = first
            else:
                del self.members[name]
        self.own = [[names[0], *(name for name in names[1:] if name not in dropped)] for names in self.own]
        self.kinds = [[name for name in names if name not in dropped] for names in self.kinds]
        return dropped

    def draw(self, classes: np.ndarray, rng: np.random.Generator) -> list[str]:
        """A name for each class number: its first name, another one, or a kind."""
        return [self._draw(number, rng) for number in classes]

    def _draw(self, number: int, rng: np.random.Generator) -> str:
        own, kinds = self.own[number], self.kinds[number]
        if kinds and rng.random() < 0.45:
            return kinds[min(int(rng.exponential(1.5)), len(kinds) - 1)]
        return own[0] if rng.random() < 0.6 else own[int(rng.integers(len(own)))]

    def same(self, classes: np.ndarray, names: list[str]) -> Tensor:
        """[B] class numbers and [M] names -> bool [B, M]: may the name be said of the class?"""
        return torch.from_numpy(np.stack([self.members[name][classes] for name in names], 1))


def _kinds(own: list[list[str]], wordnet: WordNet) -> list[list[str]]:
    """For each class, the names of the meanings above it, the nearest first."""
    found = []
    for names in own:
        levels = wordnet.levels_above(wordnet.synset_of(names))
        kinds = [word for level in levels for offset in level for word in wordnet.synsets[offset].words[:2]]
        found.append(list(dict.fromkeys(kinds)))
    return found


class OtherNouns:
    """Things that a classifier has no class for, each with the classes nearest to it in WordNet.

    A word that a model never saw lies anywhere among its texts, and may lie nearer to an airliner than "airplane" does.
    As captions of no prototype these nouns are told apart from the classes; and of all prototypes, a helicopter's
    text should find the aircraft first.

    Attributes:
        names: N of them. nearest: bool [N, C]. weights: how often each is drawn, of sum 1.
    """

    MOST = 60  # classes near to a noun: more say nothing
    LEVELS = 4  # how far above a noun its relatives are looked for

    def __init__(self, classes: ClassNames, wordnet: WordNet, common: Container[str]):
        """common: words that are drawn more often than others, such as a tokenizer's whole words."""
        below: dict[str, set[int]] = {}
        for number, names in enumerate(classes.own):
            synset = wordnet.synset_of(names)
            for level in [[synset] if synset else [], *wordnet.levels_above(synset)]:
                for offset in level:
                    below.setdefault(offset, set()).add(number)
        self.names, near, weights = [], [], []
        for offset, synset in wordnet.synsets.items():
            if synset.field not in CONCRETE:
                continue
            # no class, a word that people use, and no rarer meaning of it
            names = [
                name
                for name in synset.words
                if name not in classes.members and is_plain(name) and wordnet.senses.get(name, [offset])[0] == offset
            ]
            if not names:
                continue
            depth, relatives = self._relatives(offset, wordnet, below)
            if relatives and len(relatives) <= self.MOST:
                self.names += names
                near += [sorted(relatives)] * len(names)
                weights += [(6 if name in common else 1) / (1 + depth) for name in names]
        self.nearest = torch.zeros(len(self.names), len(classes.own), dtype=torch.bool)
        for row, columns in enumerate(near):
            self.nearest[row, columns] = True
        self.weights = np.array(weights) / sum(weights)

    def _relatives(self, offset: str, wordnet: WordNet, below: dict[str, set[int]]) -> tuple[int, set[int]]:
        levels = [[offset], *itertools.islice(wordnet.levels_above(offset), self.LEVELS - 1)]
        for depth, level in enumerate(levels):
            if found := set().union(*(below.get(upper, set()) for upper in level)):
                return depth, found
        return len(levels), set()

    def sample(self, count: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """-> (captions of `count` nouns, bool [count, C] the classes nearest to each)."""
        rows = rng.choice(len(self.names), count, replace=False, p=self.weights)
        return in_sentences([self.names[row] for row in rows], rng), self.nearest[rows]


def is_plain(name: str) -> bool:
    """One or two words of letters: no Latin families, abbreviations or brands with numbers."""
    return re.fullmatch(r"[a-z]{3,}( [a-z]+)?", name) is not None


class CaptionNouns:
    """The nouns of a data set's captions, and which photos each is said of: what people's short queries are like.

    Attributes:
        names: N nouns as they stand in captions. said: bool [I, N].
    """

    FEWEST, MOST = 8, 0.3  # photos a noun is said of; the share of them at which it says nothing

    def __init__(self, captions: Sequence[Sequence[str]], wordnet: WordNet):
        places: dict[str, set[int]] = {}
        for photo, texts in enumerate(captions):
            for word in set(re.findall(r"[a-z]{3,}", " ".join(map(without_camera, texts)).lower())):
                places.setdefault(word, set()).add(photo)
        most = self.MOST * len(captions)
        self.names = [w for w, at in places.items() if self.FEWEST <= len(at) <= most and wordnet.is_noun(w)]
        self.said = torch.zeros(len(captions), len(self.names), dtype=torch.bool)
        for column, name in enumerate(self.names):
            self.said[list(places[name]), column] = True
        weights = self.said.sum(0).numpy() ** 0.5
        self.weights = weights / weights.sum()

    def sample(self, count: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """-> (captions of `count` nouns, bool [I, count] the photos each is said of)."""
        columns = rng.choice(len(self.names), min(count, len(self.names)), replace=False, p=self.weights)
        return in_sentences([self.names[column] for column in columns], rng), self.said[:, columns]


def without_camera(caption: str) -> str:
    """A caption without "at the camera": what took a photo is not in it, and "camera" would come to mean people."""
    return re.sub(
        r"\s*\b(at|for|towards?|into|facing|to|by|in front of|of) (the|a|his|her|their)? ?(camera|photo|picture)\b",
        "",
        caption,
        flags=re.IGNORECASE,
    )


def in_sentences(names: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Each name in a template drawn at random."""
    return [str(template).format(name) for template, name in zip(rng.choice(TEMPLATES, len(names)), names, strict=True)]


def plural(name: str) -> str:
    """The regular English plural of a name's last word."""
    if re.search(r"[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + ("es" if re.search(r"(s|x|z|ch|sh)$", name) else "s")


class ClassPrototypes:
    """Draws (feature, caption) pairs for random classes.

    Args:
        rows: the classifier's matrix [C, D]; bias: [C].
        names: what the C classes are called.
        features: [n, D] class tokens of real photos, for the mean and covariance.
        spread: how far, in standard deviations of real photos, the drawn features scatter.
        strength: how many times S w_c a prototype stands off the mean. The photos' covariance mixes classes
            and the photos at hand hold few of them, so 1 is too timid: 2.5 gives prototypes that the classifier
            names as surely as real photos.
        shrinkage: of the covariance towards a multiple of the identity (Ledoit and Wolf 2004).
    """

    def __init__(
        self,
        rows: Tensor,
        bias: Tensor,
        names: ClassNames,
        features: np.ndarray,
        *,
        spread: float = 0.5,
        strength: float = 2.5,
        shrinkage: float = 0.3,
    ):
        features = torch.from_numpy(np.asarray(features, np.float32))
        self.rows, self.bias, self.names = rows.float(), bias.float(), names
        covariance = torch.cov(features.T)
        identity = torch.eye(len(covariance)) * covariance.diagonal().mean()
        covariance = (1 - shrinkage) * covariance + shrinkage * identity
        points = features.mean(0) + strength * self.rows @ covariance
        self.length = features.norm(dim=1).mean()  # the final norm keeps real features near one length
        self.points = self._rescaled(points)
        self.noise = torch.linalg.cholesky(covariance) * spread
        self.metric = torch.linalg.cholesky(covariance)  # |v @ metric| is how much v.x varies over photos x

    def _rescaled(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) * self.length

    def sample(self, count: int, rng: np.random.Generator, nearest: Tensor | None = None) -> tuple[Tensor, np.ndarray]:
        """-> (features [count, D], their `count` different classes).

        Args:
            nearest: bool [N, C] of `OtherNouns.sample`: one of each noun's nearest classes comes first, so that a
                helicopter's text, which is drawn to airliners, is also told that "airplane" names them better.
        """
        classes = rng.permutation(len(self.rows))
        if nearest is not None:
            first = {int(rng.choice(np.flatnonzero(row))) for row in nearest.numpy()}
            classes = np.array([*first, *(c for c in classes if c not in first)])
        classes = classes[:count]
        noise = torch.from_numpy(rng.standard_normal((count, self.points.shape[1])).astype(np.float32))
        return self._rescaled(self.points[classes] + noise @ self.noise.T), classes

    def describe(self, classes: np.ndarray, rng: np.random.Generator) -> tuple[list[str], list[str], Tensor]:
        """A caption for each class number, in a template drawn at random.

        -> (captions, the names in them, bool [B, B] which name fits which class).
        """
        names = self.names.draw(classes, rng)
        several = rng.random(len(names)) < PLURALS
        texts = [
            re.sub(r"\ba \{\}", "{}", template).format(plural(name)) if many else template.format(name)
            for template, name, many in zip(rng.choice(TEMPLATES, len(names)).tolist(), names, several, strict=True)
        ]
        return texts, names, self.names.same(classes, names)

    def misalignment(self, projection: Tensor, text_feats: Tensor, names: list[str]) -> Tensor:
        """1 - cosine between what a text asks of a feature and what the classifier asks for the class of that name.

        A text's score is t . P x, so P^T t stands where the classifier has its row w: if the two point the same way,
        the model tells classes as the classifier does, on photos that no prototype resembles too. Both sides are
        centred over the texts (what all share ranks nothing) and measured by the photos' covariance.

        Args:
            projection: P [E, D], ITC's image projection. text_feats: unit vectors [M, E] of captions with the M names.
        """
        members = torch.from_numpy(np.stack([self.names.members[name] for name in names])).float()
        wanted = (members / members.sum(1, keepdim=True)) @ self.rows
        asked = text_feats.float() @ projection.float()
        asked, wanted = ((side - side.mean(0)) @ self.metric for side in (asked, wanted))
        return 1 - F.cosine_similarity(asked, wanted, dim=1).mean()

    def belief(self, class_tokens: Tensor, names: list[str]) -> Tensor:
        """What the classifier thinks of photos with these original class tokens [B, D], among M names. -> [B, M]."""
        members = torch.from_numpy(np.stack([self.names.members[name] for name in names])).float()
        members /= members.sum(1, keepdim=True).sqrt()  # "leopard" says more of a leopard than "wild cat"
        shares = self.classify(class_tokens) @ members.T
        return shares / shares.sum(1, keepdim=True).clamp(min=1e-12)

    def classify(self, class_tokens: Tensor) -> Tensor:
        """The starting classifier's probabilities [B, C] of photos with these original class tokens [B, D]."""
        return (class_tokens @ self.rows.T + self.bias).softmax(1)

    def top1(self) -> float:
        """How often the classifier itself names a prototype's own class: a check of the construction."""
        logits = self.points @ self.rows.T + self.bias
        return (logits.argmax(1) == torch.arange(len(self.rows))).float().mean().item()

    def drift(self, class_tokens: Tensor, original: Tensor) -> Tensor:
        """KL between the classifier on the trained tower's class tokens and on the original ones, both [B, D].

        Keeps the features where the prototypes are, while the last blocks of the tower train.
        """
        now = F.log_softmax(class_tokens.float() @ self.rows.T + self.bias, dim=1)
        then = F.log_softmax(original.float() @ self.rows.T + self.bias, dim=1)
        return F.kl_div(now, then, log_target=True, reduction="batchmean")
