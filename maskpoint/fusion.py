"""Edge feature fusion (sections III-D and IV-C, equations 1 and 2, figure 4): what the keypoint branch knows of the edge meets
the mask logits.

Shapes: R RoIs of all images in order, K key points, S the side of the heat maps (56; design d: 28), C channels of the mask
logits (classes), N the side of the mask (28; design c: 56).
"""

from collections.abc import Callable

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from projects.errors import ConfigError

DESIGNS = ("a", "b", "c", "d")
REDUCTIONS = ("conv", "maxpool", "avgpool")
MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"multiply": torch.mul, "add": torch.add, "max": torch.maximum}


class EdgeFusion(nn.Module):
    """O_m = O_k (x) f_m: one map O_k of all heat maps, at the side of the mask, broadcast onto every channel of its logits f_m.

    Designs: (b) reduce every heat map, then add them up; (a) add them up, then reduce the sum; (c) and (d) add up heat maps
    that have the side of the mask already. There is no activation after the convolution (section III-D).

    In (b) the sum of one convolution per heat map is one convolution of K channels into one, and so it is written.
    At the start it gives 1 for "multiply", else 0, and weights near zero: with "multiply" and "add" the mask logits begin as
    they are, with "max" the negative ones as 0.
    """

    def __init__(self, num_keypoints: int, design: str = "b", reduction: str = "conv", mode: str = "multiply"):
        """
        Args:
            num_keypoints: K.
            design: "a", "b", "c" or "d".
            reduction: "conv" (3x3, stride 2), "maxpool" or "avgpool" (2x2): from S to S / 2 in designs a and b.
            mode: "multiply", "add" or "max".

        Raises:
            ConfigError: another value.
        """
        super().__init__()
        for key, value, known in (
            ("FUSION_DESIGN", design, DESIGNS),
            ("REDUCTION", reduction, REDUCTIONS),
            ("FUSION_MODE", mode, MODES),
        ):
            if value not in known:
                raise ConfigError(f"MODEL.MASKPOINT.{key} is '{value}': expected one of {', '.join(known)}.")
        self.design = design
        self.fuse = MODES[mode]
        if design in ("c", "d"):
            self.reduce = nn.Identity()
        elif reduction == "conv":
            self.reduce = Conv2d(num_keypoints if design == "b" else 1, 1, kernel_size=3, stride=2, padding=1)
            nn.init.normal_(self.reduce.weight, std=0.001)
            nn.init.constant_(self.reduce.bias, 1.0 if mode == "multiply" else 0.0)
        else:
            self.reduce = nn.MaxPool2d(2) if reduction == "maxpool" else nn.AvgPool2d(2)

    def forward(self, heatmaps: Tensor, mask_logits: Tensor) -> Tensor:
        """(R, K, S, S), (R, C, N, N) -> (R, C, N, N)."""
        return self.fuse(mask_logits, self.edge_map(heatmaps))

    def edge_map(self, heatmaps: Tensor) -> Tensor:
        """O_k (equation 1): (R, K, S, S) -> (R, 1, N, N)."""
        if self.design == "b":
            return self.reduce(heatmaps).sum(dim=1, keepdim=True)
        return self.reduce(heatmaps.sum(dim=1, keepdim=True))
