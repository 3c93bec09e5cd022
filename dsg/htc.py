"""Hybrid Task Cascade (Chen et al., CVPR 2019), which DSG's section 3.5 builds on: three techniques, each with its own switch.

- Interleaved execution (MODEL.DSG.INTERLEAVED): the mask head of a stage sees the boxes that the stage predicts.
- Mask information flow (MODEL.DSG.MASK_FLOW): it also sees what the earlier mask heads make of these boxes.
- Semantic branch (MODEL.DSG.SEMANTIC): box and mask heads of every stage see an embedding of :mod:`dsg.semantic_branch`.

Shapes: R RoIs of all images in order, C channels of the pyramid, D of the mask heads, S (14) bins of the mask pooler.
"""

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from fvcore.nn import weight_init
from torch import Tensor, nn

from projects.errors import ConfigError
from projects.modeling.pooler import Pooler

from .cascade import CascadeMaskROIHeads
from .mpn import features_of
from .semantic_branch import SEMANTIC, common_level


@ROI_HEADS_REGISTRY.register()
class HTCROIHeads(CascadeMaskROIHeads):
    """The heads of HTC. With its three switches off it is :class:`CascadeMaskROIHeads`, bit by bit.

    Args (beside CascadeMaskROIHeads'):
        flows: the 1x1 convolutions (with ReLU) of the mask information flow, for every stage but the first; None: no flow.
        semantic_pooler: RoIAlign (S bins) of the semantic branch's embedding, which comes as ``features["semantic"]``; None: no
            such branch.
    """

    @configurable
    def __init__(self, *, flows: list[nn.Module] | None, semantic_pooler: Pooler | None, **heads):
        super().__init__(**heads)
        self.flows = None if flows is None else nn.ModuleList(flows)
        self.semantic_pooler = semantic_pooler

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        if cfg.MODEL.DSG.SEMANTIC and cfg.MODEL.META_ARCHITECTURE != "DSGRCNN":
            raise ConfigError(
                f"MODEL.DSG.SEMANTIC True needs MODEL.META_ARCHITECTURE 'DSGRCNN', found '{cfg.MODEL.META_ARCHITECTURE}'."
            )
        arguments = super().from_config(cfg, input_shape)
        channels, mask = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels, cfg.MODEL.ROI_MASK_HEAD
        flows = [_flow(mask.CONV_DIM, channels) for _ in arguments["mask_heads"][1:]] if cfg.MODEL.DSG.MASK_FLOW else None
        pooler = None
        if cfg.MODEL.DSG.SEMANTIC:
            common = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES[common_level(cfg, input_shape)]
            pooler = Pooler(mask.POOLER_RESOLUTION, [1 / input_shape[common].stride], mask.POOLER_SAMPLING_RATIO)
        return {**arguments, "flows": flows, "semantic_pooler": pooler}

    def _pool_boxes(self, features: dict[str, Tensor], rois: list[Instances], probs: Tensor | None = None) -> Tensor:
        x = super()._pool_boxes(features, rois, probs)
        if self.semantic_pooler is None:
            return x
        pooled = self.semantic_pooler([features[SEMANTIC]], [r.proposal_boxes for r in rois])
        return x + F.adaptive_avg_pool2d(pooled, x.shape[-2:])

    def _pool_masks(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        x = super()._pool_masks(features, boxes)
        return x if self.semantic_pooler is None else x + self.semantic_pooler([features[SEMANTIC]], boxes)

    def _mask_input(self, x: Tensor, stage: int, previous: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
        """``x`` plus the convolved features of the mask head before, which saw ``x`` plus those of the one before it, ..."""
        if self.flows is None or stage == 0:
            return x
        if earlier is None:
            earlier = features_of(self.mask_head[stage - 1], HTCROIHeads._mask_input(self, x, stage - 1))
        return x + self.flows[stage - 1](earlier)


def _flow(in_channels: int, out_channels: int) -> Conv2d:
    convolution = Conv2d(in_channels, out_channels, kernel_size=1, activation=F.relu)
    weight_init.c2_msra_fill(convolution)
    return convolution
