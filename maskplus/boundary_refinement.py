"""Boundary refinement (section 3.3, figure 4): a residual that sharpens the mask logits.

Shapes: R RoIs, C channels of the logits (classes), M the side of the mask (28).

In both kinds the last convolution starts at zero: training begins with the logits as they are.
"""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from projects.errors import ConfigError

MODULES = 4  # section 4.6: "repeated for 4 modules"
BOTTLENECK = 16  # filters of a module's first convolution
GROWTH = 4  # filters of its second one
PRELU_SLOPE = 0.001  # where the slope starts in the paper's code base, Tensorpack


class OriginalBoundaryRefinement(nn.Module):
    """Peng et al. [26]: logits + conv3x3(ReLU(conv3x3(logits)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Conv2d(channels, channels, kernel_size=3, padding=1, activation=nn.ReLU())
        self.conv2 = Conv2d(channels, channels, kernel_size=3, padding=1)
        weight_init.c2_msra_fill(self.conv1)
        zero(self.conv2)

    def forward(self, logits: Tensor) -> Tensor:
        """(R, C, M, M) -> (R, C, M, M)."""
        return logits + self.conv2(self.conv1(logits))


class DenseBoundaryRefinement(nn.Module):
    """The paper's: four modules with dense connections (section 4.6), then a 1x1 convolution back to C channels.

    Module k (from 0) takes the logits and the outputs of all modules before it, C + 4k channels, and gives 4; the
    last convolution takes them all, C + 16.
    """

    def __init__(self, channels: int):
        super().__init__()
        widths = [channels + GROWTH * k for k in range(MODULES + 1)]
        self.blocks = nn.ModuleList(dense_module(width) for width in widths[:-1])
        self.last = Conv2d(widths[-1], channels, kernel_size=1)
        zero(self.last)

    def forward(self, logits: Tensor) -> Tensor:
        """(R, C, M, M) -> (R, C, M, M)."""
        x = logits
        for block in self.blocks:
            x = torch.cat([x, block(x)], dim=1)
        return logits + self.last(x)


def dense_module(in_channels: int) -> nn.Sequential:
    """BN, PReLU, 1x1 conv (16), BN, PReLU, 3x3 conv (4); one slope per PReLU.

    The convolutions have no bias: the batch norm after the first takes one away, and the second's is the last one's too.
    """
    module = nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.PReLU(init=PRELU_SLOPE),
        Conv2d(in_channels, BOTTLENECK, kernel_size=1, bias=False),
        nn.BatchNorm2d(BOTTLENECK),
        nn.PReLU(init=PRELU_SLOPE),
        Conv2d(BOTTLENECK, GROWTH, kernel_size=3, padding=1, bias=False),
    )
    for layer in (module[2], module[5]):
        weight_init.c2_msra_fill(layer)
    return module


def zero(conv: Conv2d) -> None:
    """Let a convolution give 0 at the start."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


KINDS = {"none": None, "original": OriginalBoundaryRefinement, "dense": DenseBoundaryRefinement}


def build_boundary_refinement(kind: str, channels: int) -> nn.Module | None:
    """The refinement that MODEL.MASKPLUS.BOUNDARY names, for logits of ``channels`` channels; None for "none".

    Raises ConfigError for another name.
    """
    if kind not in KINDS:
        raise ConfigError(f"MODEL.MASKPLUS.BOUNDARY is '{kind}': expected one of {', '.join(KINDS)}.")
    return KINDS[kind](channels) if KINDS[kind] else None
