"""What a student learns from a teacher: its image vectors, its similarities, its matching decisions.

Hinton et al. 2015 for the divergence, Park et al. 2019 for relations between photos, and for contrastive models
Yang et al. 2024 ("CLIP-KD") and Wu et al. 2023 ("TinyCLIP"). Gradients go to the student's side alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.blip import Blip
from blipcore.training.objectives import contrastive_loss, cosines, language_modelling_loss, sample_negatives

TERMS = ("features", "relations", "similarity", "matching", "itc", "itm", "lm")
FROM_PHOTOS = ("features", "relations")  # the terms that need no captions


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of the rows' softmaxes, [R, C] each; the mean over rows."""
    student, teacher = student_logits.float().log_softmax(1), teacher_logits.detach().float().log_softmax(1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def similarity_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """ITC's soft targets: the mean divergence of image-to-text and text-to-image.

    Args:
        student, teacher: cosines / temperature [B, B], images by texts, each with its own model's temperature.
    """
    return (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2


def feature_regression(student: Tensor, teacher: Tensor, mapping: nn.Module) -> Tensor:
    """Squared distance between the mapped student's vectors [B, E] and the teacher's [B, F]; the mean over B."""
    return (mapping(student).float() - teacher.detach().float()).square().sum(1).mean()


def relation_distillation(student: Tensor, teacher: Tensor, student_temp: Tensor, teacher_temp: Tensor) -> Tensor:
    """How a batch's photos resemble each other, as the teacher sees it: no text is needed.

    Args:
        student: unit vectors [B, E], teacher: [B, F]. Of a photo's similarities its own is left out.
    """
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)

    def others(feats: Tensor, temp: Tensor) -> Tensor:
        return (cosines(feats, feats) / temp)[~own].view(len(feats), -1)  # [B, B - 1]

    return divergence(others(student, student_temp), others(teacher, teacher_temp))


def matching_distillation(student_logits: Tensor, teacher_logits: Tensor, softness: float = 1.0) -> Tensor:
    """Divergence of ITM's logits [P, 2] on the same pairs, both divided by `softness` (Hinton's temperature T).

    Multiplied by T squared, so that the gradient's size does not depend on it.
    """
    return divergence(student_logits / softness, teacher_logits / softness) * softness**2


def matching_logits(
    model: Blip, image_embeds: Tensor, ids: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]
) -> Tensor:
    """ITM logits [3B, 2]: B matches, B (negative image, text), B (image, negative text), as `matching_loss` reads.

    Args:
        image_embeds: [B, N, D]; ids, mask: [B, T]. negatives: (image for each text, text for each image), both [B].
    """
    image_for_text, text_for_image = negatives
    images = torch.cat([image_embeds, image_embeds[image_for_text], image_embeds])
    ids, mask = torch.cat([ids, ids, ids[text_for_image]]), torch.cat([mask, mask, mask[text_for_image]])
    return model.match(images, ids, mask).float()


class Distillation(nn.Module):
    """A student beside a frozen teacher; the terms are weighed and summed.

    A batch is {"pixels": normalised [B, 3, S, S], "teacher_pixels": [B, 3, S', S']} and, where at least two of its
    photos have a caption, {"captioned": their rows [C], "input_ids", "attention_mask": [C, T], "teacher_ids",
    "teacher_mask": [C, T']}. Each process stands for itself: similarities are those of its own batch.

    Args:
        weights: a weight for some of TERMS; a term without one is not computed.
    """

    def __init__(self, model: Blip, teacher: Blip, weights: dict[str, float]):
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if not self.weights or set(self.weights) - set(TERMS):
            raise ValueError(f"distillation needs a weight for some of {', '.join(TERMS)}")
        self.model = model
        self.mapping = nn.Linear(model.config.image_text_hidden_size, teacher.config.image_text_hidden_size)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: no part of the checkpoint

    def teacher(self, device: torch.device) -> Blip:
        """The teacher, on the batch's device."""
        (teacher,) = self._teacher
        return teacher if teacher.device == device else teacher.to(device)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> {"loss", and each term that was computed}."""
        self.model.clamp_temperature()
        teacher = self.teacher(batch["pixels"].device)
        tokens = self.model.encode_images(batch["pixels"])
        with torch.no_grad():
            teacher_tokens = teacher.encode_images(batch["teacher_pixels"])
            teacher_feats = teacher.project_images(teacher_tokens)
        terms = self._photo_terms(self.model.project_images(tokens), teacher_feats, teacher.temp)
        if "input_ids" in batch and set(self.weights) - set(FROM_PHOTOS):
            rows = batch["captioned"]
            terms |= self._text_terms(teacher, tokens[rows], teacher_tokens[rows], batch)
        loss = sum(self.weights[name] * value for name, value in terms.items())
        if not torch.is_tensor(loss):  # no caption in this batch, and only terms that need them: a step of nothing
            loss = 0.0 * tokens.sum()
        return {"loss": loss, **terms}

    def _photo_terms(self, feats: Tensor, teacher_feats: Tensor, teacher_temp: Tensor) -> dict[str, Tensor]:
        terms = {}
        if "features" in self.weights:
            terms["features"] = feature_regression(feats, teacher_feats, self.mapping)
        if "relations" in self.weights and len(feats) > 1:
            terms["relations"] = relation_distillation(feats, teacher_feats, self.model.temp, teacher_temp)
        return terms

    def _text_terms(self, teacher: Blip, tokens: Tensor, teacher_tokens: Tensor, batch: dict) -> dict[str, Tensor]:
        """Terms of C photos with their captions; tokens [C, N, D] of the student and of the teacher."""
        model, text = self.model, (batch["input_ids"], batch["attention_mask"])
        with torch.no_grad():
            teacher_text = batch["teacher_ids"], batch["teacher_mask"]
            teacher_sims = similarities(teacher, teacher_tokens, teacher_text)
        same = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
        terms = {}
        if {"similarity", "itc"} & set(self.weights):
            images, texts = model.project_images(tokens), model.encode_texts(*text)
            if "similarity" in self.weights:
                terms["similarity"] = similarity_distillation(cosines(images, texts) / model.temp, teacher_sims)
            if "itc" in self.weights:
                terms["itc"] = contrastive_loss(images, texts, model.temp, same)
        if {"matching", "itm"} & set(self.weights):
            # what the teacher mistakes for a match is what there is to learn from it
            negatives = sample_negatives(teacher_sims.T, same), sample_negatives(teacher_sims, same)
            logits = matching_logits(model, tokens, *text, negatives)
            if "matching" in self.weights:
                with torch.no_grad():
                    wanted = matching_logits(teacher, teacher_tokens, *teacher_text, negatives)
                terms["matching"] = matching_distillation(logits, wanted)
            if "itm" in self.weights:
                labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
                labels[: len(tokens)] = 1
                terms["itm"] = F.cross_entropy(logits, labels)
        if "lm" in self.weights:
            terms["lm"] = language_modelling_loss(model, tokens, *text)
        return terms


def similarities(model: Blip, tokens: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """Cosines / temperature [B, B], images by texts, from image tokens [B, N, D] and (ids, mask) [B, T]."""
    return cosines(model.project_images(tokens), model.encode_texts(*text)) / model.temp
