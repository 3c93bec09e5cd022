"""The mask head of MaskPlus: Mask R-CNN's, with the techniques that are switched on.

Shapes: R RoIs of all images in order, C channels, P the side of the RoI features (14), K mask classes, M the side of the mask.
"""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from projects.errors import ConfigError

from .biased_training import BiasedTraining
from .boundary_refinement import build_boundary_refinement
from .deconv_pyramid import DeconvPyramid
from .quasi_multitask import QuasiMultitask, ScaledMaskHead


@ROI_MASK_HEAD_REGISTRY.register()
class MaskPlusHead(ScaledMaskHead):
    """Convolutions, deconvolutional pyramid, deconvolution, logits, boundary refinement; the auxiliary heads beside them.

    Without any technique it is Detectron2's MaskRCNNConvUpsampleHead, with the same names of weights.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        deconv_pyramid: nn.Module | None = None,
        boundary_refinement: nn.Module | None = None,
        quasi_multitask: QuasiMultitask | None = None,
        biased_training: BiasedTraining | None = None,
        **kwargs,
    ):
        """
        Args:
            deconv_pyramid: (R, C, P, P) -> the same shape, after the convolutions.
            boundary_refinement: (R, K, M, M) -> the same shape, on the logits.
            quasi_multitask: gives further losses of the same RoI features in training.
            biased_training: the weight of all mask losses.
        """
        super().__init__(input_shape, **kwargs)
        self.deconv_pyramid = deconv_pyramid
        self.boundary_refinement = boundary_refinement
        self.quasi_multitask = quasi_multitask
        self.biased_training = biased_training

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Raises ConfigError for contextual fusion with RoI heads that have none."""
        maskplus, mask_head, roi_heads = cfg.MODEL.MASKPLUS, cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_HEADS.NAME
        if maskplus.CONTEXT and roi_heads not in ("MaskPlusROIHeads", "MaskPlusCascadeROIHeads"):
            raise ConfigError(
                f"MODEL.MASKPLUS.CONTEXT is True, and MODEL.ROI_HEADS.NAME '{roi_heads}' has no contextual fusion: set "
                "'MaskPlusROIHeads' or 'MaskPlusCascadeROIHeads'."
            )
        arguments = super().from_config(cfg, input_shape)
        channels = mask_head.CONV_DIM if mask_head.NUM_CONV else input_shape.channels
        return arguments | {
            "scale": maskplus.MASK_SCALE,
            "deconv_pyramid": DeconvPyramid(channels) if maskplus.DECONV_PYRAMID else None,
            "boundary_refinement": build_boundary_refinement(maskplus.BOUNDARY, arguments["num_classes"]),
            "quasi_multitask": QuasiMultitask(cfg, input_shape) if maskplus.QUASI_SCALES else None,
            "biased_training": BiasedTraining.from_config(cfg) if maskplus.BIASED else None,
        }

    def layers(self, x: Tensor) -> Tensor:
        """(R, C, P, P) -> mask logits (R, K, M, M)."""
        x = self.convs(x)
        if self.deconv_pyramid is not None:
            x = self.deconv_pyramid(x)
        logits = self.predict(x)
        return logits if self.boundary_refinement is None else self.boundary_refinement(logits)

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """As Detectron2's mask heads: the losses in training, the instances with ``pred_masks`` at inference."""
        output = super().forward(x, instances)
        if not self.training:
            return output
        if self.quasi_multitask is not None:
            output |= self.quasi_multitask(x, instances)
        if self.biased_training is not None:
            storage = get_event_storage()
            weight = self.biased_training.weight(storage.iter)
            storage.put_scalar("biased_training/alpha", weight, smoothing_hint=False)
            output = {name: weight * loss for name, loss in output.items()}
        return output
