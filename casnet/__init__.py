"""CASNet: one-stage instance and panoptic segmentation by common attributes. Importing it registers its parts."""

from . import heads, hrnet, mapper, meta_arch  # noqa: F401
from .config import add_casnet_config

__all__ = ["add_casnet_config"]
