"""Registers this project's data sets in Detectron2's catalogs on import; files are read when they are needed.

| name | records hold |
|---|---|
| shapes_{train,val} | annotations |
| shapes_{train,val}_stuff | annotations, sem_seg_file_name |
| shapes_{train,val}_panoptic | annotations, sem_seg_file_name, pan_seg_file_name, segments_info |
| shapes_cityscapes_{instance,instance10,semantic,panoptic}_{train,val} | see cityscapes.py |
| cityscapes_{instance,instance10,semantic,panoptic}_{train,val,test} | see cityscapes.py |
| gland_{train,testA,testB,test} | annotations |
| phone_{train,val} | annotations |
| coco_2017_{train,val}_stuff | annotations, sem_seg_file_name |

Contiguous ids of shapes: things 0 to 7 in every set; the semantic maps label things and stuff alike (0 to 10, 255
unlabelled), so `stuff_classes` lists all eleven, things first, and segments_info uses the same numbers. As in
Detectron2, the root is $DETECTRON2_DATASETS, or "datasets", at the time of import; `register_shapes` and its
likes move it later.
"""

import os

from .cityscapes import register_cityscapes
from .coco_format import register_coco_format
from .coco_stuff import register_coco_stuff
from .gland import register_gland
from .phone import register_phone
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
    """Register the shapes data sets of both formats below a data root, in place of those of an earlier root."""
    shapes, folder = os.path.join(root, "shapes"), os.path.join(root, "shapes", "coco")
    remedy = f"Generate it with: {PREPARE_COMMAND} --root {root}"
    if os.path.isdir(shapes):
        remedy += " --force, which replaces what is there"
    for split in SPLITS:
        instances = {
            "json_file": os.path.join(folder, "annotations", f"instances_{split}.json"),
            "image_root": os.path.join(folder, split),
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
            register_coco_format(name, shapes, remedy, **SHAPES_METADATA, **places)
    register_cityscapes(os.path.join(shapes, "cityscapes"), "shapes_cityscapes", SPLITS, remedy)


def register_all(root: str | os.PathLike) -> None:
    """Register all data sets of this project below a data root, in place of those of an earlier root."""
    register_shapes(root)
    register_cityscapes(os.path.join(root, "cityscapes"))
    register_gland(root)
    register_phone(root)
    register_coco_stuff(root)


register_all(os.getenv("DETECTRON2_DATASETS", "datasets"))
