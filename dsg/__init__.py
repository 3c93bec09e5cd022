"""DSG: "Deeply Shape-guided Instance Segmentation" (Ding, Qiao, Yuille, Shen). See README.md."""

from .cascade import CascadeMaskROIHeads
from .cascade_dsg import CascadeDSGROIHeads
from .config import add_dsg_config
from .deform_backbone import build_deform_resnet_fpn_backbone
from .htc import HTCROIHeads
from .mask_rpn import MaskRPN
from .meta_arch import DSGRCNN
from .roi_heads import DSGROIHeads

__all__ = [
    "CascadeDSGROIHeads",
    "CascadeMaskROIHeads",
    "DSGRCNN",
    "DSGROIHeads",
    "HTCROIHeads",
    "MaskRPN",
    "add_dsg_config",
    "build_deform_resnet_fpn_backbone",
]
