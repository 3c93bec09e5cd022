#!/usr/bin/env python
"""Check a data set for what breaks a training, e.g.: python tools/validate_dataset.py coco_2017_val"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.data import builtin  # noqa: F401  registers the data sets
from projects.data.validate import validate_dataset, validate_file
from projects.data.validate_files import write_repaired
from projects.errors import DataError, UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check a registered data set or a COCO annotation file: missing or unreadable images, "
        "wrong boxes, polygons and RLEs, double or unknown ids, semantic and panoptic maps.",
        epilog="Exit code: 0 clean, 1 problems found (even if --fix repaired them), 2 could not check.",
    )
    parser.add_argument("dataset", help="registered name (found below $DETECTRON2_DATASETS) or a .json file")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images, with a .json file")
    parser.add_argument("--read-images", action="store_true", help="decode every image and map")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that read images (default: one per core)")
    parser.add_argument("--fix", metavar="OUT.json", help="write a repaired copy; the data set itself is not touched")
    parser.add_argument("--json", action="store_true", help="print the report as JSON with every finding")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report = _validate(args)
        if args.fix:
            write_repaired(report, args.fix)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.table())
    if args.fix and not args.json:
        changes = [f"  {count} x {change}" for change, count in report.changes.items()] or ["  nothing to change"]
        print("\n".join([f"Repaired copy: {args.fix}", *changes]))
    return 1 if report.problems else 0


def _validate(args):
    options = {"read_images": args.read_images, "workers": args.workers, "progress": True}
    if args.dataset.endswith(".json") or os.path.isfile(args.dataset):
        return validate_file(args.dataset, args.image_root, **options)
    if args.image_root:
        raise DataError(f"--image-root goes with a .json file; the data set '{args.dataset}' knows its own folder.")
    return validate_dataset(args.dataset, **options)


if __name__ == "__main__":
    sys.exit(main())
