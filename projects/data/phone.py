"""Phone recycling (GAN Mask R-CNN, section 4.3), registered as phone_{train,val}. The data set is not public.

    phone/images/{train,val}/
    phone/annotations/instances_phone_{train,val}.json      COCO's format

The classes (the paper has 11) come from the JSON.
"""

import os

from .coco_format import register_coco_format

REMEDY = "The data set is not public; docs/datasets.md says how its folder must look."


def register_phone(root: str | os.PathLike) -> None:
    """Register both sets below a data root, in place of those of an earlier root."""
    folder = os.path.join(root, "phone")
    for split in ("train", "val"):
        register_coco_format(
            f"phone_{split}",
            folder,
            REMEDY,
            json_file=os.path.join(folder, "annotations", f"instances_phone_{split}.json"),
            image_root=os.path.join(folder, "images", split),
        )
