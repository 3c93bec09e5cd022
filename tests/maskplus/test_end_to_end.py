"""The complete small models trained for a few iterations, evaluated and shown."""

import json
from pathlib import Path

import pytest

from projects import load_config
from projects.engine.trainer import StandardTrainer

REPO = Path(__file__).resolve().parents[2]
SHORT = [
    "SOLVER.MAX_ITER",
    2,
    "DATALOADER.NUM_WORKERS",
    0,
    "MODEL.MASKPLUS.CONV_DIMS",
    [20, 16],
    "TEST.DETECTIONS_PER_IMAGE",
    5,
]
SHOWN = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]


@pytest.mark.parametrize("name", ["shapes_maskplus_R_18_FPN", "shapes_maskplus_cascade_R_18_FPN"])
def test_trains_and_evaluates(name, tiny_opts, tmp_path):
    trainer = StandardTrainer(load_config(str(REPO / f"configs/maskplus/{name}.yaml"), [*tiny_opts, *SHORT, *SHOWN]))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.results.keys() == {"bbox", "segm"} and trainer.results["segm"]["AP"] >= 0
    rows = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert {"loss_mask", "loss_mask_half", "biased_training/alpha", "segm/AP"} <= set().union(*rows)
    detections = json.loads((tmp_path / "output/evaluation/shapes_val/coco_instances_results.json").read_text())
    assert detections and all("segmentation" in detection for detection in detections)
    assert len(list((tmp_path / "output/evaluation/shapes_val").rglob("pictures/*.png"))) == 2


@pytest.mark.slow
def test_scripts_train_strip_resume_and_show(run_script, tiny_opts, shapes_root, tmp_path):
    folder = tmp_path / "output"
    words = ["--num-gpus", 0, "--config-file", "configs/maskplus/shapes_maskplus_R_18_FPN.yaml"]
    done = run_script("train_net.py", *words, *tiny_opts, *SHORT, *SHOWN)
    assert done.returncode == 0, done.stderr
    done = run_script("tools/strip_training_only.py", folder / "model_final.pth", tmp_path / "stripped.pth")
    assert done.returncode == 0, done.stderr
    image = min((shapes_root / "shapes/coco/val").iterdir())
    found = []
    for weights in (folder / "model_final.pth", tmp_path / "stripped.pth"):
        output = tmp_path / weights.stem
        model = ["--config-file", folder / "config.yaml", "--weights", weights, "--score-threshold", 0]
        done = run_script("demo.py", *model, "--input", image, "--output", output)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
        found.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert found[0] == found[1] and len(found[0]) >= 2
    (tmp_path / "stripped.pth").replace(folder / "model_final.pth")
    done = run_script("train_net.py", "--resume", *words, *tiny_opts, *SHORT, *SHOWN, "SOLVER.MAX_ITER", 4)
    assert done.returncode == 2 and "stripped" in done.stderr, done.stderr
