"""The RoI heads of MaskPlus: Detectron2's, with contextual fusion between mask pooler and mask head.

Shapes: N images, R RoIs of all images in order, C channels, P bins of the mask pooler.
"""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads, select_foreground_proposals
from detectron2.structures import Instances
from torch import Tensor

from projects.errors import ConfigError

from .contextual_fusion import ContextualFusion


@ROI_HEADS_REGISTRY.register()
class MaskPlusROIHeads(StandardROIHeads):
    """StandardROIHeads whose mask features know the whole image. The box head is not touched."""

    @configurable
    def __init__(self, *, contextual_fusion: ContextualFusion | None = None, **kwargs):
        """
        Args:
            contextual_fusion: adds the image's context to the mask features; None adds nothing.
        """
        super().__init__(**kwargs)
        self.contextual_fusion = contextual_fusion

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Raises ConfigError for techniques of MaskPlusHead with another mask head."""
        maskplus, mask_head = cfg.MODEL.MASKPLUS, cfg.MODEL.ROI_MASK_HEAD.NAME
        techniques = maskplus.DECONV_PYRAMID or maskplus.BOUNDARY != "none" or maskplus.QUASI_SCALES or maskplus.BIASED
        if (techniques or maskplus.MASK_SCALE != 1) and mask_head != "MaskPlusHead":
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD.NAME is '{mask_head}', and keys of MODEL.MASKPLUS switch on what only 'MaskPlusHead' "
                "does: set that, or leave them off."
            )
        arguments = super().from_config(cfg, input_shape)
        if cfg.MODEL.MASK_ON and cfg.MODEL.MASKPLUS.CONTEXT:
            arguments["contextual_fusion"] = ContextualFusion(cfg, input_shape)
        return arguments

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """As Detectron2's: the mask losses of the foreground proposals, or the instances with ``pred_masks``."""
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [rois.proposal_boxes if self.training else rois.pred_boxes for rois in instances]
        x = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
        if self.contextual_fusion is not None:
            x = self.contextual_fusion(x, features, instances)
        return self.mask_head(x, instances)


@ROI_HEADS_REGISTRY.register()
class MaskPlusCascadeROIHeads(MaskPlusROIHeads, CascadeROIHeads):
    """MaskPlus+ (section 4.9): the box heads of Cascade R-CNN, the mask branch of MaskPlus."""
