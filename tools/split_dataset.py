#!/usr/bin/env python
"""Split the images of a COCO-format data set into training and validation, 90 : 10 unless --val says otherwise.

    python tools/split_dataset.py all.json --images photos/ --root datasets/phone --name phone --group '(.*?)_'

writes ROOT/annotations/instances_NAME_{train,val}.json and links (or copies) the images to ROOT/images/{train,val}/. With
--group, a regular expression whose first group is looked for in each file name, at least one image of every group is for
validation, as GAN Mask R-CNN picks one of every phone model (section 4.3). The same arguments give the same split.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects.engine.launch import guarded
from projects.errors import ConfigError, DataError

PARTS = ("train", "val")


def choose_validation(file_names: list[str], part: float, seed: int, group: str | None = None) -> set[str]:
    """The file names for validation: ``part`` of all, rounded, and at least one of every group.

    Args:
        group: regular expression; what its first group (or the whole of it) matches in the name is the group's name, and names
            that it does not match form one group. None: all names are one group.

    Raises:
        ConfigError: ``part`` is not between 0 and 1, or ``group`` is no regular expression.
        DataError: nothing would be left for training.
    """
    if not 0 < part < 1:
        raise ConfigError(f"--val is {part}: expected a part of the images between 0 and 1, e.g. 0.1.")
    try:
        pattern = re.compile(group or "$")
    except re.error as error:
        raise ConfigError(f"--group '{group}' is not a regular expression: {error}.") from error
    order = sorted(file_names)
    random.Random(seed).shuffle(order)
    chosen: dict[str, str] = {}
    for name in order:
        match = pattern.search(name)
        chosen.setdefault(match.group(min(1, pattern.groups)) if match else "", name)
    validation = set(chosen.values())
    rest = [name for name in order if name not in validation]
    missing = max(round(part * len(order)) - len(validation), 0)
    validation |= set(rest[:missing])
    if len(validation) >= len(order):
        raise DataError(
            f"Of {len(order)} images in {len(chosen)} groups, all would be for validation. Expected groups of several images: "
            "change --group, or lower --val."
        )
    return validation


def split(content: dict, validation: set[str]) -> dict[str, dict]:
    """{"train": ..., "val": ...} in COCO's format, with all categories in both."""
    parts = {}
    for name, wanted in (("train", False), ("val", True)):
        images = [image for image in content["images"] if (image["file_name"] in validation) == wanted]
        ids = {image["id"] for image in images}
        annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
        parts[name] = content | {"images": images, "annotations": annotations}
    return parts


def place(source: Path, target: Path) -> None:
    """Link an image, or copy it where links are not possible. It takes the place of another that is there once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copy2(source, partial)
    os.replace(partial, target)


def annotation_file(args: argparse.Namespace, part: str) -> Path:
    return args.root / "annotations" / f"instances_{args.name}_{part}.json"


def refuse_to_overwrite_originals(args: argparse.Namespace, file_names: list[str]) -> None:
    """Raise DataError where an image would be written elsewhere than below --root, or anything in the place of an original."""
    outside = [name for name in file_names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise DataError(f"'{args.annotations}' names the image '{outside[0]}': expected names below --images, without '..'.")
    written = {(args.root / "images" / part).resolve() for part in PARTS}
    written |= {annotation_file(args, part).resolve() for part in PARTS}
    for original in (args.annotations, *(args.images / name for name in file_names)):
        path = original.resolve()
        if not written.isdisjoint([path, *path.parents]):
            raise DataError(
                f"'{original}' is an original where the split writes its own files. Expected the originals in another place: "
                "move them, or choose another --root."
            )


def parse_args(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS.json", help="of all images")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where the images are")
    parser.add_argument("--root", type=Path, required=True, metavar="FOLDER", help="where the two parts go")
    parser.add_argument("--name", default="phone", help="in the names of the two JSON files (default: phone)")
    parser.add_argument("--val", type=float, default=0.1, help="part of the images for validation (default: 0.1)")
    parser.add_argument("--group", metavar="REGEX", help="at least one image of every group is for validation")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args) -> int:
    try:
        content = json.loads(args.annotations.read_text())
        file_names = [image["file_name"] for image in content["images"]]
        content["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{args.annotations}' is not a COCO data set: {type(error).__name__}: {error}.") from error
    refuse_to_overwrite_originals(args, file_names)
    absent = [name for name in file_names if not (args.images / name).is_file()]
    if absent:
        raise DataError(f"{len(absent)} images are not in '{args.images}', among them '{absent[0]}': --images is their folder.")
    parts = split(content, choose_validation(file_names, args.val, args.seed, args.group))
    for name, part in parts.items():
        for image in tqdm(part["images"], desc=name, unit="img", disable=not sys.stderr.isatty()):
            place(args.images / image["file_name"], args.root / "images" / name / image["file_name"])
            (args.root / "images" / ("val" if name == "train" else "train") / image["file_name"]).unlink(missing_ok=True)
        path = annotation_file(args, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(part))
        print(f"{path}: {len(part['images'])} images, {len(part['annotations'])} objects")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
