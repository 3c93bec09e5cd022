"""RoI pooling from a feature pyramid, with this project's operators and with probability maps that travel along.

Shapes: N images, R RoIs of all images in order, C channels, P bins.
"""

import math

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn

from projects.layers import PrRoIPool, SgRoIAlign
from projects.layers.checks import is_channels_last, sum_dtype

POOLER_TYPES = ("SgRoIAlign", "PrRoIPool")


class Pooler(nn.Module):
    """Detectron2's ROIPooler for SgRoIAlign and PrRoIPool: each RoI is pooled from the level that fits its size.

    Called with boxes only, it takes the place of a ROIPooler: with "SgRoIAlign" its results are those of "ROIAlignV2".

    Args:
        output_size: bins per side, or (rows, columns).
        scales: feature pixels per image pixel of each level, halving from one to the next, e.g. (1/4, 1/8, 1/16, 1/32).
        sampling_ratio: see :func:`projects.layers.sg_roi_align`; PrRoIPool has no use for it.
        pooler_type: one of POOLER_TYPES.
        aligned: whether half a pixel is subtracted after scaling; None: as the operator does by default (SgRoIAlign does,
            like "ROIAlignV2"; PrRoIPool does not).
        canonical_box_size, canonical_level: a box of this size (square root of the area, image pixels) belongs on this
            level (stride 2 ** level); one of half the size one level below. Levels that are not there: the nearest.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: list[float],
        sampling_ratio: int = 0,
        pooler_type: str = "SgRoIAlign",
        canonical_box_size: float = 224,
        canonical_level: int = 4,
        aligned: bool | None = None,
    ):
        super().__init__()
        levels = [-math.log2(scale) for scale in scales]
        if not levels or levels != [round(levels[0]) + i for i in range(len(levels))] or levels[0] < 0:
            raise ValueError(f"scales must be powers of 1/2, each half of the one before, got {tuple(scales)}")
        settings = {} if aligned is None else {"aligned": aligned}
        if pooler_type == "SgRoIAlign":
            operators = [SgRoIAlign(output_size, scale, sampling_ratio, **settings) for scale in scales]
        elif pooler_type == "PrRoIPool":
            operators = [PrRoIPool(output_size, scale, **settings) for scale in scales]
        else:
            raise ValueError(f"pooler_type must be one of {POOLER_TYPES}, got {pooler_type!r}")
        self.level_poolers = nn.ModuleList(operators)
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.pooler_type = pooler_type
        self.min_level, self.max_level = int(levels[0]), int(levels[-1])
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(self, x: list[Tensor], box_lists: list[Boxes], probs: Tensor | None = None) -> Tensor:
        """Pool all boxes.

        Args:
            x: the levels' features, (N, C, H_l, W_l) each.
            box_lists: the boxes of each of the N images, image pixels.
            probs: (R, 1, Hp, Wp), the probability maps of the boxes in order ("SgRoIAlign" only), or None.

        Returns:
            (R, C, P, P). A box with a coordinate that is NaN gives zeros.
        """
        if len(x) != len(self.level_poolers):
            raise ValueError(f"expected features of {len(self.level_poolers)} levels, got {len(x)}")
        if len(box_lists) != len(x[0]):
            raise ValueError(
                f"expected boxes of {len(x[0])} images, as many as there are in the features, got {len(box_lists)}"
            )
        if probs is not None and self.pooler_type != "SgRoIAlign":
            raise ValueError(f"{self.pooler_type} takes no probability maps; SgRoIAlign does")
        if not box_lists:
            return x[0].new_zeros((0, x[0].shape[1], *self.output_size))
        rois = convert_boxes_to_pooler_format(box_lists)
        if probs is not None and len(probs) != len(rois):
            raise ValueError(f"expected a probability map for each of the {len(rois)} boxes, got {len(probs)}")
        if len(x) == 1:
            return self._pool(0, x[0], rois, probs)

        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        memory_format = torch.channels_last if is_channels_last(x[0]) else torch.contiguous_format
        size = (len(rois), x[0].shape[1], *self.output_size)
        output = torch.empty(size, dtype=x[0].dtype, device=x[0].device, memory_format=memory_format).zero_()
        # Levels without boxes are pooled too: every level stays part of the graph.
        for level, features in enumerate(x):
            chosen = torch.nonzero(levels == level).squeeze(1)
            pooled = self._pool(level, features, rois[chosen], None if probs is None else probs[chosen])
            output.index_put_((chosen,), pooled)
        return output

    def _pool(self, level: int, features: Tensor, rois: Tensor, probs: Tensor | None) -> Tensor:
        pooler = self.level_poolers[level]
        return pooler(features, rois) if probs is None else pooler(features, rois, probs)


class FastRoIAlign(SgRoIAlign):
    """SgRoIAlign without probability maps, called as Detectron2's ROIAlign is: with boxes of any type, also such that require a
    gradient (they get none)."""

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W), (R, 5) -> (R, C, rows, columns)."""
        return super().forward(features, rois.detach().to(sum_dtype(features)))


def replace_roi_align(model: nn.Module) -> int:
    """Replace every Detectron2 ``ROIAlign`` in a built model by :class:`FastRoIAlign`; return how many (MODEL.FAST_ROI_ALIGN).

    The results are the same within rounding, and the operator is faster. ROIAlign has no weights, so that checkpoints fit as
    before. (Detectron2's ROIPooler knows its own pooler types only, hence the exchange in the built model, which also
    reaches ROIAligns outside of a ROIPooler.)
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is ROIAlign:
                fast = FastRoIAlign(child.output_size, child.spatial_scale, child.sampling_ratio, child.aligned)
                setattr(parent, name, fast)
                replaced += 1
    return replaced
