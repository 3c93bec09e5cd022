"""Cityscapes from its PNGs, registered for each task; any other folder in its layout (that of `shapes`) in the same way.

Every record has "file_name", "image_id", "height", "width", and where there are annotations "instance_ids_file_name" and
"label_ids_file_name". On top of that:

| data set | records hold | classes | evaluator_type |
|---|---|---|---|
| {prefix}_instance_{split} | annotations | 8 things | cityscapes_instance |
| {prefix}_instance10_{split} | annotations; image_id is a number | 10 things | cityscapes_instance10 |
| {prefix}_semantic_{split} | sem_seg_file_name, sem_seg_table | 19 | cityscapes_semantic |
| {prefix}_panoptic_{split} | all of these, pan_seg_file_name, segments_info | 8 things, 19 | cityscapes_panoptic |

image_id is "<city>_<seq>_<frame>"; for instance10 it is the position in the sorted list of images, counted from 1, since
COCO's evaluation wants numbers. Boxes are XYXY_ABS, [x0, y0, x1 + 1, y1 + 1) of the pixels; masks are RLE; groups are
``iscrowd``. Semantic maps are labelIds.png, which the mapper turns into train ids through the table in the record. In
segments_info a "category_id" counts within ``thing_classes`` where "isthing", else within ``stuff_classes``. The metadata
also has ``image_dir``, ``gt_dir`` and ``split``. Records of the test split have no annotations.
"""

import os
from typing import NamedTuple

from detectron2.structures import BoxMode

from . import cityscapes_panoptic
from .cityscapes_files import GET_CITYSCAPES, has_truth, image_dir, list_split, scan_split, truth_dir
from .cityscapes_labels import INSTANCES, THINGS, THINGS_10, TRAIN_ID_TABLE, class_metadata, label_of
from .coco_format import register

SPLITS = ("train", "val", "test")


class Task(NamedTuple):
    """What the records of a task hold, and how it is evaluated."""

    evaluator_type: str
    things: list[int] | None = None  # label ids
    semantic: bool = False
    panoptic: bool = False
    numbered: bool = False


TASKS = {
    "instance": Task("cityscapes_instance", THINGS),
    "instance10": Task("cityscapes_instance10", THINGS_10, numbered=True),
    "semantic": Task("cityscapes_semantic", semantic=True),
    "panoptic": Task("cityscapes_panoptic", THINGS, semantic=True, panoptic=True),
}


def register_cityscapes(
    root: str | os.PathLike,
    prefix: str = "cityscapes",
    splits: tuple[str, ...] = SPLITS,
    remedy: str = GET_CITYSCAPES,
) -> None:
    """Register ``{prefix}_{task}_{split}`` for every task, in place of those of an earlier root.

    Args:
        root: the folder that holds leftImg8bit/ and gtFine/. Files are read when the records are asked for.
        remedy: the end of the message where something is missing.
    """
    root = os.fspath(root)
    for split in splits:
        for name, task in TASKS.items():
            places = {"image_dir": image_dir(root, split), "gt_dir": truth_dir(root, split), "split": split}
            if task.panoptic and has_truth(split):
                places |= cityscapes_panoptic.places(root, split)
            register(
                f"{prefix}_{name}_{split}",
                lambda split=split, task=task: load_cityscapes(root, split, task, remedy),
                evaluator_type=task.evaluator_type,
                **places,
                **class_metadata(task.things, task.semantic),
            )


def load_cityscapes(root: str, split: str, task: Task, remedy: str = GET_CITYSCAPES) -> list[dict]:
    """The records of a split for a task, as the module's head describes them.

    Raises DataError: missing folders or annotations, files that cannot be read, maps of another size than their image, ids
    of no known class; for the panoptic task a missing or outdated panoptic JSON.
    """
    files = list_split(root, split, remedy)
    records = []
    for number, (paths, scan) in enumerate(zip(files, scan_split(root, split, files), strict=True), start=1):
        record = {
            "file_name": paths.image,
            "image_id": number if task.numbered else paths.name,
            "height": scan["height"],
            "width": scan["width"],
        }
        if has_truth(split):
            record |= {"instance_ids_file_name": paths.instance_ids, "label_ids_file_name": paths.label_ids}
            if task.things:
                record["annotations"] = annotations_of(scan["objects"], task.things)
            if task.semantic:
                record |= {"sem_seg_file_name": paths.label_ids, "sem_seg_table": TRAIN_ID_TABLE}
        records.append(record)
    if task.panoptic and has_truth(split):
        cityscapes_panoptic.add_segments(records, root, split)
    return records


def annotations_of(objects: list[dict], things: list[int]) -> list[dict]:
    """Detectron2's annotations of the objects (:func:`.cityscapes_files.scan_image`) whose label id is in ``things``."""
    return [
        {
            "bbox": list(found["bbox"]),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": things.index(label_of(found["id"])),
            "iscrowd": int(found["id"] < INSTANCES),
            "segmentation": dict(found["segmentation"]),
        }
        for found in objects
        if label_of(found["id"]) in things
    ]
