"""Deconvolutional pyramid (section 3.2, figure 3): twice up, twice down again, with the maps of the way up added.

Shapes: R RoIs, C channels, P the side of the mask head's features (14).
"""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ConvTranspose2d
from torch import Tensor, nn

CHUNK = 8  # RoIs at a time at inference on a CPU: their maps of 4P fit into its cache


class DeconvPyramid(nn.Module):
    """Deconvolutions and convolutions of stride 2, all of C channels; ReLU after each, before the addition.

    With P = 14: d1 = deconv1(x) (28), d2 = deconv2(d1) (56), c1 = conv1(d2) + d1 (28), conv2(c1) + x (14).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.deconv1 = ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.deconv2 = ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.conv1 = Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.conv2 = Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        for layer in (self.deconv1, self.deconv2, self.conv1, self.conv2):
            weight_init.c2_msra_fill(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, P, P) -> (R, C, P, P). At inference on a CPU in chunks and channels last, which is faster."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.jit.is_tracing():  # a trace would fix their number
            return self._up_and_down(x)
        chunks = (part.contiguous(memory_format=torch.channels_last) for part in x.split(CHUNK))
        return torch.cat([self._up_and_down(chunk) for chunk in chunks])

    def _up_and_down(self, x: Tensor) -> Tensor:
        d1 = F.relu(self.deconv1(x))
        d2 = F.relu(self.deconv2(d1))
        c1 = F.relu(self.conv1(d2)) + d1
        return F.relu(self.conv2(c1)) + x
