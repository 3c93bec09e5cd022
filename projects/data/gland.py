"""Glands (MICCAI 2015 challenge, Warwick-QU), registered as gland_{train,testA,testB,test}; test is testA and testB.

    gland/{train_1..85,testA_1..60,testB_1..20}.bmp             the image
    gland/{train_1..85,testA_1..60,testB_1..20}_anno.bmp        a pixel is its gland's id, 0 background

PNG copies are taken too. Only the id tells glands apart: one gland may have several parts, and two glands may touch.
Image ids are the numbers in the file names, plus 1000 for testA and 2000 for testB. Boxes are XYXY_ABS, masks RLE.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.structures import BoxMode

from projects.errors import DataError

from .coco_format import register
from .id_maps import image_size, objects_of, read_id_map
from .reading import cached, read_all, stamps

PARTS = {"train": ("train",), "testA": ("testA",), "testB": ("testB",), "test": ("testA", "testB")}
FIRST_ID = {"train": 0, "testA": 1000, "testB": 2000}
ENDINGS = (".bmp", ".png")  # where there are both, the first is taken
FORMAT = 1  # of what scan_image returns
REMEDY = (
    "Data sets lie below $DETECTRON2_DATASETS (else 'datasets'); docs/datasets.md says where to get this one and how its "
    "folder must look."
)


class ImageFiles(NamedTuple):
    number: int
    image: str
    annotation: str


def register_gland(root: str | os.PathLike) -> None:
    """Register the four sets below a data root, in place of those of an earlier root."""
    folder = os.path.join(root, "gland")
    for split in PARTS:
        register(
            f"gland_{split}",
            lambda split=split: load_gland(folder, split),
            evaluator_type="coco",
            image_root=folder,
            thing_classes=["gland"],
            thing_colors=[[220, 20, 60]],
            thing_dataset_id_to_contiguous_id={1: 0},
        )


def load_gland(folder: str, split: str) -> list[dict]:
    """The records of a split of :data:`PARTS`.

    Raises DataError: no folder, no images of the split, an image without its annotation, files that cannot be read, an
    annotation of another size than its image.
    """
    records = []
    for part in PARTS[split]:
        files = list_part(folder, part)
        for (number, image, _), scan in zip(files, _scan_part(folder, part, files), strict=True):
            size = {"height": scan["height"], "width": scan["width"]}
            annotations = [
                {
                    "bbox": list(found["bbox"]),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": 0,
                    "iscrowd": 0,
                    "segmentation": dict(found["segmentation"]),
                }
                for found in scan["objects"]
            ]
            records.append({"file_name": image, "image_id": FIRST_ID[part] + number, **size, "annotations": annotations})
    return records


def list_part(folder: str, part: str) -> list[ImageFiles]:
    """The files of one of train, testA, testB, in the order of their numbers."""
    if not os.path.isdir(folder):
        raise DataError(f"The gland data set was looked for in {os.path.abspath(folder)}, which does not exist. {REMEDY}")
    names = {path.name for path in Path(folder).iterdir()}
    numbers = {int(match[1]) for name in names if (match := re.fullmatch(rf"{part}_(\d+)\.(bmp|png)", name))}
    if not numbers:
        raise DataError(f"{os.path.abspath(folder)} has no images {part}_1.bmp, {part}_2.bmp, ... {REMEDY}")
    files = []
    for number in sorted(numbers):
        found = [
            next((os.path.join(folder, stem + ending) for ending in ENDINGS if stem + ending in names), None)
            for stem in (f"{part}_{number}", f"{part}_{number}_anno")
        ]
        if found[1] is None:
            raise DataError(f"{found[0]} has no annotation: expected {part}_{number}_anno.bmp (or .png) beside it. {REMEDY}")
        files.append(ImageFiles(number, *found))
    return files


def scan_image(files: ImageFiles) -> dict:
    """An image's "width", "height" and "objects" (those of :func:`.id_maps.objects_of`). Raises DataError."""
    width, height = image_size(files.image)
    ids = read_id_map(files.annotation)
    if ids.shape != (height, width):
        raise DataError(f"{files.annotation} is {ids.shape[1]}x{ids.shape[0]} pixels, but its image is {width}x{height}.")
    return {"width": width, "height": height, "objects": objects_of(ids, [i for i in np.unique(ids).tolist() if i])}


def _scan_part(folder: str, part: str, files: list[ImageFiles]) -> list[dict]:
    key = {"format": FORMAT, "files": stamps([path for f in files for path in f[1:]], folder)}
    title = f"Reading {part} of {folder}"
    return cached(Path(folder) / ".cache" / f"{part}.json", key, lambda: read_all(scan_image, files, title))
