"""The mask-supervised RPN (DSG, section 3.2): Detectron2's RPN, followed by the MPN on its proposals.

Shapes: R proposals of an image, M and S as in :mod:`dsg.mpn`.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.modeling.roi_heads.roi_heads import ROIHeads, select_foreground_proposals
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from projects.errors import ConfigError

from .mpn import MPN

HEADS = ("DSGROIHeads", "CascadeDSGROIHeads")  # that take its proposals


@PROPOSAL_GENERATOR_REGISTRY.register()
class MaskRPN(RPN):
    """RPN whose proposals carry the MPN's output.

    Fields that it adds to the proposals:

    - ``proposal_mask_probs`` (R, 1, M, M) in [0, 1]: P, the probability at each place of the box to be on the object;
    - ``proposal_mask_features`` (R, D, S, S): F_.

    Args (beside RPN's):
        mpn: the network on the proposals.
        sampler: matches the proposals with the ground truth and samples those that the heads train on (it has no weights).
    """

    @configurable
    def __init__(self, *, mpn: MPN, sampler: ROIHeads, **rpn):
        super().__init__(**rpn)
        self.mpn = mpn
        self.sampler = sampler

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        if not cfg.MODEL.MASK_ON:
            raise ConfigError("MODEL.PROPOSAL_GENERATOR.NAME 'MaskRPN' learns from masks: set MODEL.MASK_ON True.")
        if cfg.MODEL.ROI_HEADS.NAME not in HEADS:
            raise ConfigError(
                "MODEL.PROPOSAL_GENERATOR.NAME 'MaskRPN' samples the proposals, which MODEL.ROI_HEADS.NAME must know: expected "
                f"{' or '.join(HEADS)}, found {cfg.MODEL.ROI_HEADS.NAME}."
            )
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "mpn": MPN(cfg, input_shape), "sampler": ROIHeads(cfg)}

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As RPN's. In training the proposals are those that the ROI heads train on, ground truth boxes among them: they
        have ``gt_classes`` and the other gt_ fields, and are not to be sampled again; the losses have ``loss_mpn`` too."""
        proposals, losses = super().forward(images, features, gt_instances)
        if self.training:
            proposals = self.sampler.label_and_sample_proposals(proposals, gt_instances)
        logits, mask_features = self.mpn(features, [p.proposal_boxes for p in proposals])
        if self.training:
            losses = {**losses, "loss_mpn": self.mask_loss(logits, proposals)}
        attach_masks(proposals, logits, mask_features)
        return proposals, losses

    def mask_loss(self, logits: Tensor, proposals: list[Instances]) -> Tensor:
        """Mean binary cross entropy of the masks (R, 1, M, M) of the proposals that overlap an object (MODEL.ROI_HEADS.
        IOU_THRESHOLDS, in the paper IoU >= 0.5 with a ground truth box); a connected zero where there are none."""
        foreground, chosen = select_foreground_proposals(proposals, self.sampler.num_classes)
        with get_event_storage().name_scope("mpn"):
            return mask_rcnn_loss(logits[torch.cat(chosen)], foreground)


def attach_masks(instances: list[Instances], logits: Tensor, mask_features: Tensor) -> None:
    """Give every image's instances their rows of the MPN's output, as the fields that :class:`MaskRPN` names."""
    counts = [len(of_image) for of_image in instances]
    rows = zip(instances, logits.sigmoid().split(counts), mask_features.split(counts), strict=True)
    for of_image, probs, maps in rows:
        of_image.proposal_mask_probs = probs
        of_image.proposal_mask_features = maps
