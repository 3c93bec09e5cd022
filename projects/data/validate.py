"""Find what is wrong with a data set before a training does: a COCO annotation file or a registered data set.

One pass reports and repairs: every check gives its findings together with the repaired entry, so that the
repaired copy does what the report says. The kinds of findings are in validate_report.py.
"""

import difflib
import os
from collections.abc import Callable

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from projects.errors import DataError, UserError

from .validate_files import check_label_map, check_panoptic_map, check_picture, in_parallel, read_coco_json
from .validate_geometry import check_box, check_segmentation, rle_of
from .validate_report import Report


def validate_file(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    read_images: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check a COCO annotation file.

    Args:
        image_root: the folder of the pictures; without it no picture is looked for.
        read_images: also decode the pictures and compare their sizes.
        workers: threads for that, by default one per core.
        progress: show bars where there is a terminal.

    Raises DataError where the file cannot be read at all.
    """
    if image_root is not None and not os.path.isdir(image_root):
        raise DataError(f"The image folder {os.path.abspath(image_root)} does not exist.")
    if read_images and image_root is None:
        raise DataError("To read the images of an annotation file, say in which folder they are (--image-root).")
    coco = read_coco_json(path)
    return _validate(str(path), str(path), coco, image_root, read_images, workers, progress)


def validate_dataset(name: str, read_images: bool = False, workers: int | None = None, progress: bool = False) -> Report:
    """Check a registered data set: its annotation file where it has one, else its records; and its maps.

    Arguments as for `validate_file`; `read_images` also decodes the semantic and panoptic maps. Raises
    DataError for an unknown name and where nothing can be loaded.
    """
    if name not in DatasetCatalog:
        similar = difflib.get_close_matches(name, DatasetCatalog.list())
        raise DataError(
            f"There is no data set '{name}'. "
            + (f"Did you mean {', '.join(similar)}? " if similar else "")
            + "Give a registered name or a COCO annotation file that exists."
        )
    metadata = MetadataCatalog.get(name)
    source = metadata.get("json_file")
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        source = None  # the file is of another format
    if source and os.path.isfile(source):
        coco, image_root, records = read_coco_json(source), metadata.image_root, None
    else:
        records = read_records(name)
        source, coco, image_root = None, _to_coco(records, metadata), ""
    report = _validate(name, source, coco, image_root, read_images, workers, progress)
    if metadata.get("sem_seg_root") or metadata.get("panoptic_root"):
        try:
            records = records or read_records(name)
        except DataError as error:
            report.add("loader-fails", str(error))
    _check_maps(report, records or [], metadata, read_images, workers, progress)
    return report


def read_records(name: str) -> list[dict]:
    """The records of a registered data set. Raises DataError whatever its loader stumbles over."""
    try:
        return DatasetCatalog.get(name)
    except UserError:
        raise
    except Exception as error:  # loaders assert, or fail in whatever way
        file = MetadataCatalog.get(name).get("json_file", "unknown")
        raise DataError(
            f"The loader of '{name}' failed on its annotations (file: {file}): {type(error).__name__}: {error}. "
            "`python tools/validate_dataset.py FILE` says what is wrong with a COCO file. The data root is "
            f"'{os.getenv('DETECTRON2_DATASETS', 'datasets')}' ($DETECTRON2_DATASETS, else 'datasets')."
        ) from error


def _to_coco(records: list[dict], metadata) -> dict:
    """Detectron2's records as COCO's lists; ids are the contiguous ones, file names are whole paths."""
    images, annotations = [], []
    for index, record in enumerate(records):
        image = {"id": record.get("image_id", index), "file_name": record["file_name"]}
        image.update({key: record[key] for key in ("width", "height") if key in record})
        if len(image) == 2 and os.path.isfile(record["file_name"]):  # records of purely semantic sets have no size
            with Image.open(record["file_name"]) as picture:
                image["width"], image["height"] = picture.size
        images.append(image)
        for annotation in record.get("annotations", ()):
            entry = {**annotation, "id": len(annotations) + 1, "image_id": image["id"]}
            mode = entry.pop("bbox_mode", BoxMode.XYWH_ABS)
            if "segmentation" in entry:
                entry["segmentation"] = _as_json(entry["segmentation"])
            entry["bbox"] = BoxMode.convert(list(entry["bbox"]), mode, BoxMode.XYWH_ABS)
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(metadata.get("thing_classes", []))]
    return {"images": images, "annotations": annotations, "categories": categories}


def _as_json(segmentation):
    """A segmentation as JSON holds it: lists of numbers, or RLE with its counts as text. Arrays are bitmaps."""
    if isinstance(segmentation, np.ndarray):
        segmentation = mask_util.encode(np.asfortranarray(segmentation.astype(np.uint8)))
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), bytes):
        return {**segmentation, "counts": segmentation["counts"].decode("ascii")}
    if isinstance(segmentation, list):
        return [polygon.tolist() if isinstance(polygon, np.ndarray) else polygon for polygon in segmentation]
    return segmentation


def _validate(name, source, coco, image_root, read_images, workers, progress) -> Report:
    report = Report(name, source, len(coco["images"]), len(coco["annotations"]))
    categories = _new_and_sound(report, "category", coco["categories"], {"id": _is_number, "name": _is_name})
    images = _check_images(report, coco["images"], image_root, read_images, workers, progress)
    annotations = _check_annotations(report, coco["annotations"], images, categories, progress)
    report.repaired = {
        **coco,
        "images": [image for image in images.values() if image is not None],
        "annotations": annotations,
        "categories": list(categories.values()),
    }
    return report


def _is_number(value) -> bool:
    return isinstance(value, int)


def _is_name(value) -> bool:
    return isinstance(value, str)


def _is_id(value) -> bool:
    """Images may be named by a text, as Cityscapes does."""
    return isinstance(value, (int, str))


def _is_length(value) -> bool:
    return isinstance(value, int) and value > 0


def _is_sound(report: Report, what: str, index: int, entry, keys: dict[str, Callable]) -> bool:
    """Report an entry that is not an object, or in which one of `keys` is missing or fails its test."""
    if isinstance(entry, dict):
        wrong = [key for key, test in keys.items() if not test(entry.get(key))]
        if not wrong:
            return True
        detail = f"{', '.join(wrong)} missing or wrong"
    else:
        detail = "not a JSON object"
    report.add("malformed-entry", f"{what} at position {index}: {detail}")
    report.changes[f"{what}: malformed, dropped"] += 1
    return False


def _new_and_sound(report: Report, what: str, entries: list, keys: dict[str, Callable]) -> dict:
    """id -> entry for the sound entries whose id was not there before."""
    kept: dict = {}
    for index, entry in enumerate(entries):
        if not _is_sound(report, what, index, entry, keys):
            continue
        if entry["id"] in kept:
            report.add(f"duplicate-{what}-id", f"{what} {entry['id']} at position {index}")
            report.changes[f"{what}: id twice, dropped"] += 1
        else:
            kept[entry["id"]] = entry
    return kept


def _check_images(report: Report, entries, image_root, read_images, workers, progress) -> dict:
    """id -> image, or None for one that is to be dropped."""
    keys = {"id": _is_id, "file_name": _is_name, "width": _is_length, "height": _is_length}
    images = _new_and_sound(report, "image", entries, keys)
    if report.source:  # COCO's evaluation wants numbers
        for number in (number for number in images if not _is_number(number)):
            report.add("image-id-no-number", f"image {number!r}")
    if image_root is None:
        return images
    jobs = [(os.path.join(image_root, i["file_name"]), i["width"], i["height"], read_images) for i in images.values()]
    results = in_parallel(check_picture, jobs, workers, progress, "images")
    for number, problem in zip(list(images), results, strict=True):
        if problem:
            kind, message = problem
            report.add(kind, f"image {number}: {message}")
            report.changes[f"image: {kind}, dropped"] += 1
            images[number] = None
    return images


def _check_annotations(report: Report, entries, images: dict, categories: dict, progress: bool) -> list[dict]:
    """The repaired annotations, in order."""
    kept, seen, with_objects = [], set(), set()
    unused = 1 + max((e["id"] for e in entries if isinstance(e, dict) and isinstance(e.get("id"), int)), default=0)
    keys = {"id": _is_number, "image_id": _is_id, "category_id": _is_number}
    with_masks = any(isinstance(e, dict) and e.get("segmentation") for e in entries)
    for index, entry in enumerate(tqdm(entries, desc="annotations", disable=None if progress else True)):
        if not _is_sound(report, "annotation", index, entry, keys):
            continue
        label = f"annotation {entry['id']} (image {entry['image_id']})"
        with_objects.add(entry["image_id"])
        if entry["id"] in seen:
            report.add("duplicate-annotation-id", f"{label} at position {index}")
            report.changes["annotation: id twice, given a new id"] += 1
            entry = {**entry, "id": unused}
            unused += 1
        seen.add(entry["id"])
        if entry["image_id"] not in images:
            report.add("unknown-image", label)
            report.changes["annotation: unknown image, dropped"] += 1
        elif images[entry["image_id"]] is None:
            report.changes["annotation: of a dropped image, dropped"] += 1
        elif entry["category_id"] not in categories:
            report.add("unknown-category", f"{label}: category {entry['category_id']}")
            report.changes["annotation: unknown category, dropped"] += 1
        else:
            repaired = _check_annotation(report, label, entry, images[entry["image_id"]], with_masks)
            if repaired is None:
                report.changes["annotation: box or mask beyond repair, dropped"] += 1
            else:
                kept.append(repaired)
    for number in images:
        if number not in with_objects:
            report.add("no-objects", f"image {number}")
    return kept


def _check_annotation(report: Report, label: str, entry: dict, image: dict, with_masks: bool) -> dict | None:
    """The annotation with its mask, box and area repaired, or None where that cannot be done.

    A mask may be absent in a data set of boxes only (not `with_masks`): where others have one, the evaluation wants it too.
    """
    width, height = image["width"], image["height"]
    repaired, mask = dict(entry), None
    if entry.get("segmentation"):
        problems, mask = check_segmentation(entry["segmentation"], width, height)
        for kind, message in problems:
            report.add(kind, f"{label}: {message}")
        if mask is None:
            return None
        if problems:
            repaired |= {"segmentation": mask, "area": float(mask_util.area(rle_of(mask, width, height)))}
            report.changes["annotation: polygons clipped or dropped"] += 1
    else:
        report.add("missing-mask" if with_masks else "no-mask", label)
    problems, box = check_box(entry.get("bbox"), width, height)
    for kind, message in problems:
        report.add(kind, f"{label}: {message}")
    if box is None and mask is not None:
        box = mask_util.toBbox(rle_of(mask, width, height)).tolist()
        report.changes["annotation: box taken from the mask"] += 1
    elif box is not None and problems:
        report.changes["annotation: box clipped"] += 1
    if box is None or (with_masks and mask is None):
        return None
    if not isinstance(repaired.get("area"), (int, float)):
        repaired["area"] = float(box[2] * box[3] if mask is None else mask_util.area(rle_of(mask, width, height)))
        if report.source:  # records have no area
            report.add("no-area", label)
            report.changes["annotation: area taken from the mask or box"] += 1
    return {**repaired, "bbox": box}


def _check_maps(report: Report, records, metadata, read_images, workers, progress) -> None:
    """Semantic maps against the metadata's classes, panoptic maps against their segments_info."""
    classes = metadata.get("stuff_classes")
    known = {*range(len(classes)), metadata.get("ignore_label", 255)} if classes else None
    jobs, labels = [], []
    for index, record in enumerate(records):
        size = (record.get("width"), record.get("height"))
        if "sem_seg_file_name" in record:
            expected = None if "sem_seg_table" in record else known  # through a table the file's values are other ones
            jobs.append((check_label_map, record["sem_seg_file_name"], size, expected, read_images))
        if "pan_seg_file_name" in record:
            segments = {segment["id"] for segment in record.get("segments_info", [])}
            jobs.append((check_panoptic_map, record["pan_seg_file_name"], size, segments, read_images))
        labels += [f"image {record.get('image_id', index)}"] * (len(jobs) - len(labels))
    results = in_parallel(lambda check, *job: check(*job), jobs, workers, progress, "maps")
    for label, problems in zip(labels, results, strict=True):
        for kind, message in problems:
            report.add(kind, f"{label}: {message}")
