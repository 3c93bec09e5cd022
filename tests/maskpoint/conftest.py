"""Narrow models of the small configs, and masks drawn by hypothesis."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from projects import load_config

REPO = Path(__file__).resolve().parent.parent.parent
NARROW = [
    "INPUT.MIN_SIZE_TRAIN", (64, 64), "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TRAIN", 128, "INPUT.MAX_SIZE_TEST", 128,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.CONV_DIMS", [16], "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 16],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.RESNETS.NORM", "BN", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu",
]  # fmt: skip


@pytest.fixture
def narrow_cfg():
    """``narrow_cfg(name, KEY, VALUE, ...)``: a config of configs/maskpoint with few channels and small images."""

    def build(name: str = "shapes_design_b", *opts):
        return load_config(str(REPO / f"configs/maskpoint/{name}.yaml"), [*NARROW, *opts])

    return build


@st.composite
def noise(draw) -> np.ndarray:
    """Any small mask with a pixel in it: single pixels, holes, many components, all of it."""
    mask = draw(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
    mask[draw(st.integers(0, mask.shape[0] - 1)), draw(st.integers(0, mask.shape[1] - 1))] = True
    return mask


@st.composite
def blobs(draw) -> np.ndarray:
    """Up to three filled ellipses and polygons in 120 x 160 pixels, in part outside, perhaps with a hole."""
    mask = np.zeros((120, 160), np.uint8)
    place = st.tuples(st.integers(-10, 170), st.integers(-10, 130))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            axes = draw(st.tuples(st.integers(1, 70), st.integers(1, 50)))
            cv2.ellipse(mask, draw(place), axes, draw(st.integers(0, 180)), 0, 360, 1, cv2.FILLED)
        else:
            cv2.fillPoly(mask, [np.array(draw(st.lists(place, min_size=3, max_size=7)))], 1)
    if draw(st.booleans()):
        cv2.circle(mask, draw(place), draw(st.integers(1, 20)), 0, cv2.FILLED)
    mask[60, 80] = 1
    return mask.astype(bool)
