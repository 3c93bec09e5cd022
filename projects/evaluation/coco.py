"""COCO evaluation of a model on a registered data set, or of a file of results without any model.

R is the number of detections in an image of H x W pixels.
"""

import logging
import os
from collections.abc import Mapping, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from projects.errors import ConfigError, DataError
from projects.evaluation.coco_files import (
    PERSON_KEYPOINTS,
    check_results,
    check_tasks,
    load_ground_truth,
    load_results,
    write_json_atomically,
)
from projects.evaluation.coco_metrics import AREA_RANGES, evaluate_results

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"


class FastCOCOEvaluator(DatasetEvaluator):
    """Detectron2's COCOEvaluator on faster-coco-eval: same results, same keys, same results file.

    It differs where Detectron2 guesses or is silent: the tasks are given, no detections make an AP of 0, a
    number that is 0 or nan comes with its cause in the log, and categories are matched by id.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str],
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
        area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
    ):
        """
        Args:
            dataset_name: registered data set. Its metadata's `json_file` is the ground truth; without one,
                the registered dicts are converted in memory.
            tasks: some of "bbox", "segm", "keypoints".
            distributed: gather the predictions of all processes in the main one, which alone returns results.
            output_dir: where `coco_instances_results.json` is written; None writes nothing.
            max_dets_per_image, kpt_oks_sigmas, area_ranges: see :func:`.coco_metrics.evaluate_results`.

        Raises:
            ConfigError: unknown tasks; no annotations and no `output_dir`; a wrong number of sigmas.
            DataError: ground truth that cannot be used.
        """
        self._dataset_name = dataset_name
        self._tasks = check_tasks(tasks)
        self._distributed = distributed
        self._output_dir = output_dir
        self._num_keypoints = len(kpt_oks_sigmas) or PERSON_KEYPOINTS
        self._settings = {
            "max_dets": max_dets_per_image,
            "kpt_oks_sigmas": kpt_oks_sigmas,
            "area_ranges": area_ranges,
        }
        metadata = MetadataCatalog.get(dataset_name)
        json_file = metadata.get("json_file")
        source = PathManager.get_local_path(json_file) if json_file else _as_coco(dataset_name)
        self._coco_gt = load_ground_truth(source, self._tasks, self._num_keypoints)
        if "annotations" not in self._coco_gt.dataset and not output_dir:
            raise ConfigError(f"{dataset_name} has no annotations: predictions can only be written. Give an output_dir.")
        class_of_category = metadata.get("thing_dataset_id_to_contiguous_id") or {
            category_id: i for i, category_id in enumerate(sorted(self._coco_gt.getCatIds()))
        }
        self._category_of_class = {i: category_id for category_id, i in class_of_category.items()}
        self.reset()

    def reset(self) -> None:
        self._predictions: dict[int, list[dict]] = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep the detections of a batch, masks as RLE.

        Args:
            inputs: the model's inputs; "image_id" is read.
            outputs: the model's outputs: "instances" with `pred_boxes` (R, 4) as x0, y0, x1, y1 in pixels of
                the original image, `scores` (R), `pred_classes` (R), and where the model has them
                `pred_masks` (R, H, W) and `pred_keypoints` (R, number of keypoints, 3).
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                raise ConfigError(
                    f"COCO evaluation of {self._dataset_name} wants a model that returns 'instances'; this "
                    f"one returns {sorted(output)}. Choose a data set whose evaluator fits the model."
                )
            instances = output["instances"].to("cpu")
            if instances.has("pred_keypoints"):  # instances_to_coco_json shifts them in place by half a pixel
                instances.pred_keypoints = instances.pred_keypoints.clone()
            self._predictions[image["image_id"]] = instances_to_coco_json(instances, image["image_id"])

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Score what was processed since :meth:`reset`.

        Args:
            img_ids: the images to look at; None: all of the ground truth, also those without predictions.

        Returns:
            as :func:`.coco_metrics.evaluate_results`; {} in other processes than the main one, and for a data
            set without annotations (the test splits), whose results file is all there is.
        """
        parts = [self._predictions]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(self._predictions, dst=0)
            if not comm.is_main_process():
                return {}
        predictions = {image_id: found for part in parts for image_id, found in part.items()}
        results = [self._with_category_id(result) for found in predictions.values() for result in found]
        results = check_results(self._coco_gt, results, self._tasks, self._num_keypoints)
        if self._output_dir:
            path = os.path.join(self._output_dir, RESULTS_FILE)
            write_json_atomically(results, path)
            logger.info("Wrote %d detections in %d images to %s", len(results), len(predictions), path)
        if "annotations" not in self._coco_gt.dataset:
            logger.info("%s has no annotations, so there are no scores.", self._dataset_name)
            return {}
        missing = set(self._coco_gt.imgs if img_ids is None else img_ids) - predictions.keys()
        if missing:
            logger.warning(
                "%d images of %s were not given to the model; their objects count as missed.",
                len(missing),
                self._dataset_name,
            )
        return evaluate_results(self._coco_gt, results, self._tasks, img_ids=img_ids, **self._settings)

    def _with_category_id(self, result: dict) -> dict:
        """The result with the data set's category id in place of the model's class."""
        class_index = result["category_id"]
        if class_index not in self._category_of_class:
            raise ConfigError(
                f"The model predicts class {class_index}, but {self._dataset_name} has "
                f"{len(self._category_of_class)} classes, counted from 0. Set MODEL.ROI_HEADS.NUM_CLASSES "
                "to that number, or evaluate on another data set."
            )
        return {**result, "category_id": self._category_of_class[class_index]}


def _as_coco(dataset_name: str) -> dict:
    """The registered dicts as COCO ground truth, with "annotations", maybe none, where they have such a key."""
    content = convert_to_coco_dict(dataset_name)
    if any("annotations" in record for record in DatasetCatalog.get(dataset_name)):
        content.setdefault("annotations", [])
    return content


def evaluate_coco_json(
    gt_json: str | os.PathLike,
    results_json: str | os.PathLike,
    tasks: Sequence[str],
    max_dets: int | None = None,
    *,
    kpt_oks_sigmas: Sequence[float] = (),
    area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
) -> dict[str, dict[str, float]]:
    """Score a results file against a ground-truth file, without a model and without registered data.

    Arguments and result as :func:`.coco_metrics.evaluate_results`; categories go by the ground truth's ids.

    Raises:
        DataError: a file that is missing or of the wrong format, ground truth without annotations, results
            that do not belong to the ground truth.
    """
    tasks = check_tasks(tasks)
    num_keypoints = len(kpt_oks_sigmas) or PERSON_KEYPOINTS
    coco_gt = load_ground_truth(gt_json, tasks, num_keypoints)
    if "annotations" not in coco_gt.dataset:
        raise DataError(f"{gt_json} has no 'annotations' to score with; only its owner's server has them.")
    results = check_results(coco_gt, load_results(results_json), tasks, num_keypoints)
    return evaluate_results(coco_gt, results, tasks, max_dets=max_dets, kpt_oks_sigmas=kpt_oks_sigmas, area_ranges=area_ranges)
