"""BLIP for questions: the question reads the image, the answer's decoder reads the question.

Li et al. 2022, section 4.3; salesforce/BLIP `models/blip_vqa.py`. Parameter names are those of transformers'
BlipForQuestionAnswering, which omits `[ENC]`, and whose decoder reads the question's padding (its `generate` gives
no mask, its cross-attention drops the one it gets), so that an answer depends on the batch: here neither happens.
Shapes: B questions of T tokens, A answers of L tokens, H text width.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.blip import Blip, starting_with
from blipcore.models.config import BlipConfig, TextConfig
from blipcore.models.generation import Limits, beam_search
from blipcore.models.text_tower import TextDecoder, TextTower
from blipcore.models.vision_tower import VisionTower

LABEL_SMOOTHING = 0.1  # a constant of BLIP's decoder: the hub's configurations say 0


class BlipVqa(nn.Module):
    """Vision tower, question encoder, answer decoder; nothing is shared between the two text towers."""

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision_config)
        self.text_encoder = TextTower(config.text_config)
        self.text_decoder = TextDecoder(_reading_text(config.text_config))

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
        ids = starting_with(self.config.text_config.vocab_size - 1, input_ids)
        return self.text_encoder(ids, attention_mask, self.vision_model(pixel_values))

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
        ids = starting_with(self.config.text_config.bos_token_id, input_ids)
        return self.text_decoder.states(ids, attention_mask, states, states_mask)

    def answer(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, *, beams: int = 3, max_length: int = 10
    ) -> list[list[int]]:
        """Pixels [B, 3, S, S] and questions [B, T] -> the ids of an answer each; 3 beams as published."""
        with torch.no_grad():
            states = self.read_question(pixel_values, input_ids, attention_mask)
        start = torch.tensor([self.config.text_config.bos_token_id], device=input_ids.device)
        limits = Limits(max_length, min_length=1)
        written = beam_search(self.text_decoder, states, start, limits, beams=beams, sources_mask=attention_mask)
        return [texts[0] for texts in written]

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


def _reading_text(config: TextConfig) -> TextConfig:
    """The decoder's configuration: its cross-attention reads question states, which are of the text's width."""
    return replace(config, encoder_hidden_size=config.hidden_size)
