"""The files of a data set: read an annotation file, write the repaired copy, look at pictures and maps."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from projects.errors import DataError

from .validate_report import Report

LISTS = ("images", "annotations", "categories")


def read_coco_json(path: str | os.PathLike) -> dict:
    """Read a COCO annotation file; DataError where it is missing, cut off, or not of COCO's form."""
    place = os.path.abspath(path)
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"The annotation file {place} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON ({error}); it may be cut off. Fetch or write it again.") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{place}: expected a JSON object with the lists {', '.join(LISTS)} (COCO's format), found a "
            f"{type(content).__name__}. (A plain list of detections is a result file, not a data set.)"
        )
    for key in LISTS:
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{place}: expected the lists {', '.join(LISTS)} (COCO's format), but '{key}' is "
                f"{'a ' + type(content[key]).__name__ if key in content else 'missing'}; the keys are: "
                f"{', '.join(content) or 'none'}."
            )
    return content


def write_repaired(report: Report, path: str | os.PathLike) -> None:
    """Write the repaired copy atomically; DataError if `path` is the file that was read or not writable."""
    path = Path(path)
    if report.source and path.exists() and os.path.samefile(path, report.source):
        raise DataError(f"{path.resolve()} is the data set itself; choose another file for the repaired copy.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                json.dump(report.repaired, file)
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise DataError(f"Could not write the repaired copy {path.resolve()}: {error.strerror}.") from error


def in_parallel(check: Callable, jobs: Iterable, workers: int | None, progress: bool, what: str) -> Iterator:
    """check(*job) for every job, in order, on several threads (decoding a picture frees the interpreter)."""
    jobs = list(jobs)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(lambda job: check(*job), jobs)
        yield from tqdm(results, total=len(jobs), desc=what, disable=None if progress else True)


def check_picture(path: str, width: int, height: int, read: bool) -> tuple[str, str] | None:
    """The problem with a picture, as (kind, message); it is decoded as training does it if `read`."""
    if not os.path.isfile(path):
        return "missing-image", f"{path} does not exist"
    if not read:
        return None
    try:
        found = read_image(path, "RGB").shape[1::-1]
    except Exception as error:  # whatever a decoder makes of a broken file
        return "unreadable-image", f"{path}: {error or type(error).__name__}"
    if found != (width, height):
        return "image-size", f"{path} is {found[0]}x{found[1]}, annotated as {width}x{height}"
    return None


def check_label_map(path: str, size: tuple[int, int], known: set[int] | None, read: bool) -> list[tuple[str, str]]:
    """Problems of a semantic map: missing, unreadable, not of its image's size (W, H), ids not in `known`."""
    return _check_map(path, size, read, lambda pixels: _unknown(set(np.unique(pixels).tolist()), known))


def check_panoptic_map(path: str, size: tuple[int, int], segments: set[int], read: bool) -> list[tuple[str, str]]:
    """Problems of a panoptic map, whose ids R + 256 G + 256^2 B must be those of segments_info, or 0."""

    def compare(pixels: np.ndarray) -> list[str]:
        if pixels.ndim != 3:
            return ["has one channel, expected RGB"]
        found = set(np.unique(pixels[..., :3].astype(np.int64) @ np.array([1, 256, 65536])).tolist())
        absent = sorted(segments - found)
        return _unknown(found, segments | {0}) + ([f"segments without a pixel: {absent[:5]}"] if absent else [])

    return _check_map(path, size, read, compare)


def _unknown(found: set[int], known: set[int] | None) -> list[str]:
    unknown = sorted(found - known) if known is not None else []
    return [f"unknown ids {unknown[:5]}"] if unknown else []


def _check_map(path: str, size: tuple[int, int], read: bool, compare: Callable) -> list[tuple[str, str]]:
    if not os.path.isfile(path):
        return [("missing-map", f"{path} does not exist")]
    if not read:
        return []
    try:
        pixels = np.asarray(Image.open(path))
    except Exception as error:  # whatever a decoder makes of a broken file
        return [("bad-map", f"{path}: {error or type(error).__name__}")]
    if pixels.shape[1::-1] != size:
        return [("bad-map", f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, its image {size[0]}x{size[1]}")]
    return [("unknown-map-id", f"{path}: {message}") for message in compare(pixels)]
