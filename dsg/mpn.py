"""The Mask Proposal Network of the mRPN (DSG, section 3.2 and Fig. 3): a class-agnostic mask and features for every RoI.

Shapes: N images, R RoIs of all images in order, C channels of the pyramid, D channels of the mask head, S bins per side of the
mask head's pooler (14), M = 2 S pixels per side of a mask (28). Boxes are x0, y0, x1, y1 in image pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from projects.errors import ConfigError
from projects.layers.checks import is_channels_last
from projects.modeling.pooler import Pooler

CHUNK = {"cpu": 64, "cuda": 256}  # RoIs at a time where no graph is kept: 1,000 at once need 2 GB in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MPN(nn.Module):
    """RoIAlign -> the standard mask head with one output channel, of which the last convolution's output is kept.

    It has the shape of the model's own mask head (MODEL.ROI_MASK_HEAD): in the paper 14 x 14 bins, 4 x (3x3, 256, ReLU), a
    2x2 deconvolution of 256 with ReLU, 1x1 to one channel.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: Pooler,
        head: MaskRCNNConvUpsampleHead,
        dtype_test: torch.dtype = torch.float32,
    ):
        """
        Args:
            in_features: names of the pyramid's levels that it pools from.
            pooler: RoIAlign with S bins per side.
            head: with one output channel.
            dtype_test: what the head computes in at inference; bfloat16 by autocast.
        """
        super().__init__()
        self.in_features = in_features
        self.pooler = pooler
        self.head = head
        self.dtype_test = dtype_test

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        shape = ShapeSpec(channels=input_shape[in_features[0]].channels, height=side, width=side)
        arguments = MaskRCNNConvUpsampleHead.from_config(cfg, shape)
        if cfg.MODEL.ROI_MASK_HEAD.NUM_CONV < 1:
            raise ConfigError("DSG fuses what the mask head's convolutions make: set MODEL.ROI_MASK_HEAD.NUM_CONV 1 or more.")
        if cfg.MODEL.DSG.MPN_DTYPE_TEST not in DTYPES:
            raise ConfigError(
                f"MODEL.DSG.MPN_DTYPE_TEST is '{cfg.MODEL.DSG.MPN_DTYPE_TEST}': expected one of {', '.join(DTYPES)}."
            )
        return {
            "in_features": in_features,
            "pooler": build_pooler(cfg.MODEL.ROI_MASK_HEAD, in_features, input_shape),
            "head": MaskRCNNConvUpsampleHead(**{**arguments, "num_classes": 1}),
            "dtype_test": DTYPES[cfg.MODEL.DSG.MPN_DTYPE_TEST],
        }

    def forward(self, features: dict[str, Tensor], boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Mask logits (R, 1, M, M) and mask features F_ (R, D, S, S) of the boxes of each of the N images.

        The mask spans its box; its sigmoid is P of the paper. Without gradients the boxes go through in chunks, which bounds
        the memory and changes nothing else. F_ comes in the type that it was computed in, the logits in that of the features.
        """
        levels = [features[name] for name in self.in_features]
        if torch.is_grad_enabled():
            return logits_and_features(self.head, self.pooler(levels, boxes))
        device = levels[0].device
        lower = not self.training and self.dtype_test != torch.float32

        def of_part(part: list[Boxes]) -> tuple[Tensor, Tensor]:
            pooled = self.pooler(levels, part)
            with torch.autocast(device.type, self.dtype_test) if lower else nullcontext():
                logits, mask_features = logits_and_features(self.head, pooled)
            return logits.to(pooled.dtype), mask_features

        return run_in_chunks(map(of_part, in_chunks(boxes, chunk_size(device))), sum(map(len, boxes)))


def features_of(head: MaskRCNNConvUpsampleHead, x: Tensor) -> Tensor:
    """F_ (R, D, S, S), what a mask head makes of pooled features (R, C, S, S) before its deconvolution."""
    for convolution in head.conv_norm_relus:
        x = convolution(x)
    return x


def logits_and_features(head: MaskRCNNConvUpsampleHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask head makes of pooled features (R, C, S, S): its logits (R, K, M, M), and F_ (R, D, S, S)."""
    mask_features = features_of(head, x)
    return head.predictor(head.deconv_relu(head.deconv(mask_features))), mask_features


def build_pooler(head: CfgNode, in_features: list[str], input_shape: dict[str, ShapeSpec]) -> Pooler:
    """The pooler of a head (MODEL.ROI_BOX_HEAD or MODEL.ROI_MASK_HEAD) that takes probability maps; without them it is the
    ROIAlignV2 that Detectron2 would build. Raises ConfigError for another POOLER_TYPE."""
    if head.POOLER_TYPE != "ROIAlignV2":
        raise ConfigError(
            f"DSG pools with SgRoIAlign, which is ROIAlignV2 where it is not guided: POOLER_TYPE of the box and the mask head "
            f"must be 'ROIAlignV2', found '{head.POOLER_TYPE}'."
        )
    scales = [1 / input_shape[name].stride for name in in_features]
    return Pooler(head.POOLER_RESOLUTION, scales, head.POOLER_SAMPLING_RATIO)


def chunk_size(device: torch.device) -> int:
    return CHUNK.get(device.type, CHUNK["cuda"])


def in_chunks(rois: list[Boxes] | list[Instances], size: int) -> Iterator[list]:
    """The RoIs of N images, ``size`` of them at a time in their order, each time as a list of N; at least one such list."""
    for start in range(0, max(sum(map(len, rois)), 1), size):
        part, first = [], start  # first, counted from this image's first RoI
        for of_image in rois:
            part.append(of_image[max(first, 0) : max(first + size, 0)])
            first -= len(of_image)
        yield part


def run_in_chunks(outputs: Iterable[tuple[Tensor, ...]], rows: int) -> tuple[Tensor, ...]:
    """The outputs of all chunks, one below the other, without a moment at which they exist twice; ``rows`` together."""
    start, results = 0, ()
    for of_chunk in outputs:
        results = results or tuple(_empty_like(output, rows) for output in of_chunk)
        for result, output in zip(results, of_chunk, strict=True):
            result[start : start + len(output)] = output
        start += len(of_chunk[0])
    return results


def _empty_like(output: Tensor, rows: int) -> Tensor:
    memory_format = torch.channels_last if is_channels_last(output) else torch.contiguous_format
    return torch.empty((rows, *output.shape[1:]), dtype=output.dtype, device=output.device, memory_format=memory_format)
