"""Two CPU processes against one; and that no process waits for ever when something happens in one of them only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from projects import load_config

SCRIPT = Path(__file__).with_name("two_processes.py")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def run_two(tiny_opts, tmp_path):
    """``run_two(case, KEY, VALUE, ..., row="folder/name")`` -> (completed process, output folder)."""

    def run(case: str, *opts, row: str = "baseline/shapes_mask_rcnn_R_18_FPN"):
        small = [*tiny_opts, "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0, "MODEL.RESNETS.NORM", "GN"]
        cfg = load_config(str(CONFIGS / f"{row}.yaml"), [*small, *opts])
        config, folder = tmp_path / "config.yaml", tmp_path / "two"
        folder.mkdir()
        config.write_text(cfg.dump())
        command = [sys.executable, SCRIPT, case, config, folder]
        return subprocess.run(command, capture_output=True, text=True, timeout=240), folder

    return run


@pytest.mark.parametrize(
    "row, opts",
    [
        ("baseline/shapes_mask_rcnn_R_18_FPN", []),
        ("maskplus/shapes_maskplus_R_18_FPN", ["MODEL.MASKPLUS.CONV_DIMS", [20, 16]]),
        ("maskpoint/shapes_maskpoint_R_18_FPN", ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 16]]),
    ],
)
def test_gradients_equal_and_images_without_objects_in_one_process(run_two, row, opts):
    done, folder = run_two("gradients", "SOLVER.MAX_ITER", 3, *opts, row=row)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        saved = torch.load(folder / f"gradients{rank}.pth", weights_only=True)
        assert saved["together"].keys() == saved["alone"].keys() and len(saved["alone"]) > 50
        for name, expected in saved["alone"].items():
            torch.testing.assert_close(saved["together"][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert json.loads((folder / "result.json").read_text()) == {"equal": True, "iterations": 3}


def test_divergence_in_one_process_stops_both(run_two):
    done, folder = run_two("diverge", "SOLVER.MAX_ITER", 3)
    assert done.returncode == 2, done.stderr
    assert "diverged in iteration 0" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.glob("diverged_0000000/*")) == ["config.yaml", "model.pth", "rank1.pth"]


def test_error_in_one_process_ends_both(run_two):
    done, _ = run_two("user_error", "SOLVER.MAX_ITER", 3)
    assert done.returncode == 2, done.stderr
    assert "an image that cannot be read" in done.stderr


def test_error_in_both_is_printed_once(run_two):
    done, _ = run_two("user_error_in_both", "SOLVER.MAX_ITER", 3)
    assert done.returncode == 2 and done.stderr.count("error: an image that cannot be read") == 1, done.stderr


def test_evaluation_sees_the_same_batch_norm_everywhere(run_two):
    done, folder = run_two("batch_norm", "SOLVER.MAX_ITER", 2, "MODEL.RESNETS.NORM", "BN")
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((folder / "result.json").read_text())["evaluated"]
    assert evaluated["equal"] == 1.0 and evaluated["statistics"] > 20


def test_signal_to_the_launcher_saves_and_says_so(run_two):
    done, folder = run_two("signal", "SOLVER.MAX_ITER", 10_000)
    assert done.returncode == 143, done.stderr
    stopped_at = json.loads((folder / "result.json").read_text())["iterations"]
    checkpoint = torch.load(folder / f"model_{stopped_at:07d}.pth", weights_only=True)
    assert checkpoint["iteration"] == stopped_at and len(checkpoint["rng"]) == 2
