"""COCO's average precision through faster-coco-eval, and in words why one of its numbers is 0 or missing.

The numbers are those of pycocotools (https://github.com/cocodataset/cocoapi), the definition is at
https://cocodataset.org/#detection-eval. Throughout: boxes are [x, y, width, height] and keypoints
[x, y, visibility] in image pixels, areas are square image pixels, scores lie in [0, 1], metrics in [0, 100],
or nan where there is nothing to measure. T thresholds of IoU, R of recall, K categories, A area ranges, M
limits on the detections of an image.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from tabulate import tabulate

logger = logging.getLogger(__name__)

AREA_RANGES = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e5**2)}
"""COCO's small, medium and large: suffix of the metric -> (lowest, highest) area, both inclusive."""

_RESULT_FIELDS = {
    "bbox": ("bbox",),
    "segm": ("segmentation",),  # without the box, whose area would be taken for the mask's
    "keypoints": ("keypoints", "bbox", "segmentation"),
}


def evaluate_results(
    coco_gt: COCO,
    results: Sequence[dict],
    tasks: Iterable[str],
    *,
    max_dets: int | None = None,
    kpt_oks_sigmas: Sequence[float] = (),
    area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
    img_ids: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task, which are also logged as tables, with a line for those that are 0 or nan.

    Args:
        coco_gt: ground truth from :func:`~projects.evaluation.coco_files.load_ground_truth`.
        results: detections that passed :func:`~projects.evaluation.coco_files.check_results`; not changed.
        tasks: some of "bbox", "segm", "keypoints".
        max_dets: how many detections of an image and category count, best scores first; None is COCO's 100.
            Keypoints always take COCO's 20.
        kpt_oks_sigmas: one per keypoint, relative to the object's size; empty: COCO's 17 of a person.
        area_ranges: as :data:`AREA_RANGES`, for boxes and masks; keypoints take COCO's medium and large.
        img_ids: the images to look at; None: all of the ground truth.

    Returns:
        {task: {"AP", "AP50", "AP75", "AP" + suffix of each area range, "AP-" + category name, "AP50-" and "AP75-" +
        category name}}; the last kinds are left out where there is only one category. The keys are Detectron2's, but for
        the last two.
    """
    tables = {}
    for task in tasks:
        coco_eval = run_coco_eval(coco_gt, results, task, max_dets, kpt_oks_sigmas, area_ranges, img_ids)
        metrics = summary_metrics(coco_eval)
        logger.info("%s:\n%s", task, tabulate([metrics], headers="keys", tablefmt="pipe", floatfmt=".3f"))
        for line in explain(coco_eval, metrics):
            logger.warning("%s %s", task, line)
        per_class = per_class_ap(coco_eval)
        if len(per_class) > 1:
            logger.info("%s AP per category:\n%s", task, _class_table(per_class))
            metrics |= {f"AP-{name}": ap for name, ap in per_class.items()}
            for measure, iou in (("AP50", 0.5), ("AP75", 0.75)):
                metrics |= {f"{measure}-{name}": ap for name, ap in per_class_ap(coco_eval, iou).items()}
        tables[task] = metrics
    return tables


def run_coco_eval(
    coco_gt: COCO,
    results: Sequence[dict],
    task: str,
    max_dets: int | None = None,
    kpt_oks_sigmas: Sequence[float] = (),
    area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
    img_ids: Sequence[int] | None = None,
) -> COCOeval_faster:
    """The finished evaluation of one task, with `.stats` and `.eval` as pycocotools has them.

    `.eval["precision"]` is (T, R, K, A, M) and `.eval["recall"]` (T, K, A, M); K runs over all categories of
    the ground truth in the order of their ids. With `max_dets` other than 100 AP is the one of Detectron2's
    `COCOevalMaxDets` (pycocotools itself says -1). Arguments as in :func:`evaluate_results`.
    """
    # Copies, because loadRes writes into the dicts.
    fields = ("image_id", "category_id", "score", *_RESULT_FIELDS[task])
    detections = coco_gt.loadRes([{key: r[key] for key in fields if key in r} for r in results])
    coco_eval = COCOeval_faster(coco_gt, detections, task, print_function=logger.debug)
    params = coco_eval.params
    params.catIds = sorted(coco_gt.getCatIds())  # the library's list for keypoints lacks unused categories
    if img_ids is not None:
        params.imgIds = list(img_ids)
    if task == "keypoints":
        if len(kpt_oks_sigmas):
            params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
    else:
        limit = max_dets or 100
        params.maxDets = [min(1, limit), min(10, limit), limit]
        params.areaRng = [[0, 1e5**2], *(list(area_range) for area_range in area_ranges.values())]
        params.areaRngLbl = ["all", *area_ranges]
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval


def summary_metrics(coco_eval: COCOeval_faster) -> dict[str, float]:
    """AP, AP50, AP75 and one AP per area range, times 100; nan where there is no ground truth to find."""
    names = _measured(coco_eval)
    values = [float(value * 100) if value >= 0 else float("nan") for value in coco_eval.stats[: len(names)]]
    return dict(zip(names, values, strict=True))


def per_class_ap(coco_eval: COCOeval_faster, iou: float | None = None) -> dict[str, float]:
    """Category name -> AP times 100 over all areas; nan for a category without ground truth.

    Args:
        iou: the one threshold of IoU to look at; None: the mean over all of them.
    """
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]
    if iou is not None:
        precision = precision[np.isclose(coco_eval.params.iouThrs, iou)]
    table = {}
    for k, category_id in enumerate(coco_eval.params.catIds):
        name = coco_eval.cocoGt.cats[category_id]["name"]
        valid = precision[:, :, k][precision[:, :, k] > -1]
        table[name] = float(valid.mean() * 100) if valid.size else float("nan")
    return table


def explain(coco_eval: COCOeval_faster, metrics: Mapping[str, float]) -> list[str]:
    """For the metrics that are 0 or nan one line per cause: "AP, AP50 = 0: there are no detections"."""
    measured = _measured(coco_eval)
    names_of_cause: dict[str, list[str]] = {}
    for name, (iou, area_range) in measured.items():
        if np.isnan(metrics[name]):
            cause = "nan: " + _why_unmeasured(coco_eval, area_range)
        elif metrics["AP"] == 0:  # then every other zero has the same cause
            cause = "0: " + _why_zero(coco_eval, *measured["AP"])
        elif metrics[name] == 0:
            cause = "0: " + _why_zero(coco_eval, iou, area_range)
        else:
            continue
        names_of_cause.setdefault(cause, []).append(name)
    return [f"{', '.join(names)} = {cause}" for cause, names in names_of_cause.items()]


def _measured(coco_eval: COCOeval_faster) -> dict[str, tuple[float, tuple[float, float]]]:
    """Metric -> (lowest IoU that makes a match, area range), in the order of the first numbers in `stats`."""
    params = coco_eval.params
    suffixes = ["m", "l"] if params.iouType == "keypoints" else params.areaRngLbl[1:]
    whole = tuple(params.areaRng[0])
    metrics = {"AP": (0.5, whole), "AP50": (0.5, whole), "AP75": (0.75, whole)}
    areas = map(tuple, params.areaRng[1:])
    return metrics | {f"AP{suffix}": (0.5, area) for suffix, area in zip(suffixes, areas, strict=True)}


def _ground_truth(coco_eval: COCOeval_faster) -> list[dict]:
    """The annotations of the evaluated images and categories."""
    categories = set(coco_eval.params.catIds)
    images = coco_eval.params.imgIds
    return [a for i in images for a in coco_eval.cocoGt.imgToAnns[i] if a["category_id"] in categories]


def _counts(annotation: dict, task: str, area_range: tuple[float, float] = (0, float("inf"))) -> bool:
    """Whether an object has to be found: neither crowd nor without labelled keypoints, and of that size."""
    ignored = annotation.get("iscrowd", 0) or (task == "keypoints" and annotation["num_keypoints"] == 0)
    return not ignored and area_range[0] <= annotation["area"] <= area_range[1]


def _why_unmeasured(coco_eval: COCOeval_faster, area_range: tuple[float, float]) -> str:
    task = coco_eval.params.iouType
    annotations = _ground_truth(coco_eval)
    if not annotations:
        return (
            f"there is no ground truth in the {len(coco_eval.params.imgIds)} images "
            f"for the {len(coco_eval.params.catIds)} categories"
        )
    areas = [a["area"] for a in annotations if _counts(a, task)]
    if not areas:
        also = " or has no labelled keypoint" if task == "keypoints" else ""
        return f"all ground truth ({len(annotations)} objects) is crowd{also}, which is never counted"
    return (
        f"there is no ground truth of that size ({area_range[0]:g} to {area_range[1]:g} square pixels); "
        f"the {len(areas)} objects have {min(areas):.0f} to {max(areas):.0f}"
    )


def _why_zero(coco_eval: COCOeval_faster, iou: float, area_range: tuple[float, float]) -> str:
    task = coco_eval.params.iouType
    images = set(coco_eval.params.imgIds)
    detections = [d for d in coco_eval.cocoDt.anns.values() if d["image_id"] in images]
    if not detections:
        return "there are no detections (the model has not learned yet, or the score threshold is too high)"
    objects = [a for a in _ground_truth(coco_eval) if _counts(a, task)]
    detected, wanted = ({a["category_id"] for a in group} for group in (detections, objects))
    if not detected & wanted:
        return f"no category id in common: detections have {_some(detected)}, ground truth {_some(wanted)}"
    detected, wanted = ({a["image_id"] for a in group} for group in (detections, objects))
    if not detected & wanted:
        return f"no image id in common: detections have {_some(detected)}, ground truth {_some(wanted)}"
    best = _best_overlap(coco_eval, area_range)
    size = "" if area_range == tuple(coco_eval.params.areaRng[0]) else " of that size"
    if best is None:
        return f"no image has both detections and ground truth{size} of one category"
    measure = "OKS" if task == "keypoints" else "IoU"
    return f"no detection matches ground truth{size} at {measure} {iou:g}; the best one has {best:.3f}"


def _best_overlap(coco_eval: COCOeval_faster, area_range: tuple[float, float]) -> float | None:
    """Largest IoU (keypoints: OKS) of a detection with an object to be found; None without such a pair."""
    task = coco_eval.params.iouType
    best = None
    for (image_id, category_id), overlaps in coco_eval.ious.items():
        if len(overlaps) == 0:
            continue
        annotations = [a for a in coco_eval.cocoGt.imgToAnns[image_id] if a["category_id"] == category_id]
        columns = [i for i, a in enumerate(annotations) if _counts(a, task, area_range)]
        if columns:
            best = max(float(np.max(overlaps[:, columns])), -1.0 if best is None else best)
    return best


def _some(ids: set[int]) -> str:
    listed = ", ".join(str(i) for i in sorted(ids)[:5])
    return listed if len(ids) <= 5 else f"{listed}, ... ({len(ids)})"


def _class_table(per_class: Mapping[str, float]) -> str:
    columns = min(3, len(per_class))
    cells = [cell for item in per_class.items() for cell in item]
    rows = [cells[i : i + 2 * columns] for i in range(0, len(cells), 2 * columns)]
    return tabulate(rows, headers=["category", "AP"] * columns, tablefmt="pipe", floatfmt=".3f")
