"""The keypoint branch (sections III-B and III-D): one heat map per contour point, and one for the centre.

Shapes: R RoIs of all images in order, K key points, C channels, P bins of the keypoint pooler (14), S the side of a heat map
(56; in fusion design d 28). Coordinates are image pixels.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.keypoint_head import (
    ROI_KEYPOINT_HEAD_REGISTRY,
    KRCNNConvDeconvUpsampleHead,
    keypoint_rcnn_loss,
)
from detectron2.structures import Instances, heatmaps_to_keypoints
from torch import Tensor

from projects.errors import ConfigError

from .contour import ContourSampler

DECODERS = ("argmax", "subpixel", "resize")


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class ContourPointHead(KRCNNConvDeconvUpsampleHead):
    """Mask R-CNN's keypoint head, with the same names of weights, whose heat maps are also handed to the fusion.

    3x3 convolutions with ReLU, a deconvolution to 2P, and bilinear upsampling to 4P.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_points: int, upsample: bool = True, decoder: str = "argmax", **kwargs):
        """
        Args:
            num_points: k, where the first k of the K key points are one closed contour, else 0.
            upsample: False stops at 2P (fusion design d).
            decoder: "argmax", "subpixel" or "resize" (:func:`decode`).
            kwargs: see Detectron2's head; ``loss_weight`` is alpha (equation 3).

        Raises:
            ConfigError: another decoder.
        """
        super().__init__(input_shape, **kwargs)
        if decoder not in DECODERS:
            raise ConfigError(f"MODEL.MASKPOINT.DECODER is '{decoder}': expected one of {', '.join(DECODERS)}.")
        self.num_points, self.decoder = num_points, decoder
        if not upsample:
            self.up_scale = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        arguments = super().from_config(cfg, input_shape)
        sampler = ContourSampler.from_config(cfg)
        return arguments | {
            "num_points": sampler.num_points if sampler.components == "largest" else 0,
            "num_keypoints": sampler.num_keypoints,
            "loss_normalizer": "visible",  # all points are
            "upsample": cfg.MODEL.MASKPOINT.FUSION_DESIGN != "d",
            "decoder": cfg.MODEL.MASKPOINT.DECODER,
        }

    def heatmaps(self, x: Tensor) -> Tensor:
        """Logits: (R, C, P, P) -> (R, K, S, S)."""
        return self.layers(x)

    def losses(self, heatmaps: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        """L_keypoint: per point the softmax cross-entropy over the S * S positions, times alpha.

        Args:
            heatmaps: (R, K, S, S).
            instances: the R foreground proposals with ``proposal_boxes`` and ``gt_keypoints``, by image. Points outside of a
                proposal do not count; without any point the loss is 0 and still part of the graph.

        Raises:
            ConfigError: RoIs without ``gt_keypoints``, as from another mapper.
        """
        if not all(rois.has("gt_keypoints") for rois in instances if len(rois)):
            raise ConfigError("The training images have no contour points: set INPUT.MAPPER to 'ContourPointMapper'.")
        return {"loss_keypoint": self.loss_weight * keypoint_rcnn_loss(heatmaps, instances, normalizer=None)}

    @torch.no_grad()
    def set_keypoints(self, heatmaps: Tensor, instances: list[Instances]) -> None:
        """Give the R instances ``pred_keypoints`` (R, K, 3): x, y, score; and ``contour_points`` (R): how many of them, the
        first ones, form a closed contour: k, and 0 where k points are shared out over several contours."""
        boxes = torch.cat([detected.pred_boxes.tensor for detected in instances])
        keypoints = decode(heatmaps, boxes, self.decoder).split([len(detected) for detected in instances])
        for detected, own in zip(instances, keypoints, strict=True):
            detected.pred_keypoints = own
            detected.contour_points = torch.full((len(own),), self.num_points, device=own.device)


def decode(heatmaps: Tensor, boxes: Tensor, decoder: str = "argmax") -> Tensor:
    """The points of heat maps.

    Args:
        heatmaps: (R, K, S, S) logits.
        boxes: (R, 4) x0, y0, x1, y1: cell i of S lies at x0 + (i + 0.5) / S * (x1 - x0).
        decoder: "argmax" takes the middle of the highest cell; "subpixel" moves it, per axis, to the top of the parabola
            through the highest cell and its two neighbours; "resize" is Detectron2's decoder, which enlarges all heat maps to
            the size of the box, RoI by RoI.

    Returns:
        (R, K, 3): x, y, and as score the softmax probability of the highest cell ("resize": Detectron2's).
    """
    if decoder == "resize":
        return heatmaps_to_keypoints(heatmaps.float(), boxes)[:, :, [0, 1, 3]]
    R, K, S, _ = heatmaps.shape
    flat = heatmaps.reshape(R, K, S * S).float()
    highest, position = flat.max(dim=2)
    rois = 1 if flat.device.type == "cpu" else max(R, 1)  # at a time: one by one they stay in the processor's cache
    total = torch.cat([part.logsumexp(dim=2) for part in flat.split(rois)])
    score = (highest - total).exp()
    cell = torch.stack([position % S, position // S], dim=2)  # (R, K, 2): column, row
    place = cell + 0.5
    if decoder == "subpixel":
        place += torch.stack(
            [top_of_parabola(flat, highest, position, cell[:, :, axis], stride) for axis, stride in enumerate((1, S))], dim=2
        )
    xy = boxes[:, None, :2] + place / S * (boxes[:, None, 2:] - boxes[:, None, :2])
    return torch.cat([xy, score[:, :, None]], dim=2)


def top_of_parabola(flat: Tensor, highest: Tensor, position: Tensor, cell: Tensor, stride: int) -> Tensor:
    """How far from the highest cell, in cells between -0.5 and 0.5, the parabola through it and its neighbours has its top.

    Args:
        flat: (R, K, S * S); highest, position, cell: (R, K), its maximum, where that is, and its cell along this axis.
        stride: between neighbours in ``flat``.

    Returns:
        (R, K); 0 for cells at the rim and where the three are equal.
    """
    S = round(flat.shape[2] ** 0.5)
    rim = (cell == 0) | (cell == S - 1)
    before, after = (flat.gather(2, (position + step).clamp(0, S * S - 1)[:, :, None])[:, :, 0] for step in (-stride, stride))
    bend = before - 2 * highest + after  # at most 0
    return torch.where(rim | (bend == 0), 0, (before - after) / (2 * bend))
