"""Cascade DSG and HTC DSG (section 3.5, Eq. 3): the masks of a stage guide the box head of the next one.

With f and f_s for RoIAlign and SgRoIAlign; B^t, M^t, F_^t for boxes, masks and mask features of stage t (stage 0: the mRPN):

    M^t, F_^t = mask head t of  f(B^t, F) + w_m^t F_^{t-1}
    B^{t+1}   = box head t+1 of f_s(B^t, F, M^t) + w_b^{t+1} F_^t

Shapes: R RoIs of all images in order, C channels, D and S (14) of the mask features, M (28) pixels per side of a mask, K
classes.
"""

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from projects.errors import ConfigError

from .cascade import CascadeMaskROIHeads, channel_of_class, mask_loss, select
from .fusion import FeatureFusion
from .htc import HTCROIHeads
from .mask_rpn import attach_masks
from .mpn import MPN, chunk_size, in_chunks, logits_and_features, run_in_chunks
from .roi_heads import check_proposal_generator, checked_mask_features, give_masks_to_boxes, pooling_stride, without_proposals


@ROI_HEADS_REGISTRY.register()
class CascadeDSGROIHeads(HTCROIHeads):
    """The heads of Cascade DSG, and with HTC's switches those of HTC DSG. With all of DSG's switches off it is
    :class:`dsg.htc.HTCROIHeads`, bit by bit.

    A RoI's fields ``proposal_mask_probs`` (R, 1, M, M) and ``proposal_mask_features`` (R, D, S, S), which come from
    :class:`dsg.mask_rpn.MaskRPN`, are those of its current box: M^t, of the class that the box head of stage t ranks first, and
    F_^t.

    Args (beside HTCROIHeads'):
        box_fusions, mask_fusions: w_b and w_m of every stage, or None.
        guide_box: pool with SgRoIAlign for the box heads.
        detach_probs: no gradient through M^t.
        mask_features_test: "proposal" or "detection" (MODEL.DSG.MASK_FEATURES_TEST): whose F_^0 the first mask head fuses for
            the final boxes.
    """

    @configurable
    def __init__(
        self,
        *,
        box_fusions: list[FeatureFusion] | None,
        mask_fusions: list[FeatureFusion] | None,
        guide_box: bool,
        detach_probs: bool,
        mask_features_test: str = "proposal",
        **heads,
    ):
        super().__init__(**heads)
        self.box_fusions = None if box_fusions is None else nn.ModuleList(box_fusions)
        self.mask_fusions = None if mask_fusions is None else nn.ModuleList(mask_fusions)
        self.guide_box = guide_box
        self.detach_probs = detach_probs
        if mask_fusions is not None:
            if mask_features_test == "proposal":
                self.handed_on = ("proposal_boxes", "proposal_mask_features")
            self.mask_fields = (*self.mask_fields, "proposal_mask_features")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        dsg, mask = cfg.MODEL.DSG, cfg.MODEL.ROI_MASK_HEAD
        check_proposal_generator(cfg)
        if dsg.SGRA_MASK:
            raise ConfigError("Eq. 3 pools for the mask heads without guidance: set MODEL.DSG.SGRA_MASK False in a cascade.")
        on = [name for name in ("SGRA_BOX", "FUSION_BOX", "FUSION_MASK") if dsg[name]]
        if on and not dsg.INTERLEAVED:
            raise ConfigError(
                f"MODEL.DSG.{on[0]} needs masks of the boxes that a stage predicts (Eq. 3): set MODEL.DSG.INTERLEAVED True."
            )
        stages, stride = range(len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)), pooling_stride(cfg)
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels

        def fusions(stride: int) -> list[FeatureFusion]:
            return [FeatureFusion(mask.CONV_DIM, channels, dsg.FUSION_KERNEL, stride) for _ in stages]

        return {
            **super().from_config(cfg, input_shape),
            "box_fusions": fusions(stride) if dsg.FUSION_BOX else None,
            "mask_fusions": fusions(1) if dsg.FUSION_MASK else None,
            "guide_box": dsg.SGRA_BOX,
            "detach_probs": dsg.DETACH_PROBS,
            "mask_features_test": checked_mask_features(cfg),
        }

    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Proposals with ``gt_classes`` stay as they are: MaskRPN has matched and sampled them."""
        if all(p.has("gt_classes") for p in proposals):
            return proposals
        return super().label_and_sample_proposals(proposals, targets)

    def forward(self, images, features, proposals, targets=None, mpn: MPN | None = None):
        """As CascadeMaskROIHeads'. ``mpn`` is what :meth:`forward_with_given_boxes` takes."""
        if self.training:
            return super().forward(images, features, proposals, targets)
        return self.forward_with_given_boxes(features, self._detect(features, proposals), mpn), {}

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances], mpn: MPN | None = None
    ) -> list[Instances]:
        """As that of :class:`dsg.roi_heads.DSGROIHeads`."""
        if self.mask_fusions is not None and self.mask_on:
            give_masks_to_boxes(mpn, features, instances)
        return without_proposals(super().forward_with_given_boxes(features, instances))

    @property
    def _hands_masks_on(self) -> bool:
        """Whether the next heads need M^t or F_^t of a stage's RoIs in training."""
        return self.guide_box or self.box_fusions is not None or self.mask_fusions is not None

    def _box_input(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> Tensor:
        probs = None
        if self.guide_box:
            probs = cat([r.proposal_mask_probs for r in rois])
            probs = probs.detach() if self.detach_probs else probs
        x = self._pool_boxes(features, rois, probs)
        return x if self.box_fusions is None else self.box_fusions[stage](x, _mask_features(rois))

    def _mask_input(self, x: Tensor, stage: int, previous: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
        """Adds w_m^t F_^{t-1}. HTC's flow runs through mask heads that see no F_: ``earlier``, which did, is not it."""
        if self.mask_fusions is None:
            return super()._mask_input(x, stage, previous, earlier)
        return self.mask_fusions[stage](super()._mask_input(x, stage), previous)

    def _run_mask_head(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        x = self._pool_masks(features, [r.proposal_boxes for r in rois])
        previous = None if self.mask_fusions is None else _mask_features(rois)
        return logits_and_features(self.mask_head[stage], self._mask_input(x, stage, previous))

    def _refine(self, predictions: tuple[Tensor, Tensor], rois: list[Instances], stage: int) -> list[Instances]:
        """The next boxes also take the F_ of their rows along, and ``guiding_classes`` (R,): what the box head ranks first."""
        following = super()._refine(predictions, rois, stage)
        if self._hands_masks_on:
            classes = predictions[0][:, :-1].argmax(dim=1).split([len(r) for r in rois])
            for of_image, before, guiding in zip(following, rois, classes, strict=True):
                of_image.guiding_classes = guiding
                of_image.proposal_mask_features = before.proposal_mask_features
        return following

    def _mask_loss(self, features: dict[str, Tensor], rois: list[Instances], targets: list[Instances], stage: int) -> Tensor:
        """The mask head runs on all RoIs, since the next box head needs their masks; the loss is taken on the same ones."""
        if not self._hands_masks_on or stage + 1 == self.num_cascade_stages:
            return super()._mask_loss(features, rois, targets, stage)
        logits, mask_features = self._run_mask_head(features, rois, stage)
        attach_masks(rois, channel_of_class(logits, _guiding_classes(rois)), mask_features)
        chosen = self._foreground(rois)
        foreground = select(rois, chosen, CascadeMaskROIHeads.mask_fields)
        return mask_loss(logits[cat(chosen)], foreground, targets, self.vis_period)

    def _before_stage(self, features: dict[str, Tensor], rois: list[Instances], stage: int) -> None:
        """The mask head of the stage before runs on all boxes, in chunks that bound its memory, where a box head needs it."""
        if not self.guide_box and self.box_fusions is None:
            return

        def of_chunk(chunk: list[Instances]) -> tuple[Tensor, Tensor]:
            logits, mask_features = self._run_mask_head(features, chunk, stage - 1)
            return channel_of_class(logits, _guiding_classes(chunk)), mask_features

        chunks = in_chunks(rois, chunk_size(features[self.mask_in_features[0]].device))
        attach_masks(rois, *run_in_chunks(map(of_chunk, chunks), sum(map(len, rois))))

    def _features_of_proposals(self, instances: list[Instances]) -> Tensor | None:
        return None if self.mask_fusions is None else _mask_features(instances)


def _mask_features(rois: list[Instances]) -> Tensor:
    return cat([r.proposal_mask_features for r in rois])


def _guiding_classes(rois: list[Instances]) -> Tensor:
    return cat([r.guiding_classes for r in rois])
