"""BLIP-2's first stage: a frozen vision tower and a Q-Former that embeds (ITC), matches (ITM) and writes (ITG).

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
2023, section 3.1; salesforce/LAVIS `models/blip2_models/blip2_qformer.py`.
Shapes: B images, N image tokens of width D (the class token first), Q = 32 queries, T texts of L tokens, P pairs, H
Q-Former width, E = 256.
"""

import torch
from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextOnlyMLMHead
from transformers.models.blip_2.configuration_blip_2 import Blip2Config
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings, Blip2VisionModel

from blipcore.models.blip import Blip, starting_with
from blipcore.models.qformer import QFormer

DEC_TOKEN_ID = 30522  # `[DEC]`, the one id that BLIP-2 adds after bert-base-uncased's
VOCAB_SIZE = DEC_TOKEN_ID + 1
VISION_NORM_EPS = 1e-5  # LAVIS's ln_vision; transformers takes the tower's 1e-6


class Blip2(nn.Module):
    """Vision tower, Q-Former, and a head for each objective.

    Args:
        config: transformers' Blip2Config; the hub's blip2-itm checkpoints carry one. Its language model is not built,
            and its `image_token_index` is not read: texts come without image tokens.
        captioning: build the head that writes (ITG); the hub's checkpoints have none.

    Parameter names are those of transformers' Blip2ForImageTextRetrieval; `ln_vision` is `vision_model.post_layernorm`
    there. `cls` and `temp` are ours.
    """

    def __init__(self, config: Blip2Config, *, captioning: bool = True):
        super().__init__()
        self.config = config
        qformer, width = config.qformer_config, config.qformer_config.hidden_size
        self.vision_model = Blip2VisionModel(config.vision_config)
        self.vision_model.post_layernorm.eps = VISION_NORM_EPS
        # zeros, as transformers has them, would stay 32 copies of one query for ever
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width).normal_(0, 0.02))
        self.embeddings = Blip2TextEmbeddings(qformer)
        self.qformer = QFormer(qformer)
        self.vision_projection = nn.Linear(width, config.image_text_hidden_size)
        self.text_projection = nn.Linear(width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.embeddings.apply(_start)
        if captioning:
            self.cls = BlipTextOnlyMLMHead(qformer)
            self.cls.apply(_start)
            head = self.cls.predictions
            head.decoder.weight, head.decoder.bias = self.embeddings.word_embeddings.weight, head.bias

    @property
    def device(self) -> torch.device:
        return self.query_tokens.device

    def train_vision(self, train: bool = True) -> None:
        """Let the vision tower learn, or freeze it; its last norm learns either way, as the paper has it."""
        self.vision_model.requires_grad_(train)
        self.vision_model.post_layernorm.requires_grad_(True)

    # -- images ---------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> image tokens [B, N, D], after `ln_vision`."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state

    def query_states(self, image_embeds: Tensor) -> list[Tensor]:
        """Image tokens [B, N, D] -> the queries [B, Q, H] as they enter each layer, and as they leave the last."""
        return self.qformer.query_states(self._queries(len(image_embeds)), image_embeds)

    def project_images(self, image_embeds: Tensor) -> Tensor:
        """Image tokens [B, N, D] -> Q unit vectors an image [B, Q, E] for ITC, float32."""
        return self.project_queries(self.query_states(image_embeds))

    def project_queries(self, query_states: list[Tensor]) -> Tensor:
        """As `project_images`, from what `query_states` gave."""
        return Blip.unit(self.vision_projection, query_states[-1])

    # -- text, three ways -----------------------------------------------------------------------------------

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text alone, `[CLS]` first: [T, L] -> unit vectors [T, E] for ITC, float32."""
        states = self.qformer.text_states(self.embeddings(input_ids), attention_mask)
        return Blip.unit(self.text_projection, states[:, 0])

    @staticmethod
    def similarity(image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """ITC: of [B, Q, E] and [T, E], the cosine of each text and its nearest query of each image, [T, B]."""
        with torch.autocast(image_vectors.device.type, enabled=False):  # bfloat16 would tie what should differ
            cosines = text_vectors.float() @ image_vectors.float().flatten(0, 1).T
        return cosines.unflatten(1, image_vectors.shape[:2]).amax(-1)

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ITM logits [P, 2] (mismatch, match) for image tokens [P, N, D] and texts [P, L], the mean over the queries.

        The text keeps its `[CLS]`: BLIP-2 has no `[ENC]`.
        """
        queries, words = self._queries(len(input_ids)), self.embeddings(input_ids)
        states = self.qformer.joint_states(queries, words, attention_mask, image_embeds)
        return self.itm_head(states.to(self.itm_head.weight.dtype)).mean(1)

    def decode(self, query_states: list[Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Causal states [B, L, H] of texts that follow the image's queries, with `[DEC]` at position 0."""
        words = self.embeddings(starting_with(DEC_TOKEN_ID, input_ids))
        return self.qformer.decode(words, attention_mask, query_states)

    def lm_logits(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Next-token logits [B, L, V] of ITG."""
        return self.cls(self.decode(self.query_states(image_embeds), input_ids, attention_mask))

    def _queries(self, count: int) -> Tensor:
        return self.query_tokens.expand(count, -1, -1)


def _start(module: nn.Module) -> None:
    """BERT's random start, for what transformers' own classes do not start."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.data.normal_(0, 0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# -- presets --------------------------------------------------------------------------------------------------


def blip2_config(
    *,
    vision: tuple[int, int, int],
    feed_forward: int,
    qformer: tuple[int, int, int],
    image_size: int,
    patch_size: int,
    dropout: float = 0.1,
) -> Blip2Config:
    """A BLIP-2 of the given (width, layers, heads) for tower and Q-Former; `feed_forward` is the tower's."""
    width, layers, heads = qformer
    return Blip2Config(
        vision_config={
            "hidden_size": vision[0],
            "num_hidden_layers": vision[1],
            "num_attention_heads": vision[2],
            "intermediate_size": feed_forward,
            "image_size": image_size,
            "patch_size": patch_size,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
        },
        qformer_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "use_qformer_text_input": True,
        },
    )


def blip2_mini() -> Blip2Config:
    """blip-mini's vision tower, frozen, and a Q-Former of the shape of blip-mini's text tower."""
    return blip2_config(vision=(192, 12, 3), feed_forward=768, qformer=(384, 6, 12), image_size=288, patch_size=16)


def blip2_vit_g() -> Blip2Config:
    """EVA-CLIP ViT-g/14 at 224, 39 of its 40 blocks, with BERT-base, as salesforce/LAVIS publishes it."""
    return blip2_config(vision=(1408, 39, 16), feed_forward=6144, qformer=(768, 12, 12), image_size=224, patch_size=14)


BLIP2_PRESETS = {"blip2-mini": blip2_mini, "blip2-vit-g": blip2_vit_g}
