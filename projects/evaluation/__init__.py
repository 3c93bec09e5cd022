"""Evaluators by the kind of data set, and a table of what they return."""

from collections.abc import Callable, Mapping

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from tabulate import tabulate

from projects.errors import ConfigError
from projects.evaluation.by_output import EvaluatorsByOutput
from projects.evaluation.cityscapes import CityscapesEvaluator
from projects.evaluation.cityscapes_instance import CityscapesInstanceEvaluator
from projects.evaluation.cityscapes_panoptic import CityscapesPanopticEvaluator
from projects.evaluation.cityscapes_semantic import CityscapesSemanticEvaluator
from projects.evaluation.coco import FastCOCOEvaluator, evaluate_coco_json
from projects.evaluation.coco_panoptic import COCOPanopticQualityEvaluator

__all__ = ["EVALUATORS", "FastCOCOEvaluator", "build_evaluator", "evaluate_coco_json", "results_table"]


def _build_coco(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> FastCOCOEvaluator:
    """Boxes, and masks and keypoints if the model has them (MODEL.MASK_ON, MODEL.KEYPOINT_ON).

    TEST.DETECTIONS_PER_IMAGE is also the number of detections that count: above 100, AP is not COCO's usual one
    but the one of Detectron2's `COCOEvaluator(max_dets_per_image=...)`. TEST.KEYPOINT_OKS_SIGMAS as in Detectron2.
    """
    optional = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    limit = cfg.TEST.DETECTIONS_PER_IMAGE  # Detectron2's heads take a negative number as no limit
    return FastCOCOEvaluator(
        dataset_name,
        tasks=["bbox", *(task for task, wanted in optional.items() if wanted)],
        output_dir=output_dir,
        max_dets_per_image=limit if limit > 0 else None,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _build_coco_panoptic(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> EvaluatorsByOutput:
    """Boxes and masks as :func:`_build_coco`, and PQ."""
    return EvaluatorsByOutput(
        dataset_name,
        {
            "instances": [_build_coco(cfg, dataset_name, output_dir)],
            "panoptic_seg": [COCOPanopticQualityEvaluator(dataset_name, output_dir)],
        },
    )


def _build_cityscapes_10(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> EvaluatorsByOutput:
    """Boxes and masks as :func:`_build_coco`, and as "segm_cityscapes" the benchmark's AP of the 8 classes that it counts."""
    benchmark = CityscapesInstanceEvaluator(dataset_name, output_dir, task="segm_cityscapes")
    return EvaluatorsByOutput(dataset_name, {"instances": [_build_coco(cfg, dataset_name, output_dir), benchmark]})


def _build_cityscapes(**of_output: type[CityscapesEvaluator]) -> Callable[[CfgNode, str, str | None], EvaluatorsByOutput]:
    """A builder of the benchmark's evaluators, given by the model's output that they read. No key of the config is read."""
    return lambda cfg, dataset_name, output_dir: EvaluatorsByOutput(
        dataset_name, {output: [evaluator(dataset_name, output_dir)] for output, evaluator in of_output.items()}
    )


EVALUATORS: dict[str, Callable[[CfgNode, str, str | None], DatasetEvaluator]] = {
    "coco": _build_coco,
    "coco_panoptic_seg": _build_coco_panoptic,
    "cityscapes_instance": _build_cityscapes(instances=CityscapesInstanceEvaluator),
    "cityscapes_instance10": _build_cityscapes_10,
    "cityscapes_semantic": _build_cityscapes(sem_seg=CityscapesSemanticEvaluator),
    "cityscapes_panoptic": _build_cityscapes(
        instances=CityscapesInstanceEvaluator,
        sem_seg=CityscapesSemanticEvaluator,
        panoptic_seg=CityscapesPanopticEvaluator,
    ),
}
"""The metadata's `evaluator_type` -> builder(cfg, dataset_name, output_dir)."""


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    """The evaluator of a registered data set, by its metadata's `evaluator_type`, out of :data:`EVALUATORS`.

    Args:
        cfg: the config; the builder's docstring names the keys that it reads.
        output_dir: folder for what the evaluator writes; None writes nothing.

    Raises:
        ConfigError: the data set has no evaluator type, or an unknown one.
    """
    return evaluator_builder(dataset_name)(cfg, dataset_name, output_dir)


def evaluator_builder(dataset_name: str) -> Callable[[CfgNode, str, str | None], DatasetEvaluator]:
    """The row of :data:`EVALUATORS` for a registered data set. Raises ConfigError when there is none."""
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in EVALUATORS:
        raise ConfigError(
            f"The data set {dataset_name} has the evaluator type {evaluator_type!r}; known are: "
            f"{', '.join(sorted(EVALUATORS))}. Set one where the data set is registered, with "
            f"MetadataCatalog.get({dataset_name!r}).set(evaluator_type=...)."
        )
    return EVALUATORS[evaluator_type]


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown table of {task: {metric: value}}, a row per task, without those of classes ("AP-car")."""
    rows = [
        {"task": task} | {name: value for name, value in metrics.items() if "-" not in name}
        for task, metrics in results.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f") if rows else "no metrics"
