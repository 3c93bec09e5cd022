"""Which evaluator a data set gets, the table of results, and the command."""

import json
import math

import pytest
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

from projects.errors import ConfigError
from projects.evaluation import EVALUATORS, FastCOCOEvaluator, build_evaluator, results_table
from projects.evaluation.__main__ import main


@pytest.fixture
def name(two_cars, tmp_path):
    (tmp_path / "gt.json").write_text(json.dumps(two_cars[0]))
    MetadataCatalog.get("two_cars").set(json_file=str(tmp_path / "gt.json"), evaluator_type="coco")
    yield "two_cars"
    MetadataCatalog.remove("two_cars")


@pytest.mark.parametrize(
    ("mask_on", "limit", "tasks", "max_dets"),
    [(False, 100, ("bbox",), 100), (True, 300, ("bbox", "segm"), 300), (True, -1, ("bbox", "segm"), None)],
)
def test_the_config_chooses_tasks_and_limit(name, mask_on, limit, tasks, max_dets):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = mask_on
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    evaluator = build_evaluator(cfg, name, None)
    assert isinstance(evaluator, FastCOCOEvaluator)
    assert evaluator._tasks == tasks
    assert evaluator._settings["max_dets"] == max_dets


def test_keypoints_and_their_sigmas(made_up, tmp_path):
    dataset, _ = made_up
    (tmp_path / "gt.json").write_text(json.dumps(dataset))
    MetadataCatalog.get("people").set(json_file=str(tmp_path / "gt.json"), evaluator_type="coco")
    cfg = get_cfg()
    cfg.MODEL.KEYPOINT_ON = True
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05] * 17
    try:
        evaluator = build_evaluator(cfg, "people", None)
        assert evaluator._tasks == ("bbox", "keypoints")
        assert list(evaluator._settings["kpt_oks_sigmas"]) == [0.05] * 17
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05] * 4
        with pytest.raises(ConfigError, match="17 keypoints, but 4"):
            build_evaluator(cfg, "people", None)
    finally:
        MetadataCatalog.remove("people")


def test_unknown_kinds_of_data(name):
    metadata = MetadataCatalog.get(name)
    del metadata.evaluator_type
    with pytest.raises(ConfigError, match="evaluator type None; known are: .*coco"):
        build_evaluator(get_cfg(), name, None)
    metadata.evaluator_type = "lidar"
    with pytest.raises(ConfigError, match="'lidar'"):
        build_evaluator(get_cfg(), name, None)


def test_a_new_kind_is_one_row(name, monkeypatch):
    monkeypatch.setitem(EVALUATORS, "lidar", lambda cfg, dataset_name, output_dir: (dataset_name, output_dir))
    del MetadataCatalog.get(name).evaluator_type
    MetadataCatalog.get(name).evaluator_type = "lidar"
    assert build_evaluator(None, name, "out") == (name, "out")


def test_table():
    results = {
        "bbox": {"AP": 41.7494, "AP50": 60.0, "APs": math.nan, "AP-car": 83.0},
        "sem_seg": {"mIoU": 70.126},
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table(results).splitlines()]
    assert lines[0] == ["task", "AP", "AP50", "APs", "mIoU"]
    assert lines[2][:4] == ["bbox", "41.75", "60.00", "nan"]
    assert lines[3] == ["sem_seg", "", "", "", "70.13"]
    assert results_table({}) == "no metrics"


def test_command(two_cars, tmp_path, capsys):
    dataset, results = two_cars
    (tmp_path / "gt.json").write_text(json.dumps(dataset))
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ["--gt", str(tmp_path / "gt.json"), "--results", str(tmp_path / "results.json")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "| bbox" in out and "| segm" in out and "41.75" in out
    assert main([*arguments, "--tasks", "keypoints"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_benchmark(run_script):
    """Both libraries run, and agree to 1e-9."""
    done = run_script("tools/benchmark_coco_eval.py", "--images", 4, "--classes", 3, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-2:]:
        task, *numbers = (cell.strip() for cell in line.split("|")[1:-1])
        assert task in ("bbox", "segm") and float(numbers[-1]) < 1e-9
