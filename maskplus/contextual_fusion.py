"""Contextual fusion (section 3.1): what the whole image shows is added to the mask features of each of its RoIs.

Shapes: N images, R RoIs of all images in order, C channels, P bins of the mask pooler, H and W the size of a feature map.
"""

import math

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from projects.errors import ConfigError


class ContextualFusion(nn.Module):
    """RoIAlign of one box that covers the image, 3x3 convolutions with ReLU, and addition to the RoI features.

    The map of an image ends where the image ends: cells of a padded batch that lie beyond it are never read. (Those inside
    know of the padding what the backbone's convolutions have brought in, as all of Detectron2's features do.)
    """

    @configurable
    def __init__(self, *, level: str, stride: int, in_channels: int, conv_dims: list[int], pooler: ROIPooler):
        """
        Args:
            level: name of the feature map, e.g. "p5".
            stride: image pixels per cell of that map.
            in_channels: of that map.
            conv_dims: filters of the convolutions; the last number is C, the channels of the RoI features.
            pooler: of that one level, to P x P bins.
        """
        super().__init__()
        self.level = level
        self.stride = stride
        self.pooler = pooler
        self.convs = nn.Sequential()
        for out_channels in conv_dims:
            conv = Conv2d(in_channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU())
            weight_init.c2_msra_fill(conv)
            self.convs.append(conv)
            in_channels = out_channels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Raises ConfigError when the level does not exist, a number of filters is none, or the sum would be of different
        numbers of channels."""
        maskplus, mask_head = cfg.MODEL.MASKPLUS, cfg.MODEL.ROI_MASK_HEAD
        level, conv_dims = maskplus.CONTEXT_LEVEL, list(maskplus.CONV_DIMS)
        if level not in input_shape:
            raise ConfigError(f"MODEL.MASKPLUS.CONTEXT_LEVEL is '{level}': expected one of {', '.join(input_shape)}.")
        if not all(isinstance(filters, int) and filters > 0 for filters in conv_dims):
            raise ConfigError(f"MODEL.MASKPLUS.CONV_DIMS is {conv_dims}: expected whole numbers of filters, at least 1 each.")
        roi_channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        if not conv_dims or conv_dims[-1] != roi_channels:
            raise ConfigError(
                f"MODEL.MASKPLUS.CONV_DIMS is {conv_dims}: its last number must be {roi_channels}, the channels of the RoI "
                "features that the context is added to."
            )
        shape = input_shape[level]
        return {
            "level": level,
            "stride": shape.stride,
            "in_channels": shape.channels,
            "conv_dims": conv_dims,
            "pooler": ROIPooler(
                output_size=mask_head.POOLER_RESOLUTION,
                scales=(1.0 / shape.stride,),
                sampling_ratio=mask_head.POOLER_SAMPLING_RATIO,
                pooler_type=mask_head.POOLER_TYPE,
            ),
        }

    def forward(self, x: Tensor, features: dict[str, Tensor], instances: list[Instances]) -> Tensor:
        """Add to the features of each RoI the context of its own image.

        Args:
            x: (R, C, P, P), RoI features.
            features: feature maps of the batch by level, (N, C_l, H_l, W_l).
            instances: the RoIs of each of the N images, zero or more; ``image_size`` is the image's own (height, width) in
                pixels, without padding.

        Returns:
            (R, C, P, P).
        """
        context = self.convs(self.pool(features[self.level], [rois.image_size for rois in instances]))
        parts = x.split([len(rois) for rois in instances])
        return torch.cat([part + own for part, own in zip(parts, context, strict=True)])

    def pool(self, features: Tensor, image_sizes: list[tuple[int, int]]) -> Tensor:
        """(N, C_l, H, W) and the N images' (height, width) in pixels -> (N, C_l, P, P)."""
        pooled = []
        for own, (height, width) in zip(features.split(1), image_sizes, strict=True):
            inside = own[:, :, : math.ceil(height / self.stride), : math.ceil(width / self.stride)]
            whole = Boxes(torch.tensor([[0.0, 0.0, width, height]], device=features.device))
            pooled.append(self.pooler([inside], [whole]))
        return torch.cat(pooled)
