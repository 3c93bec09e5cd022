"""The small configs through the scripts: a few iterations, evaluation, pictures with maps."""

import json

import pytest

from .conftest import NARROW


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("shapes_maskpoint_R_18_FPN", {"bbox", "segm", "keypoints"}),
        ("shapes_cityscapes_maskpoint_R_18_FPN", {"bbox", "segm", "keypoints", "cityscapes"}),
    ],
)
def test_trains_evaluates_and_shows(run_script, shapes_root, tmp_path, name, tasks):
    schedule = ["SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.LOG_PERIOD", 1, "DATALOADER.NUM_WORKERS", 0]
    opts = [*NARROW, *schedule, "TEST.PICTURES", 2, "OUTPUT_DIR", tmp_path / "run"]
    done = run_script("train_net.py", "--num-gpus", 0, "--config-file", f"configs/maskpoint/{name}.yaml", *opts)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "run/results.json").read_text())) == tasks
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert sum("loss_keypoint" in json.loads(line) and "loss_mask" in json.loads(line) for line in lines) >= 3
    assert len(list((tmp_path / "run/evaluation").rglob("pictures/*.png"))) == 2
    model = ["--config-file", tmp_path / "run/config.yaml", "--weights", tmp_path / "run/model_final.pth"]
    images = sorted((shapes_root / "shapes/coco/val").iterdir())[:2]
    words = ["--input", *images, "--output", tmp_path / "pictures", "--score-threshold", 0, "--maps"]
    done = run_script("demo.py", *model, *words)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "pictures").iterdir())) == 3
