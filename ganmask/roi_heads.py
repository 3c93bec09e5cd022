"""The generator's heads: Mask R-CNN's, which can also hand out samples for the discriminators (section 3.2).

Shapes: N images, B sampled RoIs of all images in order, R those of them that are foreground, K classes, C channels, P bins on a
side of a sample (28). Boxes are x0, y0, x1, y1 in image pixels.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads, select_foreground_proposals
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, Instances
from torch import Tensor

from projects.errors import ConfigError

from .samples import SamplePooler, Samples


@ROI_HEADS_REGISTRY.register()
class GANMaskROIHeads(StandardROIHeads):
    """StandardROIHeads with :meth:`forward_with_samples` beside ``forward``, and no weight more."""

    @configurable
    def __init__(self, *, sample_pooler: SamplePooler, sample_class: str = "gt", **kwargs):
        """
        Args:
            sample_pooler: pools the features of the samples; P is the side of the mask head's masks.
            sample_class: whose regression and whose mask become samples, those of the RoI's "gt" or of its "predicted" class.
        """
        super().__init__(**kwargs)
        if sample_class not in ("gt", "predicted"):
            raise ConfigError(f"MODEL.GANMASK.SAMPLE_CLASS is '{sample_class}': expected 'gt' or 'predicted'.")
        if not self.mask_on or self.train_on_pred_boxes:
            raise ConfigError(
                "GANMaskROIHeads judges the masks of the proposals: expected MODEL.MASK_ON True and "
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES False."
            )
        self.sample_pooler = sample_pooler
        self.sample_class = sample_class

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ganmask = cfg.MODEL.GANMASK
        pooler = SamplePooler(
            output_size=2 * cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
            scales=[1.0 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
            levels=ganmask.LEVELS,
            aligned=ganmask.ALIGNED,
        )
        return super().from_config(cfg, input_shape) | {"sample_pooler": pooler, "sample_class": ganmask.SAMPLE_CLASS}

    def forward_with_samples(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[dict[str, Tensor], Samples]:
        """The losses of Mask R-CNN's heads, as ``forward`` gives them in training, and the samples of the foreground RoIs.

        Args:
            features: feature maps of the batch by level, (N, C, H_l, W_l).
            proposals: per image, with ``proposal_boxes``.
            targets: per image, with ``gt_boxes``, ``gt_classes``, ``gt_masks``.
        """
        proposals = self.label_and_sample_proposals(proposals, targets)
        maps = [features[name] for name in self.box_in_features]
        predictions = self.box_predictor(self.box_head(self.box_pooler(maps, [p.proposal_boxes for p in proposals])))
        losses = self.box_predictor.losses(predictions, proposals)

        foreground, chosen = select_foreground_proposals(proposals, self.num_classes)
        boxes = [p.proposal_boxes for p in foreground]
        mask_maps = [features[name] for name in self.mask_in_features]
        logits = self.mask_head.layers(self.mask_pooler(mask_maps, boxes))
        losses["loss_mask"] = mask_rcnn_loss(logits, foreground, self.mask_head.vis_period) * self.mask_head.loss_weight
        losses.update(self._forward_keypoint(features, proposals))

        scores, deltas = (prediction[torch.cat(chosen)] for prediction in predictions)
        classes = torch.cat([p.gt_classes for p in foreground])
        if self.sample_class == "predicted":
            classes = scores[:, :-1].argmax(dim=1)  # the last one is the background
        fixed = [level.detach() for level in maps]
        real = [p.gt_boxes if len(p) else p.proposal_boxes for p in foreground]
        samples = Samples(
            fake_boxes=self.sample_pooler(fixed, self.predicted_boxes(of_classes(deltas, classes, 4), foreground)),
            real_boxes=self.sample_pooler.pool_repeated(fixed, real),
            fake_masks=of_classes(logits, classes, 1).sigmoid(),
            real_masks=ground_truth_masks(foreground, logits),
            features=self.sample_pooler(fixed, boxes),
        )
        return losses, samples

    def predicted_boxes(self, deltas: Tensor, proposals: list[Instances]) -> list[Boxes]:
        """Decode regressions (R, 4) of the proposals of each image, and clip them to it, with gradients."""
        decoded = self.box_predictor.box2box_transform.apply_deltas(
            deltas, torch.cat([p.proposal_boxes.tensor for p in proposals])
        )
        clipped = []
        for p, boxes in zip(proposals, decoded.split([len(p) for p in proposals]), strict=True):
            height, width = p.image_size
            corner = boxes.new_tensor([width, height, width, height])
            clipped.append(Boxes(boxes.clamp(torch.zeros_like(corner), corner)))
        return clipped


def of_classes(predictions: Tensor, classes: Tensor, size: int) -> Tensor:
    """What is predicted for one class of each RoI: (R, K * size, ...), (R,) -> (R, size, ...); as it is when K is 1."""
    if predictions.shape[1] == size:
        return predictions
    by_class = predictions.unflatten(1, (-1, size))
    return by_class[torch.arange(len(classes), device=classes.device), classes]


def ground_truth_masks(proposals: list[Instances], logits: Tensor) -> Tensor:
    """The ground truth in each proposal box, (R, 1, P, P) of 0 and 1, where ``logits`` are (R, K, P, P)."""
    side = logits.shape[-1]
    crops = [p.gt_masks.crop_and_resize(p.proposal_boxes.tensor, side) for p in proposals if len(p)]
    if not crops:
        return logits.new_zeros(0, 1, side, side)
    return torch.cat(crops).to(logits)[:, None]
