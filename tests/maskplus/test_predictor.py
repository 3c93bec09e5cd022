"""Detectron2's DefaultPredictor runs on what the config tests do not tell apart: whole models on a picture."""

from pathlib import Path

import cv2
import pytest
from detectron2.engine import DefaultPredictor

from projects import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs/maskplus"


@pytest.mark.parametrize("row", ["maskplus_R_18_FPN", "maskplus_cascade_R_18_FPN", "mask_half", "context_180_128_128_64"])
def test_default_predictor(tiny_opts, shapes_root, row):
    words = ["MODEL.MASKPLUS.CONV_DIMS", [20, 16], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    cfg = load_config(str(CONFIGS / f"shapes_{row}.yaml"), [*tiny_opts, *words, "TEST.DETECTIONS_PER_IMAGE", 5])
    image = cv2.imread(str(next((shapes_root / "shapes/coco/val").glob("*"))))
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert len(instances) == 5
    assert instances.pred_masks.shape == (5, *image.shape[:2])
