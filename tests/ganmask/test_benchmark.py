"""tools/benchmark_ganmask.py on tiny models."""

import re

import pytest


@pytest.mark.slow
def test_table(run_script):
    done = run_script(
        *("tools/benchmark_ganmask.py", "--repeats", 1, "--threads", 1, "--device", "cpu", "--opts", "SOLVER.IMS_PER_BATCH", 1),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.CONV_DIMS", "[16]"),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.GANMASK.DISCRIMINATOR_WIDTH", 4),
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["LOSSES", "baseline", "adversarial", "both"] and {len(row) for row in rows} == {7}
    assert rows[1][3] == "1.00x (1.00 to 1.00)" and rows[1][5] == "1.00x"
    for row in rows[1:]:
        assert float(row[1]) > 0 and re.fullmatch(r"\d+ MB", row[4]) and float(row[6]) > 0
