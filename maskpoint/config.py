"""Config keys of Mask Point R-CNN.

The rest of the keypoint branch is set by Detectron2's keys under MODEL.ROI_KEYPOINT_HEAD: CONV_DIMS, POOLER_RESOLUTION, and
LOSS_WEIGHT, which is the paper's alpha (equation 3). NUM_KEYPOINTS there is not read: it follows from the keys here; nor is
NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS, since all points are visible.
"""

from detectron2.config import CfgNode


def add_maskpoint_config(cfg: CfgNode) -> None:
    """Add the node MODEL.MASKPOINT to ``cfg``."""
    cfg.MODEL.MASKPOINT = type(cfg)()  # merging wants one class of nodes throughout
    # k, the number of contour points (section IV-D, Table V).
    cfg.MODEL.MASKPOINT.NUM_POINTS = 100
    # How contour points are chosen (figure 3, Table VI): "uniform" or "corner".
    cfg.MODEL.MASKPOINT.SAMPLING = "uniform"
    # Of a mask of several parts: "largest" takes the points from the largest one, "all" shares them out by perimeter.
    cfg.MODEL.MASKPOINT.COMPONENTS = "largest"
    # Key point k + 1 (section IV-D, Table VII): the centre of the "box", the "centroid" of the mask, or "none".
    cfg.MODEL.MASKPOINT.CENTER = "box"
    # Structural design of the fusion (figure 4, Table II): "a", "b", "c" or "d"; "none" trains the branches side by side.
    cfg.MODEL.MASKPOINT.FUSION_DESIGN = "b"
    # How designs a and b get from 56x56 to 28x28 (Table III): "conv", "maxpool" or "avgpool".
    cfg.MODEL.MASKPOINT.REDUCTION = "conv"
    # How O_k meets the mask logits f_m (equation 2, Table IV): "multiply", "add" or "max".
    cfg.MODEL.MASKPOINT.FUSION_MODE = "multiply"
    # Heat maps to points: "argmax" of a map, "subpixel" (a parabola through its neighbours), or Detectron2's slow "resize".
    cfg.MODEL.MASKPOINT.DECODER = "argmax"
    # Masks at inference: "fused" from the mask branch, or "points", the polygon through the contour points (section IV-E).
    cfg.MODEL.MASKPOINT.MASK_FROM = "fused"
    # Keep the maps of figure 5 with every detection (demo.py --maps draws them).
    cfg.MODEL.MASKPOINT.KEEP_MAPS = False
