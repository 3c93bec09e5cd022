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
from projects.errors import CheckpointError, ConfigError

from .discriminators import Discriminators, Judgement
from .losses import AdversarialLosses
from .meta_arch import GANMaskRCNN
from .roi_heads import GANMaskROIHeads
from .samples import Samples

logger = logging.getLogger(__name__)

REPLACED = ("loss_box_reg", "loss_mask")  # L_bbox and L_mask, which LOSSES "adversarial" leaves out (Table 5)


@TRAINER_REGISTRY.register()
class AdversarialTrainer(StandardTrainer):
    """StandardTrainer with discriminators, which have an optimizer of their own.

    With LOSSES "baseline", and before START_ITER, a step is StandardTrainer's. ``total_loss`` is the generator's (Eq. 2); the
    discriminators' losses and the accuracy of D_b on real and on fake boxes are logged beside it.
    """

    advice = (
        " Where it is loss_adv_box or loss_adv_mask, the discriminators, which are not in that folder, have stepped already, "
        "and the replay, which has the model's own losses only, finds nothing; remedies: a lower "
        "MODEL.GANMASK.DISCRIMINATOR_LR_FACTOR, lower MODEL.GANMASK.BOX_WEIGHT and MASK_WEIGHT, a later "
        "MODEL.GANMASK.START_ITER."
    )

    def __init__(self, cfg: CfgNode, trust: bool = False):
        super().__init__(cfg, trust)
        ganmask = cfg.MODEL.GANMASK
        if ganmask.LOSSES not in ("both", "adversarial", "baseline"):
            raise ConfigError(f"MODEL.GANMASK.LOSSES is '{ganmask.LOSSES}': expected 'both', 'adversarial' or 'baseline'.")
        self.plays = ganmask.LOSSES != "baseline"
        if not self.plays:
            return
        refuse_unfit(cfg, self.model)
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

    def resume_or_load(self, resume: bool) -> None:
        """As StandardTrainer's. A game that has started does not go on from a checkpoint without discriminators."""
        found = []
        if self.plays:
            self.discriminators.register_load_state_dict_post_hook(lambda *_: found.append(True))
        super().resume_or_load(resume)
        if not self.plays or found or self.start_iter == 0:
            return
        lacking = f"The checkpoint '{self.checkpointer.resumed_from}' has no discriminators"
        if self.start_iter > self.first_iter:
            raise CheckpointError(
                f"{lacking}: it comes from a run with MODEL.GANMASK.LOSSES 'baseline'. Go on with that, or let the game start "
                f"now, with MODEL.GANMASK.START_ITER {self.start_iter}."
            )
        logger.warning("%s: they are new, for the game that starts in iteration %d.", lacking, self.first_iter)

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        """The generator's losses on a batch, after the discriminators have stepped on its samples.

        Empty in the case of :meth:`StandardTrainer.forward`. When a loss is not finite in any process, no process goes on to
        the discriminators: all would wait for each other there.
        """
        if not self.plays or self.iter < self.first_iter:
            return super().forward(batch)
        losses, samples = self.generate(batch)
        losses = {name: loss for name, loss in losses.items() if name not in self.replaced}
        means, _ = mean_over_processes(losses, False)
        if not all(map(math.isfinite, means.values())):
            return losses
        self.train_discriminators(samples.detach())
        with self.autocast(), frozen(self.discriminators):
            adversarial = self.adversarial_losses.generator(self.discriminators(samples))
        return losses | adversarial

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
            "samples": torch.tensor(len(judgement.real_scores), device=judgement.real_scores.device),
            "real": (judgement.real_scores > 0).sum(),
            "fake": (judgement.fake_scores < 0).sum(),
        }
        means, _ = mean_over_processes(losses | counts, False)
        samples, real, fake = (means.pop(name) for name in counts)
        if samples > 0:
            means |= {"accuracy_box_real": real / samples, "accuracy_box_fake": fake / samples}
        self.storage.put_scalars(**means)


def refuse_unfit(cfg: CfgNode, model: torch.nn.Module) -> None:
    """Raise ConfigError where the model hands out no samples, or a key contradicts the game."""
    if not isinstance(model, GANMaskRCNN):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is '{cfg.MODEL.META_ARCHITECTURE}': AdversarialTrainer needs GANMaskRCNN, whose "
            "forward pass returns samples for the discriminators."
        )
    if not isinstance(model.roi_heads, GANMaskROIHeads):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME is '{cfg.MODEL.ROI_HEADS.NAME}': AdversarialTrainer needs GANMaskROIHeads, which "
            "make the samples."
        )
    if model.proposal_generator is None:
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is '{cfg.MODEL.PROPOSAL_GENERATOR.NAME}': AdversarialTrainer needs a generator of "
            "proposals, such as 'RPN'."
        )
    steps = cfg.MODEL.GANMASK.DISCRIMINATOR_STEPS
    if steps < 1:
        raise ConfigError(f"MODEL.GANMASK.DISCRIMINATOR_STEPS is {steps}: expected at least 1.")
    if cfg.SOLVER.ACCUMULATE > 1:
        raise ConfigError(
            f"SOLVER.ACCUMULATE is {cfg.SOLVER.ACCUMULATE}: AdversarialTrainer needs 1: its players take turns on a batch."
        )


@contextmanager
def frozen(module: torch.nn.Module):
    """What is computed inside the block gives the weights of ``module`` no gradient."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
