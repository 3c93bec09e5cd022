"""Operators that Detectron2 and torchvision do not have, compiled (csrc/) or in PyTorch (reference.py)."""

from .prroi_pool import PrRoIPool, prroi_pool
from .sg_roi_align import SgRoIAlign, sg_roi_align

__all__ = ["PrRoIPool", "SgRoIAlign", "prroi_pool", "sg_roi_align"]
