"""train_net.py on shapes in Cityscapes' format: training, then all three evaluators in one `--eval-only` command.

The same command evaluates on a test split, which has no ground truth: two of the images, taken for Cityscapes' own.
"""

import json
import shutil
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "configs/baseline/shapes_cityscapes_panoptic_fpn_R_18.yaml"
VAL, TEST = "shapes_cityscapes_panoptic_val", "cityscapes_panoptic_test"


def test_train_then_evaluate_with_all_three_evaluators(cityscapes_root, tiny_opts, run_script, tmp_path):
    opts = [*tiny_opts, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "SOLVER.MAX_ITER", 6, "DATALOADER.NUM_WORKERS", 0]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.05]
    env = {"OMP_NUM_THREADS": "1"}
    done = run_script("train_net.py", "--config-file", CONFIG, *opts, "DATASETS.TEST", "()", env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert {"loss_sem_seg", "loss_mask"} <= rows[-1].keys()

    city = tmp_path / "root/cityscapes/leftImg8bit/test/sternau"
    city.mkdir(parents=True)
    for path in sorted((cityscapes_root / "leftImg8bit/val/sternau").iterdir())[:2]:
        shutil.copy(path, city)
    (tmp_path / "root/shapes").symlink_to(cityscapes_root.parent)
    opts += ["MODEL.WEIGHTS", tmp_path / "output/model_final.pth", "DATASETS.TEST", f"('{VAL}', '{TEST}')"]
    env["DETECTRON2_DATASETS"] = str(tmp_path / "root")
    done = run_script("train_net.py", "--eval-only", "--config-file", CONFIG, *opts, env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "output/results.json").read_text())
    assert list(results) == [f"{VAL}/{task}" for task in ("segm", "sem_seg", "panoptic_seg")]
    assert all(f"| {task}" in done.stdout for task in results)
    assert results[f"{VAL}/sem_seg"]["mIoU"] > 0
    assert all(0 <= results[f"{VAL}/{task}"][metric] <= 100 for task, metric in (("segm", "AP50"), ("panoptic_seg", "PQ_st")))
    folders = {name: tmp_path / "output/evaluation" / name for name in (VAL, TEST)}
    for folder in folders.values():
        assert len(list((folder / "pictures").glob("sternau_*_leftImg8bit.png"))) == 2
    assert {path.name for path in folders[VAL].iterdir()} == {"pictures", "results.json"}
    assert {path.name for path in folders[TEST].iterdir()} == {
        "pictures", "cityscapes_instance", "cityscapes_semantic", "cityscapes_panoptic",
    }  # fmt: skip
    index = json.loads((folders[TEST] / "cityscapes_panoptic/cityscapes_panoptic_test.json").read_text())["annotations"]
    assert [entry["image_id"] for entry in index] == ["sternau_000000_000019", "sternau_000001_000019"]
    assert len(list((folders[TEST] / "cityscapes_instance").glob("*.txt"))) == 2
