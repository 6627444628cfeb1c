"""The Q-Former: learned queries that read an image, and words, through one BERT; on transformers' Blip2QFormerModel.

Li et al., "BLIP-2", 2023, section 3.1 and figure 2; salesforce/LAVIS `models/blip2_models/Qformer.py`. Queries and
words share the self-attention, each has its own feed-forward, and only queries cross-attend to the image. What may see
what is the paper's three masks, here three ways to run it:

    uni-modal (ITC)             `query_states`, and `text_states`: neither sees the other
    bidirectional (ITM)         `joint_states`: everything sees everything
    multimodal causal (ITG)     `decode`: words see the queries and the words before them, queries see no word

Shapes: B images, N image tokens of width D, Q queries, T words, H width, L layers.
"""

import torch
from torch import Tensor
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel


class QFormer(Blip2QFormerModel):
    """transformers' Q-Former, under the same parameter names. Queries and words come embedded, before the norm."""

    def query_states(self, queries: Tensor, image_embeds: Tensor) -> list[Tensor]:
        """Queries [B, Q, H] read image tokens [B, N, D]. -> L + 1 of [B, Q, H]: what enters each layer, and the end."""
        dtype = self.layernorm.weight.dtype
        image_embeds = image_embeds.to(dtype)
        states = [self.dropout(self.layernorm(queries.to(dtype)))]
        for layer in self.encoder.layer:
            states.append(layer(states[-1], None, image_embeds, query_length=queries.shape[1]))
        return states

    def text_states(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """Words alone [B, T, H] -> [B, T, H]."""
        return self(query_embeds=words, query_length=0, attention_mask=attention_mask).last_hidden_state

    def joint_states(self, queries: Tensor, words: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Queries [B, Q, H] and words [B, T, H] see each other, queries the image. -> the queries' end [B, Q, H]."""
        count = queries.shape[1]
        states = self(
            query_embeds=torch.cat([queries, words.to(queries.dtype)], 1),
            query_length=count,
            attention_mask=torch.cat([attention_mask.new_ones(len(words), count), attention_mask], 1),
            encoder_hidden_states=image_embeds,
        ).last_hidden_state
        return states[:, :count]

    def decode(self, words: Tensor, attention_mask: Tensor, query_states: list[Tensor]) -> Tensor:
        """Words [B, T, H] after the queries that `query_states` gave -> causal states [B, T, H].

        The queries see no word, so an image's are computed once for all that is written about it: LAVIS caches their
        keys and values, here they are kept themselves.
        """
        hidden = self.dropout(self.layernorm(words))
        mask = _causal(attention_mask, query_states[0].shape[1], hidden.dtype)
        for layer, queries in zip(self.encoder.layer, query_states[:-1], strict=True):
            seen = torch.cat([queries.to(hidden.dtype), hidden], 1)
            context = layer.attention(hidden, encoder_hidden_states=seen, encoder_attention_mask=mask)
            hidden = layer.feed_forward_chunk(context)
        return hidden


def _causal(attention_mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Padding [B, T] -> what is added to the scores [B, 1, T, Q + T] of words that follow the queries."""
    length = attention_mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    allowed = (attention_mask[:, None] != 0) & earlier
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
    return torch.nn.functional.pad(mask, (queries, 0))[:, None]
