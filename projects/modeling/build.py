"""Detectron2's build_model, for names that it does not know."""

import logging
import operator

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_registered_model

from projects import PROJECTS, get_cfg
from projects.config import Config
from projects.errors import ConfigError

from .pooler import replace_roi_align

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode) -> torch.nn.Module:
    """The model of a config, on MODEL.DEVICE. Raises ConfigError when a name in it stands for nothing."""
    try:
        model = build_registered_model(cfg)
    except KeyError as error:
        name = error.args[0]
        if "registry" in str(name):
            raise ConfigError(f"The config names a part of the model that does not exist: {name}") from error
        keys = [key for key in Config.keys_in_full(cfg) if isinstance(name, str) and operator.attrgetter(key)(cfg) == name]
        if not keys:
            raise
        raise ConfigError(f"{' and '.join(keys)}: there is no '{name}'. Detectron2's manual lists the choices.") from error
    if cfg.MODEL.FAST_ROI_ALIGN:
        replace_roi_align(model)
    warn_of_unread_keys(cfg, model)
    return model


def warn_of_unread_keys(cfg: CfgNode, model: torch.nn.Module) -> None:
    """Warn where keys of a paper are changed and no module of the model is from its package: as with Detectron2's heads."""
    defaults, packages = get_cfg().MODEL, {type(module).__module__.partition(".")[0] for module in model.modules()}
    for node in sorted(package.upper() for package in PROJECTS.keys() - packages):
        default, own = defaults.get(node), cfg.MODEL.get(node)
        changed = [key for key in default or () if own is not None and key in own and own[key] != default[key]]
        if changed:
            logger.warning(
                "%s: changed, and no part of this model is from %s/, so that the network is the same without. Set its heads.",
                ", ".join(f"MODEL.{node}.{key}" for key in changed),
                node.lower(),
            )
