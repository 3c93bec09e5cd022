"""Evaluation on huddled instances (DSG, appendix 6.1, Table 4): the images where objects overlap, and AP over all instances.

An instance is huddled when its largest box IoU with another instance of its image is above T_O (0 where there is no other, so
that at T_O = -1 every instance is); an image is selected when the share of its instances that are huddled is above T_P. Images
without instances belong to T_O = -1 only. Crowds are neither counted nor compared.

Shapes: D detections and G objects of an image, T thresholds of IoU. Boxes are [x, y, width, height] in image pixels, APs lie in
[0, 100].
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO
from pycocotools import mask as mask_util
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from projects.errors import DataError

T_O = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
T_P = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
MAX_DETECTIONS = 100  # of an image, over all classes
RECALLS = np.linspace(0, 1, 101)


def largest_overlaps(coco_gt: COCO) -> dict[int, np.ndarray]:
    """Of every image (by id) the largest box IoU of each instance with another one of the image, whatever its class; (G,).

    Raises DataError for an instance without a box.
    """
    overlaps = {}
    for image_id in coco_gt.imgs:
        instances = [a for a in coco_gt.imgToAnns[image_id] if not a.get("iscrowd", 0)]
        for annotation in instances:
            if not annotation.get("bbox"):
                raise DataError(f"Annotation {annotation['id']} has no 'bbox', by whose overlaps instances are huddled.")
        boxes = [a["bbox"] for a in instances]
        if not boxes:
            overlaps[image_id] = np.zeros(0)
            continue
        boxes = np.asarray(boxes, dtype=np.float64)
        pairs = np.nan_to_num(mask_util.iou(boxes, boxes, [0] * len(boxes)))  # two boxes without area give nan
        np.fill_diagonal(pairs, 0)
        overlaps[image_id] = pairs.max(axis=1)
    return overlaps


def select_images(overlaps: Mapping[int, np.ndarray], t_o: float, t_p: float) -> list[int]:
    """The ids of the images whose share of instances with an overlap above ``t_o`` is above ``t_p``."""
    return [i for i, found in overlaps.items() if (np.mean(found > t_o) > t_p if len(found) else t_o < 0)]


def share_with_overlaps(overlaps: Mapping[int, np.ndarray]) -> float:
    """The share of all images in which two instances overlap; the paper: nearly 0.8 on COCO's val2017."""
    return len(select_images(overlaps, 0.0, 0.0)) / len(overlaps)


@dataclass(frozen=True)
class Matches:
    """What COCO's matching made of the detections of one image, all classes together.

    Attributes:
        scores: (D,).
        hits: (T, D) whether a detection matched an object or a crowd at each IoU threshold.
        ignored: (T, D) whether it counts neither way: it matched a crowd, or nothing and has a negative area.
        objects: how many there were to find.
    """

    scores: np.ndarray
    hits: np.ndarray
    ignored: np.ndarray
    objects: int


def match(coco_gt: COCO, results: Sequence[dict], task: str) -> dict[int, Matches]:
    """Match the detections of every image with its objects, class by class, as COCO does.

    Args:
        coco_gt: ground truth from :func:`projects.evaluation.coco_files.load_ground_truth`.
        results: detections that passed :func:`projects.evaluation.coco_files.check_results`. Of an image the 100 of the highest
            scores count, of the classes that the ground truth has.
        task: "bbox" or "segm".
    """
    field = {"bbox": "bbox", "segm": "segmentation"}[task]
    fields = ("image_id", "category_id", "score", field)
    best = best_of_each_image([r for r in results if r["category_id"] in coco_gt.cats])
    detections = coco_gt.loadRes([{key: r[key] for key in fields} for r in best])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco_eval = COCOeval(coco_gt, detections, task)
        coco_eval.params.areaRng, coco_eval.params.areaRngLbl = [[0, 1e5**2]], ["all"]
        coco_eval.params.maxDets = [MAX_DETECTIONS]
        coco_eval.evaluate()
    of_image = defaultdict(list)
    for found in coco_eval.evalImgs:
        if found is not None:
            of_image[found["image_id"]].append(found)
    thresholds = len(coco_eval.params.iouThrs)
    return {i: _merge(of_image[i], thresholds) for i in coco_gt.imgs}


def best_of_each_image(results: Sequence[dict]) -> list[dict]:
    """The MAX_DETECTIONS results of each image with the highest scores, whatever their class; of equals the first."""
    of_image = defaultdict(list)
    for result in results:
        of_image[result["image_id"]].append(result)
    return [r for found in of_image.values() for r in sorted(found, key=lambda r: -r["score"])[:MAX_DETECTIONS]]


def _merge(classes: list[dict], thresholds: int) -> Matches:
    empty = np.zeros((thresholds, 0), dtype=bool)
    return Matches(
        scores=np.concatenate([[], *(found["dtScores"] for found in classes)]),
        hits=np.concatenate([empty, *(found["dtMatches"] > 0 for found in classes)], axis=1),
        ignored=np.concatenate([empty, *(found["dtIgnore"].astype(bool) for found in classes)], axis=1),
        objects=sum(int(np.sum(np.asarray(found["gtIgnore"]) == 0)) for found in classes),
    )


def pooled_ap(matches: Iterable[Matches]) -> float:
    """AP over the instances of all classes together, averaged over the IoU thresholds; nan where there is no object.

    The detections of all images and classes are put into one order by score; the rest is COCO's AP of a single class:
    precision, made non-increasing, at 101 places of recall.
    """
    matches = list(matches)
    objects = sum(m.objects for m in matches)
    if objects == 0:
        return float("nan")
    order = np.argsort(-np.concatenate([m.scores for m in matches]), kind="stable")
    hits = np.concatenate([m.hits for m in matches], axis=1)[:, order]
    ignored = np.concatenate([m.ignored for m in matches], axis=1)[:, order]
    right = np.cumsum(hits & ~ignored, axis=1)
    wrong = np.cumsum(~hits & ~ignored, axis=1)
    averages = []
    for found, missed in zip(right, wrong, strict=True):
        precision = found / np.maximum(found + missed, 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)  # 0 where that recall is never reached
        averages.append(precision[np.searchsorted(found / objects, RECALLS)].mean())
    return float(100 * np.mean(averages))


def huddled_table(
    overlaps: Mapping[int, np.ndarray], matches: Mapping[str, Mapping[int, Matches]]
) -> dict[tuple[float, float], dict]:
    """(T_O, T_P) -> {"images": how many are selected, task: AP over all their instances}, for each task in ``matches``.

    At T_O = -1 the share is 1 in every image that has instances, so that T_P = 0 is its only column.
    """
    cells = {}
    for t_o in T_O:
        for t_p in T_P if t_o >= 0 else T_P[:1]:
            images = select_images(overlaps, t_o, t_p)
            aps = {task: pooled_ap(of_image[i] for i in images) for task, of_image in matches.items()}
            cells[t_o, t_p] = {"images": len(images), **aps}
    return cells


def format_cells(cells: Mapping[tuple[float, float], str]) -> str:
    """A Markdown table as the paper's: a row per T_O, a column per T_P."""
    rows = [[f"{t_o:.1f}", *(cells.get((t_o, t_p), "-") for t_p in T_P)] for t_o in T_O]
    headers = ["T_O \\ T_P", *(f"{t_p:.1f}" for t_p in T_P)]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
