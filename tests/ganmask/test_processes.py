"""The game in two CPU processes against one; and that no process waits for ever when one has no foreground."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.parametrize("losses", ["adversarial", pytest.param("both", marks=pytest.mark.slow)])
def test_two_processes(gan_cfg, tmp_path, losses):
    cfg = gan_cfg(
        *("MODEL.GANMASK.LOSSES", losses, "MODEL.GANMASK.BOX_WEIGHT", 1.0, "MODEL.RESNETS.NORM", "GN"),
        *("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0),
    )
    config, folder = tmp_path / "config.yaml", tmp_path / "two"
    folder.mkdir()
    config.write_text(cfg.dump())
    done = subprocess.run([sys.executable, SCRIPT, config, folder], capture_output=True, text=True, timeout=240)

    # The gradients of the discriminators in their half of the step, and those of the generator in its half, against the
    # updated discriminators, are the means of what one process gets from each half of the batch.
    for rank in (0, 1):
        assert (folder / f"gradients{rank}.pth").is_file(), done.stderr
        saved = torch.load(folder / f"gradients{rank}.pth", weights_only=True)
        assert saved["together"].keys() == saved["alone"].keys()
        assert len([name for name in saved["alone"] if name.startswith("discriminators.")]) == 24
        for name, expected in saved["alone"].items():
            assert expected.any(), name
            torch.testing.assert_close(saved["together"][name], expected, rtol=1e-3, atol=1e-6, msg=name)

    # One process without foreground, all without: no process waits, the losses are zero, the weights stay the same in both.
    assert (folder / "result.json").is_file(), done.stderr
    assert json.loads((folder / "result.json").read_text()) == {"equal": True, "iterations": 3}
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    game = ("loss_adv_box", "loss_adv_mask", "loss_disc_box", "loss_disc_mask")
    assert [[record[name] == 0 for name in game] for record in records[:3]] == [[False] * 4, [True] * 4, [False] * 4]
    assert ["accuracy_box_fake" in record for record in records[:3]] == [True, False, True]

    # A forward pass that breaks off in one process stops both.
    assert done.returncode == 2 and "forward not finite" in done.stderr and "Traceback" not in done.stderr, done.stderr
