"""Quasi-multitask learning (sections 3.4 and 4.7): mask heads of another mask size that help training and nothing else.

Shapes: R RoIs of all images in order, C channels, P the side of the RoI features (14), K mask classes.
"""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ConvTranspose2d, ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, mask_rcnn_loss
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from projects.errors import ConfigError

DECONVS = {0.5: 0, 1.0: 1, 2.0: 2}  # scale of the mask -> deconvolutions of its head
NAMES = {0.5: "mask_half", 2.0: "mask_double"}  # scale of an auxiliary mask -> name of its head; its loss is loss_<name>
ATTRIBUTE = "quasi_multitask"  # of the mask head; its weights are the keys with this part


class ScaledMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN's mask head whose mask is ``scale`` times as large: without its deconvolution, or with one more.

    With scale 1 it is Detectron2's head, with the same names of weights.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, scale: float = 1.0, **kwargs):
        """Raises ConfigError for another scale, and where without a deconvolution the numbers of channels do not fit."""
        super().__init__(input_shape, **kwargs)
        if scale not in DECONVS:
            raise ConfigError(f"The scale of a mask is {scale}: expected one of {', '.join(map(str, DECONVS))}.")
        if DECONVS[scale] == 2:
            channels = self.predictor.in_channels
            self.deconv2 = ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
            weight_init.c2_msra_fill(self.deconv2)
        elif DECONVS[scale] == 0:
            if self.deconv.in_channels != self.predictor.in_channels:
                raise ConfigError(
                    f"A mask of half the size has no deconvolution, which with MODEL.ROI_MASK_HEAD.NUM_CONV 0 gets from the "
                    f"features' {self.deconv.in_channels} channels to CONV_DIM {self.predictor.in_channels}: make them equal."
                )
            del self.deconv
        self.deconvs = [layer for name, layer in self.named_children() if name in ("deconv", "deconv2")]

    def layers(self, x: Tensor) -> Tensor:
        """(R, C, P, P) -> mask logits (R, K, 2 * scale * P, 2 * scale * P)."""
        return self.predict(self.convs(x))

    def convs(self, x: Tensor) -> Tensor:
        """The 3x3 convolutions: (R, C, P, P) -> (R, C', P, P)."""
        for layer in self.conv_norm_relus:
            x = layer(x)
        return x

    def predict(self, x: Tensor) -> Tensor:
        """The deconvolutions, and the 1x1 convolution that gives the logits."""
        for deconv in self.deconvs:
            x = F.relu(deconv(x))
        return self.predictor(x)


class QuasiMultitask(nn.ModuleDict):
    """The auxiliary heads by name, each with weights and a loss of its own (weight 1). Never run at inference.

    A checkpoint without any of their weights loads silently: they are not needed to predict.
    """

    @configurable
    def __init__(self, heads: dict[str, ScaledMaskHead]):
        super().__init__(heads)
        self.register_load_state_dict_post_hook(forgive_absence)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        scales = cfg.MODEL.MASKPLUS.QUASI_SCALES
        if not all(scale in list(NAMES) for scale in scales) or len(set(scales)) < len(scales):
            raise ConfigError(f"MODEL.MASKPLUS.QUASI_SCALES is {scales}: expected [], [0.5], [2.0] or [0.5, 2.0].")
        return {"heads": {NAMES[scale]: ScaledMaskHead(cfg, input_shape, scale=scale) for scale in scales}}

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        """The losses of all heads against the ground truth at their size.

        Args:
            x: (R, C, P, P), the features that the mask head gets too.
            instances: the R foreground proposals with ``proposal_boxes``, ``gt_classes`` and ``gt_masks``, by image.
        """
        losses = {}
        for name, head in self.items():
            with get_event_storage().name_scope(name):
                losses[f"loss_{name}"] = mask_rcnn_loss(head.layers(x), instances)
        return losses


def is_training_only(key: str) -> bool:
    """Whether a key of a model's state dict is a weight of an auxiliary head."""
    return ATTRIBUTE in key.split(".")


def forgive_absence(module: QuasiMultitask, incompatible) -> None:
    """Hook after ``load_state_dict``: the auxiliary heads are not missing where none of their parameters was there."""
    absent = {key.rpartition(f"{ATTRIBUTE}.")[2]: key for key in incompatible.missing_keys if is_training_only(key)}
    if absent.keys() >= dict(module.named_parameters()).keys():
        for key in absent.values():
            incompatible.missing_keys.remove(key)
