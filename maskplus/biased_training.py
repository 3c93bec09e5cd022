"""Biased training (section 3.5): L = L_cls + L_box + alpha L_mask, with a larger alpha in the first part of the training."""

import math
from dataclasses import dataclass

from detectron2.config import CfgNode

from projects.errors import ConfigError


@dataclass(frozen=True)
class BiasedTraining:
    """The weight of the mask losses as a function of the iteration alone, so that a resumed run is the same run.

    The switch lies in a fixed part of SOLVER.MAX_ITER: a run that goes on with a larger one has a later switch.

    Attributes:
        alpha: the weight at first.
        iterations: for how many iterations; then it is 1.
    """

    alpha: float
    iterations: int

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "BiasedTraining":
        """Raises ConfigError when alpha is not a positive number or the fraction is not one."""
        alpha, fraction = cfg.MODEL.MASKPLUS.BIASED_ALPHA, cfg.MODEL.MASKPLUS.BIASED_FRACTION
        if not 0 < alpha < math.inf:
            raise ConfigError(f"MODEL.MASKPLUS.BIASED_ALPHA is {alpha}: expected a positive weight, the paper's is 1.5.")
        if not 0 <= fraction <= 1:
            raise ConfigError(f"MODEL.MASKPLUS.BIASED_FRACTION is {fraction}: expected a part of the training, 0 to 1.")
        return cls(alpha, round(fraction * cfg.SOLVER.MAX_ITER))

    def weight(self, iteration: int) -> float:
        """The weight in an iteration, which count from 0."""
        return self.alpha if iteration < self.iterations else 1.0
