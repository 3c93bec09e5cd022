"""SOLVER.OPTIMIZER by name, under Detectron2's rules for parameter groups and gradient clipping."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from projects.errors import ConfigError


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters of ``model``.

    WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR and CLIP_GRADIENTS act as in Detectron2, whose 0.6 has SGD only.
    Raises ConfigError for another name.
    """
    solver = cfg.SOLVER
    kinds = {
        "SGD": (torch.optim.SGD, {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}),
        "AdamW": (torch.optim.AdamW, {}),
    }
    if solver.OPTIMIZER not in kinds:
        raise ConfigError(f"SOLVER.OPTIMIZER is '{solver.OPTIMIZER}': expected one of {', '.join(kinds)}.")
    kind, arguments = kinds[solver.OPTIMIZER]
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return maybe_add_gradient_clipping(cfg, kind)(parameters, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **arguments)
