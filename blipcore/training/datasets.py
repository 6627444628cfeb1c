"""What a training step reads: augmented views, and the frozen part of the tower computed once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from blipcore.captioned import CaptionedPhotos
from blipcore.models.blip import Blip
from blipcore.transforms import Normalizer, squash


def augmentation(size: int, min_scale: float = 0.5) -> v2.Transform:
    """BLIP's fine-tuning augmentation without RandAugment: RandomResizedCrop and a flip."""
    crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


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
