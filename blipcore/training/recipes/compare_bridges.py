"""Compare bridges: one vision tower, one language model, one budget, five ways to join them.

    photoblip train pretrain_language --data FLICKR8K:train --out LM
    photoblip train compare_bridges --language LM/model --data FLICKR8K --split train --dev dev --out DIR

Each bridge goes through LLaVA's two stages (Liu et al. 2023): `align` trains the bridge, `instruct` the bridge and the
language model, so many steps each, on the same samples in the same order. Then each captions the photos of `dev`.
DIR/bridges.json holds the figures, DIR/BRIDGE/instruct/model each trained system.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig

from blipcore.encoder import load_encoder
from blipcore.evaluation import captioning
from blipcore.hub import find_model
from blipcore.models.systems import SYSTEMS
from blipcore.models.vlm import VlmConfig
from blipcore.training import instruct
from blipcore.training.recipes.assemble import joined, read_language, read_tower
from blipcore.training.settings import as_script, run_and_print
from blipcore.transforms import Normalizer
from blipcore.vlm_checkpoint import LoadedVlm, make_reader, save_vlm

SYSTEM = "llava"
HEAD = 64  # width of an attention head in the bridges that have attention


@dataclass
class Settings:
    """One comparison."""

    language: str  # a folder with a language model and its tokenizer
    data: Path  # captioned photos
    out: Path
    vision: str = "blip-mini"
    split: str = "train"
    dev: str = "dev"  # the split that is captioned
    bridges: tuple[str, ...] = ("linear", "mlp", "concat", "qformer", "resampler")
    queries: int = 36  # of Q-Former and resampler; the resampler's are a square's
    qformer_layers: int = 4
    align_steps: int = 150
    instruct_steps: int = 250
    batch_size: int = 32
    align_rate: float = 2e-3
    instruct_rate: float = 5e-4
    photos: int = 500  # of `dev`; 0: all
    beams: int = 3
    seed: int = 0


def train(settings: Settings) -> list[dict]:
    """Train and measure each bridge. -> rows {"bridge", "tokens", "parameters", "cider", "bleu4", "loss", ...}."""
    s = settings
    rows = []
    for bridge in s.bridges:
        folder = s.out / bridge
        row = _shape(bridge, _start(s, bridge, folder / "start"))
        for stage, steps, rate, start in (
            ("align", s.align_steps, s.align_rate, folder / "start"),
            ("instruct", s.instruct_steps, s.instruct_rate, folder / "align" / "model"),
        ):
            if not (folder / stage / "model" / "config.json").exists():
                instruct.train_stage(_stage_settings(s, stage, steps, rate, start, folder / stage), (SYSTEM,))
            row |= _outcome(stage, folder / stage / "log.jsonl")
        encoder = load_encoder(str(folder / "instruct" / "model"))
        figures = captioning(s.data, s.dev, encoder, beams=s.beams, limit=s.photos or None)
        row |= {name: figures[name] for name in ("cider", "bleu4", "seconds", "photos")}
        row["captions"] = [photo["caption"] for photo in figures["per_photo"][:5]]
        rows.append(row)
        (s.out / "bridges.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _start(s: Settings, bridge: str, folder: Path) -> LoadedVlm:
    """Tower, language model and a new bridge, written as the folder of a system."""
    seeing = find_model(s.vision)
    tower, (language, tokenizer) = read_tower(seeing), read_language(find_model(s.language))
    width = language.config.hidden_size
    torch.manual_seed(s.seed)
    config = VlmConfig(
        system=SYSTEM,
        vision_config=tower.config,
        text_config=language.config,
        qformer_config=_qformer(s, width, tower.config.hidden_size) if bridge == "qformer" else None,
        bridge=bridge,
        queries=s.queries,
        bridge_heads=max(1, width // HEAD),
    )
    model = joined(config, tower, language)
    reader = make_reader(SYSTEMS[SYSTEM], config, tokenizer, None, Normalizer.of_folder(seeing))
    loaded = LoadedVlm(model, reader, SYSTEMS[SYSTEM])
    save_vlm(loaded, folder)
    return loaded


def _qformer(s: Settings, width: int, vision_width: int) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=s.qformer_layers,
        num_attention_heads=max(1, width // HEAD),
        intermediate_size=4 * width,
        encoder_hidden_size=vision_width,
    )


def _shape(bridge: str, loaded: LoadedVlm) -> dict:
    parameters = sum(p.numel() for p in loaded.model.bridge.parameters())
    return {"bridge": bridge, "tokens": loaded.model.config.image_tokens, "parameters": parameters}


def _stage_settings(s: Settings, stage: str, steps: int, rate: float, start: Path, out: Path) -> instruct.Settings:
    return instruct.Settings(
        start=str(start),
        stage=stage,
        data=s.data,
        split=s.split,
        out=out,
        steps=steps,
        batch_size=s.batch_size,
        rate=rate,
        min_rate=rate / 20,
        save_every=0,
        seed=s.seed,
    )


def _outcome(stage: str, log: Path) -> dict:
    """How a stage ended: the mean loss of its last three lines, and the seconds it took."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line][-3:]
    return {f"{stage}_loss": round(sum(losses) / len(losses), 3), f"{stage}_seconds": round(lines[-1]["seconds"])}


def main(arguments: list[str] | None = None) -> list[dict]:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
