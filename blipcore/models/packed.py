"""Linear layers whose weights lie as the processor's matrix kernels read them: for inference on a CPU.

oneDNN multiplies in blocks: a plain matrix is rearranged at every call, a packed one once. And it has float32 kernels
for every processor, where PyTorch's plain layers use MKL, which has the fast ones for Intel's alone. Measured on an AMD
EPYC, one core, 24 rows: bfloat16 1.3 times and float32 2.5 times faster than nn.Linear (docs/benchmarks/towers.md).
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLEARLY = 1.25  # times faster
CALLS, LONG = 6, 0.01  # to measure a way to multiply: calls, and seconds after which no more are made than two


class PackedLinear(nn.Module):
    """An nn.Linear that is no longer trained. It packs its weights when it is first used.

    From then on its `weight` is opaque, and `weight.to_dense()` the plain matrix.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self._plain(states) if self._needs_plain(states) else self._run(states, "none")

    def gelu(self, states: Tensor) -> Tensor:
        """gelu of what `forward` gives, in the same kernel."""
        return F.gelu(self._plain(states)) if self._needs_plain(states) else self._run(states, "gelu")

    def _run(self, states: Tensor, after: str) -> Tensor:
        weight = self.weight  # once: another thread may pack it meanwhile
        if not weight.is_mkldnn:
            weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight.detach()), requires_grad=False)
            self.weight = weight
        return torch.ops.mkldnn._linear_pointwise(states, weight, self.bias, after, [], "none")

    def _needs_plain(self, states: Tensor) -> bool:
        """The kernel has no backward, which heat maps ask for, and no other type than its weights'."""
        return states.requires_grad or states.dtype != self.weight.dtype

    def _plain(self, states: Tensor) -> Tensor:
        weight = self.weight
        return F.linear(states, weight.to_dense() if weight.is_mkldnn else weight, self.bias)


def linear_gelu(linear: nn.Module, states: Tensor) -> Tensor:
    """gelu(linear(states)), in one kernel where the layer is packed."""
    return linear.gelu(states) if isinstance(linear, PackedLinear) else F.gelu(linear(states))


def can_pack(weight: Tensor) -> bool:
    """Whether this processor has kernels for a matrix."""
    here = platform.machine().lower() in {"x86_64", "amd64"} and torch.backends.mkldnn.is_available()
    if not here or weight.device.type != "cpu":
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(network: nn.Module) -> None:
    """Have every linear layer of a network on the CPU packed, in place, where this processor has the kernels.

    The keys and values of a cross-attention stay plain: `models/text.py` multiplies by parts of their matrices.
    """
    crossing = [getattr(module, "crossattention", None) for module in network.modules()]
    reading = [crossed.self for crossed in crossing if hasattr(crossed, "self")]  # the Q-Former's is not read in parts
    plain = {id(part) for heads in reading for part in (heads.key, heads.value)}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and id(child) not in plain and can_pack(child.weight):
                setattr(module, name, PackedLinear(child))


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies bfloat16 clearly faster than float32: measured, in about ten milliseconds.

    Its flags do not say: some processors know the type and multiply it no faster, and some of PyTorch's ways to
    multiply it are slower than float32 on processors without it.
    """
    seconds = {}
    with torch.inference_mode(), _one_thread():
        for dtype in (torch.float32, torch.bfloat16):
            layer, states = nn.Linear(768, 768, dtype=dtype), torch.ones(64, 768, dtype=dtype)
            layer = PackedLinear(layer) if can_pack(layer.weight) else layer
            seconds[dtype] = _seconds(layer, states)
    return seconds[torch.bfloat16] * CLEARLY < seconds[torch.float32]


def _seconds(layer: nn.Module, states: Tensor) -> float:
    """The processor's own time for the quickest of some calls: what else runs on the machine hardly counts.

    The first call is not among them: it packs the weights and has the kernel written, and takes longer than the others.
    """
    exact = time.get_clock_info("thread_time").resolution < 1e-5  # Windows counts in sixtieths of a second
    now = time.thread_time if exact else time.perf_counter
    layer(states)
    found, began = [], now()
    while len(found) < 2 or (len(found) < CALLS and now() - began < LONG):
        started = now()
        layer(states)
        found.append(now() - started)
    return min(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
