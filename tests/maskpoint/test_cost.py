"""What the keypoint branch costs at inference, by the shapes of the layers at the size of the paper (nothing is computed)."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.utils.flop_counter import FlopCounterMode

from maskpoint.keypoint_branch import ContourPointHead
from projects import load_config
from projects.modeling.build import build_model

from .conftest import REPO

PROPOSALS, DETECTIONS = 1000, 100


def load(name: str):
    return load_config(str(REPO / f"configs/maskpoint/{name}.yaml"), ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""])


@pytest.fixture(scope="module")
def mask_rcnn() -> float:
    """Multiply-adds / 1e9 of Mask R-CNN R50-FPN for an image of 800 x 1333 (padded to 800 x 1344), without pooling."""
    cfg = load("mask_only")
    model = build_model(cfg).eval()
    heads = model.roi_heads
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.empty(1, 3, 800, 1344))
        model.proposal_generator.rpn_head([features[level] for level in cfg.MODEL.RPN.IN_FEATURES])
        heads.box_predictor(heads.box_head(torch.empty(PROPOSALS, 256, 7, 7)))
        heads.mask_head.layers(torch.empty(DETECTIONS, 256, 14, 14))
    return counter.get_total_flops() / 2e9


def keypoint_branch(name: str) -> float:
    """Multiply-adds / 1e9 of a config's keypoint branch for all detections."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        branch = ContourPointHead(load(name), ShapeSpec(channels=256, height=14, width=14))
        branch.heatmaps(torch.empty(DETECTIONS, 256, 14, 14))
    return counter.get_total_flops() / 2e9


def test_the_paper_s_branch_costs_more_than_all_of_mask_rcnn(mask_rcnn):
    assert mask_rcnn == pytest.approx(264, rel=0.01)
    assert keypoint_branch("design_b") == pytest.approx(363, rel=0.01)


def test_light_branch_costs_less_than_a_third_more(mask_rcnn):
    assert 1.1 < 1 + keypoint_branch("light") / mask_rcnn <= 1.3
