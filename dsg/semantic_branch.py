"""HTC's semantic branch: a semantic segmentation of the whole image, whose features the box and mask heads see.

Every level of the pyramid is convolved (1x1, ReLU) and resized to that of stride 8, and they are summed; four 3x3 convolutions
with ReLU follow; from there one 1x1 convolution gives class logits, another one (with ReLU) the embedding.

Shapes: N images of H x W pixels (with the batch's padding), C channels, K semantic classes; h, w = H / 8, W / 8.
"""

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from fvcore.nn import weight_init
from torch import Tensor, nn

from projects.errors import ConfigError

SEMANTIC = "semantic"  # the embedding's name among the features


class SemanticBranch(nn.Module):
    """Logits have K + 1 channels: the last one is COCO-Stuff's "unlabeled", as in the 183 outputs of HTC's code base. No pixel
    is trained on it, since unlabelled pixels are ignored.

    Args:
        in_features: names of the pyramid's levels.
        common: index of the one of them whose size the others are resized to.
        channels: C, of the levels and of all layers.
        num_classes: K.
        ignore_value: label of pixels without a class.
        loss_weight: of ``loss_sem_seg``.
    """

    @configurable
    def __init__(
        self, *, in_features: list[str], common: int, channels: int, num_classes: int, ignore_value: int, loss_weight: float
    ):
        super().__init__()
        self.in_features = in_features
        self.common = common
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight

        def convolution(kernel: int, out_channels: int = channels, activation=F.relu) -> Conv2d:
            layer = Conv2d(channels, out_channels, kernel, padding=kernel // 2, activation=activation)
            weight_init.c2_msra_fill(layer)
            return layer

        self.laterals = nn.ModuleList(convolution(1) for _ in in_features)
        self.convs = nn.Sequential(*(convolution(3) for _ in range(4)))
        self.embedding = convolution(1)
        self.predictor = convolution(1, num_classes + 1, activation=None)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "in_features": head.IN_FEATURES,
            "common": common_level(cfg, input_shape),
            "channels": input_shape[head.IN_FEATURES[0]].channels,
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, K + 1, h, w) and embedding (N, C, h, w)."""
        size = features[self.in_features[self.common]].shape[-2:]
        levels = [lateral(features[name]) for lateral, name in zip(self.laterals, self.in_features, strict=True)]
        resized = [
            level if level.shape[-2:] == size else F.interpolate(level, size, mode="bilinear", align_corners=False)
            for level in levels
        ]
        x = self.convs(sum(resized))
        return self.predictor(x), self.embedding(x)

    def loss(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy, mean over the cells that have a class; a connected zero without any.

        Args:
            labels: (N, H, W), classes of the pixels; each cell takes that of the pixel at its middle.
        """
        labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0].long()
        total = F.cross_entropy(logits.float(), labels, ignore_index=self.ignore_value, reduction="sum")
        return {"loss_sem_seg": self.loss_weight * total / (labels != self.ignore_value).sum().clamp(min=1)}


def common_level(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> int:
    """Which of MODEL.SEM_SEG_HEAD.IN_FEATURES has MODEL.SEM_SEG_HEAD.COMMON_STRIDE. Raises ConfigError where none has."""
    head = cfg.MODEL.SEM_SEG_HEAD
    strides = [input_shape[name].stride for name in head.IN_FEATURES]
    if head.COMMON_STRIDE not in strides:
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {head.COMMON_STRIDE}: expected the stride of one of the levels in "
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES, {', '.join(map(str, strides))}."
        )
    return strides.index(head.COMMON_STRIDE)
