"""What is wrong with a file is said in words; what is merely unusable is dropped and counted."""

import json
import os
import re

import pytest

from projects.errors import ConfigError, DataError
from projects.evaluation.coco_files import (
    check_results,
    check_tasks,
    load_ground_truth,
    load_json,
    load_results,
    write_json_atomically,
)


@pytest.mark.parametrize("tasks", [(), ["box"], "bbox", ["bbox", "panoptic"]])
def test_unknown_tasks(tasks):
    with pytest.raises(ConfigError, match="among bbox, segm, keypoints"):
        check_tasks(tasks)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="Cannot read .*absent.json: No such file"):
        load_json(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(DataError, match="cut.json is not JSON"):
        load_json(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="no COCO ground truth"):
        load_ground_truth(tmp_path / "list.json", ["bbox"])


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json_atomically([1], path)
    with pytest.raises(ValueError):  # nan is not JSON
        write_json_atomically([float("nan")], path)
    assert json.loads(path.read_text()) == [1]


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("bbox", "area", None),
        ("bbox", "bbox", []),
        ("segm", "segmentation", []),
        ("segm", "segmentation", None),
        ("keypoints", "num_keypoints", None),
    ],
)
def test_annotations_that_lack_something(made_up, task, field, value):
    dataset, _ = made_up
    dataset["annotations"][4][field] = value
    with pytest.raises(DataError, match=f"annotation 5 has no {field}, needed to evaluate {task}"):
        load_ground_truth(dataset, [task])
    others = {"bbox", "segm", "keypoints"} - {task}
    if field not in ("area", "bbox"):
        load_ground_truth(dataset, sorted(others))


def test_image_ids_are_integers(made_up):
    dataset, _ = made_up
    dataset["images"][0]["id"] = "munster_000"
    with pytest.raises(DataError, match="must be integers, found 'munster_000'"):
        load_ground_truth(dataset, ["bbox"])


def test_one_sigma_per_keypoint(made_up):
    dataset, results = made_up
    with pytest.raises(ConfigError, match="17 keypoints, but 5 OKS sigmas.*KEYPOINT_OKS_SIGMAS"):
        load_ground_truth(dataset, ["keypoints"], num_keypoints=5)
    coco_gt = load_ground_truth(dataset, ["keypoints"])
    results[3]["keypoints"] = results[3]["keypoints"][:9]
    with pytest.raises(ConfigError, match="the results, image .*: 3 keypoints, but 17"):
        check_results(coco_gt, results, ["keypoints"])


def test_good_results_pass_untouched(made_up):
    dataset, results = made_up
    tasks = ["bbox", "segm", "keypoints"]
    assert check_results(load_ground_truth(dataset, tasks), results, tasks) == results


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_dropped_and_counted(made_up, caplog, bad):
    dataset, results = made_up
    coco_gt = load_ground_truth(dataset, ["bbox"])
    expected = results[3:]
    results[0]["score"] = bad
    results[1]["bbox"][2] = bad
    results[2]["keypoints"][7] = bad
    assert check_results(coco_gt, results, ["bbox"]) == expected
    assert f"3 of {len(results)} detections" in caplog.text


def test_unknown_images(made_up):
    dataset, results = made_up
    coco_gt = load_ground_truth(dataset, ["bbox"])
    results[5]["image_id"] = 31
    with pytest.raises(DataError, match="only 2[0-9] of which .* has 24 images, but not image_id 31"):
        check_results(coco_gt, results, ["bbox"])
    with pytest.raises(DataError, match="for 1 images, none of which"):
        check_results(coco_gt, results[5:6], ["bbox"])


def test_unknown_categories_are_counted(made_up, caplog):
    dataset, results = made_up
    results[5]["category_id"] = 3
    check_results(load_ground_truth(dataset, ["bbox"]), results, ["bbox"])
    assert "1 detections are of categories unknown" in caplog.text


@pytest.mark.parametrize("field", ["score", "category_id", "segmentation"])
def test_results_that_lack_something(made_up, field):
    dataset, results = made_up
    del results[2][field]
    with pytest.raises(DataError, match=f"has no '{field}', needed to evaluate bbox, segm"):
        check_results(load_ground_truth(dataset, ["bbox", "segm"]), results, ["bbox", "segm"])


def test_masks_of_another_size_or_kind(made_up, encode):
    import numpy as np

    dataset, results = made_up
    coco_gt = load_ground_truth(dataset, ["segm"])
    results[1]["segmentation"] = encode(np.ones((80, 200)))
    with pytest.raises(DataError, match=r"size \[80, 200\] .* says \[160, 200\]"):
        check_results(coco_gt, results, ["segm"])
    for segmentation in ([[0.0, 0.0, 5.0, 0.0, 5.0, 5.0]], {"counts": "0"}, None):
        results[1]["segmentation"] = segmentation
        with pytest.raises(DataError, match="no compressed RLE"):
            check_results(coco_gt, results, ["segm"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": None}, "position 1 has no usable score: found None"),
        ({"score": "0.9"}, "position 1 has no usable score: found '0.9'"),
        ({"bbox": None}, "no usable bbox: found None"),
        ({"bbox": [1, 2, 3]}, "no usable bbox"),
        ({"bbox": [1, 2, 3, "4"]}, "no usable bbox"),
        ({"keypoints": 7}, "no usable keypoints: found 7"),
        ({"image_id": [1]}, "no usable image_id"),
        ({"category_id": None}, "no usable category_id"),
    ],
)
def test_malformed_results_files(made_up, tmp_path, change, words):
    _, results = made_up
    path = tmp_path / "results.json"
    path.write_text(json.dumps([results[0], {**results[1], **change}]))
    with pytest.raises(DataError, match=f"results.json: the detection at .*{re.escape(words)}"):
        load_results(path)
    path.write_text(json.dumps([results[0], {key: value for key, value in results[1].items() if key not in change}]))
    if change.keys() & {"bbox", "keypoints"}:
        assert len(load_results(path)) == 2
    else:
        with pytest.raises(DataError, match="found none"):
            load_results(path)


@pytest.mark.parametrize(("content", "words"), [("[1]", "found 1"), ("{}", "found an object"), ("[", "JSON")])
def test_what_is_no_results_file(tmp_path, content, words):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=f"results.json is no.*{words}"):
        load_results(tmp_path / "results.json")


def test_no_half_written_file_is_left_behind(tmp_path):
    write_json_atomically({"a": 1}, tmp_path / "a.json")
    assert os.listdir(tmp_path) == ["a.json"]
