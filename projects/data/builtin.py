"""Registers this project's data sets in Detectron2's catalogs on import; files are read when they are needed.

| name | records hold |
|---|---|
| shapes_{train,val} | annotations |
| shapes_{train,val}_stuff | annotations, sem_seg_file_name |
| shapes_{train,val}_panoptic | annotations, sem_seg_file_name, pan_seg_file_name, segments_info |

Contiguous ids: things 0 to 7 in every set; the semantic maps label things and stuff alike (0 to 10, 255
unlabelled), so `stuff_classes` lists all eleven, things first, and segments_info uses the same numbers. As in
Detectron2, the root is $DETECTRON2_DATASETS, or "datasets", at the time of import; `register_shapes` moves it
later.
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json

from projects.errors import DataError

from .shapes import PREPARE_COMMAND
from .shapes_scene import THING_CLASSES, UNLABELLED
from .shapes_writers import CATEGORIES, SPLITS

_COLORS = [category["color"] for category in CATEGORIES]
SHAPES_METADATA = {
    "thing_classes": list(THING_CLASSES),
    "thing_colors": _COLORS[: len(THING_CLASSES)],
    "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(CATEGORIES) if c["isthing"]},
    "stuff_classes": [category["name"] for category in CATEGORIES],
    "stuff_colors": _COLORS,
    "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(CATEGORIES)},
    "ignore_label": UNLABELLED,
}


def register_shapes(root: str | os.PathLike) -> None:
    """Register the six shapes data sets below a data root, in place of those of an earlier root."""
    folder = os.path.join(root, "shapes", "coco")
    for split in SPLITS:
        instances = {
            "json_file": os.path.join(folder, "annotations", f"instances_{split}.json"),
            "image_root": os.path.join(folder, split),
            "evaluator_type": "coco",
        }
        stuff = {**instances, "sem_seg_root": os.path.join(folder, "stuffthingmaps", split)}
        panoptic = {
            **stuff,
            "panoptic_json": os.path.join(folder, "annotations", f"panoptic_{split}.json"),
            "panoptic_root": os.path.join(folder, f"panoptic_{split}"),
            "label_divisor": 1000,
            "evaluator_type": "coco_panoptic_seg",
        }
        for name, places in (
            (f"shapes_{split}", instances),
            (f"shapes_{split}_stuff", stuff),
            (f"shapes_{split}_panoptic", panoptic),
        ):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
            DatasetCatalog.register(name, lambda name=name: _load_shapes(name))
            MetadataCatalog.get(name).set(**SHAPES_METADATA, **places)


def _load_shapes(name: str) -> list[dict]:
    """Records in Detectron2's standard format, with whatever the metadata of `name` has a place for."""
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root", "sem_seg_root", "panoptic_json", "panoptic_root"):
        if not os.path.exists(metadata.get(key, metadata.image_root)):
            _raise_missing(name, metadata, getattr(metadata, key))
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


def _raise_missing(name: str, metadata, path: str) -> None:
    folder = os.path.dirname(os.path.dirname(metadata.image_root))
    root = os.path.dirname(folder)
    raise DataError(
        f"The data set '{name}' was looked for in {os.path.abspath(folder)} (data root '{root}', from "
        f"$DETECTRON2_DATASETS or the default), but {os.path.relpath(path, folder)} is missing there. "
        f"Generate it with: {PREPARE_COMMAND} --root {root}"
    )


register_shapes(os.getenv("DETECTRON2_DATASETS", "datasets"))
