"""Train a small language model on the words of captions: the language half of a system small enough for any machine.

A Llama (Touvron et al. 2023) of a few million weights with blip-mini's WordPiece vocabulary and the marks that the
systems' templates write (`vlm_checkpoint.marked_tokenizer`). It knows the language of captions and nothing else;
`assemble` then joins it to a vision tower. Writes a folder in the hub's format: OUT/model.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from blipcore.captioned import load_captioned
from blipcore.hub import find_model
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.transforms import IGNORE, clean_caption
from blipcore.vlm_checkpoint import marked_tokenizer


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: tuple[Path, ...]  # captioned data; FOLDER:SPLIT for one split of it
    held_out: float = 0.05  # the share of the captions that only measures
    width: int = 256
    layers: int = 6
    heads: int = 4
    max_length: int = 32
    rate: float = 1e-3
    min_rate: float = 5e-5
    warmup: int = 50
    batch_size: int = 128
    epochs: float = 3.0


class NextWord(nn.Module):
    """The causal language model's objective: [B, T] ids -> mean cross-entropy of the next token."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.model(**batch).loss}


def train(settings: Settings) -> dict:
    """Train and write OUT/model. -> {"perplexity": of the held-out captions, a token}."""
    s = settings
    tokenizer = marked_tokenizer(find_model("blip-mini") / "tokenizer.json")
    texts = list(dict.fromkeys(text for source in s.data for text in _texts(source)))
    order = np.random.default_rng(s.seed).permutation(len(texts))
    cut = max(1, round(s.held_out * len(texts)))
    held_out, learnt = ([texts[row] for row in rows] for rows in (order[:cut], order[cut:]))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=s.width,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            intermediate_size=4 * s.width,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

    def encode(text: str, _: np.random.Generator | None = None) -> list[int]:
        ids = tokenizer(clean_caption(text, s.max_length), add_special_tokens=False)["input_ids"]
        return [tokenizer.bos_token_id, *ids[: s.max_length], tokenizer.eos_token_id]

    def collate(rows: list[list[int]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORE),
        }

    def evaluate() -> dict:
        total, count = 0.0, 0
        for at in range(0, len(held_out), s.batch_size):
            batch = collate([encode(text) for text in held_out[at : at + s.batch_size]])
            tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
            moved = {name: value.to(model.device) for name, value in batch.items()}
            total, count = total + float(model(**moved).loss) * tokens, count + tokens
        return {"perplexity": round(float(np.exp(total / count)), 2)}

    figures = fit(NextWord(model), learnt, encode, collate, s, evaluate=evaluate)
    model.save_pretrained(s.out / "model")
    tokenizer.save_pretrained(s.out / "model")
    return figures


def _texts(source: Path) -> list[str]:
    folder, _, split = str(source).partition(":")
    return [text for texts in load_captioned(Path(folder), split or None).captions for text in texts]


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
