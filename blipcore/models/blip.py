"""BLIP: a vision tower and one text tower used three ways (ITC, ITM, LM).

Li et al., "BLIP: Bootstrapping Language-Image Pre-training", 2022; salesforce/BLIP `models/blip_pretrain.py`.
Shapes: B pairs, N image tokens (class token first), D vision width, T text tokens, H text width, E = 256.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.config import BlipConfig
from blipcore.models.text_tower import TextDecoder, TextTower, tie_lm_head
from blipcore.models.vision_tower import VisionTower

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


def starting_with(token_id: int, input_ids: Tensor) -> Tensor:
    """A copy of ids [B, T] with another token at position 0: the caller's ids serve the other uses too."""
    replaced = input_ids.clone()
    replaced[:, 0] = token_id
    return replaced


class Blip(nn.Module):
    """Vision tower, text encoder (ITC and ITM) and text decoder (LM), shared as BLIP's pretraining shares them.

    Args:
        config: as the hub's BLIP checkpoints carry it.
        retrieval: build the text encoder, the projections and the ITM head.
        captioning: build the text decoder.
        tied: encoder and decoder share everything but self-attention (BLIP's pretraining ties; the published
            retrieval and captioning fine-tunes are two networks, so they are not tied).

    Parameter names are those of transformers' BlipForImageTextRetrieval and BlipForConditionalGeneration.
    """

    def __init__(self, config: BlipConfig, *, retrieval: bool = True, captioning: bool = True, tied: bool = True):
        super().__init__()
        self.config = config
        text, vision = config.text_config, config.vision_config
        self.vision_model = VisionTower(vision)
        if retrieval:
            self.text_encoder = TextTower(text)
            self.vision_proj = nn.Linear(vision.hidden_size, config.image_text_hidden_size)
            self.text_proj = nn.Linear(text.hidden_size, config.image_text_hidden_size)
            self.itm_head = nn.Linear(text.hidden_size, 2)
            self.temp = nn.Parameter(torch.tensor(0.07))
        if captioning:
            self.text_decoder = TextDecoder(text)
        if retrieval and captioning and tied:
            self._share_text_weights()

    def _share_text_weights(self) -> None:
        """Embeddings, cross-attention and feed-forward are one; self-attention and the LM head are not."""
        encoder, decoder = self.text_encoder, self.text_decoder.bert
        decoder.embeddings = encoder.embeddings
        for ours, theirs in zip(decoder.encoder.layer, encoder.encoder.layer, strict=True):
            ours.crossattention = theirs.crossattention
            ours.intermediate = theirs.intermediate
            ours.output = theirs.output
        tie_lm_head(self.text_decoder)

    @property
    def device(self) -> torch.device:
        return self.vision_model.post_layernorm.weight.device

    @property
    def dec_token_id(self) -> int:
        """`[DEC]`: stands at position 0 of what the decoder writes."""
        return self.config.text_config.bos_token_id

    @property
    def enc_token_id(self) -> int:
        """`[ENC]`: stands at position 0 of what ITM reads; the last id of the vocabulary, after `[DEC]`."""
        return self.config.text_config.vocab_size - 1

    # -- images ---------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> image tokens [B, N, D], after the final norm."""
        return self.vision_model(pixel_values)

    def encode_until(self, pixel_values: Tensor, block: int) -> Tensor:
        """Pixels -> tokens [B, N, D] as they enter vision block number `block`: what a frozen prefix computes."""
        hidden = self.vision_model.embeddings(pixel_values)
        for layer in self.vision_model.encoder.layers[:block]:
            hidden = layer(hidden)
        return hidden

    def encode_from(self, hidden: Tensor, block: int) -> Tensor:
        """The rest of the vision tower: `encode_from(encode_until(x, b), b) == encode_images(x)`."""
        for layer in self.vision_model.encoder.layers[block:]:
            hidden = layer(hidden)
        return self.vision_model.post_layernorm(hidden)

    def project_images(self, image_embeds: Tensor) -> Tensor:
        """Image tokens [B, N, D] -> unit vectors [B, E] for ITC, from the class token."""
        return self.unit(self.vision_proj, image_embeds[:, 0])

    @staticmethod
    def unit(projection: nn.Linear, states: Tensor) -> Tensor:
        """States [B, H] -> unit vectors [B, E], float32."""
        # the length is taken in float32: cosines of bfloat16 vectors would tie where scores should differ
        return F.normalize(projection(states.to(projection.weight.dtype)).float(), dim=-1)

    # -- text, three ways -----------------------------------------------------------------------------------

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text alone, `[CLS]` first: [B, T] -> unit vectors [B, E] for ITC."""
        hidden = self.text_encoder(input_ids, attention_mask)
        return self.unit(self.text_proj, hidden[:, 0])

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ITM logits [B, 2] (mismatch, match) for B pairs of image tokens [B, N, D] and text [B, T].

        `[ENC]` is put at position 0, as BLIP's training and retrieval evaluation do (its demo and transformers
        forget it, and score differently).
        """
        hidden = self.text_encoder(starting_with(self.enc_token_id, input_ids), attention_mask, image_embeds)
        return self.itm_head(hidden[:, 0].to(self.itm_head.weight.dtype))

    def decode(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The decoder's causal states [B, T, H], with `[DEC]` at position 0."""
        return self.text_decoder.states(starting_with(self.dec_token_id, input_ids), attention_mask, image_embeds)

    def lm_logits(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Next-token logits [B, T, V] of the decoder."""
        return self.text_decoder.cls(self.decode(image_embeds, input_ids, attention_mask))

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the learned temperature in BLIP's range; called after each optimiser step."""
        self.temp.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
