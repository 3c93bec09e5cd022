"""CASNet's configs made narrow, and the names and shapes of the weights that HRNet's authors publish.

The latter are written down from lib/models/seg_hrnet.py of https://github.com/HRNet/HRNet-Semantic-Segmentation. Their
segmentation files add the prefix "model." and a head "last_layer"; their ImageNet files have none of these.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from projects import load_config

REPO = Path(__file__).resolve().parents[2]
NARROW = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.CASNET.HRNET_WEIGHTS", "", "MODEL.CASNET.HRNET_WIDTH", 4,
    "MODEL.CASNET.HRNET_MODULES", [1, 1, 1], "MODEL.CASNET.HRNET_BLOCKS", 1, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 8,
    "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, "OUTPUT_DIR", "output/of_no_run",
]  # fmt: skip


@pytest.fixture
def narrow():
    """``narrow("panoptic_joint", KEY, VALUE, ...)``: a config of CASNet with a narrow backbone on the CPU, and overrides."""
    return lambda name, *opts: load_config(str(REPO / f"configs/casnet/{name}.yaml"), [*NARROW, *opts])


Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out: int, inside: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, inside, kernel, kernel)}


def norm(name: str, channels: int) -> Shapes:
    vectors = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def conv_norm(name: str, out: int, inside: int, kernel: int) -> Shapes:
    return conv(f"{name}.0", out, inside, kernel) | norm(f"{name}.1", out)


def hrnet(width: int) -> Shapes:
    """Name -> shape of HRNetV2-W<width> without a head."""
    found = conv("conv1", 64, 3, 3) | norm("bn1", 64) | conv("conv2", 64, 64, 3) | norm("bn2", 64)
    for block in range(4):
        name, inside = f"layer1.{block}", 64 if block == 0 else 256
        found |= conv(f"{name}.conv1", 64, inside, 1) | conv(f"{name}.conv2", 64, 64, 3) | conv(f"{name}.conv3", 256, 64, 1)
        found |= norm(f"{name}.bn1", 64) | norm(f"{name}.bn2", 64) | norm(f"{name}.bn3", 256)
    found |= conv_norm("layer1.0.downsample", 256, 64, 1)

    channels = [width * 2**i for i in range(4)]
    found |= conv_norm("transition1.0", channels[0], 256, 3) | conv_norm("transition1.1.0", channels[1], 256, 3)
    found |= conv_norm("transition2.2.0", channels[2], channels[1], 3)
    found |= conv_norm("transition3.3.0", channels[3], channels[2], 3)
    for stage, modules in ((2, 1), (3, 4), (4, 3)):
        for module in range(modules):
            found |= exchange_module(f"stage{stage}.{module}", channels[:stage])
    return found


def exchange_module(name: str, channels: list[int]) -> Shapes:
    """Four basic blocks per branch, then the fusion of every branch with every other."""
    found: Shapes = {}
    for branch, width in enumerate(channels):
        for block in range(4):
            for half in ("1", "2"):
                place = f"{name}.branches.{branch}.{block}"
                found |= conv(f"{place}.conv{half}", width, width, 3) | norm(f"{place}.bn{half}", width)
    for to, out in enumerate(channels):
        for source, inside in enumerate(channels):
            place = f"{name}.fuse_layers.{to}.{source}"
            if source > to:
                found |= conv_norm(place, out, inside, 1)
            for step in range(to - source):
                found |= conv_norm(f"{place}.{step}", out if step == to - source - 1 else inside, inside, 3)
    return found


def last_layer(width: int, classes: int) -> Shapes:
    """The head for semantic segmentation; its first convolution has a bias."""
    fused = 15 * width
    found = conv("last_layer.0", fused, fused, 1) | {"last_layer.0.bias": (fused,)} | norm("last_layer.1", fused)
    return found | conv("last_layer.3", classes, fused, 1) | {"last_layer.3.bias": (classes,)}


def count(shapes: Shapes) -> int:
    """Learnt numbers: without the statistics of batch norm."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    total = 0
    for name, shape in shapes.items():
        if not name.endswith(statistics):
            size = 1
            for side in shape:
                size *= side
            total += size
    return total


@pytest.fixture(scope="session")
def official() -> SimpleNamespace:
    """``hrnet(width)`` and ``last_layer(width, classes)``: name -> shape; ``count(shapes)``: learnt numbers."""
    return SimpleNamespace(hrnet=hrnet, last_layer=last_layer, count=count)
