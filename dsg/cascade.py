"""The cascade that Cascade DSG and HTC build on: Cascade Mask R-CNN as in the paper's code base (DSG, section 4.1).

Three stages, each with a box head and a mask head; what the paper calls stage 1 to 3 is 0 to 2 here. A stage's RoIs are the
boxes that the stage before predicted, row for row: none is sampled anew and none is dropped, so that a RoI has one row number
throughout.

Shapes: R RoIs of all images in order, C channels, S (14) bins of the mask pooler, M (28) pixels per side of a mask, K classes.
Boxes are x0, y0, x1, y1 in image pixels.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from projects.errors import ConfigError

from .mpn import build_pooler, logits_and_features
from .roi_heads import infer_boxes


@ROI_HEADS_REGISTRY.register()
class CascadeMaskROIHeads(CascadeROIHeads):
    """Cascade Mask R-CNN with a mask head per stage.

    Fields that it gives the RoIs in training: ``gt_classes`` and ``gt_boxes`` by the stage's IoU threshold, for the box losses;
    ``gt_mask_classes`` by that of the first stage (K where no object overlaps as much), and ``gt_matches``, the row of the
    ground truth, for the mask loss.

    Args (beside CascadeROIHeads'):
        mask_heads: one for each stage.
        stage_weights: of each stage's losses.
        interleaved: a stage's mask head runs on the boxes that the stage predicts, B^t of Eq. 3, instead of on its RoIs.
    """

    handed_on: tuple[str, ...] = ()  # fields that a detection gets from the proposal that it came from
    mask_fields = ("proposal_boxes", "gt_mask_classes", "gt_matches")  # what the mask head and its loss read of a RoI

    @configurable
    def __init__(self, *, mask_heads: list[nn.Module], stage_weights: Sequence[float], interleaved: bool, **heads):
        super().__init__(mask_head=nn.ModuleList(mask_heads), **heads)
        self.vis_period = mask_heads[0].vis_period
        self.stage_weights = tuple(stage_weights)
        self.interleaved = interleaved

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        stages, weights = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS), cfg.MODEL.DSG.STAGE_WEIGHTS
        if len(weights) != stages:
            raise ConfigError(f"MODEL.DSG.STAGE_WEIGHTS: expected one for each of the {stages} stages, found {list(weights)}.")
        cascade, box = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_BOX_HEAD
        needs = [
            ("MASK_ON", cfg.MODEL.MASK_ON, True),
            ("KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON, False),
            ("ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", box.CLS_AGNOSTIC_BBOX_REG, True),
            ("ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", box.TRAIN_ON_PRED_BOXES, False),
            ("ROI_MASK_HEAD.NAME", cfg.MODEL.ROI_MASK_HEAD.NAME, "MaskRCNNConvUpsampleHead"),  # its layers run one by one
            ("ROI_HEADS.IOU_THRESHOLDS", list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS), [cascade.IOUS[0]]),
        ]
        if cls is CascadeMaskROIHeads:
            needs += [(f"DSG.{key}", cfg.MODEL.DSG[key], False) for key in ("MASK_FLOW", "SEMANTIC")]
        for key, found, needed in needs:
            if found != needed:
                raise ConfigError(f"MODEL.ROI_HEADS.NAME '{cls.__name__}' needs MODEL.{key} {needed}, found {found}.")
        if len(cascade.BBOX_REG_WEIGHTS) != stages:
            raise ConfigError(
                f"MODEL.ROI_BOX_CASCADE_HEAD: expected BBOX_REG_WEIGHTS for each of the {stages} IOUS, found "
                f"{len(cascade.BBOX_REG_WEIGHTS)}."
            )
        return {
            **super().from_config(cfg, input_shape),
            "stage_weights": weights,
            "interleaved": cfg.MODEL.DSG.INTERLEAVED,
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        pooler = build_pooler(cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        return {**super()._init_box_head(cfg, input_shape), "box_pooler": pooler}

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        """Detectron2's mask head and pooler, the head once for each stage."""
        stages = range(len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS))
        of_stage = [super(CascadeMaskROIHeads, cls)._init_mask_head(cfg, input_shape) for _ in stages]
        heads = [built["mask_head"] for built in of_stage]
        pooler = build_pooler(cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_HEADS.IN_FEATURES, input_shape)
        return {"mask_in_features": of_stage[0]["mask_in_features"], "mask_pooler": pooler, "mask_heads": heads}

    def forward(self, images, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances] | None = None):
        """As Detectron2's: sampled RoIs and losses in training, detections and {} in inference."""
        del images
        if not self.training:
            return self.forward_with_given_boxes(features, self._detect(features, proposals)), {}
        rois = self.label_and_sample_proposals(proposals, targets)
        return rois, self._losses(features, rois, targets)

    def _losses(self, features: dict[str, Tensor], rois: list[Instances], targets: list[Instances]) -> dict[str, Tensor]:
        losses = {}
        for stage, weight in enumerate(self.stage_weights):
            with get_event_storage().name_scope(f"stage{stage}"):
                self._match(rois, targets, stage)
                self._count_foreground(rois)
                predictions = self._predict(features, rois, stage)
                of_stage = self._box_losses(predictions, rois, stage)
                following = self._refine(predictions, rois, stage)
                masked = following if self.interleaved else rois
                if self.interleaved:
                    self._match(following, targets, stage)
                of_stage["loss_mask"] = self._mask_loss(features, masked, targets, stage)
            losses |= {f"{name}_stage{stage}": weight * loss for name, loss in of_stage.items()}
            rois = following
        return losses

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        """The boxes of the last stage under the mean of all stages' class logits."""
        rois, predictions = proposals, self._predict(features, proposals, 0)
        logits = [predictions[0]]
        for stage in range(1, self.num_cascade_stages):
            rois = self._refine(predictions, rois, stage - 1)
            self._before_stage(features, rois, stage)
            predictions = self._predict(features, rois, stage)
            logits.append(predictions[0])
        last = self.box_predictor[-1]
        scores = last.predict_probs((torch.stack(logits).mean(dim=0), predictions[1]), rois)
        boxes = last.predict_boxes(predictions, rois)
        detections, rows = infer_boxes(last, boxes, scores, [p.image_size for p in proposals])
        for found, of_image, kept in zip(detections, proposals, rows, strict=True):
            for name in self.handed_on:
                found.set(name, of_image.get(name)[kept])
        return detections

    def _before_stage(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> None:
        """At inference, what a stage after the first needs on its RoIs beside their boxes: here nothing."""

    def _predict(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        """Class logits (R, K + 1) and box deltas (R, 4) of a stage's box head."""
        return self.box_predictor[stage](self.box_head[stage](self._box_input(features, rois, stage)))

    def _box_input(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> Tensor:
        """What a stage's box head sees: (R, C, 7, 7)."""
        return self._pool_boxes(features, rois)

    def _pool_boxes(self, features: dict[str, Tensor], rois: list[Instances], probs: Tensor | None = None) -> Tensor:
        return self.box_pooler([features[name] for name in self.box_in_features], [r.proposal_boxes for r in rois], probs)

    def _pool_masks(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """(R, C, S, S)"""
        return self.mask_pooler([features[name] for name in self.mask_in_features], boxes)

    def _mask_input(self, x: Tensor, stage: int, previous: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
        """What a stage's mask head sees: here ``x`` (R, C, S, S), what was pooled.

        Args:
            previous: F_^{t-1} of Eq. 3, (R, D, S, S), what the previous mask head made of these rows, in training of their
                boxes one stage before.
            earlier: what the previous mask head makes of the same boxes, (R, D, S, S), where that is known already.
        """
        return x

    def _run_mask_head(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        """Logits (R, K, M, M) and features F_ (R, D, S, S) of a stage's mask head on RoIs."""
        x = self._pool_masks(features, [r.proposal_boxes for r in rois])
        return logits_and_features(self.mask_head[stage], self._mask_input(x, stage))

    @torch.no_grad()
    def _match(self, rois: list[Instances], targets: list[Instances], stage: int) -> None:
        """Set the ground truth fields of the RoIs, anew for every stage."""
        for of_image, truth in zip(rois, targets, strict=True):
            overlaps = pairwise_iou(truth.gt_boxes, of_image.proposal_boxes)
            matches, for_boxes = self.proposal_matchers[stage](overlaps)
            _, for_masks = self.proposal_matchers[0](overlaps)
            if len(truth):
                classes, of_image.gt_boxes = truth.gt_classes[matches], truth.gt_boxes[matches]
            else:
                classes, of_image.gt_boxes = torch.zeros_like(matches), Boxes(overlaps.new_zeros(len(matches), 4))
            of_image.gt_classes = torch.where(for_boxes == 1, classes, self.num_classes)
            of_image.gt_mask_classes = torch.where(for_masks == 1, classes, self.num_classes)
            of_image.gt_matches = matches

    def _count_foreground(self, rois: list[Instances]) -> None:
        """Log, as Detectron2 does, what the stage's box head trains on."""
        foreground = sum(int((r.gt_classes < self.num_classes).sum()) for r in rois)
        storage, images = get_event_storage(), max(len(rois), 1)
        storage.put_scalar("roi_head/num_fg_samples", foreground / images)
        storage.put_scalar("roi_head/num_bg_samples", (sum(map(len, rois)) - foreground) / images)

    def _box_losses(self, predictions: tuple[Tensor, Tensor], rois: list[Instances], stage: int) -> dict[str, Tensor]:
        """Detectron2's, of the RoIs that are not empty."""
        there = [of_image.proposal_boxes.nonempty() for of_image in rois]
        rows = cat(there)
        rois = select(rois, there, ("proposal_boxes", "gt_classes", "gt_boxes"))
        return self.box_predictor[stage].losses(tuple(values[rows] for values in predictions), rois)

    def _refine(self, predictions: tuple[Tensor, Tensor], rois: list[Instances], stage: int) -> list[Instances]:
        """The RoIs of the next stage: the predicted boxes, clipped to their images. A box that is not finite becomes empty."""
        following = []
        for boxes, of_image in zip(self.box_predictor[stage].predict_boxes(predictions, rois), rois, strict=True):
            boxes = boxes.detach()
            finite = torch.isfinite(boxes).all(dim=1, keepdim=True)
            boxes = Boxes(torch.where(finite, boxes, 0))
            boxes.clip(of_image.image_size)
            following.append(Instances(of_image.image_size, proposal_boxes=boxes))
        return following

    def _mask_loss(self, features: dict[str, Tensor], rois: list[Instances], targets: list[Instances], stage: int) -> Tensor:
        """Of the RoIs that overlap an object by IoU >= 0.5 (the first stage's threshold); a connected zero without any."""
        foreground = select(rois, self._foreground(rois), self.mask_fields)
        logits, _ = self._run_mask_head(features, foreground, stage)
        return mask_loss(logits, foreground, targets, self.vis_period)

    def _foreground(self, rois: list[Instances]) -> list[Tensor]:
        """Of each image (R,): which RoIs the mask heads train on."""
        return [of_image.gt_mask_classes < self.num_classes for of_image in rois]

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        """At inference: ``pred_masks`` (R, 1, M, M) of the detections, the mean of all mask heads' probabilities."""
        if not self.mask_on:
            return instances
        x = self._pool_masks(features, [i.pred_boxes for i in instances])
        previous = self._features_of_proposals(instances)
        earlier, probs = None, []
        for stage, head in enumerate(self.mask_head):
            logits, earlier = logits_and_features(head, self._mask_input(x, stage, previous, earlier))
            previous = earlier
            probs.append(logits.sigmoid())
        masks = channel_of_class(torch.stack(probs).mean(dim=0), cat([i.pred_classes for i in instances]))
        for of_image, of_masks in zip(instances, masks.split([len(i) for i in instances]), strict=True):
            of_image.pred_masks = of_masks
        return instances

    def _features_of_proposals(self, instances: list[Instances]) -> Tensor | None:
        """F_^0 of the proposals that the detections came from, or None where nothing uses it."""
        return None


def select(rois: list[Instances], rows: list[Tensor], fields: Sequence[str]) -> list[Instances]:
    """Some rows of some fields: others can be large, as masks of the image's size and mask features are."""
    return [
        Instances(of_image.image_size, **{name: of_image.get(name)[chosen] for name in fields})
        for of_image, chosen in zip(rois, rows, strict=True)
    ]


class MatchedMasks:
    """The ground truth masks ``masks[matches]`` of RoIs, of which only CHUNK exist at a time: a bitmap is as large as the
    image, and without sampling all RoIs of a stage may be foreground."""

    CHUNK = 64

    def __init__(self, masks: BitMasks | PolygonMasks, matches: Tensor):
        self.masks, self.matches = masks, matches

    def __len__(self) -> int:
        return len(self.matches)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """As that of Detectron2's masks: boxes (R, 4) -> (R, mask_size, mask_size), bool."""
        parts = zip(self.matches.split(self.CHUNK), boxes.split(self.CHUNK), strict=True)
        return torch.cat([self.masks[rows].crop_and_resize(of_part, mask_size).to(boxes.device) for rows, of_part in parts])


def mask_loss(logits: Tensor, foreground: list[Instances], targets: list[Instances], vis_period: int = 0) -> Tensor:
    """Mean binary cross entropy of the masks (R, K, M, M), or (R, 1, M, M) without classes, of foreground RoIs.

    Args:
        foreground: of each image, with ``proposal_boxes``, ``gt_mask_classes`` and ``gt_matches``.
        targets: the ground truth of each image.
    """
    matched = []
    for of_image, truth in zip(foreground, targets, strict=True):
        fields = {"proposal_boxes": of_image.proposal_boxes, "gt_classes": of_image.gt_mask_classes}
        if len(of_image):
            fields["gt_masks"] = MatchedMasks(truth.gt_masks, of_image.gt_matches)
        matched.append(Instances(of_image.image_size, **fields))
    return mask_rcnn_loss(logits, matched, vis_period)


def channel_of_class(values: Tensor, classes: Tensor) -> Tensor:
    """(R, K, M, M), classes (R,) -> (R, 1, M, M): each row's channel of its class; the one there is, where K is 1."""
    if values.shape[1] == 1:
        return values
    return values[torch.arange(len(values), device=values.device), classes][:, None]
