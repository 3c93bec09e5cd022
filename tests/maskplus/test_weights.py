"""How many weights and multiplications each technique adds, at the paper's size. The README derives the numbers."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from torch.utils.flop_counter import FlopCounterMode

from maskplus.quasi_multitask import is_training_only
from projects import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs/maskplus"
MASK_HEAD = 4 * (256 * 256 * 9 + 256) + (256 * 256 * 4 + 256) + (256 * 80 + 80)
CONTEXT = {
    "context_256_256": 1_180_160,
    "context_256_256_256": 1_770_240,
    "context_512_256_256": 2_950_144,
    "context_720_512_512_256": 8_517_584,
}
PYRAMID, ORIGINAL, DENSE, HALF, DOUBLE, DECONV = 1_704_960, 115_360, 16_392, 2_380_880, 2_905_680, 262_400


def build(config: str) -> torch.nn.Module:
    """The RoI heads, without memory for their weights."""
    shapes = {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in range(2, 7)}
    with torch.device("meta"):
        return build_roi_heads(load_config(str(CONFIGS / f"{config}.yaml")), shapes)


def parameters(config: str) -> dict[str, int]:
    return {name: p.numel() for name, p in build(config).named_parameters()}


def multiplications(layers) -> float:
    """Of one RoI, or one image, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        layers(torch.zeros(1, 256, 14, 14, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


@pytest.mark.parametrize(
    "config, added",
    [
        *CONTEXT.items(),
        ("deconv_pyramid", PYRAMID),
        ("boundary_original", ORIGINAL),
        ("boundary_dense", DENSE),
        ("quasi_half", HALF),
        ("quasi_double", DOUBLE),
        ("mask_half", -DECONV),
        ("biased", 0),
        ("maskplus_R_50_FPN_2x", CONTEXT["context_720_512_512_256"] + PYRAMID + DENSE + HALF),
    ],
)
def test_exact_counts(config, added):
    baseline = parameters("baseline")
    assert sum(n for name, n in baseline.items() if name.startswith("mask_head")) == MASK_HEAD == 2_643_280
    assert sum(parameters(config).values()) - sum(baseline.values()) == added


@pytest.mark.parametrize(
    "config, added",
    [("baseline", 0), ("deconv_pyramid", 0.834929), ("boundary_original", 0.090317), ("boundary_dense", 0.012143)]
    + [("quasi_half", 0), ("quasi_double", 0), ("biased", 0)],
)
def test_multiplications_of_the_mask_head(config, added):
    assert multiplications(build(config).eval().mask_head.layers) == pytest.approx(0.529859 + added, abs=1e-6)


def test_multiplications_of_contextual_fusion():
    convs = build("context_720_512_512_256").contextual_fusion.convs
    assert multiplications(convs) == pytest.approx(1.669054, abs=1e-6)


def test_at_inference_quasi_multitask_learning_adds_none():
    for config in ("quasi_half", "quasi_double"):
        kept = {name: n for name, n in parameters(config).items() if not is_training_only(name)}
        assert kept == parameters("baseline")


def test_cascade_adds_box_heads_only():
    """Three box heads that regress a box for all classes together, in place of one that regresses a box for each."""
    plain, cascade = parameters("maskplus_R_50_FPN_2x"), parameters("maskplus_cascade_R_50_FPN_3x")
    others = [{name: n for name, n in counts.items() if not name.startswith("box")} for counts in (plain, cascade)]
    assert others[0] == others[1]
    box_head = (256 * 49 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 81 + 81)
    assert sum(plain.values()) - sum(others[0].values()) == box_head + 1024 * 320 + 320
    assert sum(cascade.values()) - sum(others[1].values()) == 3 * (box_head + 1024 * 4 + 4)
