"""The evaluator beside Detectron2's own, on the same predictions, and its edges."""

import copy
import json
import math
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from pycocotools import mask as mask_util

from projects.errors import ConfigError, DataError
from projects.evaluation import evaluate_coco_json
from projects.evaluation.coco import RESULTS_FILE, FastCOCOEvaluator

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools on NumPy 2
TASKS = ["bbox", "segm", "keypoints"]
CLASS_OF_CATEGORY = {2: 0, 5: 1, 6: 2, 40: 3, 77: 4}


@pytest.fixture
def register(tmp_path):
    """register(ground truth, **metadata) -> name of the data set; forgotten after the test."""
    names = []

    def _register(dataset, **metadata):
        name = f"made_up_{len(names)}_{tmp_path.name}"
        names.append(name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(dataset))
        categories = sorted(dataset["categories"], key=lambda c: c["id"])
        MetadataCatalog.get(name).set(
            json_file=str(path),
            thing_classes=[c["name"] for c in categories],
            evaluator_type="coco",
            **metadata,
        )
        return name

    yield _register
    for name in names:
        MetadataCatalog.remove(name)


def as_outputs(dataset, results, class_of_category=CLASS_OF_CATEGORY):
    """Detections in COCO's format -> the inputs and outputs of a model, one pair per image."""
    pairs = []
    for image in dataset["images"]:
        found = [r for r in results if r["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in found], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [mask_util.decode(r["segmentation"]) for r in found]
        size = (image["height"], image["width"])
        instances = Instances(
            size,
            pred_boxes=Boxes(boxes),
            scores=torch.tensor([r["score"] for r in found], dtype=torch.float64),
            pred_classes=torch.tensor([class_of_category[r["category_id"]] for r in found], dtype=torch.int64),
            pred_masks=torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *size)),
        )
        if found and "keypoints" in found[0]:
            points = torch.tensor([r["keypoints"] for r in found]).reshape(len(found), -1, 3)
            points[:, :, :2] += 0.5  # COCO's pixel indices -> continuous coordinates
            instances.pred_keypoints = points
        pairs.append(({"image_id": image["id"]}, {"instances": instances}))
    return pairs


def run(evaluator, pairs):
    evaluator.reset()
    for image, output in pairs:
        evaluator.process([image], [copy.deepcopy(output)])
    return evaluator.evaluate()


def test_same_as_detectron2(made_up, register, tmp_path):
    dataset, results = made_up
    name = register(dataset, thing_dataset_id_to_contiguous_id=CLASS_OF_CATEGORY)
    pairs = as_outputs(dataset, results)
    theirs = run(COCOEvaluator(name, tuple(TASKS), False, str(tmp_path / "d2"), use_fast_impl=False), pairs)
    ours = run(FastCOCOEvaluator(name, TASKS, False, str(tmp_path / "fast")), pairs)
    assert set(ours) == set(theirs) == set(TASKS)
    for task in TASKS:
        of_classes = [f"{measure}-{c}" for measure in ("AP50", "AP75") for c in MetadataCatalog.get(name).thing_classes]
        assert list(ours[task]) == [*theirs[task], *of_classes]
        common = [ours[task][metric] for metric in theirs[task]]
        np.testing.assert_allclose(common, list(theirs[task].values()), rtol=0, atol=1e-9)
    written = [json.loads((tmp_path / folder / RESULTS_FILE).read_text()) for folder in ("d2", "fast")]
    assert written[0] == written[1]


@pytest.mark.parametrize("limit", [20, 300])
def test_same_as_detectron2_at_other_limits(made_up, register, limit):
    dataset, results = made_up
    name = register(dataset, thing_dataset_id_to_contiguous_id=CLASS_OF_CATEGORY)
    pairs = as_outputs(dataset, results)
    theirs = run(COCOEvaluator(name, ("bbox",), False, max_dets_per_image=limit), pairs)["bbox"]
    ours = run(FastCOCOEvaluator(name, ["bbox"], False, max_dets_per_image=limit), pairs)["bbox"]
    np.testing.assert_allclose([ours[metric] for metric in theirs], list(theirs.values()), rtol=0, atol=1e-9)


def test_same_as_the_file_of_results(made_up, register, tmp_path):
    dataset, results = made_up
    name = register(dataset, thing_dataset_id_to_contiguous_id=CLASS_OF_CATEGORY)
    ours = run(FastCOCOEvaluator(name, ["segm"], False, str(tmp_path)), as_outputs(dataset, results))
    again = evaluate_coco_json(MetadataCatalog.get(name).json_file, tmp_path / RESULTS_FILE, ["segm"])
    np.testing.assert_equal(ours, again)


def test_classes_in_any_order(two_cars, register):
    """The model's class 0 is category 5 here, although 2 comes first."""
    dataset, results = two_cars
    mapping = {5: 0, 2: 1}
    name = register(dataset, thing_dataset_id_to_contiguous_id=mapping)
    metrics = run(FastCOCOEvaluator(name, ["bbox"], False), as_outputs(dataset, results, mapping))["bbox"]
    assert metrics["AP-bus"] == 0
    assert metrics["AP-car"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-4)


def test_classes_follow_the_ids_where_no_order_is_given(two_cars, register):
    dataset, results = two_cars
    pairs = as_outputs(dataset, results, {2: 0, 5: 1})
    assert run(FastCOCOEvaluator(register(dataset), ["bbox"], False), pairs)["bbox"]["AP-car"] > 80


def test_too_many_classes(two_cars, register):
    dataset, results = two_cars
    evaluator = FastCOCOEvaluator(register(dataset), ["bbox"], False)
    with pytest.raises(ConfigError, match="predicts class 7, .* has 2 classes.*NUM_CLASSES"):
        run(evaluator, as_outputs(dataset, results, {2: 7}))


def test_no_detections(two_cars, register, tmp_path, caplog):
    """AP 0 and a cause, in every task that was asked for."""
    dataset, _ = two_cars
    evaluator = FastCOCOEvaluator(register(dataset), ["bbox", "segm"], False, str(tmp_path / "out"))
    results = run(evaluator, as_outputs(dataset, []))
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == 0 and math.isnan(results[task]["APs"])
        assert f"{task} AP, AP50, AP75, APm = 0: there are no detections" in caplog.text
    assert json.loads((tmp_path / "out" / RESULTS_FILE).read_text()) == []


def test_images_that_the_model_never_saw(made_up, register, caplog):
    dataset, results = made_up
    evaluator = FastCOCOEvaluator(register(dataset), ["bbox"], False)
    run(evaluator, as_outputs(dataset, results)[:-3])
    assert "3 images of" in caplog.text and "count as missed" in caplog.text


def test_some_images_only(made_up, register, caplog):
    dataset, results = made_up
    pairs = as_outputs(dataset, results)[:6]
    evaluator = FastCOCOEvaluator(register(dataset), ["bbox"], False)
    whole = run(evaluator, pairs)["bbox"]["AP"]
    caplog.clear()
    assert evaluator.evaluate(img_ids=[image["image_id"] for image, _ in pairs])["bbox"]["AP"] > whole
    assert "not given to the model" not in caplog.text


def test_an_image_that_the_data_set_does_not_have(two_cars, register):
    dataset, results = two_cars
    pairs = as_outputs(dataset, results)
    pairs[0][0]["image_id"] = 99
    with pytest.raises(DataError, match="image_id 99"):
        run(FastCOCOEvaluator(register(dataset), ["bbox"], False), pairs)


def test_non_finite_predictions(two_cars, register, tmp_path, caplog):
    dataset, results = two_cars
    results.append({**results[0], "score": float("nan")})
    results.append({**results[0], "bbox": [float("inf")] * 4})
    evaluator = FastCOCOEvaluator(register(dataset), ["bbox"], False, str(tmp_path / "out"))
    metrics = run(evaluator, as_outputs(dataset, results, {2: 0}))["bbox"]
    assert "2 of 5 detections" in caplog.text
    assert metrics["AP-car"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-4)
    assert len(json.loads((tmp_path / "out" / RESULTS_FILE).read_text())) == 3


def test_masks_that_the_model_does_not_make(two_cars, register):
    dataset, results = two_cars
    pairs = as_outputs(dataset, results, {2: 0})
    pairs[0][1]["instances"].remove("pred_masks")
    with pytest.raises(DataError, match="has no 'segmentation'.*MASK_ON"):
        run(FastCOCOEvaluator(register(dataset), ["bbox", "segm"], False), pairs)


def test_a_model_without_instances(two_cars, register):
    evaluator = FastCOCOEvaluator(register(two_cars[0]), ["bbox"], False)
    with pytest.raises(ConfigError, match=r"returns \['sem_seg'\]"):
        evaluator.process([{"image_id": 3}], [{"sem_seg": torch.zeros(1)}])


def test_a_test_split(two_cars, register, tmp_path, caplog):
    """Without annotations: no scores, and the server's file."""
    dataset, results = two_cars
    del dataset["annotations"]
    name = register(dataset)
    with pytest.raises(ConfigError, match="Give an output_dir"):
        FastCOCOEvaluator(name, ["bbox"], False)
    with caplog.at_level("INFO", logger="projects"):
        evaluator = FastCOCOEvaluator(name, ["bbox", "segm"], False, str(tmp_path / "out"))
        assert run(evaluator, as_outputs(dataset, results, {2: 0})) == {}
    path = tmp_path / "out" / RESULTS_FILE
    assert str(path) in caplog.text
    written = json.loads(path.read_text())
    assert [r["score"] for r in written] == [0.9, 0.8, 0.7]
    assert written[0]["category_id"] == 2 and written[0]["segmentation"] == results[0]["segmentation"]


def test_the_models_output_is_left_alone(made_up, register):
    dataset, results = made_up
    evaluator = FastCOCOEvaluator(register(dataset), ["bbox"], False)
    image, output = as_outputs(dataset, results)[0]
    before = output["instances"].pred_keypoints.clone()
    evaluator.process([image], [output])
    assert torch.equal(output["instances"].pred_keypoints, before)


def test_nothing_is_written_elsewhere(two_cars, register, tmp_path, monkeypatch):
    dataset, results = two_cars
    name = register(dataset)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(FastCOCOEvaluator(name, ["bbox"], False), as_outputs(dataset, results, {2: 0}))
    run(FastCOCOEvaluator(name, ["bbox"], False, str(tmp_path / "out")), as_outputs(dataset, results, {2: 0}))
    assert os.listdir(tmp_path / "here") == []
    assert os.listdir(tmp_path / "out") == [RESULTS_FILE]


def test_a_data_set_that_is_not_a_coco_file(two_cars):
    """Registered dicts are converted; their classes count from 0."""
    dataset, results = two_cars
    name = "made_up_dicts"
    annotations = [
        {
            "bbox": a["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "segmentation": a["segmentation"],
            "category_id": {2: 0, 5: 1}[a["category_id"]],
        }
        for a in dataset["annotations"]
    ]
    record = {"file_name": "a.png", "image_id": 3, "height": 160, "width": 200, "annotations": annotations}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["car", "bus"])
    try:
        evaluator = FastCOCOEvaluator(name, ["bbox", "segm"], False)
        metrics = run(evaluator, as_outputs(dataset, results, {2: 0}))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for task in ("bbox", "segm"):
        assert metrics[task]["AP-car"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-4)


def test_processes_are_gathered_in_the_main_one(made_up, register, monkeypatch):
    dataset, results = made_up
    name = register(dataset)
    pairs = as_outputs(dataset, results)
    whole = run(FastCOCOEvaluator(name, ["bbox"], False), pairs)
    evaluators = [FastCOCOEvaluator(name, ["bbox"]) for _ in range(2)]
    for i, (image, output) in enumerate(pairs):
        evaluators[i % 2].process([image], [output])
    parts = [evaluator._predictions for evaluator in evaluators]
    monkeypatch.setattr(comm, "gather", lambda mine, dst: parts)
    np.testing.assert_equal(evaluators[0].evaluate(), whole)
    monkeypatch.setattr(comm, "gather", lambda mine, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluators[1].evaluate() == {}


def test_wrong_files_of_results(two_cars, tmp_path):
    dataset, _ = two_cars
    (tmp_path / "gt.json").write_text(json.dumps(dataset))
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list"):
        evaluate_coco_json(tmp_path / "gt.json", tmp_path / "object.json", ["bbox"])
    del dataset["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="no 'annotations'"):
        evaluate_coco_json(tmp_path / "test.json", tmp_path / "object.json", ["bbox"])


def _one_of_two(rank, port, path, queue):
    torch.set_num_threads(1)  # a forked process must not use its parent's OpenMP threads
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with open(path) as file:
        dataset, results = json.load(file)
    MetadataCatalog.get("two_processes").set(json_file=f"{path}.gt")
    evaluator = FastCOCOEvaluator("two_processes", ["bbox", "segm"])
    for image, output in as_outputs(dataset, results)[rank::2]:
        evaluator.process([image], [output])
    queue.put((rank, evaluator.evaluate()))
    dist.barrier()
    dist.destroy_process_group()


def test_two_real_processes(made_up, register, tmp_path):
    dataset, results = made_up
    whole = run(FastCOCOEvaluator(register(dataset), ["bbox", "segm"], False), as_outputs(dataset, results))
    path = tmp_path / "both.json"
    path.write_text(json.dumps([dataset, results]))
    (tmp_path / "both.json.gt").write_text(json.dumps(dataset))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("fork").SimpleQueue()
    mp.start_processes(_one_of_two, (port, str(path), queue), nprocs=2, start_method="fork")
    found = dict(queue.get() for _ in range(2))
    np.testing.assert_equal(found, {0: whole, 1: {}})
