"""What the systems with a language model are: parts and stages with their parameters counted.

`photoblip models info SYSTEM`. Networks are built without their weights' memory.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, Qwen2VLConfig

from blipcore.models.qwen2_vl import Qwen2Vl
from blipcore.models.systems import SYSTEMS, Stage, System
from blipcore.models.vlm import Vlm
from blipcore.training.instruct import choose_trainable


def new_system(config: PreTrainedConfig) -> Vlm | Qwen2Vl:
    """A system of this shape, random."""
    return Qwen2Vl(config) if isinstance(config, Qwen2VLConfig) else Vlm(config)


def describe(name: str) -> dict | None:
    """A system as published: parameters a part, and what each stage trains; None for a name that is no system's."""
    system = SYSTEMS.get(name)
    if system is None:
        return None
    model = _network(system)
    config = model.config
    reads = {"image_size": config.image_size, "image_tokens": config.image_tokens} if isinstance(model, Vlm) else {}
    return {
        "system": name,
        "parameters": _counts(model),
        **reads,
        "start": system.start,
        "licence": system.licence,
        "hub": list(system.hub),
        "stages": [_stage(system, stage) for stage in system.stages],
    }


def _stage(system: System, stage: Stage) -> dict:
    model = _network(system)
    choose_trainable(model, stage)
    every, trained = _counts(model), _counts(model, trained=True)
    return {
        "stage": stage.name,
        "task": stage.task,
        "template": stage.template,
        "trained": trained,
        "frozen": {part: every[part] - trained[part] for part in every},
        "adapters": bool(stage.lora),
        "rate": stage.rate,
        "min_rate": stage.min_rate,
        "warmup": stage.warmup,
        "weight_decay": stage.weight_decay,
        "batch": stage.batch,
        "image_size": stage.image_size,
    }


def _network(system: System) -> Vlm | Qwen2Vl:
    with torch.device("meta"):
        return new_system(system.config())


def _counts(model: nn.Module, trained: bool = False) -> dict[str, int]:
    counts = {"vision": 0, "bridge": 0, "language": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained:
            counts[_part(name)] += parameter.numel()
    return counts


def _part(name: str) -> str:
    if name.startswith(("bridge.", "model.visual.merger.")):
        return "bridge"
    return "vision" if name.startswith(("vision_tower.", "model.visual.")) else "language"
