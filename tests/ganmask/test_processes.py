"""The game in two CPU processes against one; and that no process waits for ever when one has no foreground."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture
def run_two(gan_cfg, tmp_path):
    """``run_two(case, KEY, VALUE, ...)`` -> (completed process, output folder)."""

    def run(case: str, *opts):
        cfg = gan_cfg("MODEL.RESNETS.NORM", "GN", "SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 0, *opts)
        config, folder = tmp_path / "config.yaml", tmp_path / "two"
        folder.mkdir()
        config.write_text(cfg.dump())
        command = [sys.executable, SCRIPT, case, config, folder]
        return subprocess.run(command, capture_output=True, text=True, timeout=240), folder

    return run


@pytest.mark.parametrize("losses", ["adversarial", pytest.param("both", marks=pytest.mark.slow)])
def test_two_processes_are_one_that_averages_and_go_on_without_foreground(run_two, losses):
    """Discriminators' gradients of their half of the step, generator's of its half, against the updated discriminators."""
    done, folder = run_two("foreground", "MODEL.GANMASK.LOSSES", losses, "MODEL.GANMASK.BOX_WEIGHT", 1.0)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        saved = torch.load(folder / f"gradients{rank}.pth", weights_only=True)
        assert saved["together"].keys() == saved["alone"].keys()
        assert len([name for name in saved["alone"] if name.startswith("discriminators.")]) == 24
        for name, expected in saved["alone"].items():
            assert expected.any(), name
            torch.testing.assert_close(saved["together"][name], expected, rtol=1e-3, atol=1e-6, msg=name)
    assert json.loads((folder / "result.json").read_text()) == {"equal": True, "iterations": 3}
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    game = ("loss_adv_box", "loss_adv_mask", "loss_disc_box", "loss_disc_mask")
    assert [[record[name] == 0 for name in game] for record in records] == [[False] * 4, [True] * 4, [False] * 4]
    assert ["accuracy_box_fake" in record for record in records] == [True, False, True]


def test_a_forward_pass_that_breaks_off_in_one_process_stops_both(run_two):
    done, _ = run_two("breaks_off")
    assert done.returncode == 2, done.stderr
    assert "forward not finite" in done.stderr and "Traceback" not in done.stderr
