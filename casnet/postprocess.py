"""Common attribute support (section III.C): every pixel of a thing class votes for the seed whose box is most like its own.

Shapes: H x W pixels of the output, h x w cells of the grid, K thing classes, S seeds, P pairs of a cell and a class, R
instances. Boxes on the grid are x0 y0 x1 y1 in cells, those of instances in pixels; pixel or cell i covers [i, i + 1).

The votes are those of cells: a pixel of the output has the predicted box of the cell that it lies in. It votes among the seeds
of its own class, which the semantic map of the output's size says, so that a cell on the border of two classes may have a
vote in each, and neither overlaps nor holes arise. There is no loop over pixels, seeds or classes; the votes are counted in
chunks of bounded memory.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

NO_INSTANCE = -1


class Seeds(NamedTuple):
    """S seeds, the most probable first.

    Attributes:
        boxes: (S, 4), in cells.
        scores: (S,), box probabilities.
        classes: (S,), thing classes.
        cells: (S,), the cell of each, counted in reading order.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    cells: Tensor


class CommonAttributeSupport:
    """From the three heads' predictions to instances."""

    @configurable
    def __init__(
        self,
        *,
        seed_threshold: float = 0.5,
        nms_threshold: float = 0.5,
        pre_nms_topk: int = 10000,
        max_seeds: int = 100,
        tie_margin: float = 0.02,
        max_pairs: int = 4000000,
    ):
        """
        Args:
            seed_threshold: seeds have a higher box probability.
            nms_threshold: IoU of two seeds' boxes above which the less probable one is dropped.
            pre_nms_topk: positions that enter the NMS.
            max_seeds: of an image, that leave it; a negative number is no limit.
            tie_margin: IoUs less than this below the best count as equal to it.
            max_pairs: (cell, seed) that are looked at at once.
        """
        self.seed_threshold, self.nms_threshold, self.pre_nms_topk = seed_threshold, nms_threshold, pre_nms_topk
        self.max_seeds, self.tie_margin, self.max_pairs = max_seeds, tie_margin, max_pairs

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        casnet = cfg.MODEL.CASNET
        return {
            "seed_threshold": casnet.SEED_THRESHOLD,
            "nms_threshold": casnet.NMS_THRESHOLD,
            "pre_nms_topk": casnet.PRE_NMS_TOPK,
            "max_seeds": cfg.TEST.DETECTIONS_PER_IMAGE,
            "tie_margin": casnet.TIE_MARGIN,
            "max_pairs": casnet.MAX_PAIRS,
        }

    def __call__(
        self,
        classes: Tensor,
        distances: Tensor,
        probabilities: Tensor,
        grid_size: tuple[float, float],
        certainty: Tensor | None = None,
    ) -> tuple[Tensor, Instances, Seeds]:
        """
        Args:
            classes: (H, W) integers: the thing class of a pixel, or a negative number.
            distances: (4, h, w), positive, in cells: left, top, right, bottom.
            probabilities: (K, h, w), of boxes.
            grid_size: height and width of the image in cells (its size in the network, divided by the stride).
            certainty: (H, W), the probability of a pixel's class; the scores are multiplied by its mean. None: they are not.

        Returns:
            (H, W) int64: which instance a pixel belongs to, or NO_INSTANCE; the R instances, with ``pred_masks`` (R, H, W)
            bool, ``pred_boxes``, ``pred_classes`` and ``scores`` (descending if they are those of seeds); and the seeds.
        """
        num_classes, height, width = probabilities.shape
        boxes = predicted_boxes(distances)
        seeds = self.find_seeds(probabilities, boxes, grid_size)

        inside = classes >= 0
        cells = cell_of_pixels(classes.shape, grid_size, (height, width)).to(classes.device)
        pair_of_pixel = (cells * num_classes + classes)[inside]
        present = torch.zeros(height * width * num_classes, dtype=torch.bool, device=classes.device)
        present[pair_of_pixel] = True
        pairs = present.nonzero().squeeze(1)
        seed_of_pair = torch.full_like(present, NO_INSTANCE, dtype=torch.long)
        seed_of_pair[pairs] = self.vote(boxes[pairs // num_classes], pairs % num_classes, seeds)

        seed_of_pixel = torch.full_like(classes, NO_INSTANCE, dtype=torch.long)
        seed_of_pixel[inside] = seed_of_pair[pair_of_pixel]
        return (*self.gather(seed_of_pixel, seeds, certainty), seeds)

    def find_seeds(self, probabilities: Tensor, boxes: Tensor, grid_size: tuple[float, float]) -> Seeds:
        """The most probable positions of the image after NMS within each class.

        Args:
            probabilities: (K, h, w).
            boxes: (h * w, 4).
            grid_size: height and width of the image in cells. What lies beyond is padding, where no head was trained.
        """
        height, width = map(math.ceil, grid_size)
        classes, rows, columns = (probabilities[:, :height, :width] > self.seed_threshold).nonzero().unbind(1)
        scores, cells = probabilities[classes, rows, columns], rows * probabilities.shape[2] + columns
        if len(cells) > self.pre_nms_topk:
            scores, best = scores.topk(self.pre_nms_topk)
            classes, cells = classes[best], cells[best]
        of_cells = boxes[cells]
        if len(cells):  # torchvision keeps classes apart only where no coordinate is negative
            of_cells = of_cells - of_cells.amin()
        kept = batched_nms(of_cells, scores, classes, self.nms_threshold)
        kept = kept if self.max_seeds < 0 else kept[: self.max_seeds]
        return Seeds(boxes[cells[kept]], scores[kept], classes[kept], cells[kept])

    def vote(self, boxes: Tensor, classes: Tensor, seeds: Seeds) -> Tensor:
        """(P,) int64: for each cell's box (P, 4) and class (P,) the seed it supports, or NO_INSTANCE if its class has none."""
        if len(seeds.boxes) == 0:
            return torch.full_like(classes, NO_INSTANCE)
        chunk = max(self.max_pairs // len(seeds.boxes), 1)
        parts = zip(boxes.split(chunk), classes.split(chunk), strict=True)
        return torch.cat([self._vote_at_once(*part, seeds) for part in parts])

    def _vote_at_once(self, boxes: Tensor, classes: Tensor, seeds: Seeds) -> Tensor:
        iou = pairwise_iou(Boxes(boxes), Boxes(seeds.boxes))
        iou.masked_fill_(classes[:, None] != seeds.classes, NO_INSTANCE)
        best = iou.amax(dim=1, keepdim=True)
        (x, y), (seed_x, seed_y) = centers(boxes), centers(seeds.boxes)
        distance = (x[:, None] - seed_x).square_().add_((y[:, None] - seed_y).square_())
        distance.masked_fill_(iou < (best - self.tie_margin).clamp(min=0), torch.inf)
        return distance.argmin(dim=1).masked_fill_(best.squeeze(1) < 0, NO_INSTANCE)

    def gather(self, seed_of_pixel: Tensor, seeds: Seeds, certainty: Tensor | None) -> tuple[Tensor, Instances]:
        """Number the seeds that have pixels, and describe the instances by these pixels."""
        assigned = seed_of_pixel >= 0
        pixels = torch.bincount(seed_of_pixel[assigned], minlength=len(seeds.boxes))
        kept = pixels.nonzero().squeeze(1)
        numbers = torch.full_like(pixels, NO_INSTANCE)
        numbers[kept] = torch.arange(len(kept), device=kept.device)
        instance_of_pixel = seed_of_pixel.clone()
        instance_of_pixel[assigned] = numbers[seed_of_pixel[assigned]]

        scores = seeds.scores[kept]
        if certainty is not None:
            total = torch.zeros_like(scores).index_add(0, instance_of_pixel[assigned], certainty[assigned].to(scores.dtype))
            scores = scores * total / pixels[kept]
        masks = instance_of_pixel.short() == torch.arange(len(kept), dtype=torch.int16, device=kept.device)[:, None, None]
        instances = Instances(tuple(seed_of_pixel.shape))
        instances.pred_masks = masks
        instances.pred_boxes = Boxes(boxes_of_masks(masks))
        instances.pred_classes = seeds.classes[kept]
        instances.scores = scores
        return instance_of_pixel, instances


def predicted_boxes(distances: Tensor) -> Tensor:
    """Distances (4, h, w) -> boxes (h * w, 4), both in cells."""
    height, width = distances.shape[1:]
    x = torch.arange(width, device=distances.device) + 0.5
    y = torch.arange(height, device=distances.device)[:, None] + 0.5
    left, top, right, bottom = distances
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1).flatten(0, 1)


def centers(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (..., 4) -> x and y of their centres, (...) each."""
    return (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2


def cell_of_pixels(size: tuple[int, int], grid_size: tuple[float, float], grid_shape: tuple[int, int]) -> Tensor:
    """(H, W) int64: the cell, in reading order, that the centre of each pixel lies in.

    Args:
        size: H and W.
        grid_size: height and width of the image in cells; need not be whole.
        grid_shape: h and w, which may be larger, since networks are given padded images.
    """
    rows, columns = (
        ((torch.arange(pixels, dtype=torch.float64) + 0.5) * (cells / pixels)).long().clamp(max=limit - 1)
        for pixels, cells, limit in zip(size, grid_size, grid_shape, strict=True)
    )
    return rows[:, None] * grid_shape[1] + columns


def boxes_of_masks(masks: Tensor) -> Tensor:
    """(R, 4) float: the smallest boxes around the pixels of masks (R, H, W), none of which is empty."""
    sides = []
    for axis in (2, 1):  # first y, then x
        occupied = masks.any(dim=axis).to(torch.uint8)
        sides.append((occupied.argmax(dim=1), occupied.shape[1] - occupied.flip(1).argmax(dim=1)))
    (y0, y1), (x0, x1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def thing_classes(labels: Tensor, thing_labels: Sequence[int]) -> Tensor:
    """Semantic labels (H, W), 0 to 255 -> thing classes, -1 where there is no thing. thing_labels: K, of the classes."""
    table = torch.full((256,), -1)
    table[list(thing_labels)] = torch.arange(len(thing_labels))
    return table.to(labels.device)[labels.long()]
