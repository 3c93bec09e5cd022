"""Detectron2's DefaultPredictor runs on every config."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor

from projects import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs/maskplus"
LEAVES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.name.startswith("Base"))
NARROW = [
    "INPUT.MIN_SIZE_TEST", 64, "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.CONV_DIMS", [16], "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    "TEST.DETECTIONS_PER_IMAGE", 5, "MODEL.RESNETS.NORM", "GN", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu",
]  # fmt: skip
NARROW_BOTTLENECKS = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 128, "MODEL.RESNETS.WIDTH_PER_GROUP", 32,
]  # fmt: skip


@pytest.mark.parametrize("row", LEAVES)
def test_default_predictor(row):
    cfg = load_config(str(CONFIGS / f"{row}.yaml"))
    filters = [16 * number // cfg.MODEL.FPN.OUT_CHANNELS for number in cfg.MODEL.MASKPLUS.CONV_DIMS]
    bottlenecks = NARROW_BOTTLENECKS if cfg.MODEL.RESNETS.DEPTH > 34 else []  # Detectron2 builds R18 in one width only
    cfg.merge_from_list([*NARROW, *bottlenecks, "MODEL.MASKPLUS.CONV_DIMS", filters])
    torch.manual_seed(0)
    image = np.random.RandomState(0).randint(0, 256, (48, 64, 3), dtype=np.uint8)
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert len(instances) == 5
    assert instances.pred_masks.shape == (5, 48, 64)
