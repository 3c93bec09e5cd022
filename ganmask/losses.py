"""The adversarial losses of generator and discriminators (Eqs. 2 to 6).

Shapes: R foreground RoIs. All losses are 0, and part of the graph, when R is 0.
"""

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor
from torch.nn import functional as F

from projects.errors import ConfigError

from .discriminators import Judgement


def box_generator_loss(fake_scores: Tensor) -> Tensor:
    """L_adv^G_b (Eq. 4): the mean of -log D_b(fake), from logits (R,)."""
    return _mean_cross_entropy(fake_scores, 1.0)


def box_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """L_adv^D_b (Eq. 5): the mean of -log D_b(real) - log(1 - D_b(fake)), from logits (R,)."""
    return _mean_cross_entropy(real_scores, 1.0) + _mean_cross_entropy(fake_scores, 0.0)


def mask_distance(real_features: list[Tensor], fake_features: list[Tensor], scales: list[float]) -> Tensor:
    """L_adv^G_m = -L_adv^D_m (Eq. 6): the L1 distance of the concatenated features of D_m, each multiplied with its scale.

    The mean over all elements; Eq. 6 takes the sum over the elements of a RoI (226,688 with five layers and C = 256).

    Args:
        real_features, fake_features: the masked input of D_m and the output of each layer, (R, C_l, H_l, W_l).
        scales: one for each of them.
    """
    total = sum(
        scale * F.l1_loss(fake, real, reduction="sum")
        for scale, fake, real in zip(scales, fake_features, real_features, strict=True)
    )
    return total / max(sum(features.numel() for features in real_features), 1)


def _mean_cross_entropy(scores: Tensor, target: float) -> Tensor:
    total = F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target), reduction="sum")
    return total / max(len(scores), 1)


class AdversarialLosses:
    """The losses of both players by name, weighted, from a :class:`Judgement`."""

    @configurable
    def __init__(self, *, box_weight: float, mask_weight: float, scales: list[float], layers: int):
        """
        Args:
            box_weight, mask_weight: factors of the box's and of the mask's losses, on both players.
            scales: of the features in :func:`mask_distance`, ``layers`` + 1 of them.
        """
        if len(scales) != layers + 1:
            raise ConfigError(
                f"MODEL.GANMASK.FEATURE_SCALES has {len(scales)} numbers: expected {layers + 1}, for the input and the "
                f"{layers} layers of the mask discriminator."
            )
        self.box_weight, self.mask_weight, self.scales = box_weight, mask_weight, list(scales)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        ganmask = cfg.MODEL.GANMASK
        return {
            "box_weight": ganmask.BOX_WEIGHT,
            "mask_weight": ganmask.MASK_WEIGHT,
            "scales": ganmask.FEATURE_SCALES,
            "layers": ganmask.DISCRIMINATOR_LAYERS,
        }

    def generator(self, judgement: Judgement) -> dict[str, Tensor]:
        """What Eq. 2 adds to Mask R-CNN's losses."""
        distance = mask_distance(judgement.real_features, judgement.fake_features, self.scales)
        return {
            "loss_adv_box": self.box_weight * box_generator_loss(judgement.fake_scores),
            "loss_adv_mask": self.mask_weight * distance,
        }

    def discriminator(self, judgement: Judgement) -> dict[str, Tensor]:
        """Eq. 3."""
        distance = mask_distance(judgement.real_features, judgement.fake_features, self.scales)
        return {
            "loss_disc_box": self.box_weight * box_discriminator_loss(judgement.real_scores, judgement.fake_scores),
            "loss_disc_mask": -self.mask_weight * distance,
        }
