"""Every number against pycocotools, one AP by hand, and the causes of the zeros."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from projects.evaluation.coco_files import load_ground_truth
from projects.evaluation.coco_metrics import (
    AREA_RANGES,
    evaluate_results,
    explain,
    per_class_ap,
    run_coco_eval,
    summary_metrics,
)

TASKS = ["bbox", "segm", "keypoints"]
EXACT = dict(rtol=0, atol=1e-9)


def reference(dataset, results, task, *, max_dets=(1, 10, 100), sigmas=(), ranges=None, img_ids=None, cls=COCOeval):
    """pycocotools' evaluation of the same results."""
    results = copy.deepcopy(results)
    if task == "segm":
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = COCO()
        coco_gt.dataset = copy.deepcopy(dataset)
        coco_gt.createIndex()
        evaluation = cls(coco_gt, coco_gt.loadRes(results), task)
        if task == "keypoints":
            if len(sigmas):
                evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        else:
            evaluation.params.maxDets = list(max_dets)
        if ranges:
            evaluation.params.areaRng = [[0, 1e10], *map(list, ranges.values())]
        if img_ids:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal(ours, theirs):
    for key in ("precision", "recall", "scores"):
        assert ours.eval[key].shape == theirs.eval[key].shape
        np.testing.assert_allclose(ours.eval[key], theirs.eval[key], **EXACT)
    assert len(ours.stats) == len(theirs.stats)
    np.testing.assert_allclose(ours.stats, theirs.stats, **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_every_number_is_pycocotools(made_up, task):
    dataset, results = made_up
    theirs = reference(dataset, results, task)
    ours = run_coco_eval(load_ground_truth(dataset, [task]), results, task)
    assert_equal(ours, theirs)
    assert 0.05 < ours.stats[0] < 0.95  # the made-up data is neither hopeless nor perfect
    assert (theirs.stats[:5] > 0).all()


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_every_number_on_real_annotations(real_coco_root, task):
    """Polygons in parts, crowds as runs, 80 categories with gaps; the detections are shifted objects."""
    with open(real_coco_root / "coco/annotations/instances_train2017.json") as file:
        dataset = json.load(file)
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    results = []
    for i, annotation in enumerate(dataset["annotations"]):
        height, width = sizes[annotation["image_id"]]
        segmentation = annotation["segmentation"]
        rles = mask_util.frPyObjects(segmentation, height, width)
        mask = mask_util.decode(mask_util.merge(rles) if isinstance(segmentation, list) else rles)
        moved = mask_util.encode(np.asfortranarray(np.roll(mask, i % 7, axis=1)))
        x, y, w, h = annotation["bbox"]
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "score": (i * 37 % 50) / 50,
                "bbox": [x + i % 7, y, w, h],
                "segmentation": {"size": moved["size"], "counts": moved["counts"].decode()},
            }
        )
    ours = run_coco_eval(load_ground_truth(dataset, [task]), results, task)
    assert_equal(ours, reference(dataset, results, task))
    assert 0.2 < ours.stats[0] < 0.99


@pytest.mark.parametrize("absent", [["bbox"], ["bbox", "segmentation"]])
def test_keypoints_without_boxes(made_up, absent):
    """Then the size of a detection comes from its mask or its keypoints."""
    dataset, results = made_up
    results = [{key: value for key, value in result.items() if key not in absent} for result in results]
    theirs = reference(dataset, results, "keypoints")
    assert_equal(run_coco_eval(load_ground_truth(dataset, ["keypoints"]), results, "keypoints"), theirs)


def test_own_sigmas(made_up):
    dataset, results = made_up
    sigmas = np.linspace(0.01, 0.2, 17)
    coco_gt = load_ground_truth(dataset, ["keypoints"])
    ours = run_coco_eval(coco_gt, results, "keypoints", kpt_oks_sigmas=sigmas)
    assert_equal(ours, reference(dataset, results, "keypoints", sigmas=sigmas))
    assert abs(ours.stats[0] - run_coco_eval(coco_gt, results, "keypoints").stats[0]) > 1e-3


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("limit", [5, 20, 300])
def test_other_limits_are_detectron2s(made_up, task, limit):
    dataset, results = made_up
    max_dets = [1, min(10, limit), limit]
    coco_gt = load_ground_truth(dataset, [task])
    ours = run_coco_eval(coco_gt, results, task, max_dets=limit)
    assert_equal(ours, reference(dataset, results, task, max_dets=max_dets, cls=COCOevalMaxDets))
    assert reference(dataset, results, task, max_dets=max_dets).stats[0] == -1  # which is why it is needed
    assert ours.stats[0] != run_coco_eval(coco_gt, results, task).stats[0]


def test_own_area_ranges(made_up):
    dataset, results = made_up
    ranges = {"s": (0, 20**2), "m": (20**2, 50**2), "l": (50**2, 1e10)}
    coco_gt = load_ground_truth(dataset, ["segm"])
    ours = run_coco_eval(coco_gt, results, "segm", area_ranges=ranges)
    assert_equal(ours, reference(dataset, results, "segm", ranges=ranges))
    one = evaluate_results(coco_gt, results, ["segm"], area_ranges={"tiny": (0, 20**2)})["segm"]
    assert one["APtiny"] == pytest.approx(100 * ours.stats[3])
    assert "APs" not in one


def test_some_images(made_up):
    dataset, results = made_up
    img_ids = [image["id"] for image in dataset["images"][4:9]]
    ours = run_coco_eval(load_ground_truth(dataset, ["bbox"]), results, "bbox", img_ids=img_ids)
    assert_equal(ours, reference(dataset, results, "bbox", img_ids=img_ids))


@pytest.mark.parametrize("task", TASKS)
def test_no_detections_are_zero_not_missing(made_up, task):
    dataset, _ = made_up
    metrics = evaluate_results(load_ground_truth(dataset, [task]), [], [task])[task]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP-car"] == 0
    assert math.isnan(metrics["AP-ghost"])


def test_results_and_repeats_leave_no_trace(made_up):
    dataset, results = made_up
    before = copy.deepcopy(results)
    coco_gt = load_ground_truth(dataset, TASKS)
    first = evaluate_results(coco_gt, results, TASKS)
    assert results == before
    second = evaluate_results(coco_gt, results, TASKS[::-1])
    for task in TASKS:
        np.testing.assert_equal(first[task], second[task])


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_by_hand(two_cars, task):
    """Cars: precision 1 at the 51 recalls up to .5, 2/3 at the other 50. Bus: 0. All are of medium size."""
    dataset, results = two_cars
    metrics = evaluate_results(load_ground_truth(dataset, [task]), results, [task])[task]
    car = 100 * (51 + 50 * 2 / 3) / 101
    assert metrics["AP-car"] == pytest.approx(car, abs=1e-9)
    assert metrics["AP-bus"] == 0
    for name in ("AP", "AP50", "AP75", "APm"):
        assert metrics[name] == pytest.approx(car / 2, abs=1e-9)
    assert math.isnan(metrics["APs"]) and math.isnan(metrics["APl"])


def test_limit_of_one_by_hand(two_cars):
    """Only the best detection counts: precision 1 at the 51 recalls up to .5, then 0."""
    dataset, results = two_cars
    coco_gt = load_ground_truth(dataset, ["bbox"])
    metrics = evaluate_results(coco_gt, results, ["bbox"], max_dets=1)["bbox"]
    assert metrics["AP-car"] == pytest.approx(100 * 51 / 101, abs=1e-9)


def test_area_decides_the_range_of_a_mask(two_cars, encode):
    """A large box around a small mask is a small detection: no false positive among medium objects."""
    dataset, results = two_cars
    thin = copy.deepcopy(results[1])
    mask = np.zeros(thin["segmentation"]["size"])
    mask[100:101, :30] = 1
    thin |= {"segmentation": encode(mask), "bbox": [0.0, 60.0, 90.0, 90.0], "score": 0.99}
    coco_gt = load_ground_truth(dataset, ["segm"])
    with_thin, without = (evaluate_results(coco_gt, found, ["segm"])["segm"] for found in ([thin, *results], results))
    assert with_thin["APm"] == without["APm"]
    assert with_thin["AP"] < without["AP"]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_classes_go_by_id(made_up, task):
    """Names follow the ids (here in reverse in the file), each AP is pycocotools' of that category alone."""
    dataset, results = made_up
    coco_gt = load_ground_truth(dataset, [task])
    assert list(per_class_ap(run_coco_eval(coco_gt, results, task))) == ["car", "bus", "dog", "rare", "ghost"]
    metrics = evaluate_results(coco_gt, results, [task])[task]
    for category in dataset["categories"]:
        kept = [r for r in results if r["category_id"] == category["id"]]
        alone = {**dataset, "categories": [category]}
        alone["annotations"] = [a for a in dataset["annotations"] if a["category_id"] == category["id"]]
        stats = reference(alone, kept, task).stats[:3] if kept else np.zeros(3)
        for measure, value in zip(("AP", "AP50", "AP75"), stats, strict=True):
            ours = metrics[f"{measure}-{category['name']}"]
            assert math.isnan(ours) if value < 0 else ours == pytest.approx(100 * value, abs=1e-9)
    assert metrics["AP50-car"] > metrics["AP75-car"] > 0


def test_a_single_class_has_no_class_row(two_cars):
    dataset, results = two_cars
    dataset["categories"] = dataset["categories"][1:]
    metrics = evaluate_results(load_ground_truth(dataset, ["bbox"]), results, ["bbox"])["bbox"]
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def _causes(dataset, results, task="bbox", **settings):
    evaluation = run_coco_eval(load_ground_truth(dataset, [task]), results, task, **settings)
    return explain(evaluation, summary_metrics(evaluation))


def _edit(**fields):
    def apply(entries):
        for entry in entries:
            entry.update(fields)

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d, r: r.clear(),
            ["AP, AP50, AP75, APm = 0: there are no detections", "APs = nan: there is no ground"],
        ),
        (
            lambda d, r: _edit(category_id=5)(r) or d["annotations"].pop(2),
            ["no category id in common: detections"],
        ),
        (
            lambda d, r: d["images"].append({"id": 9}) or _edit(image_id=9)(r),
            ["no image id in common: detections have 9"],
        ),
        (lambda d, r: _edit(bbox=[5.0, 100.0, 40.0, 40.0])(r), ["IoU 0.5; the best one has 0.000"]),
        (
            lambda d, r: _edit(bbox=[0.0, 10.0, 40.0, 25.0])(r),
            ["AP75 = 0: no detection matches", "the best one has 0.625"],
        ),
        (
            lambda d, r: _edit(iscrowd=1)(d["annotations"]),
            ["AP, AP50, AP75, APs, APm, APl = nan: all ground truth (3"],
        ),
        (
            lambda d, r: d["annotations"].clear(),
            ["= nan: there is no ground truth in the 1 images for the 2 categories"],
        ),
        (
            lambda d, r: None,
            ["APs = nan: there is no ground truth of that size (0 to 1024", "objects have 1600 to 1600"],
        ),
        (
            lambda d, r: d["annotations"][1].update(area=9e4) or r.pop(2),
            ["APl = 0: no detection matches ground truth of that size at IoU 0.5; the best one has 0.000"],
        ),
    ],
)
def test_the_cause_is_named(two_cars, change, words):
    change(*two_cars)
    lines = _causes(*two_cars)
    for word in words:
        assert any(word in line for line in lines), lines


def test_a_pair_of_image_and_category_is_needed(two_cars):
    dataset, results = two_cars
    dataset["images"].append({"id": 9})
    dataset["annotations"][2]["image_id"] = 9
    results[0].update(image_id=9)
    _edit(category_id=5)(results[1:])
    assert "no image has both detections and ground truth of one category" in _causes(dataset, results)[0]


def test_crowd_is_not_the_best_overlap(two_cars):
    """A detection that lies on crowd only has overlap 1 with it, and still nothing to match."""
    dataset, results = two_cars
    dataset["annotations"][0]["iscrowd"] = 1
    lines = _causes(dataset, results[:1])
    assert any("the best one has 0.000" in line for line in lines), lines


def test_causes_of_keypoints(made_up):
    dataset, results = made_up
    for result in results:
        result["keypoints"] = [v + 1e4 for v in result["keypoints"]]
    (line,) = _causes(dataset, results, "keypoints")
    assert line.startswith("AP, AP50, AP75, APm, APl = 0: no detection matches ground truth at OKS 0.5")
    _edit(num_keypoints=0)(dataset["annotations"])
    (line,) = _causes(dataset, results, "keypoints")
    assert "is crowd or has no labelled keypoint" in line


def test_nothing_to_explain(made_up):
    assert _causes(*made_up) == []
    assert set(AREA_RANGES) == {"s", "m", "l"}


def test_the_log_holds_tables_and_causes(two_cars, caplog):
    dataset, results = two_cars
    with caplog.at_level("INFO", logger="projects"):
        evaluate_results(load_ground_truth(dataset, ["bbox"]), results, ["bbox"])
    text = caplog.text
    assert "bbox APs = nan" in text
    assert "| car" in text and "| bus" in text
    assert "41.749" in text  # AP, in percent
