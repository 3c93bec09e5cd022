"""Config keys of MaskPlus. With every technique switched off the model is Mask R-CNN."""

from detectron2.config import CfgNode


def add_maskplus_config(cfg: CfgNode) -> None:
    """Add the node MODEL.MASKPLUS to ``cfg``."""
    cfg.MODEL.MASKPLUS = type(cfg)()  # merging wants one class of nodes throughout
    # Contextual fusion (section 3.1): add features of the whole image to the mask features of every RoI.
    cfg.MODEL.MASKPLUS.CONTEXT = False
    # Contextual fusion: the level that the whole image is pooled from; the paper's "FPN last-layer" is P5.
    cfg.MODEL.MASKPLUS.CONTEXT_LEVEL = "p5"
    # Contextual fusion: filters of its 3x3 convolutions (Table 1); the last number is that of the RoI features.
    cfg.MODEL.MASKPLUS.CONV_DIMS = [720, 512, 512, 256]
    # Deconvolutional pyramid (section 3.2) between the mask head's convolutions and its deconvolution.
    cfg.MODEL.MASKPLUS.DECONV_PYRAMID = False
    # Boundary refinement of the mask logits (section 3.3, Table 3): "none", "original" (Peng et al.) or "dense".
    cfg.MODEL.MASKPLUS.BOUNDARY = "none"
    # Quasi-multitask learning (section 3.4): mask sizes of the auxiliary heads relative to 28, [], [0.5], [2.0] or both.
    cfg.MODEL.MASKPLUS.QUASI_SCALES = []
    # Size of the predicted mask itself relative to 28: 0.5 is Table 4's row "0.5x mask", without a deconvolution.
    cfg.MODEL.MASKPLUS.MASK_SCALE = 1.0
    # Biased training (section 3.5): weigh the mask losses with alpha in the first part of the training.
    cfg.MODEL.MASKPLUS.BIASED = False
    # Biased training: the paper's alpha.
    cfg.MODEL.MASKPLUS.BIASED_ALPHA = 1.5
    # Biased training: the part of SOLVER.MAX_ITER after which alpha is 1.
    cfg.MODEL.MASKPLUS.BIASED_FRACTION = 0.5
