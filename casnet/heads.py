"""The map that the heads work on, the heads (section III.A), and HRNet's semantic segmentation alone.

Shapes: N images of H x W pixels (padded), h x w cells of the grid of 1 / OUTPUT_STRIDE, F channels of the fused map, C semantic
classes, K thing classes.
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from projects.errors import ConfigError

from .losses import IGNORED, enlarge, semantic_loss
from .norm import synchronized


class FeatureFusion(nn.Module):
    """The maps of a backbone resized (bilinearly) to the grid and concatenated, as HRNetV2 does. It has no weights.

    Attributes:
        channels: F.
    """

    @configurable
    def __init__(self, input_shape: Mapping[str, ShapeSpec], *, names: Sequence[str], output_stride: int):
        """
        Args:
            input_shape: of the backbone's maps.
            names: of those that are taken.
            output_stride: image pixels per cell of the grid.

        Raises:
            ConfigError: a name that the backbone does not have.
        """
        super().__init__()
        unknown = [name for name in names if name not in input_shape]
        if unknown or not names:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {list(names)}: expected maps of the backbone, which has "
                f"{', '.join(input_shape)}."
            )
        self.names = list(names)
        self.channels = sum(input_shape[name].channels for name in names)
        self.scale = input_shape[names[0]].stride, output_stride

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        stride = cfg.MODEL.CASNET.OUTPUT_STRIDE
        if stride not in (2, 4, 8):
            raise ConfigError(f"MODEL.CASNET.OUTPUT_STRIDE is {stride}: expected 2, 4 or 8.")
        names = list(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
        if stride == 2 and "stem" in input_shape:
            names.insert(0, "stem")
        return {"input_shape": input_shape, "names": names, "output_stride": stride}

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Maps by name -> (N, F, h, w)."""
        stride, output_stride = self.scale
        size = [side * stride // output_stride for side in features[self.names[0]].shape[-2:]]
        return torch.cat([enlarge(features[name], size) for name in self.names], dim=1)


class PixelHead(nn.Sequential):
    """1x1 convolution, batch norm, ReLU, 1x1 convolution: (N, F, h, w) -> (N, out_channels, h, w).

    The first convolution keeps F channels, as HRNetV2's does, and has no bias, which the batch norm would take away.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out_channels, kernel_size=1),
        )
        self.out_channels = out_channels
        nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self[3].weight, std=0.01)
        nn.init.zeros_(self[3].bias)


@SEM_SEG_HEADS_REGISTRY.register()
class HRNetSemanticHead(nn.Module):
    """The "normal HRNet" of section IV as a head of Detectron2's SemanticSegmentor: fusion, semantic head, cross-entropy."""

    @configurable
    def __init__(self, *, fusion: FeatureFusion, layers: PixelHead):
        super().__init__()
        self.fusion, self.layers = fusion, layers
        self.ignore_value = IGNORED

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        fusion = FeatureFusion(cfg, input_shape)
        layers = PixelHead(fusion.channels, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        return {"fusion": fusion, "layers": synchronized(layers, cfg)}

    def forward(self, features: Mapping[str, Tensor], targets: Tensor | None = None):
        """As Detectron2's heads do.

        Args:
            features: maps of the backbone by name.
            targets: (N, H, W) labels, in training.

        Returns:
            (None, losses) in training; else (logits (N, C, H, W), {}).
        """
        logits = self.layers(self.fusion(features))
        if self.training:
            return None, {"loss_semantic": semantic_loss(logits, targets)}
        stride = self.fusion.scale[1]
        return enlarge(logits, [side * stride for side in logits.shape[-2:]]), {}
