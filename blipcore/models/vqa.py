"""BLIP for questions: the question reads the image, the answer's decoder reads the question.

Li et al. 2022, section 4.3; salesforce/BLIP `models/blip_vqa.py`. Parameter names are those of transformers'
BlipForQuestionAnswering, which omits `[ENC]`, and whose decoder reads the question's padding (its `generate` gives
no mask, its cross-attention drops the one it gets), so that an answer depends on the batch: here neither happens.
Shapes: B questions of T tokens, A answers of L tokens, H text width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.configuration_blip import BlipConfig, BlipTextConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextLMHeadModel, BlipTextModel

from blipcore.models.blip import Blip, SdpaAttention, starting_with, tie_lm_head

LABEL_SMOOTHING = 0.1  # a constant of BLIP's decoder: the hub's configurations say 0


class MaskedCrossAttention(BlipTextAttention):
    """Cross-attention that obeys its mask: transformers' takes one and does not hand it on (5.23)."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **_):
        """[A, L, H], additive mask [A, 1, L, T], question states [A, T, H] -> ([A, L, H], attention weights)."""
        context, weights = self.self(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return self.output(context, hidden_states), weights


class BlipVqa(nn.Module):
    """Vision tower, question encoder, answer decoder; nothing is shared between the two text towers."""

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config = config
        self.vision_model = BlipVisionModel(config.vision_config)
        for layer in self.vision_model.encoder.layers:
            layer.self_attn = SdpaAttention(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(_reading_text(config.text_config))
        for number, layer in enumerate(self.text_decoder.bert.encoder.layer):
            masked = MaskedCrossAttention(self.text_decoder.config, is_cross_attention=True, layer_idx=number)
            masked.load_state_dict(layer.crossattention.state_dict())
            layer.crossattention = masked
        tie_lm_head(self.text_decoder)

    def start_from(self, retrieval: Blip, captioner: Blip) -> None:
        """Copy pretrained towers in: image and question from `retrieval`, the answer's decoder from `captioner`.

        Weights of another shape stay as they are, as in BLIP: where image and text differ in width, these are
        the keys and values of the decoder's cross-attention, which read the question in place of the image.
        """
        self.vision_model.load_state_dict(retrieval.vision_model.state_dict())
        self.text_encoder.load_state_dict(retrieval.text_encoder.state_dict())
        ours = self.text_decoder.state_dict()
        theirs = captioner.text_decoder.state_dict()
        fitting = {name: value for name, value in theirs.items() if value.shape == ours[name].shape}
        self.text_decoder.load_state_dict(fitting, strict=False)

    def read_question(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] and questions [B, T] -> question states [B, T, H]; `[ENC]` is put at position 0."""
        return self.text_encoder(
            starting_with(self.config.text_config.vocab_size - 1, input_ids),
            attention_mask=attention_mask,
            encoder_hidden_states=self.vision_model(pixel_values=pixel_values).last_hidden_state,
        ).last_hidden_state

    def loss(
        self,
        pixel_values: Tensor,
        question: tuple[Tensor, Tensor],
        answers: tuple[Tensor, Tensor],
        counts: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """The weighted sum of the answers' smoothed losses, over the number of questions.

        Args:
            question: (ids, mask), both [B, T]. answers: (ids, mask), both [A, L], question by question.
            counts: [B] int, how many of the answers are each question's; they sum to A.
            weights: [A], each answer's share among what people answered.
        """
        states = self.read_question(pixel_values, *question).repeat_interleave(counts, dim=0)
        question_mask = question[1].repeat_interleave(counts, dim=0)
        losses = self.answer_losses(states, question_mask, *answers, smoothing=LABEL_SMOOTHING)
        return (weights * losses).sum() / len(pixel_values)

    def answer_losses(
        self, states: Tensor, states_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, *, smoothing: float = 0.0
    ) -> Tensor:
        """Cross-entropy [A], summed over each answer's tokens after `[DEC]`; without smoothing, -log p(answer).

        Args:
            states, states_mask: [A, T, H] and [A, T], the question that each answer [A, L] answers.
        """
        hidden = self._decode(states, states_mask, answer_ids, answer_mask)[:, :-1]
        predicted = answer_mask[:, 1:].bool()
        logits = self.text_decoder.cls(hidden[predicted]).float()  # the vocabulary only where something is predicted
        targets = answer_ids[:, 1:][predicted]
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return losses.new_zeros(len(answer_ids)).index_add(0, predicted.nonzero()[:, 0], losses)

    def _decode(self, states: Tensor, states_mask: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The decoder's causal states [A, L, H], `[DEC]` at position 0."""
        return self.text_decoder.bert(
            starting_with(self.config.text_config.bos_token_id, input_ids),
            attention_mask=attention_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=states_mask,
            use_cache=False,
            is_decoder=True,
        ).last_hidden_state

    @torch.no_grad()
    def answer(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **generation) -> Tensor:
        """Pixels [B, 3, S, S] and questions [B, T] -> answer ids [B, L], `[DEC]` first; 3 beams as published."""
        text = self.config.text_config
        states = self.read_question(pixel_values, input_ids, attention_mask)
        start = torch.full((len(input_ids), 1), text.bos_token_id, device=input_ids.device)
        options = {"num_beams": 3, "max_length": 10, "min_length": 1, "do_sample": False, **generation}
        return self.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            **options,
        )

    @torch.no_grad()
    def rank_answers(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        k: int = 128,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Pixels [B, 3, S, S] and questions [B, T] -> [B], the index of the likeliest of A answers [A, L].

        The k answers whose first token is likeliest are scored whole. BLIP's own evaluation scores by the
        training loss, smoothing and all, which favours short answers: `smoothing=0.1` gives its figures.
        """
        states = self.read_question(pixel_values, input_ids, attention_mask)
        answers = (answer_ids, answer_mask)
        # each question is cut to its own tokens: no padding reaches the decoder, and memory is that of one question
        questions = [state[own] for state, own in zip(states, attention_mask.bool(), strict=True)]
        return torch.stack([self._likeliest(question, answers, k, smoothing) for question in questions])

    def _likeliest(self, question: Tensor, answers: tuple[Tensor, Tensor], k: int, smoothing: float) -> Tensor:
        """One question's states [T, H] -> the index of its answer."""
        ids, mask = answers
        first = self._first_logits(question)[ids[:, 1]]
        best = first.argsort(descending=True, stable=True)[:k]
        states = question.expand(len(best), -1, -1)
        ones = mask.new_ones(states.shape[:2])
        return best[self.answer_losses(states, ones, ids[best], mask[best], smoothing=smoothing).argmin()]

    def _first_logits(self, question: Tensor) -> Tensor:
        """One question's states [T, H] -> logits [V] of the token after `[DEC]`."""
        start = torch.full((1, 1), self.config.text_config.bos_token_id, device=question.device)
        whole = torch.ones(1, len(question), dtype=torch.long, device=question.device)
        return self.text_decoder.cls(self._decode(question[None], whole, start, torch.ones_like(start)))[0, 0].float()


def _reading_text(config: BlipTextConfig) -> BlipTextConfig:
    """The decoder's configuration: its cross-attention reads question states, which are of the text's width."""
    config = copy.deepcopy(config)
    config.encoder_hidden_size = config.hidden_size
    return config
