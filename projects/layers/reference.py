"""SgRoIAlign and PrRoIPool in PyTorch: what the compiled kernels are tested against, and the fallback without them.

Both operators are weighted sums of map pixels: each axis of each bin gives a few pixels with weights, a bin's pixels are
all pairs of them, and ``embedding_bag`` adds up the channels. Gradients come from autograd.

Shapes: N images, C channels, H, W map, R RoIs, P bins on an axis, S points of a bin on an axis, K pixels of a bin on an axis.
Coordinates are feature pixels; pixel i lies at coordinate i.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_batch_indices, is_channels_last, sum_dtype

CHUNK = 64  # RoIs at a time: all of them get the number of taps that the largest needs
MAX_GRID = 2**30


def sg_roi_align(
    features: Tensor,
    rois: Tensor,
    prob: Tensor | None,
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """See :func:`projects.layers.sg_roi_align`."""

    def axis(start: Tensor, end: Tensor, bins: int, size: int):
        """Points of every bin: pixels (R, P, S, 2), their weights, places in the RoI as fractions (R, P, S), share (R,)."""
        length = end - start if aligned else (end - start).clamp(min=1)
        bin_size = (length / bins)[:, None, None]
        start = start[:, None, None]
        grid = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp(0, MAX_GRID)
        divisor = grid.clamp(min=1)
        k = torch.arange(bins, device=start.device, dtype=start.dtype)[:, None]
        first, last, points = torch.zeros_like(grid), grid, sampling_ratio
        if sampling_ratio <= 0:  # only points that can lie on the map: a huge RoI costs no more than the map
            step = bin_size / divisor
            origin = start + k * bin_size + step / 2
            first = ((-1 - origin) / step - 1).floor().clamp(min=0)
            last = torch.where(step > 0, ((size - origin) / step + 3).floor().minimum(grid), 0)
            first = torch.where(step > 0, first, 0)
            points = _most(last - first)
        sample = first + torch.arange(points, device=start.device, dtype=start.dtype)
        x = start + k * bin_size + (sample + 0.5) * bin_size / divisor
        inside = (sample < last) & (x >= -1) & (x <= size)
        pixels, weights = _neighbours(torch.where(inside, x, 0).clamp(0, size - 1), size)
        fraction = torch.where(inside, (k + (sample + 0.5) / divisor) / bins, 0)
        return pixels, weights * inside[..., None], fraction, 1 / divisor[:, 0, 0]

    def taps(boxes: Tensor, chosen: slice):
        y, wy, v, share_y = axis(boxes[:, 1], boxes[:, 3], output_size[0], features.shape[2])
        x, wx, u, share_x = axis(boxes[:, 0], boxes[:, 2], output_size[1], features.shape[3])
        share = (share_y * share_x)[:, None, None, None, None].expand(-1, *v.shape[1:], *u.shape[1:])
        if prob is not None:
            p = _interpolate(prob[chosen, 0].to(boxes.dtype), v.flatten(1), u.flatten(1))
            share = share * (1 + p.view(share.shape))
        # (R, Py, Sy, 2, Px, Sx, 2) -> (R, Py, Px, Sy, 2, Sx, 2)
        weights = torch.einsum("rpsa,rqtb,rpsqt->rpqsatb", wy, wx, share)
        return y.flatten(2), x.flatten(2), weights

    return _pool(features, rois, output_size, spatial_scale, 0.5 if aligned else 0.0, taps)


def prroi_pool(features: Tensor, rois: Tensor, output_size: list[int], spatial_scale: float, aligned: bool) -> Tensor:
    """See :func:`projects.layers.prroi_pool`."""

    def axis(start: Tensor, end: Tensor, bins: int, size: int):
        """Pixels (R, P, K) of every bin, and their weights: the means over the bin of the pixels' hat functions."""
        k = torch.arange(bins, device=start.device)
        bin_size = ((end - start).clamp(min=0) / bins)[:, None]
        lower, upper = start[:, None] + k * bin_size, start[:, None] + (k + 1) * bin_size
        first = lower.detach().floor().clamp(0, size)
        last = (upper.detach().ceil() + 1).clamp(0, size)
        count = _most(last - first)
        pixels = first[..., None] + torch.arange(count, device=start.device)
        filled = ((upper > lower)[..., None]) & (pixels < last[..., None])
        mean = _mean_of_hat(lower[..., None] - pixels, torch.where(filled, (upper - lower)[..., None], 1))
        return pixels.clamp(max=size - 1).long(), torch.where(filled, mean, 0)

    def taps(boxes: Tensor, chosen: slice):
        boxes = boxes.double()  # small bins far from 0 lose digits otherwise
        y, wy = axis(boxes[:, 1], boxes[:, 3], output_size[0], features.shape[2])
        x, wx = axis(boxes[:, 0], boxes[:, 2], output_size[1], features.shape[3])
        return y, x, torch.einsum("rpk,rql->rpqkl", wy, wx)

    return _pool(features, rois, output_size, spatial_scale, 0.5 if aligned else 0.0, taps)


def _pool(
    features: Tensor, rois: Tensor, output_size: list[int], spatial_scale: float, offset: float, taps: Callable
) -> Tensor:
    """Sum the pixels that ``taps(boxes (r, 4), slice of the RoIs)`` names, with their weights.

    It returns rows (r, Py, Ky) and columns (r, Px, Kx) of the map, and weights (r, Py, Px, ...) for all Ky * Kx pairs. Pixels
    of weight 0, which fill up the lists, are not read: they may be NaN. Autocast has no part in the weights.
    """
    device = features.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return _pool_in_full_precision(features, rois, output_size, spatial_scale, offset, taps)


def _pool_in_full_precision(features, rois, output_size, spatial_scale, offset, taps) -> Tensor:
    images, channels, height, width = features.shape
    check_batch_indices(rois, images)
    dtype = sum_dtype(features)
    pixels = features.permute(0, 2, 3, 1).reshape(images * height * width, channels).to(dtype)
    pixels = F.pad(pixels, (0, 0, 0, 1))  # the last row stands in for pixels of weight 0
    rois = rois.to(dtype)
    scaled = rois[:, 1:] * spatial_scale - offset
    finite = torch.isfinite(scaled[:, 2:] - scaled[:, :2]).all(dim=1)
    boxes = torch.where(finite[:, None], scaled, 0)
    outputs = []
    for start in range(0, max(len(rois), 1), CHUNK):
        chosen = slice(start, start + CHUNK)
        rows, columns, weights = taps(boxes[chosen], chosen)
        rows = rows + (rois[chosen, 0].long() * height)[:, None, None]
        index = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
        bags = index.shape[:3].numel()
        weights = weights.flatten(3) * finite[chosen, None, None, None]
        if index.numel() == 0 or channels == 0:  # nothing to add up: zeros that know where they come from
            output = (pixels[:0].sum() + weights.sum().to(dtype)).expand(bags, channels)
        else:
            weights = weights.reshape(bags, -1)
            index = torch.where(weights != 0, index.reshape(bags, -1), len(pixels) - 1)
            output = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weights.to(dtype))
        outputs.append(output.view(len(rows), *output_size, channels))
    output = torch.cat(outputs).permute(0, 3, 1, 2).to(features.dtype)
    return output.contiguous(memory_format=torch.channels_last if is_channels_last(features) else torch.contiguous_format)


def _most(counts: Tensor) -> int:
    return int(counts.max().clamp(min=0)) if counts.numel() else 0


def _neighbours(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels around x, inside [0, size - 1], and their shares in the linear interpolation: two (..., 2)."""
    low = x.floor().clamp(max=max(size - 2, 0))
    share = x - low
    pixels = torch.stack([low, (low + 1).clamp(max=size - 1)], dim=-1).long()
    return pixels, torch.stack([1 - share, share], dim=-1)


def _interpolate(prob: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """Probability maps (R, Hp, Wp) at the fractions v (R, Y), u (R, X) of the RoI, half-pixel, edge repeated: (R, Y, X)."""

    def matrix(fraction: Tensor, cells: int) -> Tensor:
        index, weights = _neighbours((fraction * cells - 0.5).clamp(0, cells - 1), cells)
        return weights.new_zeros((*fraction.shape, cells)).scatter_add(-1, index, weights)

    return torch.einsum("ryh,rhw,rxw->ryx", matrix(v, prob.shape[1]), prob, matrix(u, prob.shape[2]))


def _mean_of_hat(a: Tensor, width: Tensor) -> Tensor:
    """The mean of max(0, 1 - |x|) over [a, a + width]: of its rising and its falling side, each side's share of the width times
    the value in the middle of that. The shares need no gradient: what one side gains the other loses, at the same value."""
    mean = 0
    for low, high in [(-1.0, 0.0), (0.0, 1.0)]:
        with torch.no_grad():
            start, end = ((edge - a).clamp(min=0).minimum(width) / width for edge in (low, high))
        middle = (start + end) / 2 * width
        mean = mean + (end - start) * (a + 1 + middle if high == 0 else 1 - a - middle)
    return mean
