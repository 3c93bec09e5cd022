"""Both branches learn four shapes by heart: the points, the polygon through them and the fused mask come out right."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from maskpoint.contour import ContourSampler
from maskpoint.fusion import EdgeFusion
from maskpoint.keypoint_branch import ContourPointHead
from maskpoint.mask_head import FusedMaskHead
from maskpoint.segmentation import ContourMasks

SIZE, WIDTH = 100, 16


def shapes() -> np.ndarray:
    masks = np.zeros((4, SIZE, SIZE), np.uint8)
    cv2.ellipse(masks[0], (50, 50), (40, 20), 30, 0, 360, 1, cv2.FILLED)
    cv2.rectangle(masks[1], (20, 10), (60, 90), 1, cv2.FILLED)
    cv2.fillPoly(masks[2], [np.array([[50, 5], [95, 90], [5, 80]])], 1)
    cv2.circle(masks[3], (50, 50), 45, 1, cv2.FILLED)
    cv2.rectangle(masks[3], (50, 0), (99, 50), 0, cv2.FILLED)
    return masks.astype(bool)


def training_instances(masks: np.ndarray, sampler: ContourSampler) -> Instances:
    truth = Instances((SIZE, SIZE), gt_classes=torch.zeros(4, dtype=torch.int64))
    truth.gt_masks = BitMasks(torch.from_numpy(masks))
    truth.proposal_boxes = truth.gt_masks.get_bounding_boxes()
    points = torch.from_numpy(np.stack([sampler(mask, np.random.RandomState(0)) for mask in masks]))
    truth.gt_keypoints = Keypoints(torch.cat([points, torch.full((*points.shape[:2], 1), 2.0)], dim=2))
    return truth


@pytest.mark.parametrize("mode", ["multiply", "add"])
def test_four_shapes_are_learned(mode):
    torch.manual_seed(0)
    masks, sampler = shapes(), ContourSampler(16)
    truth, shape = training_instances(masks, sampler), ShapeSpec(channels=WIDTH, height=14, width=14)
    branch = ContourPointHead(shape, num_points=16, num_keypoints=17, conv_dims=[WIDTH])
    head = FusedMaskHead(shape, num_classes=1, conv_dims=[WIDTH] * 2, fusion=EdgeFusion(17, mode=mode))
    x = torch.randn(4, WIDTH, 14, 14)
    optimizer = torch.optim.Adam([*branch.parameters(), *head.parameters()], lr=0.02)
    with EventStorage(0):
        for _ in range(60):
            heatmaps = branch.heatmaps(x)
            losses = branch.losses(heatmaps, [truth]) | head(x, [truth], heatmaps)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    found = Instances((SIZE, SIZE), pred_boxes=Boxes(truth.proposal_boxes.tensor), pred_classes=truth.gt_classes)
    with torch.no_grad():
        heatmaps = branch.heatmaps(x)
        branch.set_keypoints(heatmaps, [found])
        head.eval()(x, [found], heatmaps)
    wrong = (found.pred_keypoints - truth.gt_keypoints.tensor)[:, :, :2].norm(dim=2)
    assert (wrong < 3).float().mean() > 0.95  # a cell is up to 1.7 pixels long
    polygons = ContourMasks.from_points(found.pred_keypoints[:, :16, :2], found.pred_boxes)
    polygons = polygons.to_bitmasks(found.pred_boxes, SIZE, SIZE).tensor
    inside = truth.gt_masks.crop_and_resize(found.pred_boxes.tensor, 28)
    for one, other in ((polygons, truth.gt_masks.tensor), (found.pred_masks[:, 0] > 0.5, inside)):
        assert ((one & other).sum(dim=(1, 2)) / (one | other).sum(dim=(1, 2))).min() > 0.85
