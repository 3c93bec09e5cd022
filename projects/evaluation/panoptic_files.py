"""COCO's panoptic format, which Cityscapes shares: a PNG per image, and a JSON with the list of each image's segments.

H, W: image in pixels. In the PNG a pixel's segment id is R + 256 G + 256^2 B, 0 (void) where it belongs to none.
Layout: https://cocodataset.org/#format-data, section 4.
"""

import os
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata
from PIL import Image

from projects.data.id_maps import read_pixels
from projects.drawables import as_array
from projects.errors import ConfigError, DataError
from projects.visualization import segments_of_ids

from .coco_files import load_json
from .panoptic_quality import VOID


def read_segment_map(path: str | os.PathLike) -> np.ndarray:
    """(H, W) int64 segment ids of a panoptic PNG. Raises DataError where there is no such picture of three channels."""
    colors = read_pixels(path)
    if colors.ndim != 3:
        raise DataError(f"{path} is no panoptic map: expected three channels, found {colors.shape} pixels.")
    return colors[:, :, :3].astype(np.int64) @ np.array([1, 256, 256**2])


def write_segment_map(path: Path, segments: np.ndarray) -> None:
    """Write segment ids (H, W) below 256^3 as a panoptic PNG; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = [segments % 256, segments // 256 % 256, segments // 256**2]
    Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).save(path, compress_level=1)


def load_panoptic_json(path: str | os.PathLike) -> dict:
    """The content of a panoptic JSON. Raises DataError where it lacks "categories" or a list of segments."""
    content = load_json(path)
    if not isinstance(content, dict) or "categories" not in content:
        raise DataError(f"{path} is no panoptic ground truth: it lacks 'categories'.")
    for annotation in content.get("annotations", ()):
        if "segments_info" not in annotation:
            raise DataError(f"{path} is no panoptic ground truth: an annotation has no 'segments_info'.")
    return content


def segments_of_output(panoptic: tuple[torch.Tensor, list[dict] | None], metadata: Metadata) -> tuple[np.ndarray, list[dict]]:
    """A model's "panoptic_seg" in one form, whichever of Detectron2's two it has.

    Args:
        panoptic: (H, W) segment ids and their list, 0 being void; or ids of category * `label_divisor` + instance, with -1
            for void, and None.

    Returns:
        (H, W) int64 with VOID and ids counted from 1, and their list of "id", "category_id" (contiguous), "isthing". Listed
        segments without a pixel are left out.

    Raises:
        DataError: an id above 0 is not listed.
        ConfigError: there is no list, and the data set has no `label_divisor`.
    """
    ids, listed = as_array(panoptic[0]).astype(np.int64), panoptic[1]
    if listed is None:
        if metadata.get("label_divisor") is None:
            raise ConfigError(
                f"The model gives panoptic ids without segments_info, and {metadata.name} has no label_divisor for them. "
                "Set it where the data set is registered."
            )
        listed = segments_of_ids(ids, metadata)
    known = {s["id"]: s for s in listed}
    found, places = np.unique(ids, return_inverse=True)
    unlisted = [i for i in found.tolist() if i > VOID and i not in known]
    if unlisted:
        raise DataError(f"The model's panoptic map holds the ids {unlisted}, which its segments_info lacks.")
    numbers, segments = np.zeros(len(found), np.int64), []
    for place, i in enumerate(found.tolist()):
        if i in known:
            numbers[place] = len(segments) + 1
            segments.append({"id": len(segments) + 1, **{key: known[i][key] for key in ("category_id", "isthing")}})
    return numbers[places].reshape(ids.shape), segments
