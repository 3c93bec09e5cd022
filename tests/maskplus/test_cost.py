"""What the techniques cost at inference, by the shapes of the layers at the size of the paper (nothing is computed)."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from projects import load_config
from projects.modeling.build import build_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs/maskplus"
PROPOSALS, DETECTIONS = 1000, 100


def cost(name: str) -> float:
    """Multiply-adds / 1e9 of a config for an image of 800 x 1333 (padded to 800 x 1344), without pooling."""
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    heads = model.roi_heads
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.empty(1, 3, 800, 1344))
        model.proposal_generator.rpn_head([features[level] for level in cfg.MODEL.RPN.IN_FEATURES])
        heads.box_predictor(heads.box_head(torch.empty(PROPOSALS, 256, 7, 7)))
        if cfg.MODEL.MASKPLUS.CONTEXT:
            heads.contextual_fusion.convs(torch.empty(1, 256, 14, 14))
        heads.mask_head.layers(torch.empty(DETECTIONS, 256, 14, 14))
    return counter.get_total_flops() / 2e9


def test_all_of_maskplus_costs_less_than_two_fifths_more():
    baseline = cost("baseline")
    assert baseline == pytest.approx(264.0, abs=0.1)
    assert cost("mask_half") == pytest.approx(257.6, abs=0.1)
    complete = cost("maskplus_R_50_FPN_2x")
    assert complete == pytest.approx(350.3, abs=0.1) and complete / baseline <= 1.4
