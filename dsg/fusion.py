"""Feature fusion F_B and F_M (DSG, section 3.3): the MPN's features are added to the input of the box and the mask head.

Shapes: R RoIs, D channels of the MPN, C channels of the pyramid, S bins per side of the MPN (14), S / stride of the head.
"""

from contextlib import nullcontext

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from projects.errors import ConfigError


class FeatureFusion(nn.Module):
    """x + conv(F_), the convolution without normalisation and activation.

    Args:
        in_channels, out_channels: D and C.
        kernel_size: 3 has the weights of the paper's Table 1 (590,080 for 256 channels), 1 is what its text says.
        stride: 2 for the box head (14 bins to 7), 1 for the mask head.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"MODEL.DSG.FUSION_KERNEL must be odd (3 or 1 in the paper), found {kernel_size}.")
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        weight_init.c2_xavier_fill(self.conv)  # as Detectron2's FPN: no activation follows

    def forward(self, x: Tensor, mask_features: Tensor) -> Tensor:
        """(R, C, S / stride, S / stride), (R, D, S, S) -> the shape of ``x``. Features of a shorter type than that of ``x`` are
        convolved in theirs (MODEL.DSG.MPN_DTYPE_TEST)."""
        shorter = mask_features.dtype.itemsize < x.dtype.itemsize
        with torch.autocast(x.device.type, mask_features.dtype) if shorter else nullcontext():
            return x + self.conv(mask_features)
