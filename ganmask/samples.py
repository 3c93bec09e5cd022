"""What the generator hands to the discriminators, and how features are pooled for it (sections 3.2.1 and 3.2.2).

Shapes: N images, R foreground RoIs of all images in order, C channels, P bins on a side (28). Boxes are x0, y0, x1, y1 in
image pixels, where pixel i covers [i, i + 1).
"""

from functools import reduce
from typing import NamedTuple

import torch
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn

from projects.errors import ConfigError
from projects.layers import PrRoIPool
from projects.modeling.pooler import Pooler


class Samples(NamedTuple):
    """The foreground RoIs of a batch, as the generator predicts them (fake) and as they are (real). Zero RoIs are legal.

    Attributes:
        fake_boxes: (R, C, P, P), features inside the predicted boxes. Their gradient goes to the boxes' coordinates only.
        real_boxes: (R, C, P, P), features inside the ground-truth boxes. No gradient.
        fake_masks: (R, 1, P, P), predicted probabilities in [0, 1], on the grid of the proposal box. Gradient to the mask head.
        real_masks: (R, 1, P, P), the ground truth, 0 or 1, on the same grid. No gradient.
        features: (R, C, P, P), features inside the proposal boxes, which the masks are multiplied with. No gradient.
    """

    fake_boxes: Tensor
    real_boxes: Tensor
    fake_masks: Tensor
    real_masks: Tensor
    features: Tensor

    def detach(self) -> "Samples":
        """The same values, without the way back to the generator."""
        return Samples(*(tensor.detach() for tensor in self))


class SamplePooler(nn.Module):
    """PrRoIPool of a feature pyramid, with gradients to the boxes. It has no weights.

    Args:
        output_size: P.
        scales: feature pixels per image pixel of each level.
        levels: "max" pools every RoI from all levels and takes the maximum; "assign" pools it from the level of its size.
        aligned: see :func:`projects.layers.prroi_pool`.
    """

    def __init__(self, output_size: int, scales: list[float], levels: str = "max", aligned: bool = False):
        super().__init__()
        if levels not in ("max", "assign"):
            raise ConfigError(f"MODEL.GANMASK.LEVELS is '{levels}': expected 'max' or 'assign'.")
        self.levels = levels
        if levels == "assign":
            self.pooler = Pooler(output_size, scales, pooler_type="PrRoIPool", aligned=aligned)
        else:
            self.poolers = nn.ModuleList(PrRoIPool(output_size, scale, aligned) for scale in scales)

    def forward(self, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Feature maps (N, C, H_l, W_l) of each level, the boxes of each of the N images -> (R, C, P, P)."""
        if self.levels == "assign":
            return self.pooler(maps, boxes)
        rois = convert_boxes_to_pooler_format(boxes)
        return reduce(maximum, (pooler(features, rois) for pooler, features in zip(self.poolers, maps, strict=True)))

    def pool_repeated(self, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """The same for boxes without gradients, most of which come several times: each different one is pooled once."""
        different, rows, count = [], [], 0
        for own in boxes:
            found, inverse = own.tensor.unique(dim=0, return_inverse=True)
            different.append(Boxes(found))
            rows.append(inverse + count)
            count += len(found)
        return self(maps, different)[torch.cat(rows)]


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """Of equal shapes. torch.maximum would keep both of them for the backward pass, torch.where keeps its condition."""
    return torch.where(b > a, b, a) if a.requires_grad else torch.maximum(a, b)
