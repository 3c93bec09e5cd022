"""tools/analyze_model.py: what it counts, what it builds, and its table."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dsg.deform_backbone import DeformBottleneckBlock
from projects.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
BASELINE, DSG = "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml", "configs/dsg/shapes_dsg_R_18_FPN.yaml"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.chdir(REPO)
    spec = importlib.util.spec_from_file_location("analyze_model", REPO / "tools/analyze_model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "analyze_model", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setting(tool):
    return tool.Setting(device="cpu", size=(128, 160), threads=1, autocast="", channels_last=False)


def test_counts_what_layers_do(tool, setting):
    """Multiply-adds by hand: a convolution, a linear layer, and a deformable block."""
    from detectron2.modeling.backbone.resnet import BottleneckBlock

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, stride=8, padding=1)
            self.block = DeformBottleneckBlock(BottleneckBlock(16, 16, bottleneck_channels=4, norm=""))
            self.linear = nn.Linear(16, 10)

        def forward(self, inputs):
            x = self.block(self.conv(inputs[0]["image"][None].float()))
            return self.linear(x.mean(dim=(2, 3)))

    pixels = (128 // 8) * (160 // 8)
    block = 16 * 4 + 4 * 18 * 9 + 4 * 4 * 9 + 4 * 16
    expected = pixels * (3 * 16 * 9 + block) + 16 * 10
    assert tool.gigamacs(Model(), setting) * 1e9 == pytest.approx(expected)


def test_what_nobody_uses_counts_too_and_random_weights_keep_the_work(tool, setting):
    """The MPN of the mRPN row, whose output nothing uses: 200 proposals x its layers."""
    switches_off = ",".join(f"MODEL.DSG.{key}=False" for key in ("FUSION_MASK", "SGRA_BOX", "FUSION_BOX"))
    rows = [tool.Row(BASELINE, ()), tool.Row(f"{DSG},{switches_off}", ("TEST.DETECTIONS_PER_IMAGE", "7"))]
    assert rows[1].name == f"shapes_dsg_R_18_FPN, {switches_off.replace(',', ', ')}"
    models = [setting.build(row) for row in rows]
    assert tool.proposals_and_detections(models[0], setting)[0] == "200"
    assert tool.proposals_and_detections(models[1], setting) == ("200", "7")
    mpn = 200 * (2 * 196 * 64 * 64 * 9 + 196 * 64 * 64 * 4 + 784 * 64) / 1e9
    models[0].roi_heads.box_predictor.test_topk_per_image = 7
    difference = tool.gigamacs(models[1], setting) - tool.gigamacs(models[0], setting)
    assert difference == pytest.approx(mpn)


def test_overrides_of_a_row(tool):
    cfg = tool.Row(f"{DSG},MODEL.RPN.POST_NMS_TOPK_TEST=50", ("SOLVER.MAX_ITER", "7")).config("cpu")
    assert (cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.SOLVER.MAX_ITER, cfg.MODEL.DEVICE) == (50, 7, "cpu")
    with pytest.raises(ConfigError, match="expected CONFIG,KEY=VALUE"):
        tool.Row(f"{DSG},MODEL.RPN.POST_NMS_TOPK_TEST", ()).config("cpu")


@pytest.mark.parametrize("extra", [[], ["--autocast", "bfloat16", "--channels-last"]])
def test_table(tool, capsys, extra):
    threads = torch.get_num_threads()
    command = ["--baseline", BASELINE, DSG, f"{DSG},MODEL.RPN.POST_NMS_TOPK_TEST=20", "--size", "64", "96", "--device", "cpu"]
    command += ["--threads", str(threads), "--repeats", "1", "--skip-memory", *extra]
    assert tool.main(tool.parse_args([*command, "--opts", "MODEL.RPN.POST_NMS_TOPK_TEST", "60"])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, _, baseline, full, few = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert header[:6] == ["model", "proposals", "detections", "weights", "GMAC", "ratio"] and len(header) == 9
    assert baseline[5] == baseline[8] == "1.00x" and [row[1] for row in (baseline, full, few)] == ["60", "60", "20"]
    assert float(full[4]) > float(few[4]) > 0 and float(full[5][:-1]) > 1.5
    assert all(float(row[6].split()[0]) > 0 for row in (baseline, full, few))


@pytest.mark.slow
def test_peak_memory_grows_with_the_proposals(run_script):
    few, many = (f"{DSG},MODEL.RPN.PRE_NMS_TOPK_TEST=3000,MODEL.RPN.POST_NMS_TOPK_TEST={count}" for count in (50, 1500))
    command = ["tools/analyze_model.py", "--baseline", few, many, "--size", 128, 160, "--device", "cpu", "--repeats", 0]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    peaks = [float(line.split("|")[-3].split()[0]) for line in done.stdout.splitlines() if line.startswith("| shapes_")]
    assert peaks[1] - peaks[0] > 1400 * 64 * 196 * 4 / 1e6  # F_ of the others, and what there is beside it
