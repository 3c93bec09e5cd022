"""The files of a Cityscapes folder, and what training needs of them, read once.

    leftImg8bit/{split}/{city}/{city}_{seq}_{frame}_leftImg8bit.png
    gtFine/{split}/{city}/{city}_{seq}_{frame}_gtFine_{instanceIds,labelIds}.png     not for the test split

The polygons (`_gtFine_polygons.json`) are not needed: the PNGs hold the same objects with their holes and their order.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from projects.errors import DataError

from .cityscapes_labels import INSTANCES, LABELS, THINGS_10, label_of
from .id_maps import image_size, objects_of, read_id_map
from .reading import cached, read_all, stamps

FORMAT = 1  # of what scan_image returns: another one makes the caches of earlier versions void
IMAGE_SUFFIX = "_leftImg8bit.png"
GET_CITYSCAPES = (
    "Data sets lie below $DETECTRON2_DATASETS (else 'datasets'); docs/datasets.md says where to get Cityscapes and how its "
    "folder must look."
)


class ImageFiles(NamedTuple):
    """The files of one image; ``name`` is "<city>_<seq>_<frame>"."""

    name: str
    image: str
    instance_ids: str | None
    label_ids: str | None


def image_dir(root: str | os.PathLike, split: str) -> str:
    return os.path.join(root, "leftImg8bit", split)


def truth_dir(root: str | os.PathLike, split: str) -> str:
    return os.path.join(root, "gtFine", split)


def has_truth(split: str) -> bool:
    """The annotations of the test split are the benchmark's secret (its gtFine/test holds placeholders)."""
    return split != "test"


def list_split(root: str | os.PathLike, split: str, remedy: str = GET_CITYSCAPES) -> list[ImageFiles]:
    """The files of a split, ordered by name. ``remedy``: the end of the message where something is missing.

    Raises DataError: no folder, no images, an image without its annotations.
    """
    images, truth = image_dir(root, split), truth_dir(root, split)
    for folder in [images, truth] if has_truth(split) else [images]:
        if not os.path.isdir(folder):
            raise DataError(
                f"The {split} split of a data set in Cityscapes' format was looked for in {os.path.abspath(root)}, "
                f"but the folder {os.path.relpath(folder, root)} is missing there. {remedy}"
            )
    files = []
    for path in sorted(Path(images).glob(f"*/*{IMAGE_SUFFIX}"), key=str):
        name, city = path.name.removesuffix(IMAGE_SUFFIX), path.parent.name
        maps = [os.path.join(truth, city, f"{name}_gtFine_{kind}.png") for kind in ("instanceIds", "labelIds")]
        files.append(ImageFiles(name, str(path), *(maps if has_truth(split) else (None, None))))
    if not files:
        raise DataError(f"{os.path.abspath(images)} has no images <city>/<city>_<seq>_<frame>{IMAGE_SUFFIX}. {remedy}")
    absent = [path for f in files for path in f[2:] if path and not os.path.isfile(path)]
    if absent:
        raise DataError(
            f"{len(absent)} annotations of the {split} split are missing, the first being {os.path.abspath(absent[0])}. "
            f"Every image in {images} needs its instanceIds.png and labelIds.png. {remedy}"
        )
    return files


def scan_image(files: ImageFiles) -> dict:
    """What is needed of an image's files, as JSON values.

    Returns:
        "width", "height"; and where there are annotations "objects": those of :func:`.id_maps.objects_of` for the instances
        (id >= 1000) and the groups (id < 1000) of all ten classes that have instances.

    Raises:
        DataError: a file that cannot be read, maps of another size than the image, ids that are not in the label table.
    """
    width, height = image_size(files.image)
    scan = {"width": width, "height": height}
    if files.instance_ids is None:
        return scan
    read_map(files.label_ids, width, height, LABELS.__contains__)
    ids, found = read_map(files.instance_ids, width, height, is_known)
    return scan | {"objects": objects_of(ids, [i for i in found if label_of(i) in THINGS_10])}


def is_known(instance_id: int) -> bool:
    """Whether a value of instanceIds.png means a class: any for stuff and groups, one with instances for an instance."""
    return label_of(instance_id) in (THINGS_10 if instance_id >= INSTANCES else LABELS)


def read_map(path: str, width: int, height: int, known: Callable[[int], bool]) -> tuple[np.ndarray, list[int]]:
    """A map (H, W) and the ids in it. Raises DataError where it has another size than its image, or an id is not known."""
    ids = read_id_map(path)
    if ids.shape != (height, width):
        raise DataError(f"{path} is {ids.shape[1]}x{ids.shape[0]} pixels, but its image is {width}x{height}.")
    found = np.unique(ids).tolist()
    unknown = [i for i in found if not known(i)]
    if unknown:
        raise DataError(
            f"{path} has ids of no known class: {', '.join(map(str, unknown[:5]))}. Expected label ids (0 to {max(LABELS)}) "
            f"and in instanceIds.png label id * {INSTANCES} + n for classes with instances ({', '.join(map(str, THINGS_10))})."
        )
    return ids, found


def scan_split(root: str | os.PathLike, split: str, files: list[ImageFiles]) -> list[dict]:
    """:func:`scan_image` of all files, kept in ``<root>/.cache/<split>.json`` until one of them changes."""
    paths = [path for f in files for path in f[1:] if path]
    key = {"format": FORMAT, "files": stamps(paths, str(root))}
    title = f"Reading {split} of {root}"
    return cached(Path(root) / ".cache" / f"{split}.json", key, lambda: read_all(scan_image, files, title))
