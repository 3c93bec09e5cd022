"""PrRoIPool: RoI pooling by exact integration, differentiable by the boxes (Jiang et al., "Acquisition of Localization
Confidence for Accurate Object Detection", 2018)."""

import torch
from torch import Tensor, nn

from . import extension, reference
from .checks import check_pool_arguments


def prroi_pool(
    features: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    aligned: bool = False,
) -> Tensor:
    """Pool each RoI to a fixed size: a bin is the mean over its area of the bilinearly interpolated map, integrated exactly.

    Args:
        features: (N, C, H, W), float64, 32, 16 or bfloat16, in NCHW or channels_last memory. Pixel i lies at coordinate
            i of the map; outside of it the map falls to 0 within one pixel.
        rois: (R, 5), the index of the image in the batch and x0, y0, x1, y1 in image pixels.
        output_size: bins per side, or (rows, columns).
        spatial_scale: feature pixels per image pixel.
        aligned: subtract half a pixel after scaling, which agrees with Detectron2's RoIAlign.

    Returns:
        (R, C, rows, columns) in the type and memory format of ``features``; sums are taken in float32 at least. A RoI
        without area (x1 <= x0 or y1 <= y0), or with NaN or infinite coordinates, gives zeros and zero gradients.

    Gradients go to ``features`` and to the box coordinates, once; on the CPU those of the compiled operator are the
    same bit by bit for any number of threads.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: naming what was expected and what was given. (On a GPU a
            batch index out of range is printed and stops the kernel by an assertion.)

    Example: on the ramp f(x, y) = x, a bin has the x of its centre, and moves by half of what an edge moves.
        >>> ramp = torch.arange(8.0).repeat(8, 1).view(1, 1, 8, 8)
        >>> box = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]], requires_grad=True)
        >>> pooled = prroi_pool(ramp, box, 1, 1.0)
        >>> pooled.item(), torch.autograd.grad(pooled, box)[0].tolist()
        (3.0, [[0.0, 0.5, 0.0, 0.5, 0.0]])
    """
    size = check_pool_arguments(features, rois, output_size, spatial_scale)
    operator = torch.ops.projects.prroi_pool if extension.is_available(features.device) else reference.prroi_pool
    return operator(features, rois, size, spatial_scale, aligned)


class PrRoIPool(nn.Module):
    """:func:`prroi_pool` with fixed settings."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float, aligned: bool = False):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.aligned = aligned

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """(N, C, H, W), (R, 5) -> (R, C, rows, columns); see :func:`prroi_pool`."""
        return prroi_pool(features, rois, self.output_size, self.spatial_scale, self.aligned)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, aligned={self.aligned}"
