"""BLIP for questions: the question reads the image, the answer's decoder reads the question.

Li et al. 2022, section 4.3; salesforce/BLIP `models/blip_vqa.py`. Parameter names are those of transformers'
BlipForQuestionAnswering, whose own `generate` omits `[ENC]` and ignores the question's padding, so that an
answer depends on the batch it is asked in: here neither happens.
"""

import torch
from torch import Tensor, nn
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from blipcore.models.blip import SdpaAttention, starting_with


class BlipVqa(nn.Module):
    """Vision tower, question encoder, answer decoder; nothing is shared between the two text towers."""

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config = config
        self.vision_model = BlipVisionModel(config.vision_config)
        for layer in self.vision_model.encoder.layers:
            layer.self_attn = SdpaAttention(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(config.text_config)

    @torch.no_grad()
    def answer(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **generation) -> Tensor:
        """Pixels [B, 3, S, S] and questions [B, T] -> answer ids [B, L], `[DEC]` first; 3 beams as published."""
        text = self.config.text_config
        image_embeds = self.vision_model(pixel_values=pixel_values).last_hidden_state
        question = self.text_encoder(
            starting_with(text.vocab_size - 1, input_ids),
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
        ).last_hidden_state
        start = torch.full((len(input_ids), 1), text.bos_token_id, device=input_ids.device)
        options = {"num_beams": 3, "max_length": 10, "min_length": 1, "do_sample": False, **generation}
        return self.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=question,
            encoder_attention_mask=attention_mask,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            **options,
        )
