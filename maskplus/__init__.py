"""MaskPlus: five independent techniques for the mask branch of Mask R-CNN. Importing it registers its heads."""

from . import mask_head, roi_heads  # noqa: F401
from .config import add_maskplus_config

__all__ = ["add_maskplus_config"]
