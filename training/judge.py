"""A trained model as inference uses it: calibrated logits of a tile, and how far it is from what the model has learnt.

The distance is that of Mahalanobis from the features of the tile, the input of the model's last layer, to the nearest
class of the training tiles (Lee et al., "A simple unified framework for detecting out-of-distribution samples and
adversarial attacks", 2018): classes are taken for normal distributions with means of their own and one covariance. A
picture of something else is far from all of them even where the model is sure of its class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.models import take_head

LEAST_VARIANCE, LEAST_SHARE = 1e-12, 1e-6
"""What keeps a covariance invertible where tiles of a class are all alike: its least mean variance, and the least share
of the identity in it."""


@dataclass(frozen=True)
class Reference:
    """Where training tiles lie in the space of features; float32, fitted by :func:`fit_reference`."""

    centre: Tensor  # [features]
    whitening: Tensor  # [features, features]; makes one unit in any direction of (features - centre) one deviation
    means: Tensor  # [classes with tiles, features], whitened


class Judge(nn.Module):
    """``model`` without its last layer (:func:`take_head` takes it), that layer, and what is known of confidence.

    Called with normalised float ``[B, channels, size, size]`` it returns logits over the temperature, float32
    ``[B, classes]``, and distances float32 ``[B]``, which are 0 where there is no ``reference``.
    """

    centre: Tensor
    whitening: Tensor
    means: Tensor | None

    def __init__(self, model: nn.Module, temperature: float = 1.0, reference: Reference | None = None) -> None:
        super().__init__()
        self.head = take_head(model)
        self.body = model
        self.temperature = temperature
        self.refer_to(reference)

    def refer_to(self, reference: Reference | None) -> None:
        """Measure distances from ``reference`` from now on."""
        device = next(self.head.parameters()).device
        for name in ("centre", "whitening", "means"):
            self.register_buffer(name, getattr(reference, name).to(device) if reference else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and distances."""
        features = self.body(x)
        logits = self.head(features).float() / self.temperature
        if self.means is None:
            return logits, logits.new_zeros(len(logits))
        with torch.autocast(x.device.type, enabled=False):
            place = (features.float() - self.centre) @ self.whitening
            return logits, _nearest(place, self.means)


def _nearest(place: Tensor, means: Tensor) -> Tensor:
    """The distance of each of ``place`` ``[B, features]`` to the nearest of ``means`` ``[classes, features]``."""
    squares = place.square().sum(1)[:, None] - 2 * place @ means.T + means.square().sum(1)
    return squares.amin(1).clamp(min=0).sqrt()


def fit_reference(features: Tensor, labels: Tensor) -> Reference:
    """The reference of training tiles with ``features`` ``[N, features]`` of classes ``labels`` int64 ``[N]``.

    The covariance within classes is shrunk towards a multiple of the identity, as much as is best for so many tiles
    (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004), so it can be
    inverted even where tiles are fewer than features, or a feature never moves.
    """
    wide = features.double()
    classes, place = torch.unique(labels, return_inverse=True)
    counts = torch.bincount(place).double()
    means = torch.zeros(len(classes), wide.shape[1], dtype=wide.dtype).index_add_(0, place, wide) / counts[:, None]
    within = wide - means[place]
    tiles, count = within.shape
    sample = within.T @ within / tiles
    level = sample.diagonal().mean().clamp(min=LEAST_VARIANCE)
    spread = (sample - level * torch.eye(count)).square().sum()
    error = (within.square().sum(1).square().mean() - sample.square().sum()) / tiles
    share = (error / spread).nan_to_num(1).clamp(LEAST_SHARE, 1)
    covariance = (1 - share) * sample + share * level * torch.eye(count)
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    centre = wide.mean(0)
    return Reference(centre.float(), whitening.contiguous().float(), ((means - centre) @ whitening).float())
