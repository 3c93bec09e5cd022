"""Write a scene of the `shapes` data set in COCO's and in Cityscapes' layout, with the same pixels.

Below the data set's folder:

    coco/{split}/{image_id:012}.jpg  the picture
    coco/stuffthingmaps/{split}/{image_id:012}.png  one channel: category id - 1, 255 unlabelled
    coco/panoptic_{split}/{image_id:012}.png  COCO panoptic: id = R + 256 G + 256^2 B, 0 unlabelled
    coco/annotations/{instances,panoptic}_{split}.json
    cityscapes/leftImg8bit/{split}/{city}/{city}_{seq:06}_000019_leftImg8bit.png
    cityscapes/gtFine/{split}/{city}/{city}_{seq:06}_000019_gtFine_{instanceIds,labelIds}.png

COCO category ids: things 1 to 8, stuff 9 to 11. Panoptic segment ids: category id * 1000 + n, n = 0 for stuff
and groups. Cityscapes ids: see CITYSCAPES_IDS; instances are labelId * 1000 + n, a group is its labelId.
H, W: picture in pixels; boxes are COCO's [x, y, width, height] in image pixels, tight around visible pixels.
"""

import io
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from .shapes_paint import STUFF_CLASSES
from .shapes_scene import THING_CLASSES, UNLABELLED, Scene

SPLITS = ("train", "val")
CLASSES = THING_CLASSES + STUFF_CLASSES
COLORS = (
    (230, 60, 70),
    (250, 170, 40),
    (240, 230, 70),
    (190, 110, 230),
    (60, 110, 230),
    (60, 200, 200),
    (240, 120, 190),
    (130, 220, 80),
    (150, 200, 250),
    (170, 150, 140),
    (90, 120, 70),
)
CATEGORIES = [
    {
        "id": i + 1,
        "name": name,
        "isthing": int(name in THING_CLASSES),
        "color": list(color),
        "supercategory": "thing" if name in THING_CLASSES else "stuff",
    }
    for i, (name, color) in enumerate(zip(CLASSES, COLORS, strict=True))
]
# person, rider, car, truck, bus, train, motorcycle, bicycle; sky, wall, road
CITYSCAPES_IDS = np.array([24, 25, 26, 27, 28, 31, 32, 33, 23, 12, 7])
CITYSCAPES_UNLABELLED = 0
CITIES = {"train": ("rautenberg", "kreisfeld"), "val": ("sternau",)}
JPEG_QUALITY = 95


def image_id(split: str, index: int) -> int:
    """Unique over both splits."""
    return 1_000_000 * SPLITS.index(split) + index + 1


def write_scene(folder: Path, split: str, index: int, scene: Scene) -> dict:
    """Write the six files of a scene.

    Returns its entries for the COCO files: {"image": {...}, "annotations": [...], "panoptic": {...}}.
    """
    number = image_id(split, index)
    jpeg = _jpeg(scene.image)
    _save(folder / f"coco/{split}/{number:012}.jpg", jpeg)
    _save(folder / f"coco/stuffthingmaps/{split}/{number:012}.png", _png(scene.semantic))

    segments, infos = _panoptic(scene)
    rgb = np.stack([segments % 256, segments // 256, segments // 65536], axis=2).astype(np.uint8)
    _save(folder / f"coco/panoptic_{split}/{number:012}.png", _png(rgb))

    city = CITIES[split][index % len(CITIES[split])]
    stem = f"{split}/{city}/{city}_{index:06}_000019"
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))  # the very pixels of the COCO version
    _save(folder / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png", _png(decoded))
    label_ids, instance_ids = _cityscapes(scene)
    _save(folder / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png", _png(label_ids))
    _save(folder / f"cityscapes/gtFine/{stem}_gtFine_instanceIds.png", _png(instance_ids))

    height, width = scene.owner.shape
    return {
        "image": {"id": number, "file_name": f"{number:012}.jpg", "width": width, "height": height},
        "annotations": [_annotation(scene, number, k) for k in range(len(scene.instances))],
        "panoptic": {"image_id": number, "file_name": f"{number:012}.png", "segments_info": infos},
    }


def write_annotation_files(folder: Path, split: str, entries: list[dict]) -> None:
    """Write instances_{split}.json and panoptic_{split}.json from what `write_scene` returned, in order."""
    info = {"description": f"shapes {split}: generated scenes of huddled objects"}
    images = [entry["image"] for entry in entries]
    instances = {
        "info": info,
        "images": images,
        "annotations": [annotation for entry in entries for annotation in entry["annotations"]],
        "categories": [{k: c[k] for k in ("id", "name", "supercategory")} for c in CATEGORIES if c["isthing"]],
    }
    panoptic = {
        "info": info,
        "images": images,
        "annotations": [entry["panoptic"] for entry in entries],
        "categories": CATEGORIES,
    }
    for name, content in (("instances", instances), ("panoptic", panoptic)):
        _save(
            folder / f"coco/annotations/{name}_{split}.json",
            json.dumps(content, separators=(",", ":")).encode(),
        )


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """The outer borders of a mask (H, W) as polygons [x0, y0, x1, y1, ...] along pixel edges; holes are lost.

    Contours run through pixel centres; in a mask of twice the size (pixel i becomes 2i and 2i + 1) every
    centre lies beside exactly one pixel edge, (c + 1) // 2.
    """
    double = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour in contours:
        edge = (contour[:, 0].astype(int) + 1) // 2
        edge = edge[np.any(edge != np.roll(edge, 1, axis=0), axis=1)]
        before, after = edge - np.roll(edge, 1, axis=0), np.roll(edge, -1, axis=0) - edge
        corners = edge[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
        polygons.append(corners.ravel().tolist())
    return polygons


def _annotation(scene: Scene, number: int, k: int) -> dict:
    """Polygons where they give exactly the mask, else RLE (holes, pixels that touch at a corner, groups)."""
    instance, mask = scene.instances[k], scene.owner == k + 1
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    if not instance.is_group:
        polygons = mask_to_polygons(mask)
        drawn = mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))
        if drawn["counts"] == rle["counts"]:
            segmentation = polygons
    return {
        "id": number * 1000 + k,
        "image_id": number,
        "category_id": instance.category + 1,
        "iscrowd": int(instance.is_group),
        "area": int(mask.sum()),
        "bbox": _box(mask),
        "segmentation": segmentation,
    }


def _panoptic(scene: Scene) -> tuple[np.ndarray, list[dict]]:
    """Segment ids, (H, W) int32 with 0 where unlabelled, and COCO's segments_info."""
    segments = np.where(scene.semantic == UNLABELLED, 0, (scene.semantic.astype(np.int32) + 1) * 1000)
    for k, instance in enumerate(scene.instances):
        if not instance.is_group:
            segments[scene.owner == k + 1] += k + 1
    groups = {(instance.category + 1) * 1000 for instance in scene.instances if instance.is_group}
    infos = []
    for segment in np.unique(segments[segments > 0]).tolist():
        mask = segments == segment
        infos.append(
            {
                "id": segment,
                "category_id": segment // 1000,
                "area": int(mask.sum()),
                "bbox": _box(mask),
                "iscrowd": int(segment in groups),
            }
        )
    return segments, infos


def _cityscapes(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """labelIds, (H, W) uint8, and instanceIds, (H, W) uint16."""
    table = np.full(256, CITYSCAPES_UNLABELLED, np.uint16)
    table[: len(CITYSCAPES_IDS)] = CITYSCAPES_IDS
    label_ids = table[scene.semantic]
    instance_ids = label_ids.copy()
    for k, instance in enumerate(scene.instances):
        if not instance.is_group:
            instance_ids[scene.owner == k + 1] = CITYSCAPES_IDS[instance.category] * 1000 + k
    return label_ids.astype(np.uint8), instance_ids


def _box(mask: np.ndarray) -> list[int]:
    (ys,), (xs,) = np.nonzero(mask.any(axis=1)), np.nonzero(mask.any(axis=0))
    return [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
