"""From a data set record to what a model takes: Detectron2's DatasetMapper, made to accept every kind of annotation.

Mappers are chosen by name (INPUT.MAPPER), so that a paper whose targets depend on the augmented mask brings its own.
"""

import logging

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import Registry
from pycocotools import mask as mask_util

from projects.errors import ConfigError, DataError

FAR = 1e6  # image pixels: pycocotools walks along every edge, and ends the process where one is much longer

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = """
Mappers by class name: built as ``cls(cfg, is_train)``, they take one record of a data set (Detectron2's format) and
return the dict that the meta-architecture takes ("image" (3, H, W), "instances", "sem_seg", "height", "width", ...).
All randomness must come from ``numpy.random``, ``random`` or ``torch``: the loader seeds them for every sample.
"""


def build_mapper(cfg: CfgNode, is_train: bool, **arguments):
    """The mapper that INPUT.MAPPER names; ``arguments`` replace what it would read from the config."""
    if cfg.INPUT.MAPPER not in MAPPER_REGISTRY:
        known = ", ".join(name for name, _ in MAPPER_REGISTRY)
        raise ConfigError(f"INPUT.MAPPER: there is no mapper '{cfg.INPUT.MAPPER}'. There are: {known}.")
    return MAPPER_REGISTRY.get(cfg.INPUT.MAPPER)(cfg, is_train, **arguments)


@MAPPER_REGISTRY.register()
class InstanceMapper(DatasetMapper):
    """Detectron2's mapper, with these defined results where its own fails:

    - polygons, RLE and bitmaps may be mixed in an image: when INPUT.MASK_FORMAT is "polygon" and an instance of the
      image is no polygon, the masks of that image become bitmaps;
    - an image without instances gets empty ``gt_masks``;
    - an instance with a non-finite box, or whose segmentation holds neither a polygon of three finite points nor a mask
      of the image's size, is left out with one warning;
    - an image that is missing, unreadable or of another size than its record says raises DataError naming the file.

    A record may say with "sem_seg_table" that the pixels of its "sem_seg_file_name" are not training labels yet
    (:func:`training_labels`); "sem_seg" of the result is. The table is applied after the augmentation, which takes labels
    from the nearest pixel, so that the order makes no difference. (It pads with 0 in Detectron2 0.6, a class of many maps; 0
    and 255 of a map with a table are ignored.) What an augmentation of your own sees are the file's values.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            sample = super().__call__(dataset_dict)
        except (OSError, utils.SizeMismatchError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNGs
            raise DataError(
                f"Image '{dataset_dict['file_name']}' (image_id {dataset_dict.get('image_id')}) cannot be used: "
                f"{type(error).__name__}: {error}. Expected a readable image of the size that the annotations state. "
                "`python tools/validate_dataset.py NAME --read-images` lists every such file."
            ) from error
        table = sample.pop("sem_seg_table", None)
        if table is not None and "sem_seg" in sample:
            sample["sem_seg"] = torch.as_tensor(training_labels(sample["sem_seg"].numpy(), table).astype(np.int64))
        return sample

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        size = dataset_dict.get("height"), dataset_dict.get("width")
        annos = []
        for anno in dataset_dict.pop("annotations"):
            if anno.get("iscrowd", 0):
                continue
            if not self.use_keypoint:
                anno.pop("keypoints", None)
            segmentation = anno.pop("segmentation", None) if self.use_instance_mask else None
            if segmentation is not None:
                segmentation = anno["segmentation"] = usable_segmentation(segmentation, *size)
            if np.isfinite(anno["bbox"]).all() and (segmentation is not None or not self.use_instance_mask):
                annos.append(
                    utils.transform_instance_annotations(
                        anno, transforms, image_shape, keypoint_hflip_indices=self.keypoint_hflip_indices
                    )
                )
            else:
                log_first_n(
                    logging.WARNING,
                    f"Left out instances without a finite box and a usable mask, first in '{dataset_dict['file_name']}'. "
                    "tools/validate_dataset.py lists all of them.",
                )
        for anno in annos:
            if isinstance(anno.get("segmentation"), np.ndarray):
                anno["segmentation"] = np.require(anno["segmentation"], requirements="W")  # Pillow's arrays are read-only
        all_polygons = all(isinstance(anno.get("segmentation", []), list) for anno in annos)
        mask_format = self.instance_mask_format if all_polygons else "bitmask"
        instances = utils.annotations_to_instances(annos, image_shape, mask_format=mask_format)
        if self.use_instance_mask and not annos:
            no_bitmasks = torch.zeros(0, *image_shape, dtype=torch.bool)
            instances.gt_masks = PolygonMasks([]) if mask_format == "polygon" else BitMasks(no_bitmasks)
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)


def training_labels(labels: np.ndarray, table: bytes | None) -> np.ndarray:
    """The classes that a model learns, (H, W), from the values of a semantic map.

    Args:
        labels: (H, W), whole numbers from 0 to 255, as they stand in the file.
        table: a record's "sem_seg_table": 256 bytes, byte i being the label that the value i stands for, 255 where it is
            ignored, as 0 and 255 must be. None: the file holds the labels themselves.
    """
    return labels if table is None else np.frombuffer(table, np.uint8)[labels]


def usable_segmentation(segmentation, height: int, width: int) -> list | dict | None:
    """Bring a segmentation into one of the two forms that Detectron2 transforms.

    Args:
        segmentation: list of polygons ``[x0, y0, x1, y1, ...]`` (image pixels), RLE (compressed, or with a list of counts),
            or an array (height, width), non-zero inside.

    Returns:
        The polygons of at least three points, none farther than FAR; a compressed RLE; None when nothing usable is left: no
        such polygon, or a mask of another size than the image's.
    """
    if isinstance(segmentation, list):
        polygons = [np.asarray(p, dtype=float) for p in segmentation]
        return [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0 and (np.abs(p) <= FAR).all()] or None
    if isinstance(segmentation, np.ndarray):
        segmentation = mask_util.encode(np.asfortranarray(segmentation.astype(np.uint8)))
    if list(segmentation["size"]) != [height, width]:
        return None
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return segmentation
