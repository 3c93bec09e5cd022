"""The RoI heads of Mask Point R-CNN (figure 1): a keypoint branch beside the mask branch, on the same RoIs, and fused into it.

Shapes: R RoIs of all images in order, K key points, k contour points, S the side of a heat map, N the side of the mask.
"""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads, select_foreground_proposals
from detectron2.structures import Boxes, Instances
from torch import Tensor

from projects.errors import ConfigError

from .keypoint_branch import ContourPointHead
from .mask_head import FusedMaskHead
from .segmentation import ContourMasks

MASK_SOURCES = ("fused", "points")


@ROI_HEADS_REGISTRY.register()
class MaskPointROIHeads(StandardROIHeads):
    """StandardROIHeads with a keypoint branch for contour points, and with MODEL.MASK_ON a mask branch that it helps.

    Detectron2's MODEL.KEYPOINT_ON stays False: it is for data sets with annotated key points, and would leave out images and
    RoIs, want names of key points to mirror them, and evaluate them as a person's.
    """

    @configurable
    def __init__(self, *, mask_from: str = "fused", keep_maps: bool = False, **kwargs):
        """
        Args:
            mask_from: where masks come from at inference: "fused", the mask branch, or "points", the polygon through the
                contour points. Training is the same.
            keep_maps: whether detections keep the maps of figure 5 (:meth:`_forward_mask`).

        Raises:
            ConfigError: another ``mask_from``.
        """
        super().__init__(**kwargs)
        if mask_from not in MASK_SOURCES:
            raise ConfigError(f"MODEL.MASKPOINT.MASK_FROM is '{mask_from}': expected one of {', '.join(MASK_SOURCES)}.")
        self.mask_from, self.keep_maps = mask_from, keep_maps

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Raises ConfigError for settings and heads that do not go together."""
        check_settings(cfg)
        arguments = super().from_config(cfg, input_shape)
        for name, kind in (("mask_head", FusedMaskHead), ("keypoint_head", ContourPointHead)):
            if name in arguments and not isinstance(arguments[name], kind):
                key = f"MODEL.ROI_{name.upper()}.NAME"
                raise ConfigError(f"{key} is '{type(arguments[name]).__name__}': MaskPointROIHeads takes '{kind.__name__}'.")
        maskpoint = cfg.MODEL.MASKPOINT
        return arguments | {"mask_from": maskpoint.MASK_FROM, "keep_maps": maskpoint.KEEP_MAPS}

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.KEYPOINT_ON = True  # Detectron2 builds pooler and head under this condition
        return super()._init_keypoint_head(cfg, input_shape)

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """Both branches, since the masks need the heat maps.

        Args:
            features: feature maps of the batch by level.
            instances: in training the sampled proposals, of which both branches take the foreground, all of it; at inference
                the detections.

        Returns:
            In training the losses of both. At inference the detections with ``pred_keypoints`` (R, K, 3) and
            ``contour_points`` (R) (:meth:`.ContourPointHead.set_keypoints`); with a mask branch ``pred_masks``, as
            ``detector_postprocess`` takes them; with ``keep_maps`` also ``pred_point_maps`` (R, S, S), the sum of the heat
            maps, and, where masks are "fused", ``pred_fused_maps`` (R, N, N), probabilities of the predicted class.
        """
        if not self.keypoint_on:  # test-time augmentation switches both branches off to look for boxes
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [rois.proposal_boxes if self.training else rois.pred_boxes for rois in instances]
        heatmaps = self.keypoint_head.heatmaps(
            self.keypoint_pooler([features[name] for name in self.keypoint_in_features], boxes)
        )
        if self.training:
            losses = self.keypoint_head.losses(heatmaps, instances)
            return losses | self._masks(features, boxes, instances, heatmaps) if self.mask_on else losses
        self.keypoint_head.set_keypoints(heatmaps, instances)
        fused = self.mask_on and self.mask_from == "fused"
        if fused:
            instances = self._masks(features, boxes, instances, heatmaps)
        elif self.mask_on:
            k = self.keypoint_head.num_points
            for detected in instances:
                detected.pred_masks = ContourMasks.from_points(detected.pred_keypoints[:, :k, :2], detected.pred_boxes)
        if self.keep_maps:
            sums = heatmaps.float().sum(dim=1).split([len(detected) for detected in instances])
            for detected, own in zip(instances, sums, strict=True):
                detected.pred_point_maps = own
                if fused:
                    detected.pred_fused_maps = detected.pred_masks[:, 0].float()
        return instances

    def _masks(
        self, features: dict[str, Tensor], boxes: list[Boxes], instances: list[Instances], heatmaps: Tensor
    ) -> dict[str, Tensor] | list[Instances]:
        """What the mask head gives for the RoIs that the heat maps (R, K, S, S) are of."""
        x = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        return self.mask_head(x, instances, heatmaps)

    def _forward_keypoint(self, features: dict[str, Tensor], instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """Nothing is left to do after :meth:`_forward_mask`."""
        return {} if self.training else instances


def check_settings(cfg: CfgNode) -> None:
    """Raise ConfigError for settings of MaskPointROIHeads that do not go together."""
    maskpoint, from_points = cfg.MODEL.MASKPOINT, cfg.MODEL.MASKPOINT.MASK_FROM == "points"
    bins = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION
    fused = cfg.MODEL.MASK_ON and maskpoint.FUSION_DESIGN != "none"
    for wrong, message in (
        (
            cfg.MODEL.KEYPOINT_ON,
            "MODEL.KEYPOINT_ON is for annotated key points. MaskPointROIHeads has its keypoint branch without it: leave it "
            "False.",
        ),
        (
            from_points and not cfg.MODEL.MASK_ON,
            "MODEL.MASKPOINT.MASK_FROM is 'points', and MODEL.MASK_ON False asks for no masks: set it to True.",
        ),
        (
            from_points and maskpoint.COMPONENTS == "all",
            "MODEL.MASKPOINT.MASK_FROM is 'points', which fills one polygon, and COMPONENTS 'all' shares the points out over "
            "several contours: set COMPONENTS to 'largest'.",
        ),
        (
            from_points and cfg.TEST.AUG.ENABLED,
            "TEST.AUG averages masks, and MODEL.MASKPOINT.MASK_FROM 'points' gives polygons: use one of them.",
        ),
        (
            fused and bins[0] != bins[1],
            f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is {bins[0]} and MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION {bins[1]}: "
            "heat maps fit masks of the same number of bins only.",
        ),
    ):
        if wrong:
            raise ConfigError(message)
