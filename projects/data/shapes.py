"""The generated data set `shapes`: photograph-like scenes with huddled objects, to learn from in minutes.

`generate_shapes` writes it once below the data root (layout: shapes_writers.py) with a manifest. Each picture
is drawn from its own seed (seed, split, index), so the bytes do not depend on the number of workers; with
other versions of numpy, OpenCV or Pillow (the manifest names them) single pixels may differ.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import PIL
from iopath.common.file_io import file_lock
from tqdm import tqdm

from projects.errors import DataError

from .shapes_paint import STUFF_CLASSES
from .shapes_scene import DEFAULT_SIZE, THING_CLASSES, Scene, draw_scene
from .shapes_writers import SPLITS, write_annotation_files, write_scene

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 2
MIN_SIDE = 64
PREPARE_COMMAND = "python tools/prepare_shapes.py"
_CONTENTS = {"coco", "cityscapes", "manifest.json"}


def scene_of(split: str, index: int, seed: int = 0, size: tuple[int, int] = DEFAULT_SIZE) -> Scene:
    """The scene behind a picture of the data set.

    Every eighth picture has a group, every sixth some clutter; every 25th of the validation split has no
    object.
    """
    return draw_scene(
        [seed, SPLITS.index(split), index],
        size,
        objects=not (split == "val" and index % 25 == 7),
        group=index % 8 == 3,
        clutter=index % 6 == 2,
    )


def generate_shapes(
    root: str | os.PathLike,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = DEFAULT_SIZE,
    seed: int = 0,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Make `<root>/shapes` unless it is there already; returns that folder.

    Args:
        train, val: number of pictures of each split, at least 1.
        size: (width, height) in pixels, each at least 64.
        workers: processes; by default one per core, fewer for a small set. They do not change a byte. They are
            spawned: a script that uses several needs the usual `if __name__ == "__main__":`.
        force: replace what is there.
        progress: show a bar where there is a terminal.

    Everything is written to `<root>/shapes.partial` and renamed at the end. Raises DataError for wrong
    arguments, and when the folder holds another or a damaged set and `force` is off.
    """
    _check_arguments(train, val, size, seed, workers)
    root = Path(root)
    folder = root / "shapes"
    parameters = {"train": train, "val": val, "size": list(size), "seed": seed}
    if folder.exists() and not force:
        _check_existing(folder, parameters)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):
            if folder.exists() and not force:  # somebody else made it in the meantime
                _check_existing(folder, parameters)
                return folder
            _refuse_foreign(folder)
            _replace(folder, parameters, workers, progress)
    except OSError as error:
        raise DataError(f"Could not write the shapes data set below {root.resolve()}: {error}.") from error
    return folder


def _check_arguments(train, val, size, seed, workers) -> None:
    if train < 1 or val < 1:
        raise DataError(f"shapes needs at least one picture per split, got train={train}, val={val}.")
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise DataError(f"The size of shapes is (width, height), each at least {MIN_SIDE} pixels, got {tuple(size)}.")
    if seed < 0:
        raise DataError(f"The seed of shapes must not be negative, got {seed}.")
    if workers is not None and workers < 1:
        raise DataError(f"shapes needs at least one worker, got {workers}.")


def _check_existing(folder: Path, parameters: dict) -> None:
    """Raise DataError unless `folder` holds the complete set of these parameters, byte for byte."""
    numbers = "--train {train} --val {val} --size {size[0]} {size[1]} --seed {seed}"
    command = f"{PREPARE_COMMAND} --root {folder.parent} {numbers.format(**parameters)} --force"
    remedy = f"Replace it with: {command} (or choose another root)."
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = {"version": manifest["version"], **manifest["parameters"]}
        files, held, own_numbers = dict(manifest["files"]), _in_words(found), numbers.format(**found)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder.resolve()} exists, but has no readable manifest.json ({error!r}). {remedy}") from None
    wanted = {"version": GENERATOR_VERSION, **parameters}
    if found != wanted:
        keep = f"To keep it, ask for it: {own_numbers}. " if found["version"] == GENERATOR_VERSION else ""
        raise DataError(f"{folder.resolve()} holds {held}; wanted were {_in_words(wanted)}. {keep}{remedy}")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            state = "changed since it was written" if path.is_file() else "missing"
            raise DataError(f"The shapes data set is damaged: {path.resolve()} is {state}. {remedy}")
    logger.info("The shapes data set in %s is complete.", folder)


def _in_words(made: dict) -> str:
    return (
        f"{made['train']} training and {made['val']} validation pictures of {made['size'][0]} x {made['size'][1]} pixels (seed "
        f"{made['seed']}, version {made['version']} of the generator)"
    )


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - _CONTENTS):
        raise DataError(
            f"{folder.resolve()} holds something other than a shapes data set (expected nothing but "
            f"{', '.join(sorted(_CONTENTS))}) and is not replaced. Move it away or choose another root."
        )


def _replace(folder: Path, parameters: dict, workers: int | None, progress: bool) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        entries = _draw_all(partial, parameters, workers, progress)
        for split in SPLITS:
            write_annotation_files(partial, split, entries[split])
        manifest = _manifest(partial, parameters, entries)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _draw_all(folder: Path, parameters: dict, workers: int | None, progress: bool) -> dict[str, list[dict]]:
    jobs = [
        (folder, split, index, parameters["seed"], tuple(parameters["size"]))
        for split in SPLITS
        for index in range(parameters[split])
    ]
    workers = workers or min(os.cpu_count() or 1, 1 + len(jobs) // 100)
    bar = tqdm(total=len(jobs), desc="shapes", unit="image", disable=None if progress else True)
    entries: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with bar:
        if workers == 1:
            for job in jobs:
                entries[job[1]].append(_draw_one(job))
                bar.update()
        else:
            # spawned: forking a process in which OpenCV or torch runs threads may hang
            context = multiprocessing.get_context("spawn")
            with context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
                for job, entry in zip(jobs, pool.imap(_draw_one, jobs, chunksize=8), strict=True):
                    entries[job[1]].append(entry)
                    bar.update()
    return entries


def _draw_one(job: tuple) -> dict:
    folder, split, index, seed, size = job
    return write_scene(folder, split, index, scene_of(split, index, seed, size))


def _manifest(folder: Path, parameters: dict, entries: dict[str, list[dict]]) -> dict:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        "version": GENERATOR_VERSION,
        "parameters": parameters,
        "libraries": {
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "Pillow": PIL.__version__,
            "pycocotools": version("pycocotools"),
        },
        "thing_classes": list(THING_CLASSES),
        "stuff_classes": list(STUFF_CLASSES),
        "numbers": {split: _numbers(entries[split]) for split in SPLITS},
        "files": {p.relative_to(folder).as_posix(): _sha256(p) for p in files},
    }


def _numbers(entries: list[dict]) -> dict:
    annotations = [a for entry in entries for a in entry["annotations"]]
    by_class = Counter(THING_CLASSES[a["category_id"] - 1] for a in annotations if not a["iscrowd"])
    return {
        "images": len(entries),
        "images_without_objects": sum(not entry["annotations"] for entry in entries),
        "instances": {name: by_class[name] for name in THING_CLASSES},
        "groups": sum(a["iscrowd"] for a in annotations),
        "polygons": sum(isinstance(a["segmentation"], list) for a in annotations),
        "rles": sum(isinstance(a["segmentation"], dict) for a in annotations),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
