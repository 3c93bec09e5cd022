"""CASNet in two CPU processes against one, where one process has no things and each step takes several batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_two_processes(batches, shapes_root, narrow, tmp_path):
    cfg = narrow(
        *("shapes_instance_joint", "SOLVER.ACCUMULATE", batches, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0),
        *("SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", ()),
        *("INPUT.CROP.SIZE", [64, 80], "INPUT.MIN_SIZE_TRAIN", (56, 80)),
    )
    config, folder = tmp_path / "config.yaml", tmp_path / "two"
    folder.mkdir()
    config.write_text(cfg.dump())
    done = subprocess.run([sys.executable, SCRIPT, config, folder], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        saved = torch.load(folder / f"gradients{rank}.pth", weights_only=True)
        assert saved["together"].keys() == saved["alone"].keys() and len(saved["alone"]) > 100
        for name, expected in saved["alone"].items():
            torch.testing.assert_close(saved["together"][name], expected, rtol=1e-3, atol=1e-5, msg=name)
    assert json.loads((folder / "result.json").read_text()) == {"equal": True, "iterations": 2}
