"""What the heads learn (section III.A and III.B), on the grid, from the instances' pixels.

Shapes: H x W pixels (padded), h x w cells, s = OUTPUT_STRIDE pixels per cell, I instances, K thing classes.

Cell (i, j) covers the pixels [s * i, s * i + s) x [s * j, s * j + s) and stands for the pixel in its middle,
(s * i + s // 2, s * j + s // 2); its centre is (j + 0.5, i + 0.5) in cells, x first. Boxes are x0 y0 x1 y1; pixel i covers
[i, i + 1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

NOTHING, UNCOUNTED = 0, -1  # in a map of instances, beside i + 1 for the pixels of instance i


class GridTargets(NamedTuple):
    """The targets of an image; of a batch when each is stacked.

    Attributes:
        distances: (4, h, w) float, in cells: from a cell's centre to the left, top, right and bottom of its instance's box;
            0 where there is no instance.
        things: (h, w) bool, the cells on instances.
        central: (K, h, w) bool, the target of the box probability.
        counted: (h, w) bool, where that target counts: not on groups, in void or in padding.
    """

    distances: Tensor
    things: Tensor
    central: Tensor
    counted: Tensor


def grid_targets(
    owner: Tensor, boxes: Tensor, classes: Tensor, stride: int, num_classes: int, central_area: float
) -> GridTargets:
    """The targets of an image.

    The central area of a box has `central_area` of its sides, but at least one cell; its cells that belong to the instance
    itself have probability 1. An instance none of whose cells lie there has its cell nearest to the box's centre (the first
    in reading order) instead; one without a cell has none.

    Args:
        owner: (H, W) integers: i + 1 on the pixels of instance i, NOTHING, or UNCOUNTED; H and W multiples of s.
        boxes: (I, 4), in pixels.
        classes: (I,), from 0 to K - 1.
        stride: s.
        num_classes: K.
    """
    owner = owner[stride // 2 :: stride, stride // 2 :: stride].long()
    height, width = owner.shape
    things, boxes = owner > 0, boxes / stride
    y, x = things.nonzero().unbind(1)
    instance = owner[y, x] - 1
    cell_x, cell_y = x + 0.5, y + 0.5
    x0, y0, x1, y1 = boxes[instance].unbind(1)

    distances = boxes.new_zeros(4, height, width)
    distances[:, y, x] = torch.stack([cell_x - x0, cell_y - y0, x1 - cell_x, y1 - cell_y])

    off_x, off_y = (cell_x - (x0 + x1) / 2).abs(), (cell_y - (y0 + y1) / 2).abs()
    reach_x, reach_y = (((far - near) * central_area).clamp(min=1) / 2 for near, far in ((x0, x1), (y0, y1)))
    chosen = (off_x <= reach_x) & (off_y <= reach_y)
    chosen |= nearest(off_x.square() + off_y.square(), instance, len(boxes)) & ~holds(chosen, instance, len(boxes))[instance]
    central = torch.zeros(num_classes, height, width, dtype=torch.bool, device=owner.device)
    central[classes[instance[chosen]], y[chosen], x[chosen]] = True
    return GridTargets(distances, things, central, owner != UNCOUNTED)


def holds(chosen: Tensor, group: Tensor, count: int) -> Tensor:
    """(count,) bool: the groups of which an element (chosen (P,) bool, its group (P,)) is chosen."""
    return torch.zeros(count, dtype=torch.bool, device=group.device).index_fill(0, group[chosen], True)


def nearest(distance: Tensor, group: Tensor, count: int) -> Tensor:
    """(P,) bool: of each group the element with the least distance, the first of several."""
    least = distance.new_full((count,), torch.inf).scatter_reduce(0, group, distance, "amin")
    place = torch.arange(len(group), device=group.device)
    candidates = place.where(distance == least[group], len(group))
    first = place.new_full((count,), len(group)).scatter_reduce(0, group, candidates, "amin")
    return place == first[group]
