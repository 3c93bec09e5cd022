"""What is drawn: objects from predictions, ground truth and annotations, their masks, names and colours.

Letters: H, W height and width of the image; K key points. Coordinates are image pixels, pixel i covers [i, i+1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import Metadata
from detectron2.structures import BoxMode, Instances, PolygonMasks

from .canvas import Color, distinct_colors


@dataclass
class Drawable:
    """What is drawn: ``box`` is (4,) x0 y0 x1 y1, ``mask`` (H, W) bool, ``keypoints`` (K, 3) x y score.

    The first ``contour`` of the key points are the points of a closed contour in order. Where it is a number, 0 too, all of
    them are drawn whatever their scores; None stands for key points that are seen or not.
    """

    kind: str  # "thing" or "stuff": which names and colours of the metadata are its own
    class_id: int
    note: str = ""  # follows the class name in the label
    box: np.ndarray | None = None
    mask: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    contour: int | None = None

    def label_place(self) -> np.ndarray | None:
        """The box, or else the point (x, y) of the mask that is farthest from its edge, or else None."""
        if self.box is not None or self.mask is None or not self.mask.any():
            return self.box
        depth = cv2.distanceTransform(np.pad(self.mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        return np.array([x + 0.5, y + 0.5])


def from_instances(instances: Instances, size: tuple[int, int], score_threshold: float) -> list[Drawable]:
    """Predicted (``pred_*`` and ``scores``) or ground-truth (``gt_*``) instances of at least a score.

    ``contour_points`` (R), where there are such, says how many of the first key points form a closed contour.
    """
    if tuple(instances.image_size) != tuple(size):
        raise ValueError(f"instances of an image of (height, width) {instances.image_size} on one of {size}")
    instances = instances.to("cpu")

    def field(name: str) -> Any:
        value = next((instances.get(f) for f in (f"pred_{name}", f"gt_{name}") if instances.has(f)), None)
        if isinstance(value, PolygonMasks):
            return value.polygons
        return getattr(value, "tensor", value)

    boxes, classes, keypoints = field("boxes"), field("classes"), field("keypoints")
    masks = instances.pred_masks_rle if instances.has("pred_masks_rle") else field("masks")
    scores = instances.scores.tolist() if instances.has("scores") else None
    contours = instances.contour_points.tolist() if instances.has("contour_points") else None
    return [
        Drawable(
            kind="thing",
            class_id=int(classes[i]),
            note="" if scores is None else f"{scores[i]:.0%}",
            box=None if boxes is None else boxes[i].numpy(),
            mask=None if masks is None else binary_mask(masks[i], *size),
            keypoints=None if keypoints is None else keypoints[i].numpy(),
            contour=None if contours is None else contours[i],
        )
        for i in range(len(instances))
        if scores is None or scores[i] >= score_threshold
    ]


def from_annotations(annotations: Sequence[dict], size: tuple[int, int]) -> list[Drawable]:
    """The annotations of a data set dict."""
    return [
        Drawable(
            kind="thing",
            class_id=a["category_id"],
            note="crowd" if a.get("iscrowd") else "",
            box=_corners(a["bbox"], a["bbox_mode"]) if "bbox" in a else None,
            mask=binary_mask(a["segmentation"], *size) if a.get("segmentation") is not None else None,
            keypoints=np.reshape(a["keypoints"], (-1, 3)) if a.get("keypoints") else None,
        )
        for a in annotations
    ]


def binary_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) bool from polygons, compressed or uncompressed RLE, or a bitmask (array or tensor).

    Raises:
        ValueError: the mask belongs to an image of another size.
    """
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *rle["size"])
        mask = mask_util.decode(rle)
    elif isinstance(segmentation, list):
        polygons = [np.asarray(p, dtype=np.float64).ravel() for p in segmentation]
        polygons = [p.tolist() for p in polygons if len(p) >= 6 and np.isfinite(p).all()]
        if not polygons:
            return np.zeros((height, width), bool)
        mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, height, width)))
    else:
        mask = as_array(segmentation)
    if mask.shape != (height, width):
        raise ValueError(f"a mask of shape {mask.shape} on an image of (height, width) {(height, width)}")
    return mask > 0


def class_name(metadata: Metadata, class_id: int, kind: str = "thing") -> str:
    """Name of a contiguous class id; "class 17" where the metadata has none."""
    names = metadata.get(f"{kind}_classes") or ()
    return names[class_id] if 0 <= class_id < len(names) else f"class {class_id}"


def class_color(metadata: Metadata, class_id: int, kind: str = "thing") -> Color:
    """The metadata's colour of a contiguous class id; one of :func:`distinct_colors` where it has none."""
    colors = metadata.get(f"{kind}_colors") or ()
    if not 0 <= class_id < len(colors):
        colors = distinct_colors()
    return tuple(int(value) for value in colors[class_id % len(colors)])


def as_array(values: Any) -> np.ndarray:
    """An array of an array or of a tensor on any device."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _corners(box: Sequence[float], mode: BoxMode) -> np.ndarray:
    """(4,) x0 y0 x1 y1 of a box in any mode of Detectron2's."""
    return np.array(BoxMode.convert(list(box), mode, BoxMode.XYXY_ABS))
