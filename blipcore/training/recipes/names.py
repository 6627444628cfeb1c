"""Teach a BLIP what words name: `photoblip train names --data DIR --wordnet DIR --out DIR`.

A text tower that learnt from captions places "ibis, a wading bird with a long curved bill" better than "ibis" (Menon
and Vondrick 2023, "Visual classification via description from large language models"). So where its own vectors of a
name's kind, gloss and synonyms in WordNet lie is where the bare name learns to lie: it is to rank the photos of DIR as
these do, and each photo the names. No photo of the thing and no caption that names it are needed, and no image part is
trained.

What the model knew is held: names that captions use and, with `--imagenet yes`, those of ImageNet's classes, which
blip-mini was taught; captions' vectors and those of their words; and what ITM and the decoder make of captions and
photos (a tied BLIP shares weights with its decoder). DIR holds captioned photos, WordNet's folder `data.noun` and
`index.noun`. OUT/model is the result, with the start's scoring but for hubness: `photoblip train hubness` fits it anew.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.captioned import PhotoIndex, open_captioned
from blipcore.checkpoint import LoadedModel, load_folder
from blipcore.errors import ModelError
from blipcore.evaluation import itc_recall
from blipcore.hub import find_model
from blipcore.models.blip import Blip, starting_with
from blipcore.models.text import image_keys_values, text_states
from blipcore.training import distributed
from blipcore.training.distillation import divergence
from blipcore.training.loop import fit, wants_bf16
from blipcore.training.objectives import caption_labels, cosines
from blipcore.training.prototypes import TEMPLATES, ClassNames, in_sentences, is_plain
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.wordnet import CONCRETE, WordNet
from blipcore.transforms import TextTokenizer, squash

FIELDS = (*CONCRETE, 8, 17)  # and parts of the body, things in nature
FOOD = 13  # a lobster is an animal first
MEANINGS = 3  # of a name, the most frequent: one of them can be seen, as the animal of "leopard", the fur before it
DRAWN = 3  # times as often as names of two words, which are mostly told by their words
SPECIAL = 1000  # BERT's first ids are no words
GLOSS = 120  # characters


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # captioned photos
    wordnet: Path  # the folder of WordNet's database files
    start: str = "blip-mini"  # a known model or a model folder
    split: str = ""
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    dev: str = ""  # the split of `data` to watch; none: no evaluation
    photos: int = 4000  # of the data, whose order names learn
    read: int = 300  # of these, whose image tokens are kept, to hold ITM and the decoder; one or more
    names: int = 30000  # WordNet's, known ones and single words first
    often: int = 20  # times from which a word stands in captions so often that it counts as known
    imagenet: bool = False  # the names of ImageNet's classes are known too
    temperature: float = 0.05  # of the cosines of names and photos
    against: int = 512  # photos a step that names are told apart by
    captions: int = 64  # a step whose vectors are held
    pairs: int = 16  # photos a step whose matches and captions are held
    hold_captions: float = 5.0  # weights beside the names' 1
    hold_matching: float = 0.05
    hold_writing: float = 0.5
    word_rate: float = 10.0  # times `rate`: the words' vectors
    batch_size: int = 256  # names
    rate: float = 1e-4
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 0.0


class Name(NamedTuple):
    """A thing's name, and what WordNet calls it and says of it.

    Attributes:
        known: whether the start knows it: then it stays where it is.
    """

    name: str
    synonyms: list[str]
    kind: str
    gloss: str
    known: bool

    def described(self) -> tuple[str, str]:
        """The name with its kind, and with its gloss."""
        return f"{self.name}, a kind of {self.kind}", f"{self.name}, {self.gloss[:GLOSS]}"

    def drawn(self) -> int:
        return DRAWN if self.known or " " not in self.name else 1


def known_names(captions: Sequence[Sequence[str]], often: int, *, imagenet: bool) -> Callable[[str], bool]:
    """-> whether a name is known: it is a class's, or captions say each of its words, or its plural, `often`."""
    said = Counter(re.findall("[a-z]+", " ".join(text for texts in captions for text in texts).lower()))
    classes = {name for names in ClassNames.of_imagenet().own for name in names} if imagenet else set()
    return lambda name: name in classes or all(said[word] + said[word + "s"] >= often for word in name.split())


def names_of_things(wordnet: WordNet, known: Callable[[str], bool], most: int, seed: int = 0) -> list[Name]:
    """Plain names of which a frequent meaning can be seen: known ones and single words first, else at random."""
    found = []
    for name, offsets in wordnet.senses.items():
        meanings = [wordnet.synsets[offset] for offset in offsets[:MEANINGS]]
        seen = [meaning for meaning in meanings if meaning.field in FIELDS and meaning.above]
        if seen and is_plain(name):
            meaning = min(seen, key=lambda meaning: meaning.field == FOOD)  # the most frequent of the others
            synonyms = [word for word in meaning.words if word != name and is_plain(word)]
            kind = wordnet.synsets[meaning.above[0]].words[0]
            found.append(Name(name, synonyms, kind, meaning.gloss, known(name)))
    order = np.random.default_rng(seed).permutation(len(found))
    return sorted((found[at] for at in order), key=lambda name: (not name.known, name.drawn() != DRAWN))[:most]


class Known(NamedTuple):
    """What the start makes of photos and names. N names, I photos, R of which keep their tokens.

    Attributes:
        photos: unit vectors [I, E]. tokens: float16 [R, P, D]. wanted: unit vectors [N, E], where the names should lie.
    """

    photos: Tensor
    tokens: Tensor
    wanted: Tensor


@torch.no_grad()
def what_it_knows(loaded: LoadedModel, photos: PhotoIndex, names: Sequence[Name], s: Settings) -> Known:
    """Before any training."""
    model, tokenizer = loaded.need_blip().eval(), loaded.tokenizer
    size, count = model.config.vision_config.image_size, min(len(photos), s.photos)
    bf16 = wants_bf16(s.precision, model.device.type)
    vectors, kept = [], []
    for at in range(0, count, 32):
        pixels = np.stack([squash(photos[i].image(), size) for i in range(at, min(count, at + 32))])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            tokens = model.encode_images(loaded.normalize(pixels).to(model.device))
            vectors.append(model.project_images(tokens).float())
        if at < s.read:
            kept.append(tokens.half())
    wanted = _embed(model, tokenizer, [name.name for name in names], bf16=bf16)
    unknown = [row for row, name in enumerate(names) if not name.known]
    if unknown:
        kind, gloss = (
            _embed(model, tokenizer, list(texts), bf16=bf16)
            for texts in zip(*(names[row].described() for row in unknown), strict=True)
        )
        row_of = {name.name: row for row, name in enumerate(names)}
        wanted[unknown] = F.normalize(kind + gloss + _synonyms(wanted, [names[row] for row in unknown], row_of), dim=1)
    return Known(torch.cat(vectors), torch.cat(kept)[: s.read], wanted)


def _synonyms(bare: Tensor, names: Sequence[Name], row_of: dict[str, int]) -> Tensor:
    """Unit vectors [N, E] of the names' synonyms among the bare names, 0 where a name has none."""
    found = torch.zeros(len(names), bare.shape[1], device=bare.device)
    for at, name in enumerate(names):
        if rows := [row_of[word] for word in name.synonyms if word in row_of]:
            found[at] = F.normalize(bare[rows].mean(0), dim=0)
    return found


def _embed(model: Blip, tokenizer: TextTokenizer, names: list[str], *, bf16: bool = False) -> Tensor:
    """Unit vectors [N, E], the mean over three sentences."""
    order = sorted(range(len(names)), key=lambda at: len(names[at]))  # texts of a batch of about one length
    found = torch.zeros(len(names), model.text_proj.out_features, device=model.device)
    for template in TEMPLATES[:3]:
        for at in range(0, len(order), 256):
            rows = order[at : at + 256]
            ids, mask = tokenizer([template.format(names[row]) for row in rows])
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                found[rows] += text_vectors(model, ids.to(model.device), mask.to(model.device))
    return F.normalize(found, dim=1)


def text_vectors(model: Blip, ids: Tensor, mask: Tensor) -> Tensor:
    """ITC's unit vectors [B, E] of texts [B, T]."""
    return model.unit(model.text_proj, text_states(model.text_encoder, ids, mask)[:, 0]).float()


class Naming(nn.Module):
    """A step's losses. The network is `model`; `before` is a copy of it that stays as it was.

    Each process compares its own names and photos.
    """

    def __init__(self, model: Blip, known: Known, s: Settings):
        super().__init__()
        self.model, self.settings = model, s
        self.before = copy.deepcopy(model).eval().requires_grad_(False)
        for name, value in known._asdict().items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Args: batch: of `Texts.collate`."""
        s, model = self.settings, self.model
        seen = self.photos[torch.randperm(len(self.photos), device=self.photos.device)[: s.against]]
        asked = cosines(text_vectors(model, batch["name_ids"], batch["name_mask"]), seen) / s.temperature
        wanted = cosines(self.wanted[batch["rows"]], seen) / s.temperature
        found = {"photos": divergence(asked, wanted), "names": divergence(asked.T, wanted.T)}
        captions = batch["caption_ids"], batch["caption_mask"]
        moved = (text_vectors(model, *captions) * text_vectors(self.before, *captions)).sum(1)
        found["captions"] = s.hold_captions * (1 - moved).mean()
        (margin, words), (margin_before, words_before) = self._read(model, batch), self._read(self.before, batch)
        found["matching"] = s.hold_matching * F.mse_loss(margin, margin_before)
        if words is not None:
            found["writing"] = s.hold_writing * divergence(words, words_before)
        return {"loss": sum(found.values()), **{name: value.detach() for name, value in found.items()}}

    def _read(self, model: Blip, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """-> (ITM's margins of each photo with its caption and with the next photo's, the decoder's logits or None)"""
        ids, mask, tokens = batch["pair_ids"], batch["pair_mask"], self.tokens[batch["pair_photos"]].float()
        both_ids, both_mask = (torch.stack([x, x.roll(-1, 0)], 1).flatten(0, 1) for x in (ids, mask))
        keys_values = image_keys_values(model.text_encoder, tokens)  # the decoder's too: it shares cross-attention
        starts = starting_with(model.enc_token_id, both_ids)
        states = text_states(model.text_encoder, starts, both_mask, keys_values)
        logits = model.itm_head(states[:, 0]).float()
        if not hasattr(model, "text_decoder"):
            return logits[:, 1] - logits[:, 0], None
        predicted = caption_labels(ids, mask)[:, 1:] >= 0
        starts = starting_with(model.dec_token_id, ids)
        states = text_states(model.text_decoder.bert, starts, mask, keys_values, causal=True)
        return logits[:, 1] - logits[:, 0], model.text_decoder.cls(states[:, :-1][predicted]).float()


class Texts:
    """A step's texts: names in sentences drawn at random, captions to hold, and captions with their photos."""

    def __init__(self, names: Sequence[Name], captions: Sequence[Sequence[str]], tokenizer: TextTokenizer, s: Settings):
        self.names, self.captions, self.tokenizer, self.settings = names, captions, tokenizer, s
        self.source = [row for row, name in enumerate(names) for _ in range(name.drawn())]

    def transform(self, row: int, rng: np.random.Generator) -> tuple[int, str, str, int, str]:
        """A name's row -> (it, the name in a sentence, any caption, a photo with kept tokens, a caption of that)."""
        photo = int(rng.integers(min(self.settings.read, self.settings.photos, len(self.captions))))
        any_photo = self.captions[int(rng.integers(len(self.captions)))]
        sentence = in_sentences([self.names[row].name], rng)[0]
        return row, sentence, str(rng.choice(any_photo)), photo, str(rng.choice(self.captions[photo]))

    def collate(self, items: list[tuple[int, str, str, int, str]]) -> dict[str, Tensor]:
        """-> rows [B], and ids and mask of the names, of the first `captions` captions and the first `pairs` pairs."""
        rows, sentences, captions, photos, own = zip(*items, strict=True)
        s = self.settings
        batch = {"rows": torch.tensor(rows), "pair_photos": torch.tensor(photos[: s.pairs])}
        texts = {"name": sentences, "caption": captions[: s.captions], "pair": own[: s.pairs]}
        for name, lines in texts.items():
            batch[f"{name}_ids"], batch[f"{name}_mask"] = self.tokenizer(list(lines))
        return batch


def leave_alone(model: Blip, captions: Sequence[Sequence[str]], tokenizer: TextTokenizer, often: int) -> None:
    """Only the text tower learns, without cross-attention, and of words those that captions use seldom."""
    model.requires_grad_(False)
    for name, parameter in model.text_encoder.named_parameters():
        parameter.requires_grad_(".crossattention." not in name and not name.startswith("embeddings."))
    words = model.text_encoder.embeddings.word_embeddings.weight.requires_grad_(True)
    counts = np.zeros(len(words), int)
    for texts in captions:
        ids, mask = tokenizer(list(texts))
        np.add.at(counts, ids[mask == 1].numpy(), 1)
    free = torch.from_numpy(counts < often).to(words.device)
    free[:SPECIAL] = False
    free[min(model.dec_token_id, model.enc_token_id) :] = False
    words.register_hook(lambda gradient: gradient * free[:, None].to(gradient.device))


def train(s: Settings) -> dict:
    """Load, describe, train, evaluate on `dev`, write the model folder `out`/model. -> the last figures."""
    loaded = load_folder(find_model(s.start), s.start)
    model, tokenizer = loaded.need_blip(), loaded.tokenizer
    photos = open_captioned(s.data, s.split or None, images=s.images)
    # those of a damaged photo's place are the next one's, whose tokens are kept
    captions = [photos[row].captions if row < s.read else photos.texts_of(row) for row in range(len(photos))]
    known = known_names(captions, s.often, imagenet=s.imagenet)
    names = names_of_things(WordNet(s.wordnet), known, s.names, s.seed)
    if not names:
        raise ModelError(f"{s.wordnet} names no things that can be seen: give WordNet's folder of data.noun")
    before = what_it_knows(loaded, photos, names, s)
    leave_alone(model, captions, tokenizer, s.often)
    texts = Texts(names, captions, tokenizer, s)
    words = model.text_encoder.embeddings.word_embeddings.weight
    others = [p for p in model.parameters() if p.requires_grad and p is not words]
    groups = [{"params": others}, {"params": [words], "scale": s.word_rate, "weight_decay": 0.0}]
    dev = open_captioned(s.data, s.dev, images=s.images).load() if s.dev else None
    figures = fit(
        Naming(model, before, s),
        texts.source,
        texts.transform,
        texts.collate,
        s,
        groups=groups,
        evaluate=dev and (lambda: itc_recall(model, dev, tokenizer, loaded.normalize)),
    )
    if distributed.rank() == 0:
        loaded.save(model, s.out / "model")
    return figures


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
