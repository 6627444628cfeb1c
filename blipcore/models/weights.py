"""Weights before they are learnt or loaded: drawn at random, left out for a checkpoint to bring, given our names."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def draw_weights(network: nn.Module, std: float = 0.02) -> None:
    """Matrices and embeddings normal with deviation `std` (BERT's), padding's embedding and the biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have shapes and no weights: `load_state_dict(..., assign=True)` brings them."""
    with torch.device("meta"), _DrawNothing():
        yield


class _DrawNothing(TorchFunctionMode):
    """Random draws into tensors that hold nothing import PyTorch's compiler, which takes longer than loading."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return None
        return function(*args, **(kwargs or {}))


# -- other people's names -------------------------------------------------------------------------------------


def renamed(name: str, keys: Mapping[str, str]) -> str:
    """A weight's name after the first of the patterns that fits; its own where none does."""
    for pattern, ours in keys.items():
        changed, count = re.subn(pattern, ours, name)
        if count:
            return changed
    return name


def fold_biases(state: dict[str, Tensor]) -> None:
    """EVA's q_bias and v_bias, which it has none of for keys, become one `qkv.bias`, zero for the keys; in place."""
    for name in [name for name in state if name.endswith(".q_bias")]:
        query, value = state.pop(name), state.pop(name.replace(".q_bias", ".v_bias"))
        state[name.replace(".q_bias", ".qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
