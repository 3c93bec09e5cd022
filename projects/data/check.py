"""Before anything is started: are the data sets there, can they be evaluated, and do the heads have their classes?"""

import contextlib
import difflib
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from projects.config import CLASS_COUNT_KEYS
from projects.errors import ConfigError, DataError
from projects.evaluation import build_evaluator

from .coco_format import PLACES as COCO_PLACES
from .validate import read_records

PLACES = (*COCO_PLACES, "image_dir", "gt_dir")  # what metadata says lies on disk


def register_own_datasets(cfg: CfgNode) -> None:
    """Register what DATASETS.REGISTER lists (COCO format); names that are registered already are left as they are."""
    for row in cfg.DATASETS.REGISTER:
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            raise ConfigError(f"DATASETS.REGISTER: expected rows [name, annotations.json, image folder], found {row}.")
        name, json_file, image_root = row
        known = MetadataCatalog.get(name)
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, json_file, image_root)
        elif (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
            raise ConfigError(f"DATASETS.REGISTER: there is a data set '{name}' already. Choose another name.")


def check_datasets(cfg: CfgNode, stated: set[str], evaluation_only: bool = False) -> None:
    """Check the data sets that a run will use, and give every head the number of classes that they have.

    Args:
        cfg: not frozen; keys of :data:`projects.config.CLASS_COUNT_KEYS` that are not in ``stated`` are set.
        stated: the keys that the config file or the command line set in so many words.
        evaluation_only: look at DATASETS.TEST only, and leave it to the evaluation to look at its ground truth.

    Raises:
        ConfigError: an unknown name; no data set at all; a stated number of classes that the data sets contradict; data sets
            with different classes; one of DATASETS.TEST that has no evaluator.
        DataError: files that are not there; ground truth of DATASETS.TEST that cannot be evaluated.
    """
    register_own_datasets(cfg)
    key = "DATASETS.TEST" if evaluation_only else "DATASETS.TRAIN"
    if not (cfg.DATASETS.TEST if evaluation_only else cfg.DATASETS.TRAIN):
        raise ConfigError(f"{key} is empty: expected at least one data set name, e.g. ('coco_2017_train',).")
    names = list(cfg.DATASETS.TEST) if evaluation_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in names:
        _check_registered(name)
        _check_files(name, own=name in {row[0] for row in cfg.DATASETS.REGISTER})
    for kind in ("thing_classes", "stuff_classes"):
        classes = {name: _classes(name, kind) for name in names}
        classes = {name: known for name, known in classes.items() if known is not None}
        if classes:
            _set_class_count(cfg, stated, kind, classes)
    if not evaluation_only:
        for name in cfg.DATASETS.TEST:
            build_evaluator(cfg, name, cfg.OUTPUT_DIR)  # says now what it would say after the training


def _check_registered(name: str) -> None:
    if name in DatasetCatalog.list():
        return
    close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3, cutoff=0.4)
    raise ConfigError(
        f"There is no data set '{name}'. {'Did you mean ' + ' or '.join(close) + '? ' if close else ''}Your own in COCO format "
        f'is made known with DATASETS.REGISTER \'[["{name}", "annotations.json", "image folder"]]\'.'
    )


def _check_files(name: str, own: bool) -> None:
    metadata = MetadataCatalog.get(name)
    for place in PLACES:
        path = metadata.get(place)
        if path and "://" not in path and not os.path.exists(path):
            with contextlib.suppress(OSError, AssertionError):  # Detectron2's loaders assert
                DatasetCatalog.get(name)  # a loader of ours says itself what is missing and which command makes it
                if place == "gt_dir":  # which test splits do without
                    continue
            if own:
                raise DataError(
                    f"Data set '{name}' of DATASETS.REGISTER needs '{os.path.abspath(path)}' ({place}), which does not exist. "
                    f"Paths of DATASETS.REGISTER are relative to the current folder, which is '{os.getcwd()}'."
                )
            root = os.environ.get("DETECTRON2_DATASETS", "datasets")
            raise DataError(
                f"Data set '{name}' needs '{path}' ({place}), which does not exist. Data sets lie below the folder that "
                f"DETECTRON2_DATASETS names (now '{root}'); see README.md, \"Data\"."
            )


def _classes(name: str, kind: str) -> tuple[str, ...] | None:
    """Class names of a data set; data sets that learn them from their JSON are read for it."""
    if kind == "thing_classes" and MetadataCatalog.get(name).get(kind) is None:
        read_records(name)
    classes = MetadataCatalog.get(name).get(kind)
    return None if classes is None else tuple(classes)


def _set_class_count(cfg: CfgNode, stated: set[str], kind: str, classes: dict[str, tuple[str, ...]]) -> None:
    (first, known), *others = classes.items()
    for other, names in others:
        if names != known:
            raise ConfigError(
                f"The data sets '{first}' and '{other}' have different {kind}: {len(known)} ({', '.join(known[:5])}...) and "
                f"{len(names)} ({', '.join(names[:5])}...). A model has one list: train and test on the same classes."
            )
    for key in (key for key, wanted in CLASS_COUNT_KEYS.items() if wanted == kind):
        *path, leaf = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        if key in stated and node[leaf] != len(known):
            raise ConfigError(
                f"{key} is set to {node[leaf]}, but '{first}' has {len(known)} {kind}. Leave the key out, and it comes from "
                f"the data set; or set it to {len(known)}: append {key} {len(known)} to the command."
            )
        node[leaf] = len(known)
