"""SgRoIAlign: RoIAlign whose sample points are weighted by a probability map of the RoI (DSG, section on SgRoIAlign)."""

import torch
from torch import Tensor, nn

from . import extension, reference
from .checks import check_pool_arguments


def sg_roi_align(
    features: Tensor,
    rois: Tensor,
    prob: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool = True,
) -> Tensor:
    """Pool each RoI to a fixed size, guided by its probability map.

    A bin is the mean over its sample points of f * (1 + p): f the map, interpolated bilinearly as RoIAlign does, p the
    RoI's probability map at the same place, interpolated bilinearly too (the map spans the RoI, cell i covers [i, i + 1)
    of its cells, the edge is repeated). So p = 0 or ``prob=None`` is RoIAlign, and p = c is (1 + c) times RoIAlign.

    Args:
        features: (N, C, H, W), float64, 32, 16 or bfloat16, in NCHW or channels_last memory.
        rois: (R, 5), the index of the image in the batch and x0, y0, x1, y1 in image pixels.
        prob: (R, 1, Hp, Wp) probabilities, or None.
        output_size: bins per side, or (rows, columns).
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: points per bin and axis; 0 or less: as many as the bin has feature pixels, rounded up.
        aligned: half-pixel coordinates (pixel i covers [i, i + 1) of the map); False is the first RoIAlign, which lacks
            the half pixel and widens RoIs to one feature pixel.

    Returns:
        (R, C, rows, columns) in the type and memory format of ``features``; sums are taken in float32 at least. A RoI
        with NaN or infinite coordinates gives zeros; one of no size, or inverted, what RoIAlign gives.

    Gradients go to ``features`` and ``prob``, once; on the CPU those of the compiled operator are the same bit by bit for any
    number of threads.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: naming what was expected and what was given. ValueError also
            for ``rois`` that require a gradient. (On a GPU a batch index out of range is printed and stops the kernel by an
            assertion.)

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        >>> ones = torch.ones(1, 1, 4, 4)
        >>> sg_roi_align(ones, box, torch.full((1, 1, 28, 28), 0.5), 1, 1.0, 2).item()
        1.5
    """
    size = check_pool_arguments(features, rois, output_size, spatial_scale, prob, sampling_ratio)
    if rois.requires_grad and torch.is_grad_enabled():
        raise ValueError("sg_roi_align has no gradient for rois, and these require one: pass rois.detach()")
    operator = torch.ops.projects.sg_roi_align if extension.is_available(features.device) else reference.sg_roi_align
    return operator(features, rois, prob, size, spatial_scale, sampling_ratio, aligned)


class SgRoIAlign(nn.Module):
    """:func:`sg_roi_align` with fixed settings; without ``prob`` a faster RoIAlign with the interface of Detectron2's."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool = True):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, features: Tensor, rois: Tensor, prob: Tensor | None = None) -> Tensor:
        """(N, C, H, W), (R, 5), (R, 1, Hp, Wp) or None -> (R, C, rows, columns); see :func:`sg_roi_align`."""
        return sg_roi_align(features, rois, prob, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
