"""GAN Mask R-CNN: adversarial box and mask losses on Mask R-CNN. Importing it registers its model and its trainer."""

from . import mapper, meta_arch, roi_heads, trainer  # noqa: F401
from .config import add_ganmask_config

__all__ = ["add_ganmask_config"]
