#!/usr/bin/env python
"""Write Cityscapes' panoptic annotations, e.g.: python tools/prepare_cityscapes.py --folder datasets/cityscapes"""

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.data.cityscapes_panoptic import places, write_panoptic  # noqa: E402
from projects.errors import UserError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write gtFine/cityscapes_panoptic_<split>.json and the PNGs beside it from instanceIds.png, as "
        "cityscapesscripts' createPanopticImgs does, but in several processes. Needed for cityscapes_panoptic_<split> only. "
        "What is complete and younger than the instance ids is left alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        default=os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "cityscapes"),
        help="holds leftImg8bit/ and gtFine/: $DETECTRON2_DATASETS/cityscapes; for shapes: .../shapes/cityscapes",
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], choices=["train", "val"], help="which splits")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="write them again")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error("--workers counts the processes: at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for split in args.splits:
            written = write_panoptic(args.folder, split, args.force, args.workers)
            print(f"{places(args.folder, split)['panoptic_json']}: {'written' if written else 'is complete'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
