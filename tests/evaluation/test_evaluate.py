"""What an evaluation leaves: results.json, and the whole command on splits without ground truth."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from projects.evaluation.evaluate import write_summary
from projects.modeling.build import build_model

REPO = Path(__file__).resolve().parents[2]
SHAPES = REPO / "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml"


def test_nan_is_written_as_null(tiny_cfg, tmp_path):
    results = {"bbox": {"AP": 41.5, "APl": float("nan"), "APs": np.float32(7)}, "segm": {"AP": np.float64("nan")}}
    (tmp_path / "output").mkdir()
    write_summary(tiny_cfg(), results)

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    written = json.loads((tmp_path / "output/results.json").read_text(), parse_constant=refuse)
    assert written == {"bbox": {"AP": 41.5, "APl": None, "APs": 7}, "segm": {"AP": None}}


def test_results_are_written_whole_or_not_at_all(tiny_cfg, tmp_path):
    """A run that has results.json has finished."""
    (tmp_path / "output").mkdir()
    with pytest.raises(TypeError):
        write_summary(tiny_cfg(), {"bbox": {"AP": 1.0, "AP50": object()}})
    assert not (tmp_path / "output/results.json").exists()


def evaluate(run_script, tiny_opts, tiny_cfg, tmp_path, classes: int, *opts, **env) -> None:
    """`train_net.py --eval-only` of a small model with random weights that finds something everywhere."""
    model = build_model(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", classes))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    more = ["MODEL.WEIGHTS", tmp_path / "model.pth", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *opts]
    env |= {"OMP_NUM_THREADS": "1"}
    done = run_script("train_net.py", "--eval-only", "--config-file", SHAPES, *tiny_opts, *more, env=env)
    assert done.returncode == 0, done.stderr
    assert "no annotations, so there are no scores" in done.stdout


def test_a_json_without_annotations(run_script, tiny_opts, tiny_cfg, shapes_root, tmp_path):
    content = json.loads((shapes_root / "shapes/coco/annotations/instances_val.json").read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    own = [["own_test", str(tmp_path / "test.json"), str(shapes_root / "shapes/coco/val")]]
    opts = ["DATASETS.REGISTER", json.dumps(own), "DATASETS.TEST", "('own_test',)"]
    evaluate(run_script, tiny_opts, tiny_cfg, tmp_path, 8, *opts)
    folder = tmp_path / "output/evaluation/own_test"
    written = json.loads((folder / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in written} == {image["id"] for image in content["images"]}
    assert {result["category_id"] for result in written} <= set(range(1, 9)) and "segmentation" in written[0]
    assert len(list((folder / "pictures").glob("*.png"))) == 2
    assert not (folder / "results.json").exists() and not (tmp_path / "output/results.json").exists()


def test_cityscapes_test_split_with_ten_classes(run_script, tiny_opts, tiny_cfg, shapes_root, tmp_path):
    city = tmp_path / "root/cityscapes/leftImg8bit/test/sternau"
    city.mkdir(parents=True)
    images = sorted((shapes_root / "shapes/cityscapes/leftImg8bit/val").glob("*/*.png"))[:3]
    for path in images:
        shutil.copy(path, city)
    opts = ["DATASETS.TEST", "('cityscapes_instance10_test',)", "MODEL.ROI_HEADS.NUM_CLASSES", 10]
    evaluate(run_script, tiny_opts, tiny_cfg, tmp_path, 10, *opts, DETECTRON2_DATASETS=str(tmp_path / "root"))
    folder = tmp_path / "output/evaluation/cityscapes_instance10_test"
    assert sorted(os.listdir(folder)) == ["cityscapes_instance", "coco_instances_results.json", "pictures"]
    written = json.loads((folder / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in written} == {1, 2, 3}
    assert {result["category_id"] for result in written} <= set(range(24, 34))
    assert len(list((folder / "cityscapes_instance").glob("*.txt"))) == 3
    assert len(list((folder / "pictures").glob("*.png"))) == 2
