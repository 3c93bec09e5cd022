"""The Cityscapes evaluators on shapes in Cityscapes' format: ground truth, known damage, and the scripts run by hand.

What the damage costs is worked out here from pixel and object counts of the annotation PNGs, not by the evaluators' code.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label, name2label
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects.evaluation import build_evaluator
from projects.evaluation.cityscapes_instance import CityscapesInstanceEvaluator
from projects.evaluation.cityscapes_panoptic import CityscapesPanopticEvaluator
from projects.evaluation.cityscapes_semantic import CityscapesSemanticEvaluator

NAME = "shapes_cityscapes_panoptic_val"
THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
STUFF = ("road", "wall", "sky")
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


@pytest.fixture
def outputs(val_records, perfect):
    return [perfect(record) for record in val_records]


@pytest.fixture
def instance_maps(val_records) -> list[np.ndarray]:
    return [np.array(Image.open(record["instance_ids_file_name"])).astype(int) for record in val_records]


def objects_per_class(instance_maps, smallest: int) -> Counter:
    """Objects of at least so many pixels, no groups, by label id."""
    ids = [np.unique(ids[ids >= 1000], return_counts=True) for ids in instance_maps]
    return Counter(int(i) // 1000 for found, areas in ids for i, area in zip(found, areas, strict=True) if area >= smallest)


def largest_instance(outputs) -> tuple[int, int]:
    """(number of the image, number of the instance in it)"""
    areas = {(n, i): int(mask.sum()) for n, o in enumerate(outputs) for i, mask in enumerate(o["instances"].pred_masks)}
    return max(areas, key=areas.get)


def name_of_instance(outputs, n, i) -> str:
    return THINGS[outputs[n]["instances"].pred_classes[i]]


def test_ground_truth_is_perfect(val_records, outputs, run_evaluator):
    results = run_evaluator(build_evaluator(get_cfg(), NAME, None), val_records, outputs)
    assert list(results) == ["segm", "sem_seg", "panoptic_seg"]
    assert list(results["segm"]) == ["AP", "AP50"] + [f"{m}-{c}" for m in ("AP", "AP50") for c in THINGS]
    assert set(results["segm"].values()) == {100.0}
    present = {f"IoU-{c}" for c in THINGS + STUFF} | {"mIoU", "iIoU", "IoU_sup", "iIoU_sup"}
    assert present <= results["sem_seg"].keys() and len(results["sem_seg"]) == 4 + 19 + 7
    assert {results["sem_seg"][metric] for metric in present} == {100.0}
    assert np.isnan(results["sem_seg"]["IoU-building"]) and results["sem_seg"]["IoU_sup-vehicle"] == 100
    present = {f"PQ-{c}" for c in THINGS + STUFF} | {f"{m}{s}" for m in ("PQ", "SQ", "RQ") for s in ("", "_th", "_st")}
    assert {results["panoptic_seg"][metric] for metric in present} == {100.0}
    assert np.isnan(results["panoptic_seg"]["PQ-building"]) and len(results["panoptic_seg"]) == 9 + 19


def test_a_missed_instance(val_records, outputs, instance_maps, run_evaluator):
    """AP of its class: precision 1 up to recall (n - 1) / n; PQ: one segment of n missed."""
    n, i = largest_instance(outputs)
    name = name_of_instance(outputs, n, i)
    mask = outputs[n]["instances"].pred_masks[i]
    kept = [k for k in range(len(outputs[n]["instances"])) if k != i]
    outputs[n]["instances"] = outputs[n]["instances"][kept]
    ids, infos = outputs[n]["panoptic_seg"]
    gone = int(ids[mask][0])
    outputs[n]["panoptic_seg"] = (torch.where(mask, 0, ids), [s for s in infos if s["id"] != gone])
    results = run_evaluator(build_evaluator(get_cfg(), NAME, None), val_records, outputs)
    count = objects_per_class(instance_maps, 100)[name2label[name].id]
    assert count > 1
    ap = 100 * (count - 1) / count
    assert results["segm"][f"AP-{name}"] == results["segm"][f"AP50-{name}"] == pytest.approx(ap)
    assert results["segm"]["AP"] == pytest.approx((7 * 100 + ap) / 8)
    count = objects_per_class(instance_maps, 1)[name2label[name].id]
    pq = 100 * (count - 1) / (count - 1 + 1 / 2)
    assert results["panoptic_seg"][f"PQ-{name}"] == pytest.approx(pq)
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx((7 * 100 + pq) / 8)
    assert results["panoptic_seg"]["PQ"] == pytest.approx((10 * 100 + pq) / 11)
    assert (results["panoptic_seg"]["PQ_st"], results["panoptic_seg"]["SQ"], results["sem_seg"]["mIoU"]) == (100, 100, 100)


def test_a_shifted_mask(val_records, outputs, instance_maps, run_evaluator):
    """With the lowest score, so that where it does not match the precision up to recall (n - 1) / n stays 1.

    In the panoptic map the pixels that it left are void, and those that it moved to are another's.
    """
    n, i = largest_instance(outputs)
    name = name_of_instance(outputs, n, i)
    instances = outputs[n]["instances"]
    mask = instances.pred_masks[i].numpy()
    moved = np.roll(mask, 5, axis=1) & (np.arange(mask.shape[1]) >= 5)
    iou = (mask & moved).sum() / (mask | moved).sum()
    assert 0.55 < iou < 0.95 and min(abs(iou - t) for t in THRESHOLDS) > 0.002
    instances.pred_masks[i] = torch.from_numpy(moved)
    instances.scores[i] = 0.5
    ids, infos = outputs[n]["panoptic_seg"]
    number = int(ids[torch.from_numpy(mask)][0])
    stays = mask & moved
    outputs[n]["panoptic_seg"] = (torch.where(torch.from_numpy(mask & ~moved), 0, ids), infos)
    results = run_evaluator(build_evaluator(get_cfg(), NAME, None), val_records, outputs)
    count = objects_per_class(instance_maps, 100)[name2label[name].id]
    ap = 100 * np.mean([1 if iou > threshold else (count - 1) / count for threshold in THRESHOLDS])
    assert results["segm"][f"AP-{name}"] == pytest.approx(ap)
    assert results["segm"][f"AP50-{name}"] == 100
    assert number // 1000 == name2label[name].id
    count = objects_per_class(instance_maps, 1)[name2label[name].id]
    sq = (count - 1 + stays.sum() / mask.sum()) / count
    assert results["panoptic_seg"][f"PQ-{name}"] == pytest.approx(100 * sq)
    assert results["panoptic_seg"]["SQ_th"] == pytest.approx((7 * 100 + 100 * sq) / 8)
    assert results["panoptic_seg"]["RQ"] == 100


def test_two_classes_swapped_in_an_image(val_records, outputs, instance_maps, run_evaluator):
    """Road for sky and sky for road: pixels of the one are false positives of the other, and so are the segments."""
    counts = [{c: int((ids == name2label[c].id).sum()) for c in ("road", "sky")} for ids in instance_maps]
    n = next(n for n, count in enumerate(counts) if min(count.values()) > 0 and count["road"] != count["sky"])
    road, sky = name2label["road"].trainId, name2label["sky"].trainId
    outputs[n]["sem_seg"][[road, sky]] = outputs[n]["sem_seg"][[sky, road]]
    for segment in outputs[n]["panoptic_seg"][1]:
        if not segment["isthing"] and segment["category_id"] in (road, sky):
            segment["category_id"] = {road: sky, sky: road}[segment["category_id"]]
    results = run_evaluator(build_evaluator(get_cfg(), NAME, None), val_records, outputs)
    ious, qualities = {}, {}
    for name, other in (("road", "sky"), ("sky", "road")):
        total = sum(count[name] for count in counts)
        ious[name] = 100 * (total - counts[n][name]) / (total + counts[n][other])
        images = sum(count[name] > 0 for count in counts)
        qualities[name] = 100 * (images - 1) / (images - 1 + 1 / 2 + 1 / 2)
        assert results["sem_seg"][f"IoU-{name}"] == pytest.approx(ious[name])
        assert results["panoptic_seg"][f"PQ-{name}"] == pytest.approx(qualities[name])
    assert ious["road"] != pytest.approx(ious["sky"], abs=0.1)
    assert results["sem_seg"]["mIoU"] == pytest.approx((9 * 100 + sum(ious.values())) / 11)
    assert results["panoptic_seg"]["PQ_st"] == pytest.approx((100 + sum(qualities.values())) / 3)
    assert (results["segm"]["AP"], results["panoptic_seg"]["PQ_th"]) == (100, 100)


@pytest.mark.parametrize("evaluator_type", ["coco", "cityscapes_instance10"])
def test_ten_classes_in_coco_style(evaluator_type, cityscapes_root, perfect, run_evaluator, instance_maps, monkeypatch):
    """Boxes and masks with AP, AP50 and AP75 per class; a box that is shifted to an IoU of 3/5 counts for AP50 only."""
    name = "shapes_cityscapes_instance10_val"
    monkeypatch.setitem(vars(MetadataCatalog.get(name)), "evaluator_type", evaluator_type)
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    records = DatasetCatalog.get(name)
    semantic = DatasetCatalog.get(NAME)
    outputs = [{"instances": perfect({**s, **r})["instances"]} for r, s in zip(records, semantic, strict=True)]
    n, i = largest_instance(outputs)
    instances = outputs[n]["instances"]
    instances.scores[i] = 0.5
    x0, _, x1, _ = instances.pred_boxes.tensor[i].tolist()
    instances.pred_boxes.tensor[i, ::2] += (x1 - x0) / 4  # 3/4 of the box in common: IoU 3 / 5
    k, classes = int(instances.pred_classes[i]), MetadataCatalog.get(name).thing_classes
    results = run_evaluator(build_evaluator(cfg, name, None), records, outputs)
    benchmark = results.pop("segm_cityscapes", None)
    assert (benchmark is None) == (evaluator_type == "coco") and list(results) == ["bbox", "segm"]
    assert benchmark is None or (benchmark["AP"] == 100 and "AP-caravan" not in benchmark)
    for task, metrics in results.items():
        assert [f"{m}-{c}" for m in ("AP", "AP50", "AP75") for c in classes] == [m for m in metrics if "-" in m]
        for c in classes:
            values = [metrics[f"{m}-{c}"] for m in ("AP50", "AP75", "AP")]
            if c in ("caravan", "trailer"):
                assert np.isnan(values).all()
            elif task == "bbox" and c == classes[k]:
                count = objects_per_class(instance_maps, 1)[name2label[c].id]
                points = sum(r <= (count - 1) / count + 1e-9 for r in np.linspace(0, 1, 101)) / 101  # COCO's recalls
                assert values == pytest.approx([100, 100 * points, 100 * (3 + 7 * points) / 10])
            else:
                assert values == pytest.approx([100, 100, 100])


def damaged(output: dict, rng: np.random.Generator) -> dict:
    """The output of a mediocre model: what a perfect one gives, with everything that can go wrong."""
    instances, (ids, infos), semantic = output["instances"], output["panoptic_seg"], output["sem_seg"]
    for i in range(len(instances)):
        instances.pred_masks[i] = instances.pred_masks[i].roll((int(rng.integers(-3, 4)), int(rng.integers(-3, 4))), (0, 1))
    chosen = rng.integers(0, max(len(instances), 1), len(instances))  # some of them twice, some not at all
    instances = instances[torch.from_numpy(chosen)]
    instances.scores = torch.from_numpy(rng.choice([0.2, 0.5, 0.5, 0.7, 0.95], len(instances)))
    wrong = torch.from_numpy(rng.random(len(instances)) < 0.1)
    instances.pred_classes[wrong] = (instances.pred_classes[wrong] + 1) % 8
    ids, infos = ids.clone(), [dict(s) for s in infos]
    for _ in range(4):
        y, x = rng.integers(0, ids.shape[0] - 40), rng.integers(0, ids.shape[1] - 40)
        patch = (slice(y, y + 40), slice(x, x + 40))
        ids[patch] = int(rng.choice([0, *(s["id"] for s in infos)]))
        semantic[:, patch[0], patch[1]] = 0
        semantic[int(rng.choice([0, 3, 10, 13])), patch[0], patch[1]] = 1
    for segment in infos:
        if rng.random() < 0.15:
            segment["category_id"] = (segment["category_id"] + 1) % (8 if segment["isthing"] else 19)
    return {"instances": instances, "sem_seg": semantic, "panoptic_seg": (ids, infos)}


BY_HAND = """
import os, sys, importlib
results, scripts = sys.argv[1], {"instance": "InstanceLevel", "semantic": "PixelLevel", "panoptic": "Panoptic"}
sys.argv[1:] = []
for folder, name in scripts.items():
    script = importlib.import_module(f"cityscapesscripts.evaluation.eval{name}SemanticLabeling")
    os.environ["CITYSCAPES_RESULTS"] = f"{results}/{folder}"
    if folder == "instance":
        script.args.gtInstancesFile = f"{results}/gtInstances.json"  # which the script would write beside itself
    script.main()
"""


def test_same_numbers_as_the_scripts_run_by_hand(val_records, outputs, cityscapes_root, run_evaluator, tmp_path):
    rng = np.random.default_rng(0)
    outputs = [damaged(output, rng) for output in outputs]
    evaluators = {
        "instance": CityscapesInstanceEvaluator(NAME),
        "semantic": CityscapesSemanticEvaluator(NAME),
        "panoptic": CityscapesPanopticEvaluator(NAME),
    }
    ours = {}
    for folder, evaluator in evaluators.items():
        (tmp_path / folder).mkdir()
        pairs = zip(evaluator.records.values(), outputs, strict=True)
        entries = [evaluator.write(record, output, tmp_path / folder) for record, output in pairs]
        evaluator.write_index(entries, tmp_path / folder)
        ours |= run_evaluator(evaluator, val_records, outputs)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "gtFine").symlink_to(cityscapes_root / "gtFine")
    subprocess.run(
        [sys.executable, "-c", BY_HAND, str(tmp_path)],
        env={**os.environ, "CITYSCAPES_DATASET": str(dataset)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    theirs = json.loads((dataset / "evaluationResults/resultInstanceLevelSemanticLabeling.json").read_text())["averages"]
    assert ours["segm"]["AP"] == pytest.approx(100 * theirs["allAp"], abs=1e-9)
    assert ours["segm"]["AP50"] == pytest.approx(100 * theirs["allAp50%"], abs=1e-9)
    for name, values in theirs["classes"].items():
        assert ours["segm"][f"AP-{name}"] == pytest.approx(100 * values["ap"], abs=1e-9)
        assert ours["segm"][f"AP50-{name}"] == pytest.approx(100 * values["ap50%"], abs=1e-9)
    theirs = json.loads((dataset / "evaluationResults/resultPixelLevelSemanticLabeling.json").read_text())
    for ourname, name in (
        ("mIoU", "Classes"),
        ("iIoU", "InstClasses"),
        ("IoU_sup", "Categories"),
        ("iIoU_sup", "InstCategories"),
    ):
        assert ours["sem_seg"][ourname] == pytest.approx(100 * theirs[f"averageScore{name}"], abs=1e-9)
    for metric, value in ours["sem_seg"].items():
        if "-" in metric:
            scores = theirs["categoryScores" if metric.startswith("IoU_sup") else "classScores"]
            assert value == pytest.approx(100 * scores[metric.split("-")[1]], abs=1e-9, nan_ok=True)
    theirs = json.loads((tmp_path / "resultPanopticSemanticLabeling.json").read_text())
    for suffix, name in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        for metric in ("pq", "sq", "rq"):
            assert ours["panoptic_seg"][f"{metric.upper()}{suffix}"] == pytest.approx(100 * theirs[name][metric], abs=1e-9)
    for label_id, values in theirs["per_class"].items():
        value = ours["panoptic_seg"][f"PQ-{id2label[int(label_id)].name}"]
        assert (0 if np.isnan(value) else value) == pytest.approx(100 * values["pq"], abs=1e-9)
    for task, metric in (("segm", "AP"), ("sem_seg", "mIoU"), ("panoptic_seg", "PQ")):
        assert 10 < ours[task][metric] < 90
