"""How blip-mini is made, on two CPU cores: `photoblip train blip_mini --data DIR [--data DIR ...] --out DIR ...`.

`pretrain_blip` trains as the paper does, end to end. This recipe spends a small machine's time differently:

- The vision tower's first blocks stay as they started; what they make of each photo (a few views) is computed once.
  Stage `joint` trains the last blocks with everything else. Then the whole tower is frozen and its tokens are computed
  once: stage `texts` teaches the text tower alone what words name, which costs no image; stage `matching` spends the
  time on ITM and LM.
- Each image's keys and values are projected once for all its texts and for both uses (models/text.py).
- Batches are groups of look-alikes, so that in-batch negatives are hard ones (Byun et al. 2022, GRIT-VLP); near-twins,
  by a sentence encoder's judgement, do not count as negatives.
- ITC's targets are softened by that sentence encoder (Huang et al. 2024, CUSA): of two wrong photos, the one whose
  captions say nearly the same is less wrong.
- Class prototypes (training/prototypes.py) and what the starting classifier believes of the photos teach a thousand
  classes that no caption names; WordNet's other nouns are told apart from them; captions' nouns are learnt as queries.
- ITM learns from the decoder, which ranks better than it (`distill`).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blipcore.captioned import CaptionedPhotos, load_captioned
from blipcore.checkpoint import load_folder
from blipcore.hub import find_model
from blipcore.metrics import recall_at_k
from blipcore.models.blip import Blip, starting_with
from blipcore.models.presets import PRESETS
from blipcore.models.text import image_keys_values, text_states
from blipcore.training.datasets import FrozenPrefixCache
from blipcore.training.loop import AveragedWeights, cosine_with_warmup, parameter_groups
from blipcore.training.objectives import caption_labels, contrastive_loss, cosines, soft_targets
from blipcore.training.prototypes import CaptionNouns, ClassNames, ClassPrototypes, OtherNouns, without_camera
from blipcore.training.run_log import RunLog
from blipcore.training.settings import as_script, folder_and_split, run_recipe_cli
from blipcore.training.starts import load_text_start, load_vision_start, resize_positions
from blipcore.training.wordnet import WordNet
from blipcore.transforms import Normalizer, TextTokenizer, squash

MASK_TOKEN = 103
NAMING_WEIGHTS = {"belief": 0.3, "nouns": 0.3, "tags": 0.2, "others": 0.15}  # beside ITC's 1


@dataclass
class Settings:
    """One run; saved as settings.json beside the weights."""

    data: tuple[str, ...]  # folders with captions.tsv and photos, FOLDER:SPLIT for one split of it
    dev: str  # likewise, to watch
    out: Path  # weights, log, settings and caches
    tokenizer: Path  # tokenizer.json
    vision_start: Path  # timm ViT with its classifier, safetensors
    text_start: Path  # BERT sentence encoder, safetensors: the towers' start and the teacher of soft targets
    stage: str = "joint"  # or "texts" or "matching"
    preset: str = "blip-mini"
    wordnet: Path | None = None  # WordNet's database files (data.noun, index.noun); later stages need them
    start: str = ""  # weights.pt of an earlier stage, or a model to go on from, instead of the two starts
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    frozen_blocks: int = 9
    views: int = 4
    minutes: float = 30.0  # the clock moves the schedule and ends the run
    batch_size: int = 128
    group: int = 8  # look-alikes that stand together in a batch
    joint_size: int = 32  # rows of a batch that also train ITM and LM
    texts_per_image: int = 4  # ITM: the own caption, look-alikes' captions, and one of any other photo
    rate: float = 2e-4  # projections, cross-attention, heads
    text_rate: float = 5e-5
    vision_rate: float = 5e-5
    floor: float = 0.05  # of the rates, at the end
    weight_decay: float = 0.05
    warmup: int = 30
    dropout: float = 0.1
    word_masking: float = 0.1  # of the words that ITC's text reads
    soften: float = 0.25  # the teacher's share of ITC's targets
    teacher_temperature: float = 0.05
    twin: float = 0.75  # teacher's cosine from which a text is no negative for a photo
    listwise: float = 0.5  # weight of ITM's softmax over an image's texts and a text's images
    distill: float = 0.0  # weight of ITM's softmax over a text's images against the LM's likelihoods of the text there
    max_length: int = 20  # tokens of a training caption; longer ones are not drawn
    prior: float = 20.0  # weight of ITC's cosine beside ITM's margin in that softmax
    prototypes: int = 48
    prototype_weight: float = 0.3
    alignment_weight: float = 1.0
    others: int = 96  # WordNet's other nouns a step, after stage joint
    nouns: int = 64  # captions' nouns a step, likewise
    drift_weight: float = 0.2
    average_decay: float = 0.995
    evaluate_every: int = 150
    seed: int = 0


class Corpus:
    """The training photos with tokenised captions, and what a sentence encoder thinks of them.

    Attributes:
        photos: all data sets joined. ids: token ids of each caption. owner: [C] the photo of each caption.
        of_photo: each photo's caption numbers. embedded: unit vectors [C, W]; centre: of each photo's captions [I, W].
    """

    def __init__(self, sources: tuple[str, ...], tokenizer: TextTokenizer, teacher: Blip, max_length: int):
        parts = [load_captioned(*folder_and_split(source)) for source in sources]
        self.photos = CaptionedPhotos(
            *([item for part in parts for item in getattr(part, field)] for field in ("files", "encoded", "captions"))
        )
        texts, owner = self.photos.texts()
        self.texts, self.owner = texts, np.array(owner)
        self.embedded = embed_sentences(teacher, tokenizer, texts)
        centre = torch.zeros(len(self.photos), self.embedded.shape[1]).index_add_(0, torch.tensor(owner), self.embedded)
        self.centre = F.normalize(centre, dim=1)
        self.of_photo: list[list[int]] = [[] for _ in range(len(self.photos))]
        lengths = np.concatenate(
            [tokenizer(texts[at : at + 2000])[1].sum(1).numpy() for at in range(0, len(texts), 2000)]
        )
        for caption in np.argsort(lengths > max_length, kind="stable"):
            row = self.of_photo[owner[caption]]
            if lengths[caption] <= max_length or not row:
                row.append(int(caption))

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One caption number for each photo."""
        return np.array([rng.choice(self.of_photo[row]) for row in rows])


@torch.no_grad()
def embed_sentences(model: Blip, tokenizer: TextTokenizer, texts: list[str]) -> Tensor:
    """The sentence encoder's own use of its tower: the mean over tokens. -> unit vectors [T, W]."""
    found = []
    for at in range(0, len(texts), 256):
        ids, mask = tokenizer(texts[at : at + 256])
        with torch.autocast("cpu", torch.bfloat16):
            states = text_states(model.text_encoder, ids, mask).float() * mask[..., None]
        found.append(F.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=1))
    return torch.cat(found)


class Dropout:
    """Dropout whose random masks are slices of one that was drawn once: drawing them takes a CPU a tenth of a step."""

    def __init__(self, share: float, size: int = 1 << 23, seed: int = 0):
        kept = torch.rand(size, generator=torch.Generator().manual_seed(seed)) >= share
        self.mask = kept.to(torch.bfloat16) / (1 - share)
        self.share, self.rng = share, np.random.default_rng(seed)

    def __call__(self, states: Tensor) -> Tensor:
        if not self.share or not torch.is_grad_enabled():
            return states
        count = states.numel()
        start = int(self.rng.integers(len(self.mask) - count))
        return states * self.mask[start : start + count].view_as(states)


def grouped_batches(features: Tensor, group: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch of batches [batch_size] made of whole groups of look-alikes by unit vectors [I, E].

    A group is a random photo and neighbours drawn from its nearest free ones, so groups differ each epoch.
    """
    free = torch.ones(len(features), dtype=torch.bool)
    groups = []
    for seed in rng.permutation(len(features)):
        if free[seed] and int(free.sum()) >= group:
            free[seed] = False
            similarity = (features @ features[seed]).masked_fill(~free, -2)
            near = similarity.topk(min(3 * group, int(free.sum()))).indices.numpy()
            near = rng.choice(near, group - 1, replace=False)
            free[near] = False
            groups.append(np.concatenate([[seed], near]))
    groups = np.stack(groups)[rng.permutation(len(groups))].ravel()
    return [groups[at : at + batch_size] for at in range(0, len(groups) - batch_size + 1, batch_size)]


def pairings(size: int, group: int, texts_per_image: int, rng: np.random.Generator) -> np.ndarray:
    """[size, M]: the texts each image is matched with; column 0 its own, then look-alikes', last any other's.

    Each column is a permutation: every text also meets M images.
    """
    rows = np.arange(size)
    base, place = rows // group * group, rows % group
    shifts = rng.choice(np.arange(1, group), texts_per_image - 2, replace=False)
    far = int(rng.integers(1, size // group)) * group + int(rng.integers(group))
    return np.stack([rows, *(base + (place + shift) % group for shift in shifts), (rows + far) % size], 1)


def matching_losses(margins: Tensor, columns: Tensor, counted: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ITM's logits as margins [B, M] -> (binary loss, listwise loss, accuracy).

    The binary loss weighs matches and mismatches 1 to 2, as BLIP's 3B pairs do. The listwise one is the
    cross-entropy of the own text among an image's texts, and of the own image among a text's, by margin + `prior`:
    with ITC's weighed cosines there, ITM learns what re-ranking needs of it, which is what ITC misses.

    Args:
        columns: [B, M] of `pairings`. counted: [B, M] bool, False where a pair is too nearly true to be a negative.
    """
    label = torch.zeros_like(margins)
    label[:, 0] = 1
    each = F.binary_cross_entropy_with_logits(margins, label, reduction="none")
    negative = counted[:, 1:]
    binary = (each[:, 0].mean() + 2 * (each[:, 1:] * negative).sum() / negative.sum().clamp(min=1)) / 3
    by_image = (margins + prior).masked_fill(~counted, -1e4)
    by_text = torch.empty_like(by_image).scatter(0, columns, by_image)
    own = torch.zeros(len(margins), dtype=torch.long)
    listwise = (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2
    right = ((margins > 0) == (label > 0)).float()
    accuracy = (right[:, 0].mean() + 2 * (right[:, 1:] * negative).sum() / negative.sum().clamp(min=1)) / 3
    return binary, listwise, accuracy


def ranking_distillation(margins: Tensor, likelihood: Tensor, columns: Tensor, counted: Tensor) -> Tensor:
    """ITM learns from the decoder which of a text's images fits it: both are towers of one model, and the decoder,
    taught by every word, knows more.

    By Bayes' rule a text's likelihoods under its images, softmaxed over them, are what the text says of which image it
    is. The target is half that and half the truth.

    Args:
        margins, likelihood: [B, M]. columns, counted: as in `matching_losses`.
    """
    by_text = torch.empty_like(margins).scatter(0, columns, margins.masked_fill(~counted, -1e4))
    teacher = torch.empty_like(margins).scatter(0, columns, likelihood.masked_fill(~counted, -1e4)).softmax(1)
    truth = torch.zeros_like(teacher)
    truth[:, 0] = 1
    return F.cross_entropy(by_text, (teacher + truth) / 2)


class Run:
    """A training run: what its steps share."""

    def __init__(self, settings: Settings):
        self.settings = s = settings
        torch.manual_seed(s.seed)
        self.rng = np.random.default_rng(s.seed)
        self.tokenizer = TextTokenizer(s.tokenizer, s.max_length)
        self.normalize = Normalizer(s.mean, s.std)
        self.drop = Dropout(s.dropout)
        fresh, classifier = fresh_model(s)
        self.corpus = Corpus(s.data, self.tokenizer, fresh, s.max_length)
        self.dev = load_captioned(*folder_and_split(s.dev))
        self.cache = FrozenPrefixCache(s.out / "cache", self.corpus.photos, s.views, s.frozen_blocks)
        self.cache.build(fresh.eval(), self.normalize)
        self._learn_classes(classifier)
        self.model = started(fresh, s.start)
        self.frozen = s.frozen_blocks
        if s.stage != "joint":
            self.original = torch.from_numpy(self.cache.class_tokens.astype(np.float32))
            self.frozen = len(self.model.vision_model.encoder.layers)
            self.cache = self.cache.advanced(self.model.eval(), self.frozen)
        freeze_tower(self.model, self.frozen)
        self.average = AveragedWeights(self.model, s.average_decay)
        new = (".crossattention.", ".predictions.transform.")
        rates = {name: s.rate for name, _ in self.model.named_parameters() if any(part in name for part in new)}
        rates |= {"vision_model": s.vision_rate, "vision_proj": s.rate, "text_proj": s.rate, "itm_head": s.rate}
        groups = parameter_groups(self.model, rates, s.text_rate, s.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = cosine_with_warmup(0, 1000, s.floor)
        self.log = RunLog(s.out / "log.jsonl")
        self.number = 0

    def _learn_classes(self, classifier: tuple[Tensor, Tensor]) -> None:
        """The prototypes, and for each photo the class that the starting classifier is sure of, or -1."""
        wordnet = WordNet(self.settings.wordnet) if self.settings.wordnet else None
        names = ClassNames.of_imagenet(wordnet)
        self.prototypes = ClassPrototypes(*classifier, names, self.cache.class_tokens[:, 0])
        belief = self.prototypes.classify(torch.from_numpy(self.cache.class_tokens[:, 0].astype(np.float32)))
        if self.settings.stage != "joint":
            if wordnet is None:
                raise ValueError(
                    f"--stage {self.settings.stage} learns WordNet's nouns: give its folder with --wordnet"
                )
            self.caption_nouns = CaptionNouns(self.corpus.photos.captions, wordnet)
            names.drop_other_meanings(self.caption_nouns, belief)
            self.other_nouns = OtherNouns(names, wordnet, self.tokenizer.words())
        sure, named = belief.max(1)
        self.named = torch.where(sure > 0.5, named, -1).numpy()

    def batches(self):
        """Endless grouped batches; look-alikes by the teacher and, in stage `matching`, by the model itself."""
        while True:
            features = self.corpus.centre
            if self.settings.stage == "matching":
                with torch.no_grad():
                    own = self.model.project_images(torch.from_numpy(self.cache.class_tokens[:, :1].astype(np.float32)))
                features = F.normalize(torch.cat([features, 1.5 * own], 1), dim=1)
            yield from grouped_batches(features, self.settings.group, self.settings.batch_size, self.rng)

    def step(self, rows: np.ndarray) -> dict[str, Tensor]:
        """One optimiser step on the photos `rows`. -> the losses."""
        s, model = self.settings, self.model
        captions = self.corpus.draw(rows, self.rng)
        texts = [self.corpus.texts[c] for c in captions]
        ids, mask = self.tokenizer(list(map(without_camera, texts)) if s.stage == "texts" else texts)
        with torch.autocast(model.device.type, torch.bfloat16):
            losses = self._losses(rows, captions, ids, mask)
        weights = NAMING_WEIGHTS | {
            "prototype": s.prototype_weight,
            "drift": s.drift_weight,
            "listwise": s.listwise,
            "distill": s.distill,
            "misalignment": s.alignment_weight,
            "itm_accuracy": 0.0,
        }
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = self.schedule(1000 * self.log.minutes() / s.minutes) * min(1, (self.number + 1) / s.warmup)
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * rate
        self.optimizer.step()
        model.clamp_temperature()
        self.average.update()
        self.number += 1
        return {**losses, "temp": model.temp.detach()}

    def _losses(self, rows: np.ndarray, captions: np.ndarray, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The stage's losses on the photos `rows` and a caption of each."""
        s = self.settings
        views = self.rng.integers(s.views, size=len(rows))
        if s.stage == "texts":
            tokens = torch.from_numpy(self.cache.class_tokens[rows, views].astype(np.float32))[:, None]
            return self._contrastive(tokens, rows, captions, ids, mask)[0] | self._naming(rows)
        hidden, original = self.cache.batch(rows, views)
        tokens = self.model.encode_from(hidden, self.frozen) if s.stage == "joint" else hidden
        losses, cosine = self._contrastive(tokens, rows, captions, ids, mask)
        losses |= self._joint(tokens, rows, captions, (ids, mask), cosine.detach())
        return losses | (self._classes(tokens, rows, original) if s.stage == "joint" else self._naming(rows))

    def _text_feats(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = text_states(self.model.text_encoder, ids, mask, drop=self.drop)
        return self.model.unit(self.model.text_proj, states[:, 0])

    def _contrastive(self, tokens: Tensor, rows: np.ndarray, captions: np.ndarray, ids: Tensor, mask: Tensor):
        """ITC against the batch's photos or, where the tower is frozen, against all. -> (losses, cosines [B, B])."""
        s = self.settings
        masked = (torch.rand(ids.shape) < s.word_masking) & (mask == 1) & (ids > MASK_TOKEN)
        text_feats = self._text_feats(ids.masked_fill(masked, MASK_TOKEN), mask)
        pool = rows
        image_feats = self.model.project_images(tokens)
        cosine = cosines(image_feats, text_feats)
        if s.stage != "joint":
            pool, (_, image_feats) = np.arange(len(self.corpus.photos)), self._every_photo()
        described = self.corpus.embedded[captions] @ self.corpus.centre[pool].T
        own = torch.from_numpy(rows[:, None] == pool[None])
        teacher = (described / s.teacher_temperature).T
        return {"itc": contrastive_loss(image_feats, text_feats, self.model.temp, own.T, teacher, s.soften)}, cosine

    def _every_photo(self) -> tuple[np.ndarray, Tensor]:
        """A view of each photo. -> (the views' numbers [I], unit vectors [I, E])."""
        views = self.rng.integers(self.settings.views, size=len(self.corpus.photos))
        tokens = self.cache.class_tokens[np.arange(len(views)), views].astype(np.float32)
        return views, self.model.project_images(torch.from_numpy(tokens)[:, None])

    def _naming(self, rows: np.ndarray) -> dict[str, Tensor]:
        """What words name, learnt by the text tower and both projections with the vision tower frozen.

        Photos and prototypes choose among the names of classes and nouns, and names among them.
        """
        s, model, rng = self.settings, self.model, self.rng
        losses = {}
        noun_texts, said = self.caption_nouns.sample(s.nouns, rng)
        other_texts, nearest = self.other_nouns.sample(s.others, rng)
        features, classes = self.prototypes.sample(s.prototypes, rng, nearest)
        texts, names, same = self.prototypes.describe(classes, rng)
        named, nouns, others = self._text_feats(*self.tokenizer(texts + noun_texts + other_texts)).split(
            [len(texts), len(noun_texts), len(other_texts)]
        )
        drawn = model.project_images(features[:, None])
        points = model.project_images(self.prototypes.points[:, None])
        views, photos = self._every_photo()
        believed = rng.choice(len(photos), s.prototypes, replace=False)
        belief = self.prototypes.belief(self.original[believed, views[believed]], names)

        def choose(rows: Tensor, columns: Tensor, fits: Tensor) -> Tensor:
            return F.cross_entropy(cosines(rows, columns) / model.temp, soft_targets(fits, None, 0))

        wrong = torch.zeros(len(same), len(others), dtype=torch.bool)
        described = said[rows].any(1)
        unsaid = torch.zeros(int(described.sum()), len(others), dtype=torch.bool)
        losses["prototype"] = (
            choose(drawn, torch.cat([named, others]), torch.cat([same, wrong], 1)) + choose(named, drawn, same.T)
        ) / 2
        losses["misalignment"] = self.prototypes.misalignment(model.vision_proj.weight, named, names)
        losses["belief"] = F.kl_div(
            (cosines(photos[believed], named) / model.temp).log_softmax(1), belief, reduction="batchmean"
        )
        losses["nouns"] = choose(nouns, photos, said.T)
        losses["tags"] = choose(
            photos[rows][described], torch.cat([nouns, others]), torch.cat([said[rows][described], unsaid], 1)
        )
        losses["others"] = choose(others, points, nearest)
        return losses

    def _joint(self, tokens, rows, captions, text, cosine: Tensor) -> dict[str, Tensor]:
        """ITM and LM on the first `joint_size` rows."""
        s, model = self.settings, self.model
        n, (ids, mask) = s.joint_size, text
        keys_values = image_keys_values(model.text_encoder, tokens[:n])
        columns = torch.from_numpy(pairings(n, s.group, s.texts_per_image, self.rng))
        texts = columns.ravel()
        states = text_states(
            model.text_encoder, starting_with(model.enc_token_id, ids)[texts], mask[texts], keys_values, drop=self.drop
        )
        logits = model.itm_head(states[:, 0]).float()
        margins = (logits[:, 1] - logits[:, 0]).view(columns.shape)
        described = self.corpus.embedded[captions[:n]] @ self.corpus.centre[rows[:n]].T  # [text, image]
        counted = described.T.gather(1, columns) < s.twin
        counted[:, 0] = True
        prior = s.prior * cosine[:n, :n].gather(1, columns)
        itm, listwise, accuracy = matching_losses(margins, columns, counted, prior)
        labels = caption_labels(ids[:n], mask[:n])[:, 1:]
        predicted = labels >= 0
        found = {}
        if s.distill:
            likelihood = self._likelihood(ids[texts], mask[texts], keys_values).view(columns.shape)
            found["distill"] = ranking_distillation(margins, likelihood, columns, counted)
        states = text_states(
            model.text_decoder.bert,
            starting_with(model.dec_token_id, ids[:n]),
            mask[:n],
            keys_values,
            causal=True,
            drop=self.drop,
        )
        words = model.text_decoder.cls(states[:, :-1][predicted]).float()
        lm = F.cross_entropy(words, labels[predicted], label_smoothing=0.1)
        return {"itm": itm, "listwise": listwise, **found, "lm": lm, "itm_accuracy": accuracy}

    @torch.no_grad()
    def _likelihood(self, ids: Tensor, mask: Tensor, keys_values: list) -> Tensor:
        """What the decoder thinks of each text [B * M, T] on its image: its tokens' log-probabilities summed."""
        model = self.model
        labels = caption_labels(ids, mask)[:, 1:]
        predicted = labels >= 0
        starts = starting_with(model.dec_token_id, ids)
        states = text_states(model.text_decoder.bert, starts, mask, keys_values, causal=True)
        words = model.text_decoder.cls(states[:, :-1][predicted]).float()
        each = -F.cross_entropy(words, labels[predicted], reduction="none")
        row = torch.arange(len(ids))[:, None].expand_as(labels)[predicted]
        return torch.zeros(len(ids)).index_add_(0, row, each)

    def _classes(self, tokens: Tensor, rows: np.ndarray, original: Tensor) -> dict[str, Tensor]:
        """Prototypes and surely named photos against "a photo of a {class}"."""
        features, classes = self.prototypes.sample(self.settings.prototypes, self.rng)
        sure = np.flatnonzero(self.named[rows] >= 0)[: self.settings.prototypes // 2]
        texts, names, same = self.prototypes.describe(np.concatenate([classes, self.named[rows[sure]]]), self.rng)
        text_feats = self._text_feats(*self.tokenizer(texts))
        image_feats = self.model.project_images(torch.cat([features, tokens[sure, 0].float()])[:, None])
        found = {"prototype": contrastive_loss(image_feats, text_feats, self.model.temp, same)}
        found["misalignment"] = self.prototypes.misalignment(self.model.vision_proj.weight, text_feats, names)
        if self.settings.stage == "joint":
            found["drift"] = self.prototypes.drift(tokens[:, 0], original)
        return found

    @torch.no_grad()
    def evaluate(self, queries: int = 250, k: int = 32) -> dict:
        """On dev: ITC's recall, and R@1 of ITM over ITC's best `k`, alone and with the cosine at its best weight."""
        self.average.swap()
        model = self.model.eval()
        size, images = model.config.vision_config.image_size, range(len(self.dev))
        pixels = [np.stack([squash(self.dev.image(i), size) for i in images[at : at + 50]]) for at in images[::50]]
        with torch.autocast(model.device.type, torch.bfloat16):
            tokens = torch.cat([model.encode_images(self.normalize(part)) for part in pixels])
            texts, owners = self.dev.texts()
            feats = torch.cat(
                [self._text_feats(*self.tokenizer(texts[at : at + 250])) for at in range(0, len(texts), 250)]
            )
            image_feats = model.project_images(tokens)
            table = cosines(feats, image_feats).numpy()
            chosen = np.random.default_rng(0).permutation(len(texts))[:queries]
            best = np.argsort(-table[chosen], 1)[:, :k]
            margins = np.zeros(best.shape)
            for row, text in enumerate(chosen):
                ids, mask = self.tokenizer([texts[text]])
                kv = image_keys_values(model.text_encoder, tokens[best[row]])
                ids = starting_with(model.enc_token_id, ids).expand(k, -1)
                logits = model.itm_head(text_states(model.text_encoder, ids, mask.expand(k, -1), kv)[:, 0]).float()
                margins[row] = (logits[:, 1] - logits[:, 0]).numpy()
        own = np.array(owners)[chosen][:, None] == best
        cosine = np.take_along_axis(table[chosen], best, 1)

        def r1(score: np.ndarray) -> float:
            return round(100 * float(own[np.arange(len(own)), score.argmax(1)].mean()), 2)

        fused = {weight: r1(margins + weight * cosine) for weight in (5, 10, 15, 20, 30, 45, 60)}
        weight = max(fused, key=fused.get)
        self.average.swap()
        model.train()
        return {
            **recall_at_k(table, np.array(owners)),
            "itc_r1": r1(cosine),
            "itm_r1": r1(margins),
            "fused_r1": fused[weight],
            "weight": weight,
        }

    def save(self, name: str = "weights.pt") -> None:
        """The averaged weights, written aside and renamed."""
        self.average.swap()
        aside = self.settings.out / (name + ".part")
        torch.save(self.model.state_dict(), aside)
        aside.rename(self.settings.out / name)
        self.average.swap()


def fresh_model(s: Settings) -> tuple[Blip, tuple[Tensor, Tensor]]:
    """The preset with the public starting weights. -> (model, the vision start's classifier)."""
    model = Blip(PRESETS[s.preset]())
    classifier = load_vision_start(model, s.vision_start)
    load_text_start(model, s.text_start)
    return model, classifier


def started(model: Blip, start: str) -> Blip:
    """`model` with the weights to go on from; its own where `start` is empty."""
    if start.endswith(".pt"):
        model.load_state_dict(torch.load(start, weights_only=True, map_location="cpu"))
    elif start:
        earlier = load_folder(find_model(start)).retrieval
        resize_positions(earlier, model.config.vision_config.image_size)
        model.load_state_dict(earlier.state_dict())
    return model


def freeze_tower(model: Blip, blocks: int) -> None:
    """No gradients for the patch embedding and the first `blocks` blocks; all of them freezes the last norm too."""
    vision = model.vision_model
    vision.embeddings.requires_grad_(False)
    for layer in vision.encoder.layers[:blocks]:
        layer.requires_grad_(False)
    if blocks == len(vision.encoder.layers):
        vision.post_layernorm.requires_grad_(False)


def train(settings: Settings) -> Run:
    """Load, train, evaluate, save."""
    if settings.stage not in {"joint", "texts", "matching"}:
        raise ValueError(f"--stage is joint, texts or matching, not {settings.stage}")
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "settings.json").write_text(json.dumps(asdict(settings), default=str, indent=2))
    run = Run(settings)
    run.model.train()
    for rows in run.batches():
        if run.log.minutes() >= settings.minutes:
            break
        run.log.step(run.number, {k: v.detach() for k, v in run.step(rows).items()})
        if settings.evaluate_every and run.number % settings.evaluate_every == 0:
            run.log.write({"step": run.number, "dev": run.evaluate()})
            run.save()
    run.save()
    return run


def main(arguments: list[str] | None = None) -> None:
    """The command line: one option a field of Settings."""
    run_recipe_cli(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
