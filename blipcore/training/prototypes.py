"""Class prototypes: what a classifier's rows know, taught to the text tower without one photo of the class.

A softmax classifier over features with a shared covariance S has rows w_c = S^-1 (mu_c - mu): so mu + S w_c is
where the features of class c lie (linear discriminant analysis; Hastie et al., "The Elements of Statistical
Learning", section 4.3). Features drawn around that point stand in for photos of the class, and "a photo of a
{class}" for their caption. A thousand ImageNet classes then have a place among the captions of a small data set.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATES = ("a photo of a {}", "a {}", "a picture of a {}", "a close up of a {}", "{}", "a {} in the photo")


class ClassPrototypes:
    """Draws (feature, caption) pairs for random classes.

    Args:
        rows: the classifier's matrix [C, D]; bias: [C].
        names: C class names.
        features: [n, D] class tokens of real photos, for the mean and covariance.
        spread: how far, in standard deviations of real photos, the drawn features scatter.
        strength: how many times S w_c a prototype stands off the mean. The photos' covariance mixes classes
            and the photos at hand hold few of them, so 1 is too timid: 2.5 gives prototypes that the classifier
            names as surely as real photos.
        shrinkage: of the covariance towards a multiple of the identity (Ledoit and Wolf 2004).
    """

    def __init__(
        self,
        rows: Tensor,
        bias: Tensor,
        names: list[str],
        features: np.ndarray,
        *,
        spread: float = 0.5,
        strength: float = 2.5,
        shrinkage: float = 0.3,
    ):
        features = torch.from_numpy(np.asarray(features, np.float32))
        self.rows, self.bias, self.names = rows.float(), bias.float(), names
        covariance = torch.cov(features.T)
        identity = torch.eye(len(covariance)) * covariance.diagonal().mean()
        covariance = (1 - shrinkage) * covariance + shrinkage * identity
        points = features.mean(0) + strength * self.rows @ covariance
        self.length = features.norm(dim=1).mean()  # the final norm keeps real features near one length
        self.points = self._rescaled(points)
        self.noise = torch.linalg.cholesky(covariance) * spread

    def _rescaled(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) * self.length

    def sample(self, count: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """-> (features [count, D], captions), `count` different classes."""
        classes = rng.choice(len(self.names), count, replace=False)
        noise = torch.from_numpy(rng.standard_normal((count, self.points.shape[1])).astype(np.float32))
        features = self._rescaled(self.points[classes] + noise @ self.noise.T)
        templates = rng.choice(TEMPLATES, count)
        texts = [str(t).format(self.names[c].lower()) for t, c in zip(templates, classes, strict=True)]
        return features, texts

    def top1(self) -> float:
        """How often the classifier itself names a prototype's own class: a check of the construction."""
        logits = self.points @ self.rows.T + self.bias
        return (logits.argmax(1) == torch.arange(len(self.names))).float().mean().item()

    def drift(self, class_tokens: Tensor, original: Tensor) -> Tensor:
        """KL between the classifier on the trained tower's class tokens and on the original ones, both [B, D].

        Keeps the features where the prototypes are, while the last blocks of the tower train.
        """
        now = F.log_softmax(class_tokens.float() @ self.rows.T + self.bias, dim=1)
        then = F.log_softmax(original.float() @ self.rows.T + self.bias, dim=1)
        return F.kl_div(now, then, log_target=True, reduction="batchmean")
