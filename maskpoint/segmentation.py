"""Masks from contour points alone (section IV-E): the polygon through the predicted points.

Letters: R detections, k points of a contour, H, W height and width of the image.
"""

import cv2
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, ROIMasks
from torch import Tensor

SHIFT = 4  # cv2.fillPoly takes coordinates with this many binary digits after the point


class ContourMasks(ROIMasks):
    """Masks of RoIs given by contours instead of pixels: they are filled at the size of the image that is asked for.

    Attributes:
        tensor: (R, k, 2): x, y of the contour's points in order, relative to the box (0 to 1).
    """

    @classmethod
    def from_points(cls, points: Tensor, boxes: Boxes) -> "ContourMasks":
        """From points (R, k, 2) in the same pixels as the boxes."""
        corners = boxes.tensor[:, None]
        size = (corners[:, :, 2:] - corners[:, :, :2]).clamp(min=torch.finfo(corners.dtype).tiny)
        return cls((points - corners[:, :, :2]) / size)

    def to(self, device: torch.device) -> "ContourMasks":
        return ContourMasks(self.tensor.to(device))

    def __getitem__(self, item) -> "ContourMasks":
        return ContourMasks(super().__getitem__(item).tensor)

    def to_bitmasks(self, boxes: Boxes, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Fill the polygons in an image of (height, width) pixels; ``threshold`` is not needed. On the device of ``tensor``."""
        corners = boxes.tensor[:, None]
        points = corners[:, :, :2] + self.tensor * (corners[:, :, 2:] - corners[:, :, :2])
        masks = np.zeros((len(self), height, width), np.uint8)
        for mask, contour in zip(masks, points.cpu().numpy(), strict=True):
            fill(mask, contour)
        return BitMasks(torch.from_numpy(masks.view(bool)).to(self.device))


def fill(mask: np.ndarray, contour: np.ndarray) -> None:
    """Set to 1 the pixels of ``mask`` (H, W) uint8 on a contour (k, 2) of x, y in pixels, and inside of it (even-odd rule).

    All contour pixels of a mask without holes give that mask again.
    """
    pixels = np.rint((contour - 0.5) * (1 << SHIFT)).astype(np.int32)
    cv2.fillPoly(mask, [pixels], 1, shift=SHIFT)
