"""The box and mask head of DSG (section 3.1 and Fig. 2), with one switch for each of F_M, SgRA_B, F_B, SgRA_M of Table 1.

Shapes: R RoIs of all images in order, C channels of the pyramid, D and S (14) of the MPN's features, M (28) pixels per side of
a probability map. Boxes are x0, y0, x1, y1 in image pixels; a map spans its box, and its cell i covers [i, i + 1) / M of it.
"""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, Instances
from torch import Tensor

from projects.errors import ConfigError

from .fusion import FeatureFusion
from .mask_rpn import attach_masks
from .mpn import MPN, build_pooler

OF_PROPOSALS = ("proposal_boxes", "proposal_mask_probs", "proposal_mask_features")


@ROI_HEADS_REGISTRY.register()
class DSGROIHeads(StandardROIHeads):
    """Detectron2's heads on proposals of :class:`dsg.mask_rpn.MaskRPN`.

    A detection takes along what its mask needs of the proposal that it came from, the fields in ``handed_on``.

    Args (beside StandardROIHeads'):
        box_fusion, mask_fusion: F_B and F_M, or None.
        guide_box, guide_mask: SgRA_B and SgRA_M: pool with SgRoIAlign, guided by P.
        detach_probs: no gradient through P.
        mask_features_test: "proposal" or "detection" (MODEL.DSG.MASK_FEATURES_TEST).
    """

    @configurable
    def __init__(
        self,
        *,
        box_fusion: FeatureFusion | None,
        mask_fusion: FeatureFusion | None,
        guide_box: bool,
        guide_mask: bool,
        detach_probs: bool,
        mask_features_test: str = "proposal",
        **heads,
    ):
        super().__init__(**heads)
        self.box_fusion = box_fusion
        self.mask_fusion = mask_fusion
        self.guide_box = guide_box
        self.guide_mask = guide_mask
        self.detach_probs = detach_probs
        used = {"proposal_mask_probs": guide_mask, "proposal_mask_features": mask_fusion is not None}
        needed = tuple(name for name, on in used.items() if on and self.mask_on)
        self.masks_need_mpn = bool(needed)
        self.handed_on = ("proposal_boxes", *needed) if needed and mask_features_test == "proposal" else ()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        dsg, box, mask = cfg.MODEL.DSG, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
        check_proposal_generator(cfg)
        of_cascades = [key for key in ("INTERLEAVED", "MASK_FLOW", "SEMANTIC") if dsg[key]]
        if of_cascades:
            raise ConfigError(
                f"MODEL.DSG.{of_cascades[0]} is of cascades: set it False, or MODEL.ROI_HEADS.NAME 'CascadeDSGROIHeads'."
            )
        if box.TRAIN_ON_PRED_BOXES:
            raise ConfigError("DSG's mask head trains on the proposals: set MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES False.")
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels

        def fusion(stride: int) -> FeatureFusion:
            return FeatureFusion(mask.CONV_DIM, channels, dsg.FUSION_KERNEL, stride)

        return {
            **super().from_config(cfg, input_shape),
            "box_fusion": fusion(pooling_stride(cfg)) if dsg.FUSION_BOX else None,
            "mask_fusion": fusion(1) if dsg.FUSION_MASK else None,
            "guide_box": dsg.SGRA_BOX,
            "guide_mask": dsg.SGRA_MASK,
            "detach_probs": dsg.DETACH_PROBS,
            "mask_features_test": checked_mask_features(cfg),
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        pooler = build_pooler(cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        return {**super()._init_box_head(cfg, input_shape), "box_pooler": pooler}

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        pooler = build_pooler(cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        return {**super()._init_mask_head(cfg, input_shape), "mask_pooler": pooler}

    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Proposals with ``gt_classes`` stay as they are: MaskRPN has matched and sampled them."""
        if all(p.has("gt_classes") for p in proposals):
            return proposals
        return super().label_and_sample_proposals(proposals, targets)

    def forward(self, images, features, proposals, targets=None, mpn: MPN | None = None):
        """As StandardROIHeads'. ``mpn`` is what :meth:`forward_with_given_boxes` takes."""
        if self.training:
            return super().forward(images, features, proposals, targets)
        return self.forward_with_given_boxes(features, self._forward_box(features, proposals), mpn), {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances], mpn: MPN | None = None
    ) -> list[Instances]:
        """As StandardROIHeads'. Detections bring what their proposals carried (``handed_on``); where they do not, and for other
        boxes (test-time augmentation), the box takes its proposal's place, and ``mpn`` computes the rest."""
        if self.masks_need_mpn and self.mask_on:
            give_masks_to_boxes(mpn, features, instances)
        return without_proposals(super().forward_with_given_boxes(features, instances))

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]):
        """Losses in training; in inference the detections, with ``handed_on`` of their proposals."""
        x = self.box_pooler(
            [features[name] for name in self.box_in_features],
            [p.proposal_boxes for p in proposals],
            self._guide(proposals) if self.guide_box else None,
        )
        if self.box_fusion is not None:
            x = self.box_fusion(x, cat([p.proposal_mask_features for p in proposals]))
        predictions = self.box_predictor(self.box_head(x))
        if self.training:
            return self.box_predictor.losses(predictions, proposals)
        boxes = self.box_predictor.predict_boxes(predictions, proposals)
        scores = self.box_predictor.predict_probs(predictions, proposals)
        detections, rows = infer_boxes(self.box_predictor, boxes, scores, [p.image_size for p in proposals])
        for of_image, sources, kept in zip(detections, proposals, rows, strict=True):
            for name in self.handed_on:
                of_image.set(name, sources.get(name)[kept])
        return detections

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]):
        """As StandardROIHeads', with guided pooling and fusion. In training R is the proposal, in inference the detection."""
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [i.proposal_boxes if self.training else Boxes(i.pred_boxes.tensor.detach()) for i in instances]
        probs = self._guide(instances) if self.guide_mask else None
        if probs is not None and not self.training:
            sources = cat([i.proposal_boxes.tensor for i in instances])
            probs = resample_probs(probs, sources, cat([b.tensor for b in boxes]))
        x = self.mask_pooler([features[name] for name in self.mask_in_features], boxes, probs)
        if self.mask_fusion is not None:
            x = self.mask_fusion(x, cat([i.proposal_mask_features for i in instances]))
        return self.mask_head(x, instances)

    def _guide(self, instances: list[Instances]) -> Tensor:
        """P of all RoIs (R, 1, M, M)."""
        probs = cat([i.proposal_mask_probs for i in instances])
        return probs.detach() if self.detach_probs else probs


def check_proposal_generator(cfg: CfgNode) -> None:
    """Raise ConfigError for proposals without masks."""
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "MaskRPN":
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME '{cfg.MODEL.ROI_HEADS.NAME}' needs the masks that MODEL.PROPOSAL_GENERATOR.NAME 'MaskRPN' "
            f"gives its proposals; found '{cfg.MODEL.PROPOSAL_GENERATOR.NAME}'."
        )


def checked_mask_features(cfg: CfgNode) -> str:
    """MODEL.DSG.MASK_FEATURES_TEST. Raises ConfigError for an unknown value."""
    if cfg.MODEL.DSG.MASK_FEATURES_TEST not in ("proposal", "detection"):
        raise ConfigError(
            f"MODEL.DSG.MASK_FEATURES_TEST is '{cfg.MODEL.DSG.MASK_FEATURES_TEST}': expected 'proposal' or 'detection'."
        )
    return cfg.MODEL.DSG.MASK_FEATURES_TEST


def pooling_stride(cfg: CfgNode) -> int:
    """Bins of the mask pooler per bin of the box pooler, the stride of F_B. Raises ConfigError unless it is a whole number."""
    box, mask = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
    if mask % box:
        raise ConfigError(
            "A stride brings the MPN's features to the box head's size: MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION must be a "
            f"multiple of MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, found {mask} and {box}."
        )
    return mask // box


def give_masks_to_boxes(mpn: MPN | None, features: dict[str, Tensor], instances: list[Instances]) -> None:
    """Boxes that did not come from proposals take the place of their proposals, and ``mpn`` computes their masks."""
    if all(i.has("proposal_boxes") for i in instances):
        return
    if mpn is None:
        raise ValueError("boxes without proposals need the MPN: call the model of MODEL.META_ARCHITECTURE 'DSGRCNN'")
    attach_masks(instances, *mpn(features, [i.pred_boxes for i in instances]))
    for of_image in instances:
        of_image.proposal_boxes = of_image.pred_boxes


def without_proposals(instances: list[Instances]) -> list[Instances]:
    """The detections, without what came from their proposals."""
    for of_image in instances:
        for name in OF_PROPOSALS:
            if of_image.has(name):
                of_image.remove(name)
    return instances


def infer_boxes(
    predictor: FastRCNNOutputLayers, boxes: list[Tensor], scores: list[Tensor], image_sizes: list[tuple[int, int]]
) -> tuple[list[Instances], list[Tensor]]:
    """Detectron2's box inference under the thresholds of ``predictor``, and for each detection the row that it came from.

    Args:
        boxes, scores: of each image, as ``predictor.predict_boxes`` and ``predict_probs`` give them.
        image_sizes: (height, width) of each image, pixels.

    Returns:
        The detections, and of each image the rows: Detectron2's kept indices count the rows that are left once those with a
        number that is not finite are dropped; these count all rows.
    """
    limits = predictor.test_score_thresh, predictor.test_nms_thresh, predictor.test_topk_per_image
    detections, kept = fast_rcnn_inference(boxes, scores, image_sizes, *limits)
    rows = []
    for of_boxes, of_scores, indices in zip(boxes, scores, kept, strict=True):
        finite = torch.isfinite(of_boxes).all(dim=1) & torch.isfinite(of_scores).all(dim=1)
        rows.append(finite.nonzero().squeeze(1)[indices])
    return detections, rows


def resample_probs(probs: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Probability maps (R, 1, M, M) that span the boxes ``sources`` (R, 4), read at the cell centres of ``targets`` (R, 4).

    Bilinear, clamped at the border of the source's box as SgRoIAlign reads it; zero outside of that box.
    """
    side = (torch.arange(probs.shape[-1], device=probs.device, dtype=sources.dtype) + 0.5) / probs.shape[-1]
    places = []
    for axis in (0, 1):  # x, y: the fraction of the source's side at which each cell centre of the target lies
        start, length = targets[:, axis, None], (targets[:, axis + 2] - targets[:, axis])[:, None]
        origin, extent = sources[:, axis, None], (sources[:, axis + 2] - sources[:, axis])[:, None]
        places.append((start + side * length - origin) / extent)
    x, y = places[0][:, None, :], places[1][:, :, None]  # (R, 1, M), (R, M, 1)
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    grid = torch.where(inside[..., None], 2 * grid - 1, 0)
    read = F.grid_sample(probs.to(grid.dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[:, None], read, 0).to(probs.dtype)
