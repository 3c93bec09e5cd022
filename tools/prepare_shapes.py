#!/usr/bin/env python
"""Generate the `shapes` data set, e.g.: python tools/prepare_shapes.py --root datasets"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.data.cityscapes_panoptic import write_panoptic  # noqa: E402
from projects.data.shapes import generate_shapes  # noqa: E402
from projects.data.shapes_writers import SPLITS  # noqa: E402
from projects.errors import UserError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Generate the `shapes` data set: scenes with huddled objects, in COCO and in Cityscapes "
        "format. The same arguments give the same bytes; a complete set that is there already is left alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--root",
        default=os.getenv("DETECTRON2_DATASETS", "datasets"),
        help="data root; the set goes to ROOT/shapes ($DETECTRON2_DATASETS, else datasets)",
    )
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training images")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation images")
    parser.add_argument("--size", type=int, nargs=2, default=[160, 128], metavar=("W", "H"), help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace a set that is there")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        folder = generate_shapes(args.root, args.train, args.val, tuple(args.size), args.seed, args.workers, force=args.force)
        for split in SPLITS:
            write_panoptic(str(folder / "cityscapes"), split, args.force, args.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    numbers = json.loads((folder / "manifest.json").read_text())["numbers"]
    for split, n in numbers.items():
        instances = sum(n["instances"].values())
        print(f"{folder}: {split}: {n['images']} images, {instances} instances, {n['groups']} groups")
    return 0


if __name__ == "__main__":
    sys.exit(main())
