"""What a training step reads: augmented views, and the frozen part of the tower computed once."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from blipcore.captioned import CaptionedPhotos, Sample
from blipcore.models.blip import Blip
from blipcore.transforms import Normalizer, TextTokenizer, squash


class BlipRandAugment(v2.RandAugment):
    """RandAugment with BLIP's list of changes: colours stay, since captions name them.

    Cubuk et al. 2019; the list is salesforce/BLIP `data/__init__.py`'s.
    """

    _AUGMENTATION_SPACE: ClassVar = {
        name: change
        for name, change in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name not in {"Color", "Contrast", "Posterize", "Solarize"}
    }


def augmentation(size: int, min_scale: float = 0.5, *, randaugment: bool = True) -> v2.Transform:
    """BLIP's training augmentation: RandomResizedCrop (0.2 pretraining, 0.5 fine-tuning), flip, RandAugment(2, 5)."""
    crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    random_changes = [BlipRandAugment(2, 5, interpolation=InterpolationMode.BILINEAR)] if randaugment else []
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *random_changes])


class FrozenPrefixCache:
    """What the frozen first blocks of the vision tower make of every photo, computed once and memory-mapped.

    Training only the last blocks then costs a fraction of the tower a step. View 0 is the evaluation
    transform, the others are random augmentations.

    Args:
        folder: where `hidden-*.npy` (float16 [photos, views, N, D]) and `class_token-*.npy` live.
        block: the first block that trains.
    """

    def __init__(self, folder: Path, photos: CaptionedPhotos, views: int, block: int):
        self.folder, self.photos, self.views, self.block = Path(folder), photos, views, block
        self.hidden = self.class_tokens = None

    @torch.no_grad()
    def build(self, model: Blip, normalize: Normalizer, batch_size: int = 32, seed: int = 0) -> None:
        """Fill the cache, unless a finished one for these photos, views and block is there."""
        vision = model.config.vision_config
        tokens, width = (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size
        tag = f"{len(self.photos)}x{self.views}-block{self.block}"
        hidden_file, class_file = self.folder / f"hidden-{tag}.npy", self.folder / f"class_token-{tag}.npy"
        if not class_file.exists():  # written last: its presence says that the cache is whole
            self.folder.mkdir(parents=True, exist_ok=True)
            shape = (len(self.photos), self.views, tokens, width)
            hidden = np.lib.format.open_memmap(hidden_file, mode="w+", dtype=np.float16, shape=shape)
            class_tokens = np.zeros((shape[0], shape[1], width), np.float16)
            torch.manual_seed(seed)
            for rows, views, pixels in self._batches(vision.image_size, batch_size):
                with torch.autocast(model.device.type, torch.bfloat16):
                    prefix = model.encode_until(normalize(pixels).to(model.device), self.block)
                    last = model.encode_from(prefix, self.block)[:, 0]
                hidden[rows, views] = prefix.float().cpu().numpy()
                class_tokens[rows, views] = last.float().cpu().numpy()
            hidden.flush()
            np.save(class_file, class_tokens)
        self.hidden = np.load(hidden_file, mmap_mode="r")
        self.class_tokens = np.load(class_file)

    def _batches(self, size: int, batch_size: int) -> Iterator[tuple[list[int], list[int], Tensor]]:
        augment, rows, views, pixels = augmentation(size), [], [], []
        for row in range(len(self.photos)):
            image = self.photos.image(row)
            for view in range(self.views):
                rows.append(row)
                views.append(view)
                pixels.append(squash(image if view == 0 else augment(image), size))
            if len(rows) >= batch_size or row == len(self.photos) - 1:
                yield rows, views, torch.from_numpy(np.stack(pixels))
                rows, views, pixels = [], [], []

    def batch(self, rows: np.ndarray, views: np.ndarray) -> tuple[Tensor, Tensor]:
        """-> (hidden [B, N, D] as they enter the first trained block, original class tokens [B, D])."""
        order = np.argsort(rows)  # read the memory map forwards
        hidden = np.empty((len(rows), *self.hidden.shape[2:]), np.float32)
        hidden[order] = self.hidden[rows[order], views[order]]
        return torch.from_numpy(hidden), torch.from_numpy(self.class_tokens[rows, views].astype(np.float32))

    @torch.no_grad()
    def advanced(self, model: Blip, block: int, batch_size: int = 16) -> "FrozenPrefixCache":
        """The cache after the model's blocks up to `block` and, if that is all of them, its last norm.

        With the whole tower frozen, what a step reads is final: `hidden` are image tokens then.
        """
        later = FrozenPrefixCache(self.folder, self.photos, self.views, block)
        tag = f"{len(self.photos)}x{self.views}-block{block}"
        file = self.folder / f"hidden-{tag}.npy"
        hidden = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=self.hidden.shape)
        for at in range(0, len(self.photos), batch_size):
            part = torch.from_numpy(self.hidden[at : at + batch_size].astype(np.float32)).flatten(0, 1)
            with torch.autocast(model.device.type, torch.bfloat16):
                tokens = model.encode_from(part.to(model.device), self.block)
            hidden[at : at + batch_size] = tokens.float().cpu().unflatten(0, (-1, self.views)).numpy()
        later.hidden = hidden
        later.class_tokens = np.array(hidden[:, :, 0])
        return later


class CaptionedBatches:
    """Samples of `open_captioned` -> augmented pixels and one caption drawn at random, and batches of them.

    A batch is {"pixel_values": [B, 3, S, S], "input_ids", "attention_mask": [B, T], "ids": [B] photo numbers}.

    Args:
        prompt: put before each caption ("a picture of " in captioning).
        fixed_length: pad every batch to the tokenizer's longest, which several processes need.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        normalize: Normalizer,
        size: int,
        *,
        min_scale: float = 0.5,
        randaugment: bool = True,
        prompt: str = "",
        fixed_length: bool = False,
    ):
        self.tokenizer, self.normalize, self.size, self.prompt = tokenizer, normalize, size, prompt
        self.augment = augmentation(size, min_scale, randaugment=randaugment)
        self.fixed_length = fixed_length

    def transform(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, str, int]:
        """-> (uint8 [S, S, 3], caption, a number of the photo's content: shards repeat names)."""
        caption = sample.captions[int(rng.integers(len(sample.captions)))]
        pixels = squash(self.augment(sample.image()), self.size)
        return pixels, self.prompt + caption, zlib.crc32(sample.encoded)

    def collate(self, items: list[tuple[np.ndarray, str, int]]) -> dict[str, Tensor]:
        pixels, texts, numbers = zip(*items, strict=True)
        ids, mask = self.tokenizer(texts)
        if self.fixed_length:
            missing = self.tokenizer.max_length - ids.shape[1]
            ids, mask = F.pad(ids, (0, missing)), F.pad(mask, (0, missing))
        return {
            "pixel_values": self.normalize(np.stack(pixels)),
            "input_ids": ids,
            "attention_mask": mask,
            "ids": torch.tensor(numbers),
        }
