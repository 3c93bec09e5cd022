"""HRNet (section III.A, [41]) as a backbone: timm's network, whose branches keep the resolutions 1/4 to 1/32.

Shapes: N images of H x W pixels, both multiples of 32; W in MODEL.CASNET.HRNET_WIDTH is the paper's name for the channels of
the first branch.

The paper says that its pyramid has 1/2, 1/4 and 1/8 of the input's size. HRNet has no such branches; what its heads take is
decided in :mod:`.heads`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.models.hrnet import HighResolutionNetFeatures
from torch import Tensor, nn

from projects.engine.safe_loading import load_torch
from projects.errors import CheckpointError, ConfigError

from .norm import synchronized

logger = logging.getLogger(__name__)

NAMES = ("stem", "branch1", "branch2", "branch3", "branch4")
STRIDES = (2, 4, 8, 16, 32)
OFFICIAL_MODULES, OFFICIAL_BLOCKS = (1, 4, 3), 4


class HRNet(Backbone):
    """The four branches behind HRNet's last fusion, "branch1" (1/4, W channels) to "branch4" (1/32, 8W), and on demand "stem",
    the map of 1/2 behind the first convolution."""

    @configurable
    def __init__(
        self,
        *,
        width: int,
        modules: Sequence[int] = OFFICIAL_MODULES,
        blocks: int = OFFICIAL_BLOCKS,
        upsample: str = "nearest",
        with_stem: bool = False,
    ):
        """
        Args:
            width: W.
            modules: of the stages 2, 3 and 4.
            blocks: residual blocks of stage 1 and of each branch of a module.
            upsample: how the fusions inside the network enlarge, "nearest" as in timm and in the official code for ImageNet,
                or "bilinear" as in the official code for segmentation (https://github.com/HRNet/HRNet-Semantic-Segmentation,
                with its ALIGN_CORNERS off, as its W48 for Cityscapes has it).

        Raises:
            ConfigError: another ``upsample``, or not three numbers of modules.
        """
        super().__init__()
        if upsample not in ("nearest", "bilinear"):
            raise ConfigError(f"MODEL.CASNET.HRNET_UPSAMPLE is '{upsample}': expected nearest or bilinear.")
        if len(modules) != 3:
            raise ConfigError(f"MODEL.CASNET.HRNET_MODULES is {list(modules)}: expected those of the stages 2, 3 and 4.")
        self.names = NAMES if with_stem else NAMES[1:]
        indices = tuple(NAMES.index(name) for name in self.names)
        self.net = HighResolutionNetFeatures(architecture(width, modules, blocks), feature_location="", out_indices=indices)
        for module in self.net.modules():
            if isinstance(module, nn.Upsample) and upsample == "bilinear":
                module.mode, module.align_corners = "bilinear", False
        self._out_features = list(self.names)
        self._out_feature_channels = dict(zip(NAMES, (64, width, 2 * width, 4 * width, 8 * width), strict=True))
        self._out_feature_strides = dict(zip(NAMES, STRIDES, strict=True))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        casnet = cfg.MODEL.CASNET
        return {
            "width": casnet.HRNET_WIDTH,
            "modules": casnet.HRNET_MODULES,
            "blocks": casnet.HRNET_BLOCKS,
            "upsample": casnet.HRNET_UPSAMPLE,
            "with_stem": casnet.OUTPUT_STRIDE == 2,
        }

    @property
    def size_divisibility(self) -> int:
        return STRIDES[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> name: (N, channels, H / stride, W / stride)."""
        if x.shape[-2] % self.size_divisibility or x.shape[-1] % self.size_divisibility:
            raise ValueError(f"HRNet takes images whose sides are multiples of {self.size_divisibility}, not {tuple(x.shape)}")
        return dict(zip(self.names, self.net(x), strict=True))


@BACKBONE_REGISTRY.register()
def build_hrnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> HRNet:
    """HRNet with the weights of MODEL.CASNET.HRNET_WEIGHTS, unless MODEL.WEIGHTS or a run that goes on replace them anyway."""
    backbone = HRNet(cfg)
    source = cfg.MODEL.CASNET.HRNET_WEIGHTS
    goes_on = (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file()
    if source and goes_on and not cfg.MODEL.WEIGHTS:
        logger.warning("HRNET_WEIGHTS '%s' are not read: the run in %s goes on with its own.", source, cfg.OUTPUT_DIR)
    elif source and not cfg.MODEL.WEIGHTS:
        state = timm_weights(cfg) if source == "timm" else official_weights(source)
        if "last_layer.0.weight" in state and cfg.MODEL.CASNET.HRNET_UPSAMPLE != "bilinear":
            logger.warning(
                "HRNET_WEIGHTS '%s' are of the authors' segmentation code, whose network enlarges bilinearly: set "
                "MODEL.CASNET.HRNET_UPSAMPLE bilinear.",
                source,
            )
        load_hrnet(backbone, state, f"HRNET_WEIGHTS '{source}'")
    return synchronized(backbone, cfg)


def architecture(width: int, modules: Sequence[int], blocks: int) -> dict:
    """timm's description of an HRNet, in a form of its own each time, since timm changes it."""

    def stage(count: int, branches: int, block_type: str, channels: tuple[int, ...]) -> dict:
        sizes = {"num_modules": count, "num_branches": branches, "num_blocks": (blocks,) * branches, "num_channels": channels}
        return sizes | {"block_type": block_type, "fuse_method": "SUM"}

    stages = {"stage1": stage(1, 1, "BOTTLENECK", (64,))}
    for branches, count in enumerate(modules, start=2):
        stages[f"stage{branches}"] = stage(count, branches, "BASIC", tuple(width * 2**i for i in range(branches)))
    return {"stem_width": 64, **stages}


def timm_weights(cfg: CfgNode) -> dict[str, Tensor]:
    """ImageNet weights from timm's hub. Raises ConfigError where it has none, CheckpointError where it cannot be reached."""
    casnet = cfg.MODEL.CASNET
    name = f"hrnet_w{casnet.HRNET_WIDTH}"
    official = tuple(casnet.HRNET_MODULES) == OFFICIAL_MODULES and casnet.HRNET_BLOCKS == OFFICIAL_BLOCKS
    if not official or not timm.is_model_pretrained(name):
        raise ConfigError(
            f"MODEL.CASNET.HRNET_WEIGHTS is 'timm', which has no weights for HRNET_WIDTH {casnet.HRNET_WIDTH}, HRNET_MODULES "
            f"{list(casnet.HRNET_MODULES)}, HRNET_BLOCKS {casnet.HRNET_BLOCKS}. Expected a width such as 18, 32 or 48, modules "
            f"{list(OFFICIAL_MODULES)} and {OFFICIAL_BLOCKS} blocks; or set HRNET_WEIGHTS to '' to start from random weights."
        )
    try:
        return timm.create_model(name, pretrained=True, features_only=True, feature_location="").state_dict()
    except Exception as error:  # the hub's libraries raise many kinds
        raise CheckpointError(
            f"The ImageNet weights of {name} cannot be fetched ({type(error).__name__}: {error}). Fetch them where there is a "
            "network and set MODEL.CASNET.HRNET_WEIGHTS to the file."
        ) from error


def official_weights(path: str) -> dict[str, Tensor]:
    """The weights in a file of HRNet's authors (or timm's), without the prefix "model." that the segmentation code adds.

    Raises CheckpointError when there is no such file or it is no dict of tensors.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"There is no weights file '{path}'. Expected HRNet's weights in the format of its authors.")
    state = load_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(state).__name__}; expected a dict of HRNet's weights by name.")
    return {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def load_hrnet(backbone: HRNet, state: Mapping[str, Tensor], source: str) -> None:
    """Fill a backbone from weights named as in the official code; what else is there (classifiers, heads) is passed over.

    Raises CheckpointError when a weight is missing or has another shape. Counters of batches may be missing.
    """
    own = backbone.net.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or wrong:
        examples = [f"{name} is missing" for name in missing[:2]]
        examples += [f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}" for name in wrong[:2]]
        raise CheckpointError(
            f"The {source} does not fit this HRNet: {len(missing)} of its {len(own)} weights are missing and {len(wrong)} have "
            f"another shape ({'; '.join(examples)}). Set MODEL.CASNET.HRNET_WIDTH to that of the file, or choose another file."
        )
    backbone.net.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
