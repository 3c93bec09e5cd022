"""Panoptic quality: PQ = SQ * RQ of Kirillov et al., "Panoptic Segmentation" (CVPR 2019, section 4).

H, W: image in pixels. A segment map is (H, W) integers, each the id of the segment that the pixel belongs to; VOID (0)
is a pixel without one. Segments are listed as dicts of "id", "category_id" and, in ground truth, "iscrowd".
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from projects.errors import DataError

VOID = 0
MATCH_THRESHOLD = 0.5  # of the IoU, exclusive: above it no segment can match two others


@dataclass
class Tally:
    """Of one class: matched, superfluous and missed segments, and the sum of the matched pairs' IoU."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou + other.iou)

    @property
    def quality(self) -> tuple[float, float, float]:
        """(PQ, SQ, RQ) in [0, 1]; nan where there is neither ground truth nor a prediction that counts."""
        segments = self.tp + (self.fp + self.fn) / 2
        if not segments:
            return (float("nan"),) * 3
        return self.iou / segments, self.iou / max(self.tp, 1), self.tp / segments


def match_segments(
    truth: np.ndarray, truth_segments: Sequence[dict], predicted: np.ndarray, predicted_segments: Sequence[dict]
) -> dict[int, Tally]:
    """Compare two segment maps of an image: category id -> :class:`Tally`.

    A predicted segment matches one of the ground truth when both have the same category and an IoU above 0.5. Its pixels
    that are void in the ground truth do not count in the union. Crowd segments of the ground truth are neither matched
    nor missed. An unmatched prediction is not superfluous when more than half of it lies on void or on crowd segments of
    its own category.

    Raises:
        DataError: the maps differ in size, or a map holds an id that is not listed; a predicted segment has no pixel.
    """
    if truth.shape != predicted.shape:
        raise DataError(f"The predicted map is {predicted.shape} (height, width), the ground truth's {truth.shape}.")
    category = {s["id"]: s["category_id"] for s in truth_segments}
    predicted_category = {s["id"]: s["category_id"] for s in predicted_segments}
    crowd = {s["id"] for s in truth_segments if s.get("iscrowd")}
    overlap = _overlaps(truth, predicted)
    area, predicted_area = defaultdict(int), defaultdict(int)
    for (t, p), pixels in overlap.items():
        area[t] += pixels
        predicted_area[p] += pixels
    _check_ids("ground truth", area, category)
    _check_ids("prediction", predicted_area, predicted_category)
    if empty := predicted_category.keys() - predicted_area:
        raise DataError(f"The prediction lists segments that have no pixel: {sorted(empty)}.")

    tallies: dict[int, Tally] = defaultdict(Tally)
    matched, predicted_matched = set(), set()
    for (t, p), pixels in overlap.items():
        if VOID in (t, p) or t in crowd or category[t] != predicted_category[p]:
            continue
        iou = pixels / (area[t] + predicted_area[p] - pixels - overlap.get((VOID, p), 0))
        if iou > MATCH_THRESHOLD:
            tallies[category[t]] += Tally(tp=1, iou=iou)
            matched.add(t)
            predicted_matched.add(p)
    for t in category.keys() - matched - crowd:
        tallies[category[t]] += Tally(fn=1)
    for p in predicted_category.keys() - predicted_matched:
        ignored = [VOID, *(t for t in crowd if category[t] == predicted_category[p])]
        if sum(overlap.get((t, p), 0) for t in ignored) / predicted_area[p] <= MATCH_THRESHOLD:
            tallies[predicted_category[p]] += Tally(fp=1)
    return dict(tallies)


def sum_tallies(images: Iterable[Mapping[int, Tally]]) -> dict[int, Tally]:
    """Category id -> tally over all images."""
    total: dict[int, Tally] = defaultdict(Tally)
    for tallies in images:
        for category, tally in tallies.items():
            total[category] += tally
    return dict(total)


def panoptic_metrics(tallies: Mapping[int, Tally], categories: Iterable[dict]) -> dict[str, float]:
    """PQ, SQ and RQ in percent: means over all classes, over things ("PQ_th") and over stuff ("PQ_st"), PQ per class.

    Args:
        tallies: category id -> tally over all images.
        categories: dicts of "id", "name" and "isthing".

    Returns:
        {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st", "PQ-<class>"}. A class with neither ground truth nor predictions is nan
        and left out of the means; a mean over no class is nan.
    """
    rows = [(c, tallies.get(c["id"], Tally()).quality) for c in categories]
    metrics = {}
    for suffix, kinds in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
        found = [quality for c, quality in rows if bool(c["isthing"]) in kinds and not np.isnan(quality[0])]
        means = np.mean(found, axis=0) if found else [np.nan] * 3
        metrics |= {f"{name}{suffix}": 100 * float(mean) for name, mean in zip(("PQ", "SQ", "RQ"), means, strict=True)}
    return metrics | {f"PQ-{c['name']}": 100 * quality[0] for c, quality in rows}


def _overlaps(truth: np.ndarray, predicted: np.ndarray) -> dict[tuple[int, int], int]:
    """(id in the one map, id in the other) -> common pixels, for the pairs that have some."""
    step = int(predicted.max(initial=0)) + 1
    pairs, pixels = np.unique(truth.astype(np.int64) * step + predicted, return_counts=True)
    return {divmod(pair, step): n for pair, n in zip(pairs.tolist(), pixels.tolist(), strict=True)}


def _check_ids(whose: str, found: Mapping[int, int], listed: Mapping[int, int]) -> None:
    if unknown := found.keys() - listed.keys() - {VOID}:
        raise DataError(f"The segment map of the {whose} holds the ids {sorted(unknown)}, which its list of segments lacks.")
