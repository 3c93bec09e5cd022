"""DSG's meta-architecture: GeneralizedRCNN that hands on what the ROI heads need beside features and proposals: the MPN, for
boxes that come without proposals, and HTC's semantic embedding.

Shapes: N images of H x W pixels with the batch's padding.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from projects.errors import ConfigError, DataError

from .htc import HTCROIHeads
from .mask_rpn import MaskRPN
from .semantic_branch import SEMANTIC, SemanticBranch


@META_ARCH_REGISTRY.register()
class DSGRCNN(GeneralizedRCNN):
    """GeneralizedRCNN for :class:`dsg.mask_rpn.MaskRPN`, :class:`dsg.roi_heads.DSGROIHeads` and the cascades.

    Args (beside GeneralizedRCNN's):
        semantic_branch: its embedding joins the features as "semantic"; None: there is none.
    """

    @configurable
    def __init__(self, *, semantic_branch: SemanticBranch | None = None, **parts):
        super().__init__(**parts)
        self.semantic_branch = semantic_branch

    @classmethod
    def from_config(cls, cfg: CfgNode):
        parts = super().from_config(cfg)
        if cfg.MODEL.DSG.SEMANTIC and not isinstance(parts["roi_heads"], HTCROIHeads):
            raise ConfigError(
                f"MODEL.DSG.SEMANTIC True needs MODEL.ROI_HEADS.NAME 'HTCROIHeads' or 'CascadeDSGROIHeads', which use the "
                f"branch; found '{cfg.MODEL.ROI_HEADS.NAME}'."
            )
        shapes = parts["backbone"].output_shape()
        return {**parts, "semantic_branch": SemanticBranch(cfg, shapes) if cfg.MODEL.DSG.SEMANTIC else None}

    def forward(self, batched_inputs: list[dict]):
        """As GeneralizedRCNN's. With a semantic branch, training inputs have "sem_seg" (H, W) too, and there is one loss more.

        Raises:
            DataError: an input of training has no "sem_seg".
        """
        if not self.training:
            return self.inference(batched_inputs)
        if self.semantic_branch is None:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        labels = self._labels(batched_inputs, images)
        truth = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor)
        logits, features[SEMANTIC] = self.semantic_branch(features)
        proposals, losses = self.proposal_generator(images, features, truth)
        _, of_heads = self.roi_heads(images, features, proposals, truth)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {**losses, **of_heads, **self.semantic_branch.loss(logits, labels)}

    def _labels(self, batched_inputs: list[dict], images: ImageList) -> Tensor:
        """(N, H, W) semantic classes, padding ignored."""
        labels = torch.full(
            (len(images), *images.tensor.shape[-2:]), self.semantic_branch.ignore_value, dtype=torch.int64, device=self.device
        )
        for of_image, x in zip(labels, batched_inputs, strict=True):
            if "sem_seg" not in x:
                raise DataError(
                    f"Image '{x.get('file_name', '')}' has no semantic map, from which HTC's semantic branch learns. Expected "
                    "data sets with maps in DATASETS.TRAIN (for TEST.VALIDATION_LOSS in DATASETS.TEST too): "
                    "'coco_2017_train_stuff' (coco/stuffthingmaps/train2017/, see docs/datasets.md) or 'shapes_train_stuff' "
                    "(python tools/prepare_shapes.py makes it). Without maps set MODEL.DSG.SEMANTIC False."
                )
            height, width = x["sem_seg"].shape
            of_image[:height, :width] = x["sem_seg"].to(self.device)
        return labels

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):
        """As GeneralizedRCNN's: with ``detected_instances`` (test-time augmentation) only the masks of their boxes.

        The pyramid is laid out channels_last once, since many poolings read from it.
        """
        assert not self.training
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.semantic_branch is not None:
            _, features[SEMANTIC] = self.semantic_branch(features)
        features = {name: level.contiguous(memory_format=torch.channels_last) for name, level in features.items()}
        mpn = {"mpn": self.proposal_generator.mpn} if isinstance(self.proposal_generator, MaskRPN) else {}
        if detected_instances is None:
            proposals, _ = self.proposal_generator(images, features)
            results, _ = self.roi_heads(images, features, proposals, **mpn)
        else:
            instances = [x.to(self.device) for x in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, instances, **mpn)
        return self._postprocess(results, batched_inputs, images.image_sizes) if do_postprocess else results
