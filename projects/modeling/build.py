"""Detectron2's build_model, for names that it does not know."""

import operator

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_registered_model

from projects.config import Config
from projects.errors import ConfigError

from .pooler import replace_roi_align


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
    return model
