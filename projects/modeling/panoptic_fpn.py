"""Panoptic FPN whose semantic head knows all classes.

Kirillov et al., "Panoptic Feature Pyramid Networks" (CVPR 2019), as Detectron2 has it, takes all things for one semantic class
(label 0). The semantic maps of Cityscapes and of shapes label things and stuff alike, so that one model can be measured by
instance AP, by mean IoU over all classes and by PQ.

K semantic classes; an image of H x W pixels.
"""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Instances

from projects.errors import ConfigError


@META_ARCH_REGISTRY.register()
class JointPanopticFPN(PanopticFPN):
    """Detectron2's PanopticFPN for semantic classes of which some are things and the others stuff.

    Training and losses are PanopticFPN's. In the panoptic output instances come first, by their scores, and the pixels that are
    left take the stuff class of the semantic map; where that says a thing, they stay void.
    """

    @configurable
    def __init__(self, *, stuff_ids: Sequence[int], **kwargs):
        """
        Args:
            stuff_ids: the semantic classes (0 to K - 1) that are stuff.
            kwargs: of :class:`PanopticFPN`.
        """
        super().__init__(**kwargs)
        self.stuff_ids = tuple(stuff_ids)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """The stuff classes are those in `stuff_classes` but not in `thing_classes` of the first data set that is named."""
        names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        metadata = MetadataCatalog.get(names[0]) if names else None
        if metadata is None or not metadata.get("stuff_classes") or metadata.get("thing_classes") is None:
            raise ConfigError(
                "JointPanopticFPN learns from the data set which classes are stuff, and "
                f"{names[0] if names else 'none'} does not say it: expected the first of DATASETS.TRAIN to be a panoptic data "
                "set with `thing_classes` and `stuff_classes`, e.g. cityscapes_panoptic_train."
            )
        stuff_ids = [k for k, name in enumerate(metadata.stuff_classes) if name not in metadata.thing_classes]
        return {**super().from_config(cfg), "stuff_ids": stuff_ids}

    def inference(self, batched_inputs: list[dict], do_postprocess: bool = True):
        """As in :class:`PanopticFPN`; "category_id" of a stuff segment in "panoptic_seg" is its semantic class."""
        detections, semantics = super().inference(batched_inputs, do_postprocess=False)
        if not do_postprocess:
            return detections, semantics
        results = []
        for image, found, logits in zip(batched_inputs, detections, semantics, strict=True):
            size = [image.get(key, side) for key, side in zip(("height", "width"), found.image_size, strict=True)]
            logits = sem_seg_postprocess(logits, found.image_size, *size)
            instances = detector_postprocess(found, *size)
            panoptic = self.combine(instances, logits.argmax(dim=0))
            results.append({"sem_seg": logits, "instances": instances, "panoptic_seg": panoptic})
        return results

    def combine(self, instances: Instances, labels: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
        """One segment, or none, for every pixel.

        Args:
            instances: with `pred_masks` (R, H, W), `scores` and `pred_classes` (R).
            labels: (H, W) semantic classes.

        Returns:
            (H, W) int32 segment ids, 0 void, and segments_info: "id", "isthing", "category_id".
        """
        shifted = torch.zeros_like(labels)  # 0 is what Detectron2's function leaves to the instances
        for k in self.stuff_ids:
            shifted[labels == k] = k + 1
        segments, infos = combine_semantic_and_instance_outputs(
            instances,
            shifted,
            self.combine_overlap_thresh,
            self.combine_stuff_area_thresh,
            self.combine_instances_score_thresh,
        )
        for info in infos:
            if not info["isthing"]:
                info["category_id"] -= 1
        return segments, infos
