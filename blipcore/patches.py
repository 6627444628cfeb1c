"""An image's tokens as they are kept for matching: whole or merged, and as bytes.

Matching reads only the vision tower's tokens, so a photo whose tokens are kept is matched without its pixels. Merged
tokens are those of Bolya et al., "Token Merging: Your ViT But Faster", 2023 (facebookresearch/ToMe `tome/merge.py`),
applied once to the tower's output. Tokens are PyTorch's tensors, or arrays where a cold search does without it.
"""

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
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

    features: "Tensor | np.ndarray"
    sizes: "Tensor | np.ndarray | None" = None

    def take(self, rows: np.ndarray, device: "torch.device", dtype: "torch.dtype") -> "Patches":
        """These images' tokens, on a device and in a precision; sizes stay float32."""
        import torch

        rows = torch.from_numpy(np.asarray(rows)).to(self.features.device)
        sizes = None if self.sizes is None else self.sizes[rows].to(device)
        return Patches(self.features[rows].to(device, dtype), sizes)

    def as_tensors(self) -> "Patches":
        """These tokens where PyTorch can read them."""
        return Patches(_tensor(self.features), None if self.sizes is None else _tensor(self.sizes))


def merged(features: "Tensor", keep: int) -> Patches:
    """Merge like tokens [B, N, D] with each other until `keep` are left; the class token stays first, and by itself.

    Each round pairs every other token with its likest among those between, and merges the likest pairs.
    """
    import torch

    states, sizes = features.float(), torch.ones(features.shape[:2], device=features.device)
    while states.shape[1] > keep:
        states, sizes = _round(states, sizes, states.shape[1] - keep)
    return Patches(states.to(features.dtype), sizes)


def _round(states: "Tensor", sizes: "Tensor", surplus: int) -> "tuple[Tensor, Tensor]":
    """At most half of the tokens go in a round."""
    import torch
    import torch.nn.functional as F

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


def pack(features: "Tensor | np.ndarray", form: str) -> list[bytes]:
    """Image tokens [B, N, D] -> a record an image, in one of FORMS.

    int8 has a scale for each channel of each image: a few channels of a vision tower are far larger than the others.
    """
    dtype, keep = FORMS[form]
    whole = keep is None or keep >= features.shape[1]
    patches = Patches(features) if whole else merged(_tensor(features), keep)
    values, scales = _array(patches.features).astype(np.float32, copy=False), None
    if dtype is np.int8:
        scales = (np.abs(values).max(1, keepdims=True) / 127).astype(np.float16)
        scales = np.maximum(scales, np.finfo(np.float16).tiny)
        values = np.clip(np.rint(values / scales), -127, 127)
    parts = [values.astype(dtype)]
    parts += [] if scales is None else [scales]
    parts += [] if patches.sizes is None else [_array(patches.sizes).astype(np.uint16)]
    header = HEADER.pack(MAGIC[dtype], *values.shape[1:], patches.sizes is not None)
    return [b"".join([header, *(part[row].tobytes() for part in parts)]) for row in range(len(values))]


def _tensor(values: "Tensor | np.ndarray") -> "Tensor":
    import torch

    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def _array(values: "Tensor | np.ndarray") -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.float().cpu().numpy()


def unpack(records: Sequence[bytes | memoryview], dtype: "torch.dtype | None" = None) -> Patches:
    """Records of one form -> the tokens of all images, in `dtype` (float32). Raises ValueError for what `pack` did not
    write."""
    import torch

    values, scales, sizes = _read(records)
    features = torch.from_numpy(values).to(dtype or torch.float32)
    if scales is not None:
        features *= torch.from_numpy(scales).to(features.dtype)
    return Patches(features, None if sizes is None else torch.from_numpy(sizes))


def unpack_arrays(records: Sequence[bytes | memoryview]) -> Patches:
    """As `unpack`, float32 arrays for what runs in NumPy."""
    values, scales, sizes = _read(records)
    features = values.astype(np.float32)
    if scales is not None:
        features *= scales
    return Patches(features, sizes)


def _read(records: Sequence[bytes | memoryview]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """-> (values [I, N, D] as they were kept, int8's float16 scales [I, 1, D], merged ones' float32 sizes [I, N])."""
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
    scales = np.ascontiguousarray(rows["scales"]) if number is np.int8 else None
    sizes = rows["sizes"].astype(np.float32) if is_merged else None
    return np.ascontiguousarray(rows["values"]), scales, sizes


def _header(records: Sequence[bytes | memoryview]) -> tuple[bytes, int, int, int]:
    heads = {bytes(record[: HEADER.size]) for record in records}
    if len(heads) != 1 or len(head := heads.pop()) < HEADER.size or not head.startswith(tuple(MAGIC.values())):
        raise ValueError("these are no records of image tokens of one form")
    return HEADER.unpack(head)
