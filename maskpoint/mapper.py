"""The targets of the keypoint branch, made from the augmented mask.

Letters: H, W height and width of the augmented image; M instances; K key points.
"""

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import BitMasks, Keypoints, PolygonMasks

from projects.data.mapper import MAPPER_REGISTRY, InstanceMapper

from .contour import ContourSampler


@MAPPER_REGISTRY.register()
class ContourPointMapper(InstanceMapper):
    """InstanceMapper whose instances also have ``gt_keypoints`` (M, K, 3): x, y in pixels of the augmented image, 2 (visible).

    The data sets need masks, with MODEL.MASK_ON False too. Key points that they have themselves are not read.
    """

    @configurable
    def __init__(self, is_train: bool, *, sampler: ContourSampler, keep_masks: bool = True, **kwargs):
        """
        Args:
            sampler: makes the K points of a mask.
            keep_masks: whether the instances keep ``gt_masks``.
            kwargs: see :class:`detectron2.data.DatasetMapper`.
        """
        super().__init__(is_train, use_instance_mask=True, **kwargs)
        self.sampler, self.keep_masks = sampler, keep_masks

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = super().from_config(cfg, is_train)
        del arguments["use_instance_mask"]
        return arguments | {"sampler": ContourSampler.from_config(cfg), "keep_masks": cfg.MODEL.MASK_ON}

    def _transform_annotations(self, dataset_dict: dict, transforms, image_shape: tuple[int, int]) -> None:
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        generator = np.random.RandomState(np.random.randint(2**31))  # the loader seeds numpy's own for every sample
        keypoints = torch.full((len(instances), self.sampler.num_keypoints, 3), 2.0)
        for i in range(len(instances)):
            mask, corner = mask_of(instances.gt_masks, i, image_shape)
            keypoints[i, :, :2] = torch.from_numpy(self.sampler(mask, generator) + np.float32(corner))
        instances.gt_keypoints = Keypoints(keypoints)
        if not self.keep_masks:
            instances.remove("gt_masks")


def mask_of(masks: BitMasks | PolygonMasks, index: int, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """A mask as pixels: (h, w) of a part of the image that holds it, and the (x, y) where that part begins.

    Args:
        masks: of an image of ``size`` (height, width). Polygons end where the image ends; those that cover no pixel, since they
            are so thin, are the pixel in the middle of their box.
    """
    if isinstance(masks, BitMasks):
        return masks.tensor[index].numpy(), (0, 0)
    polygons = [np.asarray(polygon).reshape(-1, 2) for polygon in masks.polygons[index]]
    vertices = np.concatenate(polygons)
    last = np.array(size[::-1]) - 1
    corner = np.clip(np.floor(vertices.min(axis=0)), 0, last).astype(int)
    width, height = (np.clip(np.ceil(vertices.max(axis=0)), corner + 1, last + 1).astype(int) - corner).tolist()
    parts = mask_util.frPyObjects([(polygon - corner).ravel().tolist() for polygon in polygons], height, width)
    mask = mask_util.decode(mask_util.merge(parts))
    if not mask.any():
        mask[height // 2, width // 2] = 1
    return mask, tuple(corner.tolist())
