"""Tensors of all processes as one: with one process, the tensor itself.

With losses that are means over a process's own rows, and DistributedDataParallel's mean of the gradients, N processes
compute the gradient that one process computes on the joint batch: the gathered tensors carry gradients back to the
process they came from.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world() > 1 else 0


def launched_world() -> int:
    """How many processes were launched together: known before accelerate joins them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """[B, ...] of each process -> [world * B, ...], without gradients."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As `gather`; the gradient of every process's loss flows back to the rows' own process."""
    if world() == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


def shared_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Exponential noise that is the same on every process: the first one draws it."""
    noise = torch.empty(shape, device=device).exponential_()
    if world() > 1:
        dist.broadcast(noise, 0)
    return noise


@torch.no_grad()
def mean(tensor: Tensor) -> Tensor:
    """The mean over processes."""
    if world() == 1:
        return tensor
    total = tensor.detach().float().clone()
    dist.all_reduce(total)
    return total / world()


def share(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
