"""The three losses (section III.B, equations 1 to 3).

Shapes: N images of H x W pixels, h x w cells of the grid, C semantic classes, K thing classes.

Each is a mean over the places that count; where none do it is zero, and still connected to what was predicted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (equation 1), the logits being enlarged bilinearly to the labels.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) integers, 255 where nothing is known.
    """
    logits = enlarge(logits.float(), labels.shape[-2:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def attribute_loss(predicted: Tensor, distances: Tensor, things: Tensor) -> Tensor:
    """L1 (equation 2), mean over the four distances of all cells on things.

    Args:
        predicted, distances: (N, 4, h, w), in cells.
        things: (N, h, w) bool.
    """
    difference = (predicted - distances).abs() * things[:, None]
    return difference.sum() / (4 * things.sum()).clamp(min=1)


def probability_loss(logits: Tensor, central: Tensor, counted: Tensor, positive_weight: float) -> Tensor:
    """Binary cross-entropy (equation 3), weighted mean.

    Args:
        logits, central: (N, K, h, w); central is bool.
        counted: (N, h, w) bool, the cells that count.
        positive_weight: w_n where the target is 1; it is 1 elsewhere.
    """
    weight = torch.where(central, positive_weight, 1.0) * counted[:, None]
    loss = F.binary_cross_entropy_with_logits(logits.float(), central.float(), weight, reduction="sum")
    return loss / weight.sum().clamp(min=1)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), bilinear; the maps themselves if they have that size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
