"""Mask Point R-CNN: contour points as an auxiliary task, fused into the mask. Importing it registers its parts and data."""

from . import evaluation, keypoint_branch, mapper, mask_head, roi_heads  # noqa: F401
from .config import add_maskpoint_config

__all__ = ["add_maskpoint_config"]
