"""The operators' demands on their arguments; what only the values can tell (batch indices) is checked where they are read."""

import math
from numbers import Real

import torch
from torch import Tensor

MOST_POINTS = 1024  # per bin and axis, as the kernels allow
MOST_BINS = 2**15  # per side: far below what overflows a count of numbers


def sum_dtype(features: Tensor) -> torch.dtype:
    """The type in which coordinates are read and products summed: float32 for half types."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def is_channels_last(tensor: Tensor) -> bool:
    """Whether an output for this input is channels_last: where it cannot be read as NCHW as well."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def check_pool_arguments(
    features: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    prob: Tensor | None = None,
    sampling_ratio: int = 0,
) -> list[int]:
    """Check everything but the values, and return the output size as [rows, columns].

    Raises:
        TypeError: something is not a tensor, or of the wrong type.
        ValueError: a wrong shape, device or number.
        NotImplementedError: something carries a forward-mode derivative, which would be lost.
    """
    for name, tensor in [("features", features), ("rois", rois), ("prob", prob)]:
        if tensor is None and name == "prob":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
        if not torch.compiler.is_compiling() and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name} carries a forward-mode derivative; these operators have gradients only")
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {tensor.device}")
        allowed = {features.dtype, torch.float32}
        if tensor.dtype not in allowed and not _autocasts(features.device.type):
            expected = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{name} must be {expected} for {features.dtype} features, got {tensor.dtype}")
    if features.dim() != 4 or 0 in features.shape[2:]:
        raise ValueError(f"features must be (N, C, H, W) with H, W > 0, got {tuple(features.shape)}")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois must be (R, 5): batch index, x0, y0, x1, y1; got {tuple(rois.shape)}")
    if prob is not None and (prob.dim() != 4 or prob.shape[:2] != (rois.shape[0], 1) or 0 in prob.shape[2:]):
        raise ValueError(
            f"prob must be (R, 1, Hp, Wp) with R = {rois.shape[0]} as in rois and Hp, Wp > 0, got {tuple(prob.shape)}"
        )
    size = list(output_size) if isinstance(output_size, tuple | list) else [output_size] * 2
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= MOST_BINS for side in size):
        raise ValueError(
            f"output_size must be a positive int or two of them (rows, columns), at most {MOST_BINS} each, got {output_size!r}"
        )
    if not (isinstance(spatial_scale, Real) and math.isfinite(spatial_scale) and spatial_scale > 0):
        raise ValueError(f"spatial_scale must be a positive number (feature pixels per image pixel), got {spatial_scale!r}")
    if not isinstance(sampling_ratio, int) or sampling_ratio > MOST_POINTS:
        raise ValueError(f"sampling_ratio must be an int of at most {MOST_POINTS}, got {sampling_ratio!r}")
    return size


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_batch_indices(rois: Tensor, images: int) -> None:
    """Raise IndexError when the first column of `rois` names an image that is not there. Reads the values."""
    wrong = torch.nonzero(~((rois[:, 0] >= 0) & (rois[:, 0] < images)))
    if len(wrong):
        row = wrong[0, 0].item()
        raise IndexError(f"the batch index of RoI {row} must be in [0, {images}), got {rois[row, 0].item()}")
