"""COCO with stuff maps, registered as coco_2017_{train,val}_stuff: what HTC's semantic branch learns from.

    coco/stuffthingmaps/{train,val}2017/{image_id:012}.png      one channel: category id - 1 (0 to 181), 255 unlabelled

The instances are those of coco_2017_{train,val}. (Detectron2's coco_2017_*_panoptic_stuffonly and _separated have other maps:
53 kinds of stuff, all things merged into one class. Its coco_2017_{train,val}_panoptic need nothing from here.)
"""

import os

from detectron2.data import MetadataCatalog

from .coco_format import register_coco_format

UNLABELLED = 255
# Categories 1 to 182, as https://github.com/nightrome/cocostuff/blob/master/labels.txt numbers them; 1 to 91 are things (of
# which COCO dropped eleven), 92 to 182 stuff.
_NAMES = """
person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|street sign|stop sign|parking meter
bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|hat|backpack|umbrella|shoe|eye glasses|handbag|tie|suitcase
frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|plate|wine glass
cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed
mirror|dining table|window|desk|toilet|door|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink
refrigerator|blender|book|clock|vase|scissors|teddy bear|hair drier|toothbrush|hair brush
banner|blanket|branch|bridge|building-other|bush|cabinet|cage|cardboard|carpet|ceiling-other|ceiling-tile|cloth|clothes|clouds
counter|cupboard|curtain|desk-stuff|dirt|door-stuff|fence|floor-marble|floor-other|floor-stone|floor-tile|floor-wood|flower|fog
food-other|fruit|furniture-other|grass|gravel|ground-other|hill|house|leaves|light|mat|metal|mirror-stuff|moss|mountain|mud
napkin|net|paper|pavement|pillow|plant-other|plastic|platform|playingfield|railing|railroad|river|road|rock|roof|rug|salad|sand
sea|shelf|sky-other|skyscraper|snow|solid-other|stairs|stone|straw|structural-other|table|tent|textile-other|towel|tree
vegetable|wall-brick|wall-concrete|wall-other|wall-panel|wall-stone|wall-tile|wall-wood|water-other|waterdrops|window-blind
window-other|wood
"""
CATEGORIES = [name for line in _NAMES.strip().splitlines() for name in line.split("|")]


def register_coco_stuff(root: str | os.PathLike) -> None:
    """Register both sets below a data root, in place of those of an earlier root."""
    coco = MetadataCatalog.get("coco_2017_train")
    folder = os.path.join(root, "coco")
    maps = os.path.join(folder, "stuffthingmaps")
    for split in ("train", "val"):
        remedy = (
            f"docs/datasets.md says where to get the maps; then: unzip stuffthingmaps_trainval2017.zip -d {maps}. "
            f"The same images without maps are the data set coco_2017_{split}."
        )
        register_coco_format(
            f"coco_2017_{split}_stuff",
            folder,
            remedy,
            json_file=os.path.join(folder, "annotations", f"instances_{split}2017.json"),
            image_root=os.path.join(folder, f"{split}2017"),
            sem_seg_root=os.path.join(maps, f"{split}2017"),
            thing_classes=coco.thing_classes,
            thing_colors=coco.thing_colors,
            thing_dataset_id_to_contiguous_id=coco.thing_dataset_id_to_contiguous_id,
            stuff_classes=CATEGORIES,
            stuff_dataset_id_to_contiguous_id={category: category - 1 for category in range(1, 1 + len(CATEGORIES))},
            ignore_label=UNLABELLED,
        )
