"""BLIP's text tower, BERT with a cross-attention in each layer, as encoder and as decoder: plain modules.

Li et al. 2022, section 3.1; salesforce/BLIP `models/med.py`. The same functions and parameter names as transformers'
BlipTextModel and BlipTextLMHeadModel (tests compare them), which take seconds to import. `blipcore.models.text` runs
the same weights in faster arrangements.
Shapes: B texts of T tokens, N image tokens of width D, H width, h heads, d = H / h, V vocabulary.
"""

import torch
from torch import Tensor, nn

from blipcore.models.config import TextConfig
from blipcore.models.packed import linear_gelu
from blipcore.models.weights import draw_weights


class TextTower(nn.Module):
    """Embeddings and layers: transformers' BlipTextModel."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Layers(config)
        draw_weights(self, config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.LayerNorm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> Tensor:
        """Texts [B, T] -> hidden states [B, T, H].

        Args:
            attention_mask: [B, T], zero where there is padding.
            encoder_hidden_states: what the cross-attention reads, [B, N, D]; None: text alone.
            encoder_attention_mask: [B, N], zero where that is padding.
            causal: each token sees itself and what stands before it (the decoder).
        """
        allowed = attention_mask[:, None, None].bool()
        if causal:
            length = input_ids.shape[1]
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        read = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None].bool()
        return self.encoder(self.embeddings(input_ids), allowed, encoder_hidden_states, read)


class TextEmbeddings(nn.Module):
    """Words and positions, normed."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H]."""
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + positions))


class Layers(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, allowed: Tensor, read: Tensor | None, read_allowed: Tensor | None) -> Tensor:
        """As `Layer`."""
        for layer in self.layer:
            hidden = layer(hidden, allowed, read, read_allowed)
        return hidden


class Layer(nn.Module):
    """Self-attention, cross-attention where there is something to read, feed-forward."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if config.is_decoder:
            self.crossattention = Attention(config, config.encoder_hidden_size)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(self, hidden: Tensor, allowed: Tensor, read: Tensor | None, read_allowed: Tensor | None) -> Tensor:
        """[B, T, H], which pairs of tokens may see each other [B, 1, 1 or T, T], and what is read: -> [B, T, H]."""
        hidden = self.attention(hidden, hidden, allowed)
        if read is not None:
            hidden = self.crossattention(hidden, read, read_allowed)
        return self.output(self.intermediate(hidden), hidden)


class Attention(nn.Module):
    """Attention and its output, over the text itself or over what it reads, of width `source`."""

    def __init__(self, config: TextConfig, source: int):
        super().__init__()
        self.self = Heads(config, source)
        self.output = Output(config, config.hidden_size)

    def forward(self, hidden: Tensor, read: Tensor, allowed: Tensor | None = None) -> Tensor:
        """[B, T, H] and what is read [B, N, D] -> [B, T, H]."""
        return self.output(self.self(hidden, read, allowed), hidden)


class Heads(nn.Module):
    """softmax(q k^T / sqrt(d)) v in each head."""

    def __init__(self, config: TextConfig, source: int):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads do not divide a width of {config.hidden_size}")
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source, config.hidden_size)
        self.value = nn.Linear(source, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, read: Tensor, allowed: Tensor | None = None) -> Tensor:
        """[B, T, H] and [B, N, D] -> contexts [B, T, H]."""
        query, key, value = (self._split(x) for x in (self.query(hidden), self.key(read), self.value(read)))
        scores = query @ key.transpose(-1, -2) * self.attention_head_size**-0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return (self.dropout(scores.softmax(-1)) @ value).transpose(1, 2).flatten(2)

    def _split(self, states: Tensor) -> Tensor:
        """[B, T, H] -> [B, h, T, d]."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class Intermediate(nn.Module):
    """The feed-forward's wide half."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, 4 H]."""
        return linear_gelu(self.dense, hidden)


class Output(nn.Module):
    """Back to the width H, beside the residual, normed."""

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """[B, T, width] and [B, T, H] -> [B, T, H]."""
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


# -- the decoder ----------------------------------------------------------------------------------------------


class TextDecoder(nn.Module):
    """A text tower and the head that predicts words: transformers' BlipTextLMHeadModel."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.bert = TextTower(config)
        self.cls = WordHead(config)
        draw_weights(self.cls, config.initializer_range)
        tie_lm_head(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.bert.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits [B, T, V]; arguments as the tower's."""
        return self.cls(self.states(input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask))

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Causal states [B, T, H]; arguments as the tower's."""
        return self.bert(input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, causal=True)


class WordHead(nn.Module):
    """States -> logits over the vocabulary."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, V]."""
        return self.predictions(states)


class Predictions(nn.Module):
    """A transform, then the word embeddings as a matrix."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, V]."""
        return self.decoder(self.transform(states))


class Transform(nn.Module):
    """Linear, GELU, norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        return self.LayerNorm(linear_gelu(self.dense, states))


def tie_lm_head(decoder: nn.Module) -> None:
    """The LM head's matrix is the word embedding; its two biases are one (as transformers ties them)."""
    head = decoder.cls.predictions
    head.decoder.weight = decoder.bert.embeddings.word_embeddings.weight
    head.decoder.bias = head.bias
