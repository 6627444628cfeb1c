"""Run in a virtual environment with salesforce-lavis: the losses of its BLIP-2 first stage, of given weights.

    python lavis_stage_one.py INPUTS.safetensors

Prints {"itc", "itm", "itg"}. LAVIS's packages import much that has nothing to do with this (data sets, decoders of
video): they are entered without running their `__init__`, and what is not installed is replaced by nothing.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

NOT_RUN = ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models")
NOT_NEEDED = ("timm", "fairscale", "iopath", "omegaconf", "pandas", "lavis.common.utils", "lavis.common.logger",
              "lavis.models.eva_vit", "lavis.models.clip_vit")  # fmt: skip
PAD, DEC = 0, 30522


class Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that nobody needs, and puts an object in their place that has every name."""

    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(f"{each}.") for each in NOT_NEEDED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module):
        pass


def stage_one():
    """LAVIS's Blip2Qformer class."""
    root = Path(importlib.util.find_spec("lavis").submodule_search_locations[0])
    for name in NOT_RUN:
        package = types.ModuleType(name)
        package.__path__ = [str(root.parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.meta_path.insert(0, Nothing())
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
    from lavis.models.blip2_models.blip2_qformer import Blip2Qformer

    return Blip2Qformer


class Words:
    """A tokenizer that gives what was tokenised before."""

    bos_token_id, pad_token_id = DEC, PAD

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor):
        self.input_ids, self.attention_mask = ids, mask

    def __call__(self, *_: object, **__: object) -> "Words":
        return self

    def to(self, _device: object) -> "Words":
        return self


def build(kind: type, given: dict[str, torch.Tensor]):
    """A Blip2Qformer with these weights, for image tokens in place of images."""
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

    weights = {name.removeprefix("weight."): value for name, value in given.items() if name.startswith("weight.")}
    width, queries = weights["query_tokens"].shape[2], weights["query_tokens"].shape[1]
    layers = 1 + max(int(name.split("layer.")[1].split(".")[0]) for name in weights if "encoder.layer." in name)
    config = BertConfig(
        vocab_size=DEC + 1, hidden_size=width, num_hidden_layers=layers, num_attention_heads=int(given["heads"]),
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.encoder_width, config.add_cross_attention, config.cross_attention_freq = given["tokens"].shape[2], True, 2
    config.query_length = queries
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision = nn.Identity(), nn.Identity()
    model.Qformer = BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(torch.empty(1, queries, width))
    model.vision_proj, model.text_proj = (nn.Linear(width, weights["vision_proj.weight"].shape[0]) for _ in range(2))
    model.itm_head, model.temp = nn.Linear(width, 2), nn.Parameter(torch.tensor(0.0))
    model.tokenizer, model.max_txt_len = Words(given["input_ids"], given["attention_mask"]), given["input_ids"].shape[1]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if "position_ids" not in name and "cls.predictions.decoder" not in name]
    if missing or unexpected:
        raise SystemExit(f"weights that do not fit: {missing}, {unexpected}")
    model.Qformer.cls.predictions.decoder.weight = model.Qformer.bert.embeddings.word_embeddings.weight
    model.Qformer.cls.predictions.decoder.bias = model.Qformer.cls.predictions.bias
    return model.eval()


def main() -> None:
    given, kind = load_file(sys.argv[1]), stage_one()
    model = build(kind, given)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.multinomial = lambda weights, _count: weights.argmax().reshape(1)  # the hardest negative, not a drawn one
    with torch.no_grad():
        losses = model({"image": given["tokens"], "text_input": None})
    print(json.dumps({"itc": float(losses.loss_itc), "itm": float(losses.loss_itm), "itg": float(losses.loss_lm)}))


if __name__ == "__main__":
    main()
