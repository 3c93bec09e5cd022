"""Data sets in COCO's format: instances, and where the metadata has a place for them semantic and panoptic maps."""

import os
from collections.abc import Callable

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json

from projects.errors import DataError

PLACES = ("json_file", "image_root", "sem_seg_root", "panoptic_json", "panoptic_root")


def register(name: str, load: Callable[[], list[dict]], **metadata) -> None:
    """Register a data set in Detectron2's catalogs, in place of an earlier one of that name."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def register_coco_format(name: str, folder: str, remedy: str, evaluator_type: str = "coco", **metadata) -> None:
    """Register a data set in COCO's format.

    Args:
        folder: below which all its places lie; errors name it.
        remedy: the end of the message where something is missing.
        metadata: Detectron2's names: ``json_file``, ``image_root``; for semantic maps ``sem_seg_root`` (files named as the
            images, .png); for panoptic maps ``panoptic_json`` and ``panoptic_root``; classes and colours.
    """
    register(name, lambda: _load(name, folder, remedy), evaluator_type=evaluator_type, **metadata)


def _load(name: str, folder: str, remedy: str) -> list[dict]:
    """Records in Detectron2's standard format, with whatever the metadata of ``name`` has a place for."""
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get(place) for place in PLACES):
        if path and not os.path.exists(path):
            raise DataError(
                f"The data set '{name}' was looked for in {os.path.abspath(folder)} (below $DETECTRON2_DATASETS, or the "
                f"default), but {os.path.relpath(path, folder)} is missing there. {remedy}"
            )
    records = load_coco_json(metadata.json_file, metadata.image_root, name)
    if hasattr(metadata, "sem_seg_root"):
        for record in records:
            stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
            record["sem_seg_file_name"] = os.path.join(metadata.sem_seg_root, stem + ".png")
    if hasattr(metadata, "panoptic_json"):
        panoptic = load_coco_panoptic_json(
            metadata.panoptic_json, metadata.image_root, metadata.panoptic_root, metadata.as_dict()
        )
        segments = {record["image_id"]: record for record in panoptic}
        for record in records:
            for key in ("pan_seg_file_name", "segments_info"):
                record[key] = segments[record["image_id"]][key]
    return records
