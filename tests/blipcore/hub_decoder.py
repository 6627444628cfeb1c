"""A text decoder's weights inside transformers' BlipTextLMHeadModel, whose `generate` ours is compared with."""

from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextLMHeadModel

from blipcore.models.text_tower import TextDecoder, tie_lm_head


class MaskedCrossAttention(BlipTextAttention):
    """Cross-attention that obeys its mask: transformers' takes one and does not hand it on (5.23)."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **_):
        """[A, L, H], additive mask [A, 1, L, T], what is read [A, T, H] -> ([A, L, H], attention weights)."""
        context, weights = self.self(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return self.output(context, hidden_states), weights


def hub_decoder(decoder: TextDecoder) -> nn.Module:
    """transformers' class over the decoder's own tensors, which are not copied."""
    config = BlipTextConfig(**decoder.config.to_dict())
    with no_init_weights():
        theirs = BlipTextLMHeadModel(config)
        for number, layer in enumerate(theirs.bert.encoder.layer):
            layer.crossattention = MaskedCrossAttention(config, is_cross_attention=True, layer_idx=number)
    theirs.load_state_dict(decoder.state_dict(), assign=True)
    tie_lm_head(theirs)
    return theirs.eval()
