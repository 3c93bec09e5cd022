"""The game (section 4.2): in each iteration the discriminators step with the generator frozen, then the generator steps
against the discriminators as they are then, frozen.

One forward pass of the generator serves both: the discriminators train on its samples, detached.
"""

import logging
import math
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from torch import Tensor

from projects.engine.checkpoint import rng_preserved
from projects.engine.divergence import mean_over_processes
from projects.engine.optimizer import build_optimizer
from projects.engine.trainer import TRAINER_REGISTRY, StandardTrainer, wrap_for_processes
from projects.errors import ConfigError

from .discriminators import Discriminators, Judgement
from .losses import AdversarialLosses
from .meta_arch import GANMaskRCNN
from .samples import Samples

logger = logging.getLogger(__name__)

REPLACED = ("loss_box_reg", "loss_mask")  # L_bbox and L_mask, which LOSSES "adversarial" leaves out (Table 5)


@TRAINER_REGISTRY.register()
class AdversarialTrainer(StandardTrainer):
    """StandardTrainer with discriminators, which have an optimizer of their own.

    With LOSSES "baseline", and before START_ITER, a step is StandardTrainer's. ``total_loss`` is the generator's (Eq. 2); the
    discriminators' losses and the accuracy of D_b on real and on fake boxes are logged beside it.
    """

    def __init__(self, cfg: CfgNode, trust: bool = False):
        super().__init__(cfg, trust)
        ganmask = cfg.MODEL.GANMASK
        if ganmask.LOSSES not in ("both", "adversarial", "baseline"):
            raise ConfigError(
                f"MODEL.GANMASK.LOSSES is '{ganmask.LOSSES}': expected 'both', 'adversarial' or 'baseline'."
            )
        self.plays = ganmask.LOSSES != "baseline"
        if not self.plays:
            return
        if not isinstance(self.model, GANMaskRCNN):
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE is '{cfg.MODEL.META_ARCHITECTURE}': AdversarialTrainer needs GANMaskRCNN, whose "
                "forward pass returns samples for the discriminators."
            )
        if ganmask.DISCRIMINATOR_STEPS < 1:
            raise ConfigError(f"MODEL.GANMASK.DISCRIMINATOR_STEPS is {ganmask.DISCRIMINATOR_STEPS}: expected at least 1.")
        self.replaced = REPLACED if ganmask.LOSSES == "adversarial" else ()
        self.first_iter, self.steps = ganmask.START_ITER, ganmask.DISCRIMINATOR_STEPS
        self.lr_factor = ganmask.DISCRIMINATOR_LR_FACTOR
        self.adversarial_losses = AdversarialLosses(cfg)
        with rng_preserved():  # the generator draws the same numbers as without discriminators
            self.discriminators = Discriminators(cfg, self.model.backbone.output_shape()).to(cfg.MODEL.DEVICE)
        self.parallel_discriminators = wrap_for_processes(self.discriminators)
        self.discriminator_optimizer = build_optimizer(cfg, self.discriminators)
        self.checkpointer.add_checkpointable("discriminators", self.discriminators)
        self.checkpointer.add_checkpointable("discriminator_optimizer", self.discriminator_optimizer)

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        """The generator's losses on a batch, after the discriminators have stepped on its samples.

        Empty in the case of :meth:`StandardTrainer.forward`. When a loss is not finite in any process, no process goes on to
        the discriminators: all would wait for each other there.
        """
        if not self.plays or self.iter < self.first_iter:
            return super().forward(batch)
        losses, samples = self.generate(batch)
        means, _ = mean_over_processes(losses, False)
        if not all(map(math.isfinite, means.values())):
            return losses
        self.train_discriminators(samples.detach())
        with self.autocast(), frozen(self.discriminators):
            adversarial = self.adversarial_losses.generator(self.discriminators(samples))
        return {name: loss for name, loss in losses.items() if name not in self.replaced} | adversarial

    def generate(self, batch: list[dict]) -> tuple[dict[str, Tensor], Samples | None]:
        """Mask R-CNN's losses and the samples; ({}, None) when Detectron2 breaks off because a proposal is not finite."""
        try:
            with self.autocast():
                return self.parallel_model(batch, return_samples=True)
        except FloatingPointError as error:
            logger.error("%s", error)
            return {}, None

    def train_discriminators(self, samples: Samples) -> None:
        """DISCRIMINATOR_STEPS steps on detached samples. Logs the losses and the accuracy before the last of them."""
        for group in self.discriminator_optimizer.param_groups:  # the generator's schedule
            group["lr"] = self.lr_factor * self.optimizer.param_groups[0]["lr"]
        for _ in range(self.steps):
            with self.autocast():
                judgement = self.parallel_discriminators(samples)
                losses = self.adversarial_losses.discriminator(judgement)
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(sum(losses.values())).backward()
            self.scaler.step(self.discriminator_optimizer)
            self.scaler.update()
        self.log(judgement, losses)

    def log(self, judgement: Judgement, losses: dict[str, Tensor]) -> None:
        """Log the means over the processes; the accuracy only where some process has foreground."""
        counts = {
            "samples": judgement.real_scores.new_tensor(len(judgement.real_scores)),
            "real": (judgement.real_scores > 0).sum(),
            "fake": (judgement.fake_scores < 0).sum(),
        }
        means, _ = mean_over_processes(losses | counts, False)
        samples, real, fake = (means.pop(name) for name in counts)
        if samples > 0:
            means |= {"accuracy_box_real": real / samples, "accuracy_box_fake": fake / samples}
        self.storage.put_scalars(**means)


@contextmanager
def frozen(module: torch.nn.Module):
    """What is computed inside the block gives the weights of ``module`` no gradient."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
