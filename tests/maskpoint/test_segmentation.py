"""Masks from contour points alone."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings

from maskpoint.contour import ContourSampler, outer_contours
from maskpoint.segmentation import ContourMasks, fill

from .conftest import blobs, noise


@settings(max_examples=40, deadline=None)
@given(noise() | blobs())
def test_all_contour_pixels_give_the_mask_without_its_holes(mask):
    contour = outer_contours(mask.astype(np.uint8))[0]
    expected = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(expected, [contour], -1, 1, cv2.FILLED)
    found = np.zeros(mask.shape, np.uint8)
    fill(found, contour + 0.5)
    np.testing.assert_array_equal(found, expected)


def disk(radius: int = 40) -> np.ndarray:
    y, x = np.mgrid[:100, :120]
    return np.hypot(x - 60, y - 50) < radius


def iou(a, b) -> float:
    return (a & b).sum() / (a | b).sum()


def test_a_hundred_points_give_nearly_the_mask():
    points = ContourSampler(100)(disk(), np.random.RandomState(0))
    found = np.zeros((100, 120), np.uint8)
    fill(found, points[:100])
    assert iou(found.astype(bool), disk()) > 0.98


def detections(count: int = 2) -> Instances:
    points = torch.from_numpy(ContourSampler(100)(disk(), np.random.RandomState(0)))[None, :100].repeat(count, 1, 1)
    boxes = Boxes(torch.tensor([[19.0, 9, 101, 92]]).repeat(count, 1))
    found = Instances((100, 120), pred_boxes=boxes, scores=torch.arange(count) / 2)
    found.pred_masks = ContourMasks.from_points(points, boxes)
    return found


def test_masks_have_the_size_that_is_asked_for():
    large = detector_postprocess(detections(), 200, 360)
    assert large.pred_masks.shape == (2, 200, 360) and large.pred_masks.dtype == torch.bool
    expected = cv2.resize(disk().astype(np.uint8), (360, 200), interpolation=cv2.INTER_NEAREST).astype(bool)
    assert iou(large.pred_masks[0].numpy(), expected) > 0.95
    same = detector_postprocess(detections(), 100, 120).pred_masks[1].numpy()
    assert iou(same, disk()) > 0.98


def test_masks_stay_with_their_detections():
    found = detections(3)
    found.pred_masks.tensor[1] *= 0.5
    some = found[torch.tensor([False, True, True])].to("cpu")
    assert isinstance(some.pred_masks, ContourMasks) and len(some.pred_masks) == 2
    torch.testing.assert_close(some.pred_masks.tensor, found.pred_masks.tensor[1:])
    assert detector_postprocess(found[[]], 50, 60).pred_masks.shape == (0, 50, 60)


@pytest.mark.parametrize("box", [[5.0, 5, 5, 9], [5, 5, 5, 5]])
def test_box_without_area_does_no_harm(box):
    boxes = Boxes(torch.tensor([box]))
    masks = ContourMasks.from_points(torch.full((1, 4, 2), 5.0), boxes)
    assert torch.isfinite(masks.tensor).all() and masks.to_bitmasks(boxes, 20, 20).tensor.sum() <= 5
