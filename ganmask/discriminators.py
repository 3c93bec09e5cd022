"""The box and the mask discriminator, D_b and D_m (figures 2 and 3; Table 6 for fewer layers).

Shapes: R foreground RoIs, C channels of the feature maps, P = 28 bins on a side, W filters of the first convolution.

The paper gives the number of convolutions (5), their input (28 x 28) and what follows them. Strides and widths are those of
the authors' code, 28 -> 14 -> 7 -> 4 -> 2 -> 1 and 64, 128, 256, 512, except for the third kernel, 3: with their 4 the chain
breaks at 28 (28, 14, 7, 3, 1). Three and four layers are ours: 28 -> 14 -> 7 -> 1 and 28 -> 14 -> 7 -> 4 -> 1.
"""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from projects.errors import ConfigError

from .samples import Samples

SIDE = 28
CONVOLUTIONS = {  # number of layers -> kernel, stride, padding of each
    3: [(4, 2, 1), (4, 2, 1), (7, 1, 0)],
    4: [(4, 2, 1), (4, 2, 1), (3, 2, 1), (4, 1, 0)],
    5: [(4, 2, 1), (4, 2, 1), (3, 2, 1), (4, 2, 1), (2, 1, 0)],
}


class Judgement(NamedTuple):
    """What the discriminators say of R samples.

    Attributes:
        real_scores, fake_scores: (R,), logits of D_b that the box is a real one.
        real_features, fake_features: the masked input of D_m and the output of each of its layers, (R, C_l, H_l, W_l).
    """

    real_scores: Tensor
    fake_scores: Tensor
    real_features: list[Tensor]
    fake_features: list[Tensor]


class Discriminator(nn.ModuleList):
    """Convolutions without bias from 28 x 28 to 1 x 1, with batch norm and LeakyReLU (0.2) after them.

    Batch norm always uses the statistics of its batch: a discriminator never runs at inference, and keeps no others.

    Args:
        in_channels: C.
        widths: filters of each convolution; their number chooses the shapes in :data:`CONVOLUTIONS`.
        norm: whether batch norm follows, for each convolution.
        activation: whether LeakyReLU follows, for each convolution.
    """

    def __init__(self, in_channels: int, widths: list[int], norm: list[bool], activation: list[bool]):
        layers = []
        for (kernel, stride, padding), width, has_norm, has_activation in zip(
            CONVOLUTIONS[len(widths)], widths, norm, activation, strict=True
        ):
            layer = nn.Sequential(nn.Conv2d(in_channels, width, kernel, stride, padding, bias=False))
            if has_norm:
                layer.append(nn.BatchNorm2d(width, track_running_stats=False))
            if has_activation:
                layer.append(nn.LeakyReLU(0.2, inplace=True))
            layers.append(layer)
            in_channels = width
        super().__init__(layers)

    def forward(self, *parts: Tensor) -> list[Tensor]:
        """Parts of a batch, (R_i, C, 28, 28) each -> the output of each layer for the whole batch, (R, C_l, H_l, W_l).

        The first convolution takes the parts one by one: that saves a copy of the largest tensors, and the gradients of a part
        that needs none.
        """
        first, *others = self
        x = first[1:](torch.cat([first[0](part) for part in parts]))
        outputs = [x]
        for layer in others:
            x = layer(x)
            outputs.append(x)
        return outputs


class Discriminators(nn.Module):
    """D_b and D_m. Real and fake samples pass as one batch, so that batch norm sees both and never a single value."""

    @configurable
    def __init__(self, *, in_channels: int, layers: int = 5, width: int = 64, norm_everywhere: bool = False):
        """
        Args:
            in_channels: C.
            layers: 3, 4 or 5.
            width: filters of the first convolution, doubled by each that follows; the box discriminator's last has one.
            norm_everywhere: batch norm and LeakyReLU after every convolution; else no batch norm after the first, and neither
                after the last one of the box discriminator.
        """
        super().__init__()
        if layers not in CONVOLUTIONS:
            known = ", ".join(map(str, CONVOLUTIONS))
            raise ConfigError(f"MODEL.GANMASK.DISCRIMINATOR_LAYERS is {layers}: expected one of {known}.")
        widths = [width * 2**i for i in range(layers)]
        inner, everywhere = [False] + [True] * (layers - 2), [True] * layers
        self.box = Discriminator(
            in_channels,
            [*widths[:-1], 1],
            norm=everywhere if norm_everywhere else [*inner, False],
            activation=everywhere if norm_everywhere else [*everywhere[:-1], False],
        )
        self.mask = Discriminator(
            in_channels, widths, norm=everywhere if norm_everywhere else [*inner, True], activation=everywhere
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Raises ConfigError when the masks are not 28 x 28."""
        ganmask, resolution = cfg.MODEL.GANMASK, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        if 2 * resolution != SIDE:
            raise ConfigError(
                f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is {resolution}: expected {SIDE // 2}, since the discriminators take "
                f"masks of {SIDE} x {SIDE}."
            )
        return {
            "in_channels": input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels,
            "layers": ganmask.DISCRIMINATOR_LAYERS,
            "width": ganmask.DISCRIMINATOR_WIDTH,
            "norm_everywhere": ganmask.NORM_EVERYWHERE,
        }

    def forward(self, samples: Samples) -> Judgement:
        """Judge R samples; without any, every weight is still part of the graph."""
        count = len(samples.features)
        scores = self.box(samples.real_boxes, samples.fake_boxes)[-1].flatten()
        real, fake = samples.real_masks * samples.features, samples.fake_masks * samples.features
        features = self.mask(real, fake)
        return Judgement(
            real_scores=scores[:count],
            fake_scores=scores[count:],
            real_features=[real, *(f[:count] for f in features)],
            fake_features=[fake, *(f[count:] for f in features)],
        )
