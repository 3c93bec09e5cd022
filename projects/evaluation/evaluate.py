"""Evaluating a model on DATASETS.TEST: tables, result files, pictures, and the losses on data it was not trained on."""

import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from projects.data.loader import build_test_loader
from projects.data.mapper import build_mapper
from projects.engine.checkpoint import Checkpointer
from projects.errors import CheckpointError
from projects.modeling.build import build_model

from . import build_evaluator, results_table
from .coco_files import without_nan, write_json_atomically
from .pictures import PictureWriter

logger = logging.getLogger(__name__)


class Bar:
    """An iterable with a progress bar on terminals. (Detectron2's loop needs its length.)"""

    def __init__(self, loader, title: str):
        self.loader, self.title = loader, title

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        quiet = not (comm.is_main_process() and sys.stderr.isatty())
        return iter(tqdm(self.loader, desc=self.title, unit="img", disable=quiet))


def evaluate(cfg: CfgNode, model: torch.nn.Module) -> OrderedDict:
    """Run ``model`` over each data set of DATASETS.TEST.

    Returns:
        ``{task: {metric: value}}`` as Detectron2's evaluators report, preceded by the data set's name when there are several;
        empty in processes other than the first. Everything is also written to ``OUTPUT_DIR/evaluation/<data set>/``.
        With TEST.AUG.ENABLED test-time augmentation is used.
    """
    if cfg.TEST.AUG.ENABLED:
        model = GeneralizedRCNNWithTTA(cfg, model)
    results = OrderedDict()
    for name in cfg.DATASETS.TEST:
        folder = Path(cfg.OUTPUT_DIR) / "evaluation" / name
        folder.mkdir(parents=True, exist_ok=True)
        evaluator = DatasetEvaluators(
            [build_evaluator(cfg, name, str(folder)), PictureWriter(name, folder / "pictures", cfg.TEST.PICTURES)]
        )
        results[name] = inference_on_dataset(model, Bar(build_test_loader(cfg, name), name), evaluator) or {}
        if comm.is_main_process() and results[name]:
            logger.info("%s\n%s", name, results_table(results[name]))
            write_metrics(results[name], folder / "results.json")
    if len(results) == 1:
        return next(iter(results.values()))
    return OrderedDict((f"{name}/{task}", values) for name, tasks in results.items() for task, values in tasks.items())


def validation_losses(cfg: CfgNode, model: torch.nn.Module, iteration: int = 0) -> dict[str, float]:
    """Mean over the images of DATASETS.TEST of every training loss, as ``{"val_<loss>": value}``, in all processes.

    Batch norm uses its running statistics, and the only augmentation is the resizing of the test. ``iteration`` is that of the
    training, for losses that depend on it.
    """
    resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    mapper = build_mapper(cfg, is_train=True, augmentations=[resize])
    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    losses: dict[str, list[float]] = {}
    with torch.no_grad(), EventStorage(iteration):
        for name in cfg.DATASETS.TEST:
            for batch in Bar(build_test_loader(cfg, name, mapper), f"{name} losses"):
                for loss, value in model(batch).items():
                    losses.setdefault(loss, []).append(float(value))
    model.train(was_training)
    gathered = comm.all_gather(losses)
    names = sorted({name for part in gathered for name in part})
    means = {name: np.mean(sum((part.get(name, []) for part in gathered), [])) for name in names}
    return {f"val_{name}": float(mean) for name, mean in means.items()} | {"val_total_loss": float(sum(means.values()))}


def load_for_evaluation(cfg: CfgNode, resume: bool, trust: bool) -> torch.nn.Module:
    """The model with the weights of MODEL.WEIGHTS, or with ``resume`` of OUTPUT_DIR's newest checkpoint, in eval mode.

    Raises CheckpointError when there are no weights, or they leave parameters of the model unfilled: random values would be
    evaluated.
    """
    model = build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trust=trust)
    if not resume or checkpointer.resume() is None:
        if not cfg.MODEL.WEIGHTS:
            empty = f"there is no checkpoint in OUTPUT_DIR '{cfg.OUTPUT_DIR}' to take them from"
            mend = f"{empty}; set MODEL.WEIGHTS" if resume else "set MODEL.WEIGHTS, or add --resume to take the run's own"
            raise CheckpointError(f"MODEL.WEIGHTS is empty, and an evaluation needs weights: {mend}.")
        checkpointer.load(cfg.MODEL.WEIGHTS)
        checkpointer.refuse_unloaded(cfg.MODEL.WEIGHTS)
    return model.eval()


def write_summary(cfg: CfgNode, results: Mapping) -> None:
    """Write ``OUTPUT_DIR/results.json`` and log the table of all data sets. Only the first process has results."""
    if comm.is_main_process() and results:
        path = Path(cfg.OUTPUT_DIR) / "results.json"
        write_metrics(results, path)
        logger.info("Results (also in %s):\n%s", path, results_table(results))


def write_metrics(results: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Write ``{task: {metric: value}}`` as JSON, all of it or nothing; nan becomes null."""
    write_json_atomically({task: without_nan(metrics) for task, metrics in results.items()}, path, indent=1)
