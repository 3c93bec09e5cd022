"""Evaluation with contour points: perfect predictions score 100, moved ones what OKS says; fixed ground truth."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances

from maskpoint.contour import ContourSampler
from maskpoint.evaluation import OKS_SIGMA, coco_keypoints, register_points
from projects.drawables import binary_mask
from projects.errors import ConfigError
from projects.evaluation import build_evaluator
from projects.evaluation.evaluate import evaluate
from projects.modeling.build import build_model

NAMES = ["shapes_val_points", "shapes_cityscapes_instance_val_points"]


def perfect(record: dict, sampler: ContourSampler, move: float = 0.0) -> dict:
    """The annotations of a record as detections, key points moved by ``move`` pixels."""
    height, width = record["height"], record["width"]
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    found = Instances((height, width))
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = [binary_mask(a["segmentation"], height, width) for a in annotations]
    points = [sampler(mask, np.random.RandomState(0)) for mask in masks]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    found.scores = torch.ones(len(annotations))
    found.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
    xy = torch.tensor(np.array(points).reshape(-1, sampler.num_keypoints, 2)) + torch.tensor([move, 0.0])
    found.pred_keypoints = torch.cat([xy, torch.ones(*xy.shape[:2], 1)], dim=2)
    return {"instances": found}


def score(cfg, name: str, move: float = 0.0) -> dict:
    evaluator = build_evaluator(cfg, name, None)
    sampler = ContourSampler.from_config(cfg)
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [perfect(record, sampler, move)])
    return evaluator.evaluate()


@pytest.mark.parametrize("name", NAMES)
def test_perfect_predictions(shapes_root, narrow_cfg, name):
    results = score(narrow_cfg(), name)
    for task in ("bbox", "segm", "keypoints"):
        assert results[task]["AP"] == pytest.approx(100), task
    assert ("cityscapes" in results) == ("cityscapes" in name)
    if "cityscapes" in results:
        assert results["cityscapes"]["AP"] == pytest.approx(100)


def test_other_points_are_another_ground_truth(shapes_root, narrow_cfg):
    cfg = narrow_cfg()
    evaluator = build_evaluator(cfg, "shapes_val_points", None)
    corners = ContourSampler(32, "corner")
    for record in DatasetCatalog.get("shapes_val_points"):
        evaluator.process([record], [perfect(record, corners)])
    assert evaluator.evaluate()["keypoints"]["AP"] < 90
    corner_cfg = narrow_cfg("shapes_corner")
    assert score(corner_cfg, "shapes_val_points")["keypoints"]["AP"] == pytest.approx(100)


@pytest.fixture
def register_squares(tmp_path):
    """``register_squares(annotation, ...)``: "squares", a file of one image with these annotations, and "squares_points"."""

    def register(*annotations: dict) -> None:
        content = {"images": [{"id": 7, "file_name": "none.png", "height": 100, "width": 100}]}
        content |= {"categories": [{"id": 3, "name": "square"}]}
        content |= {"annotations": [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)]}
        (tmp_path / "squares.json").write_text(json.dumps(content))
        register_coco_instances("squares", {}, str(tmp_path / "squares.json"), str(tmp_path))
        register_points("squares")

    yield register
    for name in ("squares", "squares_points"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def square(**more) -> dict:
    """The annotation of a square of 40 x 40."""
    box = {"image_id": 7, "category_id": 3, "bbox": [30.0, 30.0, 40.0, 40.0], "area": 1600.0, "iscrowd": 0}
    return box | {"segmentation": [[30.0, 30.0, 70.0, 30.0, 70.0, 70.0, 30.0, 70.0]]} | more


def test_oks_by_hand(register_squares, narrow_cfg):
    """One square of 40 x 40 whose points all lie 5 pixels off has an OKS of exp(-25 / (2 * (2 * 0.05)^2 * 1600)) = 0.458."""
    register_squares(square())
    for move, area in ((5.0, 1600), (2.0, 1600)):
        oks = np.exp(-(move**2) / (2 * (2 * OKS_SIGMA) ** 2 * area))
        thresholds = np.linspace(0.5, 0.95, 10)
        found = score(narrow_cfg(), "squares_points", move)["keypoints"]["AP"]
        assert found == pytest.approx(100 * (oks >= thresholds).mean(), abs=0.1), move
    lenient = narrow_cfg("shapes_design_b", "TEST.KEYPOINT_OKS_SIGMAS", [1.0] * 33)
    assert score(lenient, "squares_points", 5.0)["keypoints"]["AP"] == pytest.approx(100)


def test_wrong_number_of_sigmas_is_refused_before_anything_runs(shapes_root, narrow_cfg):
    with pytest.raises(ConfigError, match="TEST.KEYPOINT_OKS_SIGMAS has 17 numbers: expected 33"):
        build_evaluator(narrow_cfg("shapes_design_b", "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 17), "shapes_val_points", None)


def test_instances_without_a_mask_do_not_count_for_key_points(register_squares, narrow_cfg):
    """A model without masks is evaluated on boxes without masks too."""
    unmasked = square()
    del unmasked["segmentation"]
    register_squares(square(), unmasked, square(segmentation=[]), square(segmentation=[[30.0, 30.0, 70.0, 30.0]]))
    cfg = narrow_cfg("shapes_keypoint_only")
    evaluator, sampler = build_evaluator(cfg, "squares_points", None), ContourSampler.from_config(cfg)
    (record,) = DatasetCatalog.get("squares_points")
    record["annotations"] = record["annotations"][:1]
    evaluator.process([record], [perfect(record, sampler)])
    results = evaluator.evaluate()
    assert results["keypoints"]["AP"] == pytest.approx(100) and results["bbox"]["AP"] < 100


def test_groups_have_no_key_points_and_do_not_count(register_squares, narrow_cfg):
    """Two detections with the highest scores inside of a group: neither right nor wrong, in any task."""
    group = {"bbox": [0.0, 0.0, 100.0, 20.0], "area": 2000.0, "segmentation": [[0.0, 0.0, 100.0, 0.0, 100.0, 20.0, 0.0, 20.0]]}
    register_squares(square(), square(iscrowd=1, **group))
    cfg = narrow_cfg()
    evaluator, sampler = build_evaluator(cfg, "squares_points", None), ContourSampler.from_config(cfg)
    (record,) = DatasetCatalog.get("squares_points")
    found = perfect(record, sampler)["instances"]
    members = []
    for x in (10.0, 60.0):
        member = {"bbox": [x, 5.0, 10.0, 10.0], "segmentation": [[x, 5.0, x + 10, 5.0, x + 10, 15.0, x, 15.0]]}
        members.append(square(**member) | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0})
    inside = perfect(record | {"annotations": members}, sampler)["instances"]
    found.scores[:] = 0.5
    evaluator.process([record], [{"instances": Instances.cat([inside, found])}])
    results = evaluator.evaluate()
    assert [results[task]["AP"] for task in ("bbox", "segm", "keypoints")] == pytest.approx([100, 100, 100])


def test_points_are_made_only_where_they_are_evaluated(shapes_root, narrow_cfg, monkeypatch):
    monkeypatch.setattr("maskpoint.evaluation.coco_keypoints", lambda *_: pytest.fail("not needed"))
    build_evaluator(narrow_cfg("shapes_mask_only"), "shapes_val_points", None)


def test_ground_truth_is_the_same_every_time():
    mask = np.zeros((50, 60), bool)
    mask[10:14, 20:25] = True  # fewer contour pixels than points
    from pycocotools import mask as mask_util

    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    first, second = (coco_keypoints(rle, 50, 60, ContourSampler()) for _ in range(2))
    assert first == second and first["num_keypoints"] == 101
    triples = np.reshape(first["keypoints"], (101, 3))
    expected = ContourSampler()(mask, np.random.RandomState(0))
    np.testing.assert_allclose(triples, np.column_stack([expected - 0.5, np.full(101, 2)]))


def test_polygons_and_empty_masks_as_ground_truth():
    found = coco_keypoints([[20.0, 10, 40, 10, 40, 30, 20, 30]], 50, 60, ContourSampler(4))
    assert np.reshape(found["keypoints"], (5, 3))[:, :2].tolist() == [[20, 10], [39, 10], [39, 29], [20, 29], [29.5, 19.5]]
    other_size = {"size": [2, 2], "counts": [0, 4]}
    empty = {"size": [5, 5], "counts": [25]}
    for segmentation in (None, [], [[1.0, 1, 4, 4]], [[1.0, 1, 4, 4, 1]], [[1.0, 1, 4, 4, 1, float("nan")]], other_size, empty):
        assert coco_keypoints(segmentation, 5, 5, ContourSampler(2)) == {"keypoints": [0.0] * 9, "num_keypoints": 0}
    partly = [[1.0, 1, 4, 4], [20.0, 10, 40, 10, 40, 30, 20, 30]]
    assert coco_keypoints(partly, 50, 60, ContourSampler(4)) == found


@pytest.mark.parametrize(
    ("config", "tasks"),
    [
        ("shapes_design_b", {"bbox", "segm", "keypoints"}),
        ("shapes_mask_only", {"bbox", "segm"}),
        ("shapes_keypoint_only", {"bbox", "keypoints"}),
        ("shapes_points_only", {"bbox", "segm", "keypoints"}),
        ("shapes_cityscapes_maskpoint_R_18_FPN", {"bbox", "segm", "keypoints", "cityscapes"}),
    ],
)
def test_models_are_evaluated_by_what_they_give(shapes_root, narrow_cfg, tmp_path, config, tasks):
    cfg = narrow_cfg(config, "OUTPUT_DIR", str(tmp_path), "TEST.PICTURES", 1, "DATALOADER.NUM_WORKERS", 0)
    assert set(evaluate(cfg, build_model(cfg).eval())) == tasks
    assert (tmp_path / "evaluation" / cfg.DATASETS.TEST[0] / "coco_instances_results.json").is_file()


def test_augmented_tests_give_no_key_points(shapes_root, narrow_cfg, tmp_path, caplog):
    opts = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48,), "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0]
    cfg = narrow_cfg("shapes_design_b", *opts)
    assert set(evaluate(cfg, build_model(cfg).eval())) == {"bbox", "segm"}
    assert "shapes_val_points: no key points are evaluated" in caplog.text


def test_data_set_of_ones_own_needs_no_points(shapes_root, narrow_cfg):
    """A model with contour points is evaluated on plain data sets too, by boxes and masks."""
    assert set(score(narrow_cfg(), "shapes_val")) == {"bbox", "segm"}
    assert set(score(narrow_cfg(), "shapes_cityscapes_instance_val")) == {"segm"}


def test_records_are_those_of_the_source_with_numbers_for_cocos_evaluation(shapes_root):
    for source in ("shapes_val", "shapes_cityscapes_instance_val"):
        records, points = DatasetCatalog.get(source), DatasetCatalog.get(f"{source}_points")
        assert [r["file_name"] for r in records] == [r["file_name"] for r in points]
        assert all(isinstance(r["image_id"], int) for r in points)
        assert MetadataCatalog.get(f"{source}_points").thing_classes == MetadataCatalog.get(source).thing_classes
    assert "cityscapes_instance_val_points" in DatasetCatalog.list()


def test_only_registered_data_sets_of_masks_have_points(shapes_root):
    with pytest.raises(ConfigError, match="'shape_val' is not registered: contour points need"):
        register_points("shape_val")
    with pytest.raises(ConfigError, match="is of evaluator_type 'coco_panoptic_seg': .* coco or cityscapes_instance"):
        register_points("shapes_val_panoptic")


def test_classes_that_are_known_after_loading_only(register_squares):
    register_squares(square())
    DatasetCatalog.get("squares_points")
    metadata = MetadataCatalog.get("squares_points")
    assert metadata.thing_classes == ["square"] and metadata.thing_dataset_id_to_contiguous_id == {3: 0}
    assert metadata.evaluator_type == "coco_points"
