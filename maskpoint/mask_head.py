"""The mask branch: Mask R-CNN's head, whose logits meet the heat maps of the keypoint branch.

Shapes: R RoIs of all images in order, C channels, P bins of the mask pooler (14), K key points, S the side of a heat map,
N the side of the mask (28; in fusion design c 56).
"""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ConvTranspose2d, ShapeSpec
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    MaskRCNNConvUpsampleHead,
    mask_rcnn_inference,
    mask_rcnn_loss,
)
from detectron2.structures import Instances
from fvcore.nn import weight_init
from torch import Tensor
from torch.nn import functional as F

from projects.errors import ConfigError

from .contour import ContourSampler
from .fusion import EdgeFusion


@ROI_MASK_HEAD_REGISTRY.register()
class FusedMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN's mask head with edge feature fusion. Without fusion it is Detectron2's, with the same names of weights."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, fusion: EdgeFusion | None = None, **kwargs):
        """
        Args:
            fusion: (R, K, S, S), (R, classes, N, N) -> (R, classes, N, N). With its design c, the head has one more
                deconvolution before the logits, so that N is 4P.
        """
        super().__init__(input_shape, **kwargs)
        self.fusion = fusion
        self.deconv2 = None
        if fusion is not None and fusion.design == "c":
            channels = self.predictor.in_channels
            self.deconv2 = ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
            weight_init.c2_msra_fill(self.deconv2)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        maskpoint, fusion = cfg.MODEL.MASKPOINT, None
        if maskpoint.FUSION_DESIGN != "none":
            num_keypoints = ContourSampler.from_config(cfg).num_keypoints
            fusion = EdgeFusion(num_keypoints, maskpoint.FUSION_DESIGN, maskpoint.REDUCTION, maskpoint.FUSION_MODE)
        return super().from_config(cfg, input_shape) | {"fusion": fusion}

    def layers(self, x: Tensor) -> Tensor:
        """f_m, the mask logits before the fusion: (R, C, P, P) -> (R, classes, N, N)."""
        for conv in self.conv_norm_relus:
            x = conv(x)
        x = F.relu(self.deconv(x))
        if self.deconv2 is not None:
            x = F.relu(self.deconv2(x))
        return self.predictor(x)

    def forward(
        self, x: Tensor, instances: list[Instances], heatmaps: Tensor | None = None
    ) -> dict[str, Tensor] | list[Instances]:
        """As Detectron2's mask heads, with the logits O_m (equation 2).

        Args:
            x: (R, C, P, P), the RoI features.
            instances: the R RoIs by image, in training with ``proposal_boxes``, ``gt_classes`` and ``gt_masks``.
            heatmaps: (R, K, S, S) of the same RoIs; without fusion they are not looked at.

        Raises:
            ConfigError: no heat maps to fuse, as from other RoI heads than MaskPointROIHeads.

        Returns:
            {"loss_mask": scalar} in training; at inference the instances with ``pred_masks`` (R, 1, N, N), probabilities.
        """
        logits = self.layers(x)
        if self.fusion is not None:
            if heatmaps is None:
                raise ConfigError(
                    "FusedMaskHead fuses the heat maps that MODEL.ROI_HEADS.NAME 'MaskPointROIHeads' gives it: set that, or "
                    "MODEL.MASKPOINT.FUSION_DESIGN 'none'."
                )
            logits = self.fusion(heatmaps, logits)
        if self.training:
            return {"loss_mask": self.loss_weight * mask_rcnn_loss(logits, instances, self.vis_period)}
        mask_rcnn_inference(logits, instances)
        return instances
