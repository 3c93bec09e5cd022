"""Reading, checking and writing COCO's JSON files: ground truth and results.

Layout: https://cocodataset.org/#format-data and #format-results; coordinates and units: :mod:`.coco_metrics`.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence

from faster_coco_eval import COCO

from projects.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm", "keypoints")
PERSON_KEYPOINTS = 17  # what COCO's own sigmas are for

_NEEDED_IN_ANNOTATION = {
    "bbox": ("bbox", "area"),
    "segm": ("segmentation", "area"),
    "keypoints": ("keypoints", "num_keypoints", "bbox", "area"),
}
_NEEDED_IN_RESULT = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def _are_numbers(values) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


_FORM_OF_RESULT = {  # field -> whether a value of it can be used; the first three must be there
    "image_id": lambda value: isinstance(value, int | str),
    "category_id": lambda value: isinstance(value, int),
    "score": lambda value: isinstance(value, int | float),
    "bbox": lambda value: _are_numbers(value) and len(value) == 4,
    "keypoints": _are_numbers,
}


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks as a tuple; ConfigError for an unknown one or none."""
    unknown = [task for task in tasks if task not in TASKS]
    if isinstance(tasks, str) or unknown or not tasks:
        raise ConfigError(f"COCO evaluation wants a list of tasks among {', '.join(TASKS)}; found {tasks!r}.")
    return tuple(tasks)


def load_json(path: str | os.PathLike) -> dict | list:
    """The content of a JSON file; DataError where it is missing or not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. Give the path of a JSON file.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Write or download it again.") from error


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON holds them: it has no nan, whose place null takes."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def write_json_atomically(content: dict | list, path: str | os.PathLike, indent: int | None = None) -> None:
    """Write next to `path`, then rename: a reader never meets half a file. Folders are made as needed."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, allow_nan=False, default=float, indent=indent)
    os.replace(part, path)


def load_results(path: str | os.PathLike) -> list[dict]:
    """The detections in a file of COCO's results format; DataError where it is missing or has another form."""
    results = load_json(path)
    if not isinstance(results, list):
        raise DataError(f"{path} is no COCO results file: expected a list, found an object.")
    for place, result in enumerate(results):
        if not isinstance(result, dict):
            raise DataError(f"{path} is no COCO results file: expected objects in its list, found {result!r}.")
        for field in {"image_id", "category_id", "score"} | result.keys() & _FORM_OF_RESULT.keys():
            if not _FORM_OF_RESULT[field](result.get(field)):
                found = repr(result[field]) if field in result else "none"
                raise DataError(f"{path}: the detection at position {place} has no usable {field}: found {found}.")
    return results


def load_ground_truth(source: str | os.PathLike | dict, tasks: Sequence[str], num_keypoints: int = PERSON_KEYPOINTS) -> COCO:
    """Index ground truth (a file or its content) after checking that it has what `tasks` need.

    Raises:
        DataError: it is no COCO ground truth, or an annotation lacks a field.
    """
    dataset = source if isinstance(source, dict) else load_json(source)
    where = "the ground truth" if isinstance(source, dict) else str(source)
    if not isinstance(dataset, dict) or not {"images", "categories"} <= dataset.keys():
        raise DataError(f"{where} is no COCO ground truth: it lacks 'images' or 'categories'.")
    for image in dataset["images"]:
        if not isinstance(image["id"], int):
            raise DataError(f"{where}: image ids must be integers, found {image['id']!r}. Number the images.")
    for annotation in dataset.get("annotations", ()):
        for task in tasks:
            lacking = [key for key in _NEEDED_IN_ANNOTATION[task] if annotation.get(key) in (None, [])]
            if lacking:
                raise DataError(
                    f"{where}: annotation {annotation.get('id')} has no {' and no '.join(lacking)}, needed "
                    f"to evaluate {task}. tools/validate_dataset.py checks the file; or leave {task} out."
                )
        if "keypoints" in tasks:
            _check_keypoints(annotation, num_keypoints, where)
    return COCO(dataset)


def check_results(
    coco_gt: COCO, results: Sequence[dict], tasks: Sequence[str], num_keypoints: int = PERSON_KEYPOINTS
) -> list[dict]:
    """The results that can be scored: those with a non-finite box, keypoint or score are dropped and counted.

    Args:
        coco_gt: ground truth from :func:`load_ground_truth`.
        results: detections in COCO's format: image_id, category_id, score, and bbox, segmentation (compressed
            RLE of the whole image) or keypoints as the tasks need.

    Raises:
        DataError: a result names an image that the ground truth does not have, lacks a field that a task
            needs, or has a mask of another size than its image.
        ConfigError: a result has another number of keypoints than there are sigmas.
    """
    _check_image_ids(coco_gt, results)
    kept = []
    for result in results:
        for key in ("score", "category_id", *(_NEEDED_IN_RESULT[task] for task in tasks)):
            if key not in result:
                raise DataError(
                    f"A result of image {result['image_id']} has no '{key}', needed to evaluate "
                    f"{', '.join(tasks)}. Does the model predict it (MODEL.MASK_ON, MODEL.KEYPOINT_ON)? "
                    "Otherwise leave that task out."
                )
        if "segm" in tasks:
            _check_mask(result, coco_gt.imgs[result["image_id"]])
        if "keypoints" in tasks:
            _check_keypoints(result, num_keypoints, "the results")
        numbers = (result["score"], *result.get("bbox", ()), *result.get("keypoints", ()))
        if all(map(math.isfinite, numbers)):
            kept.append(result)
    if len(kept) < len(results):
        logger.warning(
            "%d of %d detections have a box, keypoint or score that is not finite; they were dropped.",
            len(results) - len(kept),
            len(results),
        )
    foreign = sum(result["category_id"] not in coco_gt.cats for result in kept)
    if foreign:
        logger.warning("%d detections are of categories unknown to the ground truth: not counted.", foreign)
    return kept


def _check_image_ids(coco_gt: COCO, results: Sequence[dict]) -> None:
    ids = {result.get("image_id") for result in results}
    unknown = ids - coco_gt.imgs.keys()
    if unknown:
        common = "none" if unknown == ids else f"only {len(ids) - len(unknown)}"
        raise DataError(
            f"The results are for {len(ids)} images, {common} of which the ground truth knows: it has "
            f"{len(coco_gt.imgs)} images, but not image_id {next(iter(unknown))!r}. Evaluate them against "
            "the data set and split that they were made on."
        )


def _check_mask(result: dict, image: dict) -> None:
    rle = result["segmentation"]
    if not (isinstance(rle, dict) and isinstance(rle.get("counts"), str | bytes) and isinstance(rle.get("size"), list | tuple)):
        raise DataError(
            f"A result of image {image['id']} has a segmentation that is no compressed RLE (an object with "
            "'size' and 'counts'). Encode masks with pycocotools.mask.encode."
        )
    if list(rle["size"]) != [image["height"], image["width"]]:
        raise DataError(
            f"A mask of image {image['id']} has the size {list(rle['size'])} (height, width), the ground "
            f"truth says {[image['height'], image['width']]}. Masks must have the original image's size."
        )


def _check_keypoints(owner: dict, expected: int, where: str) -> None:
    found = len(owner["keypoints"])
    if found != 3 * expected:
        raise ConfigError(
            f"{where}, image {owner['image_id']}: {found / 3:g} keypoints, but {expected} OKS sigmas. "
            "Give one sigma per keypoint in TEST.KEYPOINT_OKS_SIGMAS (empty: the 17 of a person in COCO)."
        )
