"""From a record to what CASNet takes: labels of the semantic head, and which instance every pixel belongs to.

Shapes: H x W pixels of the augmented image, I instances of it, K thing classes. Boxes are x0 y0 x1 y1 in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor

from projects.data.mapper import MAPPER_REGISTRY, InstanceMapper, usable_segmentation
from projects.drawables import binary_mask
from projects.errors import ConfigError, DataError

from .losses import IGNORED
from .targets import NOTHING, UNCOUNTED


@MAPPER_REGISTRY.register()
class CASNetMapper(InstanceMapper):
    """InstanceMapper with targets for CASNet, in training:

    - "sem_seg" (H, W), the labels of the task. Task "panoptic": those of the record's semantic map. Task "instance": the thing
      class on the pixels of instances and groups, K on the rest, and 255 where the record has a semantic map that says 255;
    - "owner" (H, W) int16, whose pixel it is (:mod:`.targets`), if the record has annotations. Where masks overlap, which they
      do not in Cityscapes, a pixel belongs to the smallest of them. Groups, void and padding are UNCOUNTED;
    - "instances" with ``gt_boxes``, those of the masks after augmentation, and ``gt_classes``.

    INPUT.CROP crops after the resizing, and a smaller image is padded to its size, to the right and at the bottom, with the
    pixel mean. At inference in mode "oracle" the result has "sem_seg" at the image's own size.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        task: str,
        num_classes: int,
        pixel_mean: Sequence[float],
        pad_to: tuple[int, int] | None = None,
        truth: "CASNetMapper | None" = None,
        **kwargs,
    ):
        """
        Args:
            task: "panoptic" or "instance".
            num_classes: K.
            pixel_mean: per channel, in the image's order of channels.
            pad_to: height and width to which smaller images are padded in training.
            truth: at inference, the mapper whose "sem_seg" is given to the model.
        """
        super().__init__(is_train, **kwargs)
        self.task, self.num_classes, self.pixel_mean, self.pad_to, self.truth = task, num_classes, pixel_mean, pad_to, truth

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:  # Detectron2 crops first
            augmentations = arguments["augmentations"]
            augmentations.append(augmentations.pop(0))
            if cfg.INPUT.CROP.TYPE == "absolute":
                arguments["pad_to"] = tuple(int(side) for side in cfg.INPUT.CROP.SIZE)
        check_labels(cfg)
        oracle = not is_train and cfg.MODEL.CASNET.MODE == "oracle"
        return arguments | {
            "task": cfg.MODEL.CASNET.TASK,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "truth": cls(cfg, is_train=True, augmentations=[], pad_to=None) if oracle else None,
            "use_instance_mask": True,
            "instance_mask_format": "bitmask",
            "recompute_boxes": True,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        sample = super().__call__(dataset_dict)
        if not self.is_train:
            sample.pop("sem_seg", None)
            truth = {} if self.truth is None else self.truth(dataset_dict)
            return sample | {key: value for key, value in truth.items() if key == "sem_seg"}
        if "instances" in sample:
            self._add_owner(sample)
        if ("instances" if self.task == "instance" else "sem_seg") not in sample:
            lacking = "annotations" if self.task == "instance" else "semantic map ('sem_seg_file_name')"
            raise DataError(
                f"The record of '{sample['file_name']}' has no {lacking}, from which MODEL.CASNET.TASK '{self.task}' takes its "
                "labels. Choose a data set that has them, or the other task."
            )
        self._pad(sample)
        if "instances" in sample:
            boxes, classes = sample["instances"].gt_boxes, sample["instances"].gt_classes
            sample["instances"] = Instances(tuple(sample["owner"].shape), gt_boxes=boxes, gt_classes=classes)
        return sample

    def _transform_annotations(self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]) -> None:
        """As InstanceMapper's, and "groups": (H, W) int16, the class of the group that a pixel belongs to, or -1."""
        groups = np.full(image_shape, -1, np.int16)
        size = dataset_dict.get("height"), dataset_dict.get("width")
        for annotation in dataset_dict["annotations"]:
            segmentation = annotation.get("segmentation") if annotation.get("iscrowd", 0) else None
            segmentation = None if segmentation is None else usable_segmentation(segmentation, *size)
            if segmentation is not None:
                mask = transforms.apply_segmentation(binary_mask(segmentation, *size).astype(np.uint8))
                groups[mask > 0] = annotation["category_id"]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        dataset_dict["groups"] = torch.from_numpy(groups)

    def _add_owner(self, sample: dict) -> None:
        """Add "owner", and for the task "instance" the labels, from the instances and "groups", which is taken away."""
        groups, classes = sample.pop("groups"), sample["instances"].gt_classes
        owner = paint(sample["instances"].gt_masks.tensor)
        if self.task == "instance":
            sample["sem_seg"] = instance_labels(owner, classes, groups, self.num_classes, sample.get("sem_seg"))
        unknown = groups >= 0
        if "sem_seg" in sample:
            unknown |= sample["sem_seg"] == IGNORED
        owner[(owner == NOTHING) & unknown] = UNCOUNTED
        sample["owner"] = owner

    def _pad(self, sample: dict) -> None:
        """Pad image, "sem_seg" and "owner" to ``pad_to``."""
        image = sample["image"]
        height, width = image.shape[-2:]
        down, right = (max(side - have, 0) for side, have in zip(self.pad_to or (0, 0), (height, width), strict=True))
        if down or right:
            mean = torch.tensor(self.pixel_mean).round().to(image.dtype)
            padded = mean[:, None, None].repeat(1, height + down, width + right)
            padded[:, :height, :width] = image
            sample["image"] = padded
            for key, value in (("sem_seg", IGNORED), ("owner", UNCOUNTED)):
                if key in sample:
                    sample[key] = F.pad(sample[key], (0, right, 0, down), value=value)


def paint(masks: Tensor) -> Tensor:
    """Masks (I, H, W) bool -> (H, W) int16: i + 1 on the pixels of mask i, NOTHING elsewhere; the smallest of several masks."""
    owner = torch.full(masks.shape[1:], NOTHING, dtype=torch.int16)
    for i in masks.flatten(1).sum(dim=1).argsort(descending=True, stable=True).tolist():
        owner[masks[i]] = i + 1
    return owner


def instance_labels(owner: Tensor, classes: Tensor, groups: Tensor, num_classes: int, semantic: Tensor | None) -> Tensor:
    """The labels of the task "instance", (H, W) int64.

    Args:
        owner: (H, W), see :func:`paint`; classes: (I,) of the instances; groups: (H, W), the class of a group or -1.
        num_classes: K, the label of the background.
        semantic: (H, W), of which only 255 is taken; None if there is no map.
    """
    labels = torch.where(groups >= 0, groups.long(), num_classes)
    labels[owner > 0] = classes[owner[owner > 0].long() - 1]
    if semantic is not None:
        labels[(semantic == IGNORED) & (owner == NOTHING) & (groups < 0)] = IGNORED
    return labels


def check_labels(cfg: CfgNode) -> None:
    """Raise ConfigError where MODEL.CASNET.THING_LABELS is used and contradicts the class names of the training data."""
    labels = cfg.MODEL.CASNET.THING_LABELS
    used = cfg.MODEL.CASNET.TASK == "panoptic" or cfg.MODEL.CASNET.MODE == "separated"
    used = used and cfg.MODEL.META_ARCHITECTURE != "SemanticSegmentor"
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else "__none__")
    things, semantic = metadata.get("thing_classes"), metadata.get("stuff_classes")
    if not used or not things or not semantic:
        return
    named = [semantic[label] if 0 <= label < len(semantic) else None for label in labels]
    if named != list(things):
        wanted = [list(semantic).index(name) for name in things if name in semantic]
        raise ConfigError(
            f"MODEL.CASNET.THING_LABELS {list(labels)} are {named} among the semantic classes of {metadata.name}, but its "
            f"things are {list(things)}. "
            + (f"Expected {wanted}." if len(wanted) == len(things) else "Its semantic maps must tell these apart.")
        )
