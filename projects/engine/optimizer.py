"""Optimizer and learning rate schedule, under Detectron2's rules for parameter groups, clipping and warm-up."""

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import build_lr_scheduler, get_default_optimizer_params, maybe_add_gradient_clipping

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


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer):
    """Detectron2's schedule of the learning rate. Raises ConfigError for names and steps that it does not accept."""
    try:
        return build_lr_scheduler(cfg, optimizer)
    except ValueError as error:
        raise ConfigError(
            f"The learning rate schedule cannot be built ({error}): expected SOLVER.LR_SCHEDULER_NAME 'WarmupMultiStepLR' or "
            "'WarmupCosineLR', SOLVER.WARMUP_METHOD 'linear' or 'constant', and SOLVER.STEPS in ascending order."
        ) from error
