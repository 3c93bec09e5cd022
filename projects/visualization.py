"""Pictures of what a model found and of what is there.

Detectron2's Visualizer jitters its colours, outlines no mask that has a hole, and lets labels hide one
another. Here a colour is exactly the data set's (or one per instance), every contour is drawn, and labels
make room for each other.

Letters: H, W height and width of the image; K key points; R RoIs, P the side of a RoI's map; S the whole
number by which a small image is enlarged. Coordinates are image pixels, pixel i covers [i, i+1). Images and
pictures are RGB uint8 arrays.
"""

import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageDraw

from .canvas import Canvas, Color, distinct_colors, font
from .data.mapper import training_labels
from .drawables import Drawable, as_array, class_color, class_name, from_annotations, from_instances

__all__ = [
    "contact_sheet",
    "draw",
    "draw_comparison",
    "draw_maps",
    "draw_panoptic",
    "draw_semantic",
    "of_same_kind",
    "segments_of_ids",
    "titled",
]

logger = logging.getLogger(__name__)

# Keys of what a model gives -> keys of what a data set dict holds of the same kind; the richer kinds first.
KINDS = {"panoptic_seg": "pan_seg_file_name", "instances": "annotations", "sem_seg": "sem_seg_file_name"}
KEYPOINT_THRESHOLD = 0.05  # key points with a lower score (or visibility 0) are not drawn
TITLE_HEIGHT = 28  # of the strip above a titled picture, in picture pixels
GAP = 8  # between the pictures of a contact sheet, in picture pixels


def draw(
    image: np.ndarray,
    result: Any,
    metadata: Metadata,
    color_by: str = "instance",
    score_threshold: float = 0.0,
    alpha: float = 0.45,
) -> np.ndarray:
    """Draw a result of any kind on its image.

    Args:
        image: (H, W, 3) RGB uint8.
        result: ``Instances`` (predicted or ground truth), a model's output for one image, or a data set dict.
            Of a dict the first of :data:`KINDS` that it has is drawn. Objects whose box is not finite are
            left out.
        metadata: names and colours of the classes (``thing_classes``, ``thing_colors``, ``stuff_classes``,
            ``stuff_colors``). A missing name becomes "class 17", a missing colour a distinct one.
        color_by: "class" for the colours of the classes, "instance" for a distinct colour per object.
        score_threshold: objects with a lower score are left out.
        alpha: opacity of masks, in [0, 1]; contours and boxes are opaque.

    Returns:
        (S*H, S*W, 3) RGB uint8.
    """
    if color_by not in ("class", "instance"):
        raise ValueError(f"color_by is 'class' or 'instance', not {color_by!r}")
    if isinstance(result, Instances):
        result = {"instances": result}
    keys = [key for key in (*KINDS, *KINDS.values()) if key in result]
    if not keys:
        raise ValueError(f"expected a key of {KINDS} or a value of it, found only {', '.join(result)}")
    key = keys[0]
    if key == "panoptic_seg":
        return draw_panoptic(image, *result[key], metadata, color_by, alpha)
    if key == "pan_seg_file_name":
        ids = _read_map(result[key]).astype(np.int32) @ np.array([1, 256, 256**2], np.int32)
        return draw_panoptic(image, ids, result["segments_info"], metadata, color_by, alpha)
    if key == "sem_seg":
        return draw_semantic(image, result[key].argmax(dim=0), metadata, alpha)
    if key == "sem_seg_file_name":
        labels = training_labels(_read_map(result[key]), result.get("sem_seg_table"))
        return draw_semantic(image, labels, metadata, alpha)
    if key == "instances":
        objects = from_instances(result[key], image.shape[:2], score_threshold)
    else:
        objects = from_annotations(result[key], image.shape[:2])
    return _paint(image, objects, metadata, color_by, alpha)


def draw_semantic(image: np.ndarray, labels: Any, metadata: Metadata, alpha: float = 0.45) -> np.ndarray:
    """Draw a semantic map (H, W): per pixel a class of ``stuff_classes``, or ``ignore_label`` (255)."""
    labels = as_array(labels)
    classes = [int(c) for c in np.unique(labels) if c != metadata.get("ignore_label", 255)]
    objects = [Drawable("stuff", c, mask=labels == c) for c in classes]
    return _paint(image, objects, metadata, "class", alpha)


def draw_panoptic(
    image: np.ndarray,
    segments: Any,
    segments_info: Sequence[dict] | None,
    metadata: Metadata,
    color_by: str = "instance",
    alpha: float = 0.45,
) -> np.ndarray:
    """Draw a panoptic map: stuff in the colour of its class, things as ``color_by`` says.

    Args:
        segments: (H, W) integers: the id of the segment that a pixel belongs to.
        segments_info: per segment a dict of "id", "category_id" (contiguous) and "isthing"; ids that are not
            listed are left out. None: as :func:`segments_of_ids` reads it from the ids.
    """
    segments = as_array(segments)
    if segments_info is None:
        segments_info = segments_of_ids(segments, metadata)
    objects = [
        Drawable("thing" if s["isthing"] else "stuff", s["category_id"], mask=segments == s["id"]) for s in segments_info
    ]
    return _paint(image, objects, metadata, color_by, alpha)


def segments_of_ids(segments: np.ndarray, metadata: Metadata) -> list[dict]:
    """The ``segments_info`` of a map of category * ``metadata.label_divisor`` + instance, or -1."""
    things = set(metadata.get("thing_dataset_id_to_contiguous_id", {}).values())
    categories = {int(i): int(i) // metadata.label_divisor for i in np.unique(segments) if i >= 0}
    return [{"id": i, "category_id": c, "isthing": c in things} for i, c in categories.items()]


def draw_comparison(
    image: np.ndarray,
    ground_truth: Any,
    prediction: Any,
    metadata: Metadata,
    color_by: str = "instance",
    score_threshold: float = 0.0,
    alpha: float = 0.45,
    titles: tuple[str, str] = ("ground truth", "prediction"),
) -> np.ndarray:
    """Ground truth on the left, prediction on the right, each as :func:`draw` draws it, under its title.

    Of a data set dict what is of the prediction's kind is drawn, if it has that.

    Returns:
        (TITLE_HEIGHT + S*H, 2*S*W + GAP, 3) RGB uint8.
    """
    left = draw(image, of_same_kind(ground_truth, prediction), metadata, color_by, 0.0, alpha)
    right = draw(image, prediction, metadata, color_by, score_threshold, alpha)
    return contact_sheet([titled(left, titles[0]), titled(right, titles[1])], columns=2)


def of_same_kind(ground_truth: Any, prediction: Any) -> Any:
    """Of a data set dict what is of the kind of a prediction that :func:`draw` would draw; all of it where it lacks that."""
    kind = "instances" if isinstance(prediction, Instances) else next(k for k in KINDS if k in prediction)
    if not isinstance(ground_truth, dict) or KINDS[kind] not in ground_truth:
        return ground_truth
    return {key: ground_truth[key] for key in {KINDS[kind], "segments_info", "sem_seg_table"} & ground_truth.keys()}


def draw_maps(image: np.ndarray, maps: Any, boxes: Any) -> np.ndarray:
    """Lay the maps of RoIs over an image, each in its box, from white (the map's lowest value) to black (its highest).

    Args:
        image: (H, W, 3) RGB uint8.
        maps: (R, P, P) of any range; those that are not finite are left out.
        boxes: (R, 4) x0 y0 x1 y1 in image pixels. Smaller ones lie on top.

    Returns:
        (S*H, S*W, 3) RGB uint8.
    """
    pixels = image.copy()
    maps, boxes = as_array(maps), as_array(boxes)
    for i in np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)):
        if not (np.isfinite(maps[i]).all() and np.isfinite(boxes[i]).all()):
            continue
        x0, y0, x1, y1 = np.clip(np.rint(boxes[i]), 0, [image.shape[1], image.shape[0]] * 2).astype(int)
        if x1 > x0 and y1 > y0:
            low, high = maps[i].min(), maps[i].max()
            light = cv2.resize((high - maps[i]) / max(high - low, 1e-12), (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
            heat = cv2.applyColorMap(np.rint(255 * light).astype(np.uint8), cv2.COLORMAP_HOT)
            pixels[y0:y1, x0:x1] = heat[:, :, ::-1]
    return Canvas(pixels).picture()


def contact_sheet(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Lay out pictures left to right in rows of ``columns``, GAP white pixels between them.

    Every cell is as large as the largest picture; a smaller picture lies in the middle of its cell.
    """
    if not pictures or columns < 1:
        raise ValueError(f"a contact sheet needs pictures and columns, not {len(pictures)} and {columns}")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_h, cell_w = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheet = np.full((rows * (cell_h + GAP) - GAP, columns * (cell_w + GAP) - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        y = i // columns * (cell_h + GAP) + (cell_h - height) // 2
        x = i % columns * (cell_w + GAP) + (cell_w - width) // 2
        sheet[y : y + height, x : x + width] = picture
    return sheet


def _paint(image: np.ndarray, objects: list[Drawable], metadata: Metadata, color_by: str, alpha: float) -> np.ndarray:
    """Masks from the largest to the smallest, then boxes and key points, then labels."""
    drawn = [o for o in objects if o.box is None or np.isfinite(o.box).all()]
    if len(drawn) < len(objects):
        logger.warning("%d of %d boxes are not finite: left out", len(objects) - len(drawn), len(objects))
    one_each = distinct_colors()
    colors = [
        one_each[i % len(one_each)]
        if color_by == "instance" and o.kind == "thing"
        else class_color(metadata, o.class_id, o.kind)
        for i, o in enumerate(drawn)
    ]
    canvas = Canvas(image)
    masked = [(o.mask, color) for o, color in zip(drawn, colors, strict=True) if o.mask is not None]
    for mask, color in sorted(masked, key=lambda pair: -pair[0].sum()):
        canvas.mask(mask, color, alpha)
    for o, color in zip(drawn, colors, strict=True):
        if o.box is not None:
            canvas.box(o.box, color)
        if o.keypoints is not None:
            contour, threshold = (0, KEYPOINT_THRESHOLD) if o.contour is None else (o.contour, -np.inf)
            _paint_contour(canvas, o.keypoints[:contour], color if o.mask is None else _light(color))
            _paint_keypoints(canvas, o.keypoints[contour:], color, metadata, threshold)
        place = o.label_place()
        if place is not None:
            canvas.label(f"{class_name(metadata, o.class_id, o.kind)} {o.note}".strip(), color, place)
    return canvas.picture()


def _light(color: Color) -> Color:
    """Halfway to white: for a contour beside the outline of a mask."""
    return tuple((channel + 255) // 2 for channel in color)


def _paint_contour(canvas: Canvas, points: np.ndarray, color: Color) -> None:
    """A closed line through points (x, y, score) in order; those that are not finite are left out."""
    points = points[np.isfinite(points).all(axis=1)]
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        canvas.line(start[:2], end[:2], color)


def _paint_keypoints(canvas: Canvas, keypoints: np.ndarray, color: Color, metadata: Metadata, threshold: float) -> None:
    """The points of higher scores than ``threshold``, and between them the metadata's ``keypoint_connection_rules``."""
    seen = (keypoints[:, 2] > threshold) & np.isfinite(keypoints).all(axis=1)
    names = metadata.get("keypoint_names") or ()
    index = {name: i for i, name in enumerate(names) if i < len(seen) and seen[i]}
    for start, end, line_color in metadata.get("keypoint_connection_rules") or ():
        if start in index and end in index:
            canvas.line(keypoints[index[start]], keypoints[index[end]], tuple(line_color))
    for point in keypoints[seen]:
        canvas.point(point, color)


def titled(picture: np.ndarray, title: str) -> np.ndarray:
    """The picture under a white strip of TITLE_HEIGHT with the title."""
    strip = Image.new("RGB", (picture.shape[1], TITLE_HEIGHT), "white")
    ImageDraw.Draw(strip).text((4, 3), title, fill="black", font=font(18))
    return np.vstack([np.array(strip), picture])


def _read_map(path: str) -> np.ndarray:
    """A PNG of labels as it is: (H, W) or (H, W, 3)."""
    with PathManager.open(path, "rb") as file:
        return np.array(Image.open(file))
