"""Mode "separated": the semantic map of a network of its own (section IV), and how its weights are found.

Shapes: C semantic classes, H x W pixels of the output.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from projects import load_config
from projects.engine.checkpoint import Checkpointer
from projects.errors import CheckpointError, ConfigError

from .hrnet import HRNet, load_hrnet, official_weights


class SemanticNetwork:
    """A trained, frozen semantic network beside a model. It is no part of that model's weights, training or checkpoints."""

    def __init__(self, network: nn.Module):
        """``network``: Detectron2's SemanticSegmentor, or what takes and gives the same."""
        self.network = network.eval().requires_grad_(False)

    def __call__(self, batched_inputs: Sequence[dict], device: torch.device) -> list[Tensor]:
        """Logits (C, H, W) per image."""
        self.network.to(device)
        with torch.no_grad():
            return [output["sem_seg"] for output in self.network(batched_inputs)]


def build_semantic_network(cfg: CfgNode) -> SemanticNetwork:
    """The network of MODEL.CASNET.SEMANTIC_CONFIG, or where that is empty with ``cfg``'s backbone, and SEMANTIC_WEIGHTS.

    The file is one of that config's, or one of HRNet's authors for semantic segmentation, whose network enlarges bilinearly.

    Raises:
        CheckpointError: there is no such file, or it does not fit.
        ConfigError: there is no such config, or it has other classes.
    """
    path = cfg.MODEL.CASNET.SEMANTIC_WEIGHTS
    if not Path(path).is_file():
        raise CheckpointError(
            "MODEL.CASNET.MODE 'separated' takes its semantic map from a second network: expected the file with its weights in "
            f"MODEL.CASNET.SEMANTIC_WEIGHTS, found no file '{path}'. Train that network with the *semantic_hrnet* config in "
            "configs/casnet/ for the same data set, and set the key to its model_final.pth; or choose the mode 'joint'."
        )
    cfg = config_of_second_network(cfg)
    try:
        weights = official_weights(path)
        official = "conv1.weight" in weights
        if official:
            cfg.MODEL.CASNET.HRNET_UPSAMPLE = "bilinear"
        network = META_ARCH_REGISTRY.get("SemanticSegmentor")(cfg)
        if official and isinstance(network.backbone, HRNet):
            load_official(network, weights, path)
        else:
            checkpointer = Checkpointer(network)
            checkpointer.load(path)
            checkpointer.refuse_unloaded(path)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.CASNET.SEMANTIC_WEIGHTS, the weights of the semantic network: {error}") from error
    return SemanticNetwork(network)


def config_of_second_network(cfg: CfgNode) -> CfgNode:
    """MODEL.CASNET.SEMANTIC_CONFIG or ``cfg`` itself, without weights. Raises ConfigError: no such file, or other classes."""
    path = cfg.MODEL.CASNET.SEMANTIC_CONFIG
    own = load_config(path, ["MODEL.DEVICE", cfg.MODEL.DEVICE]) if path else cfg.clone()
    own.defrost()
    own.MODEL.WEIGHTS = own.MODEL.CASNET.HRNET_WEIGHTS = ""
    expected, found = (each.MODEL.SEM_SEG_HEAD.NUM_CLASSES for each in (cfg, own))
    if found != expected:
        raise ConfigError(
            f"MODEL.CASNET.SEMANTIC_CONFIG '{path}' has {found} classes in MODEL.SEM_SEG_HEAD.NUM_CLASSES: expected "
            f"{expected}, as this model's."
        )
    return own


def load_official(network: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Fill a SemanticSegmentor on HRNet from the weights of HRNet's authors, whose head is called "last_layer".

    Its first convolution has a bias b and ours none: batch norm, which subtracts its mean, then has the mean less b.
    """
    load_hrnet(network.backbone, weights, f"file '{path}'")
    head = {name.removeprefix("last_layer."): value for name, value in weights.items() if name.startswith("last_layer.")}
    if "0.bias" in head and "1.running_mean" in head:
        head["1.running_mean"] = head["1.running_mean"] - head.pop("0.bias")
    own = network.sem_seg_head.layers.state_dict()
    unfit = [name for name in own if name not in head or head[name].shape != own[name].shape]
    unfit = [name for name in unfit if not name.endswith("num_batches_tracked")]
    if unfit:
        raise CheckpointError(
            f"'{path}' has HRNet's weights, but not those of a head for {network.sem_seg_head.layers.out_channels} classes: "
            f"last_layer.{unfit[0]} is missing or has another shape."
        )
    network.sem_seg_head.layers.load_state_dict({name: head[name] for name in own if name in head}, strict=False)
