"""DSG: "Deeply Shape-guided Instance Segmentation" (Ding, Qiao, Yuille, Shen). See README.md."""

from .config import add_dsg_config
from .deform_backbone import build_deform_resnet_fpn_backbone
from .mask_rpn import MaskRPN
from .meta_arch import DSGRCNN
from .roi_heads import DSGROIHeads

__all__ = ["DSGRCNN", "DSGROIHeads", "MaskRPN", "add_dsg_config", "build_deform_resnet_fpn_backbone"]
