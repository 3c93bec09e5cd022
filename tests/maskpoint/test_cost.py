"""What the keypoint branch costs at inference, by the shapes of the layers at the size of the paper (nothing is computed)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from projects import load_config
from projects.modeling.build import build_model

from .conftest import REPO

PROPOSALS, DETECTIONS = 1000, 100


@pytest.fixture(scope="module")
def gigamacs():
    """Name of a config -> multiply-adds / 1e9 for an image of 800 x 1333 (padded to 800 x 1344), without pooling."""

    def count(name: str) -> float:
        cfg = load_config(str(REPO / f"configs/maskpoint/{name}.yaml"), ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""])
        model = build_model(cfg).eval()
        heads = model.roi_heads
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            features = model.backbone(torch.empty(1, 3, 800, 1344))
            model.proposal_generator.rpn_head([features[level] for level in cfg.MODEL.RPN.IN_FEATURES])
            heads.box_predictor(heads.box_head(torch.empty(PROPOSALS, 256, 7, 7)))
            logits = heads.mask_head.layers(torch.empty(DETECTIONS, 256, 14, 14))
            if heads.keypoint_on:
                heads.mask_head.fusion(heads.keypoint_head.heatmaps(torch.empty(DETECTIONS, 256, 14, 14)), logits)
        return counter.get_total_flops() / 2e9

    return {name: count(name) for name in ("mask_only", "design_b", "light")}


def test_mask_point_rcnn_costs_more_than_twice_as_much_as_mask_rcnn(gigamacs):
    assert gigamacs["mask_only"] == pytest.approx(264, rel=0.01)
    assert gigamacs["design_b"] - gigamacs["mask_only"] == pytest.approx(363, rel=0.02)


def test_light_branch_costs_less_than_a_third_more(gigamacs):
    assert 1 < gigamacs["light"] / gigamacs["mask_only"] <= 1.3
