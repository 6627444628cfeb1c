"""An image's tokens as they are kept for matching: whole or merged, and as bytes.

Matching reads only the vision tower's tokens, so a photo whose tokens are kept is matched without its pixels. Merged
tokens are those of Bolya et al., "Token Merging: Your ViT But Faster", 2023 (facebookresearch/ToMe `tome/merge.py`),
applied once to the tower's output.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = {  # form: number type, tokens kept (None: all of them)
    "fp16": (np.float16, None),
    "int8": (np.int8, None),
    "int8-128": (np.int8, 128),
    "int8-62": (np.int8, 62),  # ViT-B at 384: 49 kB an image
}
HEADER = struct.Struct("<4sHHBx")  # magic, tokens, width, whether merged
MAGIC = {np.float16: b"PBh1", np.int8: b"PBb1"}


class Patches(NamedTuple):
    """Tokens of I images.

    Attributes:
        features: [I, N, D]. sizes: [I, N], how many patches each token stands for; None where each is one.
    """

    features: Tensor
    sizes: Tensor | None = None

    def take(self, rows: np.ndarray, device: torch.device, dtype: torch.dtype) -> "Patches":
        """These images' tokens, on a device and in a precision; sizes stay float32."""
        rows = torch.from_numpy(np.asarray(rows)).to(self.features.device)
        sizes = None if self.sizes is None else self.sizes[rows].to(device)
        return Patches(self.features[rows].to(device, dtype), sizes)


def merged(features: Tensor, keep: int) -> Patches:
    """Merge like tokens [B, N, D] with each other until `keep` are left; the class token stays first, and by itself.

    Each round pairs every other token with its likest among those between, and merges the likest pairs.
    """
    states, sizes = features.float(), torch.ones(features.shape[:2], device=features.device)
    while states.shape[1] > keep:
        states, sizes = _round(states, sizes, states.shape[1] - keep)
    return Patches(states.to(features.dtype), sizes)


def _round(states: Tensor, sizes: Tensor, surplus: int) -> tuple[Tensor, Tensor]:
    """At most half of the tokens go in a round."""
    first, rest = (states[:, :1], sizes[:, :1]), (states[:, 1:], sizes[:, 1:])
    (given, given_sizes), (taking, taking_sizes) = ([part[:, start::2] for part in rest] for start in (0, 1))
    likeness = F.normalize(given, dim=-1) @ F.normalize(taking, dim=-1).transpose(1, 2)
    closeness, partner = likeness.max(-1)
    order = closeness.argsort(-1, descending=True)
    going, staying = order.split([min(surplus, order.shape[1]), order.shape[1] - min(surplus, order.shape[1])], 1)
    partner, gone_sizes = partner.gather(1, going), given_sizes.gather(1, going)
    width = states.shape[-1]
    gone = given.gather(1, going[..., None].expand(-1, -1, width)) * gone_sizes[..., None]
    total = (taking * taking_sizes[..., None]).scatter_add(1, partner[..., None].expand(-1, -1, width), gone)
    taking_sizes = taking_sizes.scatter_add(1, partner, gone_sizes)
    stayed = given.gather(1, staying[..., None].expand(-1, -1, width))
    states = torch.cat([first[0], stayed, total / taking_sizes[..., None]], 1)
    return states, torch.cat([first[1], given_sizes.gather(1, staying), taking_sizes], 1)


def pack(features: Tensor, form: str) -> list[bytes]:
    """Image tokens [B, N, D] -> a record an image, in one of FORMS.

    int8 has a scale for each channel of each image: a few channels of a vision tower are far larger than the others.
    """
    dtype, keep = FORMS[form]
    patches = Patches(features) if keep is None or keep >= features.shape[1] else merged(features, keep)
    values, scales = patches.features.float().cpu().numpy(), None
    if dtype is np.int8:
        scales = (np.abs(values).max(1, keepdims=True) / 127).astype(np.float16)
        scales = np.maximum(scales, np.finfo(np.float16).tiny)
        values = np.clip(np.rint(values / scales), -127, 127)
    parts = [values.astype(dtype)]
    parts += [] if scales is None else [scales]
    parts += [] if patches.sizes is None else [patches.sizes.cpu().numpy().astype(np.uint16)]
    header = HEADER.pack(MAGIC[dtype], *values.shape[1:], patches.sizes is not None)
    return [b"".join([header, *(part[row].tobytes() for part in parts)]) for row in range(len(values))]


def unpack(records: Sequence[bytes | memoryview], dtype: torch.dtype = torch.float32) -> Patches:
    """Records of one form -> the tokens of all images, in `dtype`. Raises ValueError for what `pack` did not write."""
    magic, tokens, width, is_merged = _header(records)
    number = next(kind for kind, name in MAGIC.items() if name == magic)
    layout = [("values", number, (tokens, width))]
    layout += [("scales", np.float16, (1, width))] if number is np.int8 else []
    layout += [("sizes", np.uint16, (tokens,))] if is_merged else []
    layout = np.dtype(layout)
    if any(len(record) != HEADER.size + layout.itemsize for record in records):
        raise ValueError("a record of image tokens is too short or too long")
    rows = np.empty(len(records), layout)
    for row, record in enumerate(records):
        rows[row] = np.frombuffer(record, layout, offset=HEADER.size)[0]
    features = torch.from_numpy(np.ascontiguousarray(rows["values"])).to(dtype)
    if number is np.int8:
        features *= torch.from_numpy(np.ascontiguousarray(rows["scales"])).to(dtype)
    sizes = torch.from_numpy(rows["sizes"].astype(np.float32)) if is_merged else None
    return Patches(features, sizes)


def _header(records: Sequence[bytes | memoryview]) -> tuple[bytes, int, int, int]:
    heads = {bytes(record[: HEADER.size]) for record in records}
    if len(heads) != 1 or len(head := heads.pop()) < HEADER.size or not head.startswith(tuple(MAGIC.values())):
        raise ValueError("these are no records of image tokens of one form")
    return HEADER.unpack(head)
