"""Detectron2's build_model, for names that are not registered."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_registered_model

from projects.errors import ConfigError

from .pooler import replace_roi_align


def build_model(cfg: CfgNode) -> torch.nn.Module:
    """The model of a config, on MODEL.DEVICE. Raises ConfigError when a part's name is not registered."""
    try:
        model = build_registered_model(cfg)
    except KeyError as error:
        if "registry" not in str(error):
            raise
        raise ConfigError(f"The config names a part of the model that does not exist: {error.args[0]}") from error
    if cfg.MODEL.FAST_ROI_ALIGN:
        replace_roi_align(model)
    return model
