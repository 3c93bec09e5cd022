"""Config keys of GAN Mask R-CNN. With LOSSES "baseline" training is Mask R-CNN's."""

from detectron2.config import CfgNode


def add_ganmask_config(cfg: CfgNode) -> None:
    """Add the node MODEL.GANMASK to ``cfg``."""
    cfg.MODEL.GANMASK = type(cfg)()  # merging wants one class of nodes throughout
    # Table 5: "both" (Eq. 2), "adversarial" (Eq. 2 without L_bbox and L_mask) or "baseline" (Mask R-CNN, no discriminator).
    cfg.MODEL.GANMASK.LOSSES = "both"
    # Iteration from which the game is played; before it training is Mask R-CNN's.
    cfg.MODEL.GANMASK.START_ITER = 0
    # Weight of the box's adversarial losses, L_adv^G_b and L_adv^D_b (Eqs. 4, 5): the authors' code; the paper writes 1.
    cfg.MODEL.GANMASK.BOX_WEIGHT = 0.025
    # Weight of the mask's adversarial losses, L_adv^G_m and L_adv^D_m (Eq. 6): the authors' code; the paper writes 1.
    cfg.MODEL.GANMASK.MASK_WEIGHT = 0.5
    # Scales of the features in Eq. 6: the masked input, then each layer of D_m (the authors' code; the paper has none).
    cfg.MODEL.GANMASK.FEATURE_SCALES = [1.0, 1.0, 2.0, 2.0, 2.0, 4.0]
    # Samples: whose regression and mask channel are judged, those of the RoI's "gt" class or of its "predicted" class.
    cfg.MODEL.GANMASK.SAMPLE_CLASS = "gt"
    # Samples: pool each RoI from all levels and take the "max", or "assign" it to the level that fits its size.
    cfg.MODEL.GANMASK.LEVELS = "max"
    # Samples: subtract half a pixel in PrRoIPool, as Detectron2's RoIAlign does.
    cfg.MODEL.GANMASK.ALIGNED = False
    # Convolutions of each discriminator: 3, 4 or 5 (Table 6).
    cfg.MODEL.GANMASK.DISCRIMINATOR_LAYERS = 5
    # Filters of the discriminators' first convolution; each one after it has twice as many.
    cfg.MODEL.GANMASK.DISCRIMINATOR_WIDTH = 64
    # Batch norm and LeakyReLU after every convolution (captions of figures 2 and 3): the authors' code has no batch norm after
    # the first, and neither after the box discriminator's last.
    cfg.MODEL.GANMASK.NORM_EVERYWHERE = False
    # Learning rate of the discriminators as a part of the generator's (section 4.2).
    cfg.MODEL.GANMASK.DISCRIMINATOR_LR_FACTOR = 0.2
    # Steps of the discriminators to each step of the generator (section 4.2 says "alternating").
    cfg.MODEL.GANMASK.DISCRIMINATOR_STEPS = 1
