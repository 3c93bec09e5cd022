"""Evaluation of boxes, masks and contour points together (Table VII), on data sets named ``<data set>_points``.

| name | ground truth | metrics |
|---|---|---|
| shapes_val_points | shapes_val | COCO's of boxes, masks, key points |
| {cityscapes,shapes_cityscapes}_instance_val_points | {...}_instance_val | these, and the benchmark's AP as "cityscapes" |

The ground truth of the key points is made here, by the sampler of the config from the masks as they are annotated. Where it
repeats points (contours of fewer than k pixels), each mask has a generator with the same seed, so that neither the order of
images nor the number of processes makes a difference.
"""

import logging
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import PolygonMasks

import projects.data.builtin  # noqa: F401  registers the data sets that the names here are derived from
from projects.data.coco_format import register
from projects.data.mapper import usable_segmentation
from projects.drawables import binary_mask
from projects.errors import ConfigError
from projects.evaluation import EVALUATORS, FastCOCOEvaluator
from projects.evaluation.by_output import EvaluatorsByOutput
from projects.evaluation.cityscapes_instance import CityscapesInstanceEvaluator

from .contour import ContourSampler
from .mapper import mask_of

logger = logging.getLogger(__name__)

OKS_SIGMA = 0.05  # of every point, relative to the square root of the object's area; the paper gives none
SEED = 0  # of the generator of every mask
SOURCES = ("shapes_val", "shapes_cityscapes_instance_val", "cityscapes_instance_val")
TYPES = {"coco": "coco_points", "cityscapes_instance": "cityscapes_points"}  # evaluator_type of a source -> of its _points


class ContourPointEvaluator(FastCOCOEvaluator):
    """FastCOCOEvaluator whose ground truth has the contour points of its masks as key points, all visible.

    Groups (iscrowd) have none: as in COCO, what is detected there counts neither for nor against a model.
    """

    def __init__(self, dataset_name: str, tasks: Sequence[str], sampler: ContourSampler, **kwargs):
        """
        Args:
            dataset_name: its annotations have masks, and no key points are needed.
            tasks: some of "bbox", "segm", "keypoints".
            sampler: makes the K key points that the model was trained on.
            kwargs: see the base class; ``kpt_oks_sigmas`` has K numbers.
        """
        super().__init__(dataset_name, [task for task in tasks if task != "keypoints"], **kwargs)
        self._tasks = tuple(tasks)
        for annotation in self._coco_gt.anns.values() if "keypoints" in tasks else ():
            image = self._coco_gt.imgs[annotation["image_id"]]
            segmentation = None if annotation.get("iscrowd") else annotation.get("segmentation")
            annotation |= coco_keypoints(segmentation, image["height"], image["width"], sampler)


def coco_keypoints(segmentation: list | dict | None, height: int, width: int, sampler: ContourSampler) -> dict:
    """The fields "keypoints" and "num_keypoints" of an annotation in COCO's format.

    Args:
        segmentation: polygons or RLE, of an image of (height, width) pixels; or none.

    Returns:
        x, y as pixel indices, as COCO counts them, and 2 (visible), of K points; all 0 where there is no mask, or an empty or
        unusable one, which then does not count.
    """
    segmentation = usable_segmentation(segmentation, height, width) if segmentation else None
    if isinstance(segmentation, list):
        mask, corner = mask_of(PolygonMasks([segmentation]), 0, (height, width))
    elif segmentation:
        x, y, w, h = mask_util.toBbox(segmentation).astype(int)
        mask, corner = binary_mask(segmentation, height, width)[y : y + h, x : x + w], (x, y)
    keypoints = np.zeros((sampler.num_keypoints, 3))
    if segmentation and mask.any():
        keypoints[:, :2] = sampler(mask, np.random.RandomState(SEED)) + corner - 0.5
        keypoints[:, 2] = 2
    return {"keypoints": keypoints.ravel().tolist(), "num_keypoints": int((keypoints[:, 2] > 0).sum())}


def build_contour_point_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> ContourPointEvaluator:
    """Boxes; masks with MODEL.MASK_ON; key points if the model has Mask Point R-CNN's heads, and without TEST.AUG.

    TEST.DETECTIONS_PER_IMAGE is also the number of detections that count (of key points always COCO's 20). TEST.
    KEYPOINT_OKS_SIGMAS has K numbers, or none for :data:`OKS_SIGMA`; ConfigError for another number.
    """
    sampler = ContourSampler.from_config(cfg)
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS or [OKS_SIGMA] * sampler.num_keypoints
    if len(sigmas) != sampler.num_keypoints:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} numbers: expected {sampler.num_keypoints}, one for each contour point "
            f"and for the centre if there is one, or none, which is {OKS_SIGMA} for all."
        )
    tasks = ["bbox", "segm"] if cfg.MODEL.MASK_ON else ["bbox"]
    if cfg.MODEL.ROI_HEADS.NAME == "MaskPointROIHeads":
        if cfg.TEST.AUG.ENABLED:
            logger.warning("%s: no key points are evaluated, since test-time augmentation (TEST.AUG) gives none.", dataset_name)
        else:
            tasks.append("keypoints")
    limit = cfg.TEST.DETECTIONS_PER_IMAGE  # Detectron2's heads take a negative number as no limit
    return ContourPointEvaluator(
        dataset_name,
        tasks,
        sampler,
        output_dir=output_dir,
        max_dets_per_image=limit if limit > 0 else None,
        kpt_oks_sigmas=sigmas,
    )


def build_cityscapes_point_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> EvaluatorsByOutput:
    """As :func:`build_contour_point_evaluator`, and with MODEL.MASK_ON the benchmark's instance AP."""
    evaluators = [build_contour_point_evaluator(cfg, dataset_name, output_dir)]
    if cfg.MODEL.MASK_ON:
        evaluators.append(CityscapesInstanceEvaluator(dataset_name, output_dir, task="cityscapes"))
    return EvaluatorsByOutput(dataset_name, {"instances": evaluators})


def register_points(source: str) -> None:
    """Register ``<source>_points``: the records of a registered data set of masks, evaluated with their contour points.

    Args:
        source: of evaluator_type "coco" or "cityscapes_instance". COCO's evaluation wants numbers for image_id: those of the
            latter are the positions of the records, counted from 1. Register again what has been registered anew.

    Raises:
        ConfigError: there is no such data set, or it is of another type.
    """
    metadata = MetadataCatalog.get(source).as_dict() if source in DatasetCatalog.list() else {}
    kind = metadata.get("evaluator_type")
    if kind not in TYPES:
        found = f"is of evaluator_type {kind!r}" if metadata else "is not registered"
        raise ConfigError(f"The data set '{source}' {found}: contour points need a registered one of {' or '.join(TYPES)}.")
    numbered = kind == "cityscapes_instance"
    own = {"name": f"{source}_points", "evaluator_type": TYPES[kind]}

    def load() -> list[dict]:
        records = DatasetCatalog.get(source)
        named = MetadataCatalog.get(source).as_dict()  # some data sets get the names of their classes when they are loaded
        MetadataCatalog.get(own["name"]).set(**named | own)
        return [dict(record, image_id=i) for i, record in enumerate(records, start=1)] if numbered else records

    register(load=load, **metadata | own)


EVALUATORS["coco_points"] = build_contour_point_evaluator
EVALUATORS["cityscapes_points"] = build_cityscapes_point_evaluator
for name in SOURCES:
    register_points(name)
