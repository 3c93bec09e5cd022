"""Checks of one box, polygon or RLE against its image, each with a repaired version where there is one.

Image pixels, x to the right, y down; an image covers [0, width] x [0, height]. Boxes are COCO's [x, y, width,
height], polygons [x0, y0, x1, y1, ...]. A problem is a pair (kind, message); the kinds are listed in
validate.py.
"""

import numpy as np
from pycocotools import mask as mask_util

TOLERANCE = 0.1  # pixels; COCO rounds its boxes

Problem = tuple[str, str]


def check_box(box, width: int, height: int) -> tuple[list[Problem], list[float] | None]:
    """Problems of a box, and the box clipped to the image, or None where nothing is left of it."""
    numbers = _finite_numbers(box)
    if numbers is None or numbers.shape != (4,):
        return [("degenerate-box", f"box {_short(box)} is not four finite numbers")], None
    x, y, w, h = numbers.tolist()
    if w <= 0 or h <= 0:
        return [("degenerate-box", f"box {_short(box)} has no area")], None
    if x >= -TOLERANCE and y >= -TOLERANCE and x + w <= width + TOLERANCE and y + h <= height + TOLERANCE:
        return [], box
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    clipped = [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None
    return [("box-outside", f"box {_short(box)} leaves the image of {width}x{height}")], clipped


def check_segmentation(segmentation, width: int, height: int) -> tuple[list[Problem], list | dict | None]:
    """Problems of a mask (polygons or RLE), and its repaired version, or None where nothing is left."""
    if isinstance(segmentation, dict):
        problem = _rle_problem(segmentation, width, height)
        return ([problem], None) if problem else ([], segmentation)
    if not isinstance(segmentation, list):
        return [("bad-polygon", f"segmentation {_short(segmentation)} is neither polygons nor RLE")], None
    problems, kept = [], []
    for polygon in segmentation:
        problem, repaired = _check_polygon(polygon, width, height)
        problems += [problem] if problem else []
        kept += [repaired] if repaired is not None else []
    if not kept:
        return problems, None
    if mask_util.area(rle_of(kept, width, height)) == 0:
        return [*problems, ("empty-mask", "the polygons cover no pixel")], None
    return problems, kept


def rle_of(segmentation: list | dict, width: int, height: int) -> dict:
    """pycocotools' compressed RLE of a sound mask."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def clip_polygon(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """The part of a polygon (P, 2) inside the image, (Q, 2), Q may be 0 (Sutherland and Hodgman, CACM 1974).

    A concave polygon that falls apart keeps its parts joined along the border, where the joint covers
    nothing.
    """
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        if not len(points):
            break
        inside = sign * (points[:, axis] - limit)  # >= 0 within
        clipped = []
        for k in range(len(points)):
            start, end, d_start, d_end = points[k - 1], points[k], inside[k - 1], inside[k]
            if d_start * d_end < 0:
                crossing = start + (end - start) * (d_start / (d_start - d_end))
                crossing[axis] = limit
                clipped.append(crossing)
            if d_end >= 0:
                clipped.append(end)
        points = np.array(clipped).reshape(-1, 2)
    return points


def _check_polygon(polygon, width: int, height: int) -> tuple[Problem | None, list[float] | None]:
    numbers = _finite_numbers(polygon)
    if numbers is None:
        return ("bad-polygon", f"polygon {_short(polygon)} is not a list of finite numbers"), None
    if len(numbers) % 2 or len(numbers) < 6:
        return (
            "bad-polygon",
            f"polygon of {len(numbers)} numbers; x and y of at least 3 points needed",
        ), None
    points = numbers.reshape(-1, 2).astype(float)
    if points.min() >= -TOLERANCE and (points <= np.array([width, height]) + TOLERANCE).all():
        return None, polygon
    clipped = clip_polygon(points, width, height)
    problem = ("polygon-outside", f"polygon leaves the image of {width}x{height}: {_short(polygon)}")
    return problem, clipped.ravel().tolist() if len(clipped) >= 3 else None


def _rle_problem(rle: dict, width: int, height: int) -> Problem | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        return "rle-size", f"RLE of size {_short(size)} (height, width) in an image of {[height, width]}"
    try:
        runs = counts if isinstance(counts, list) else _decode_counts(counts)
        sound = all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == height * width
    except (TypeError, ValueError, IndexError, AttributeError):
        sound = False
    if not sound:
        return "bad-rle", f"RLE counts {_short(counts)} do not make {height * width} pixels"
    if sum(runs[1::2]) == 0:
        return "empty-mask", "the RLE covers no pixel"
    return None


def _decode_counts(counts: str) -> list[int]:
    """The runs in a compressed RLE (pycocotools writes past or short of the mask where they are wrong).

    Base 32, least digit first, 48 added to each character, bit 5 for "continues", sign in the last digit's
    bit 4; from the fourth run on the difference to the run two before.
    """
    runs, value, shift = [], 0, 0
    for byte in counts.encode("ascii"):
        digit = byte - 48
        if not 0 <= digit < 64:
            raise ValueError("not a character of an RLE")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("the last run is cut off")
    return runs


def _finite_numbers(values) -> np.ndarray | None:
    """`values` as a 1-D array, or None unless it is a flat list of finite numbers."""
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        return None
    flat = array.ndim == 1 and array.dtype.kind in "iuf" and np.isfinite(array).all()
    return array if flat else None


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
