"""Deformable ResNets on torchvision's operator: DCN rows of Table 3 without a compiled Detectron2.

The state dict has the names of Detectron2's DeformBottleneckBlock (``conv2_offset``, ``conv2.weight``, ...) and the same layout
of offsets, so that its DCN checkpoints load, and ImageNet weights of the plain ResNet fill everything but the offsets.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from projects.errors import ConfigError


class DeformBottleneckBlock(CNNBlockBase):
    """A bottleneck block whose 3x3 convolution samples at learned offsets (Dai et al., "Deformable Convolutional Networks").

    Args:
        block: the plain block, whose layers it takes over.
        modulated: also weight the samples, by a sigmoid (Zhu et al., "Deformable ConvNets v2").
        num_groups: groups of channels with offsets of their own.
    """

    def __init__(self, block: BottleneckBlock, modulated: bool = False, num_groups: int = 1):
        super().__init__(block.in_channels, block.out_channels, block.stride)
        self.shortcut, self.conv1, self.conv2, self.conv3 = block.shortcut, block.conv1, block.conv2, block.conv3
        self.modulated = modulated
        points = self.conv2.kernel_size[0] * self.conv2.kernel_size[1]
        self.conv2_offset = Conv2d(
            self.conv2.in_channels,
            (3 if modulated else 2) * points * num_groups,
            kernel_size=self.conv2.kernel_size,
            stride=self.conv2.stride,
            padding=self.conv2.padding,
            dilation=self.conv2.dilation,
        )
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        offset, weights = self.conv2_offset(out), None
        if self.modulated:
            a, b, weights = offset.chunk(3, dim=1)
            offset, weights = torch.cat([a, b], dim=1), weights.sigmoid()
        out = self._sample_and_convolve(out, offset, weights)
        conv = self.conv2
        if conv.norm is not None:
            out = conv.norm(out)
        out = self.conv3(F.relu_(out))
        return F.relu_(out + (x if self.shortcut is None else self.shortcut(x)))

    def _sample_and_convolve(self, x: Tensor, offset: Tensor, weights: Tensor | None) -> Tensor:
        """torchvision's operator has no half types on a CPU: it computes in float32 there."""
        conv, tensors = self.conv2, (x, offset, self.conv2.weight, self.conv2.bias, weights)
        half = x.device.type == "cpu" and x.dtype.itemsize == 2
        if half:
            tensors = tuple(None if t is None else t.float() for t in tensors)
        with torch.autocast(x.device.type, enabled=False) if half else nullcontext():
            inputs, offset, weight, bias, weights = tensors
            return deform_conv2d(inputs, offset, weight, bias, conv.stride, conv.padding, conv.dilation, weights).to(x.dtype)


@BACKBONE_REGISTRY.register()
def build_deform_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet with FPN, with deformable blocks in the stages (res2 to res5) that MODEL.RESNETS.DEFORM_ON_PER_STAGE
    names; DEFORM_MODULATED and DEFORM_NUM_GROUPS as in Detectron2. For depths of 50 and more; ConfigError for others."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH < 50 and any(resnets.DEFORM_ON_PER_STAGE):
        raise ConfigError(
            "Deformable blocks are bottleneck blocks: MODEL.RESNETS.DEPTH must be 50 or more with DEFORM_ON_PER_STAGE, found "
            f"{resnets.DEPTH}."
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    backbone = build_resnet_fpn_backbone(plain, input_shape)
    for stage, deform in zip(backbone.bottom_up.stages, resnets.DEFORM_ON_PER_STAGE, strict=True):
        for i, block in enumerate(stage if deform else ()):
            stage[i] = DeformBottleneckBlock(block, resnets.DEFORM_MODULATED, resnets.DEFORM_NUM_GROUPS)
    backbone.bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return backbone
