"""COCO metrics of a results file, without a model.

    python -m projects.evaluation --gt instances_val2017.json --results coco_instances_results.json

The log holds the metrics of every category and the cause of those that are 0 or nan.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from projects.errors import UserError
from projects.evaluation import evaluate_coco_json, results_table
from projects.evaluation.coco_files import TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code is 2 where a file or argument is wrong."""
    parser = argparse.ArgumentParser("python -m projects.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--gt", required=True, help="ground truth in COCO's JSON format")
    parser.add_argument("--results", required=True, help="detections in COCO's results format")
    parser.add_argument("--tasks", nargs="+", default=["bbox", "segm"], choices=TASKS)
    parser.add_argument("--max-dets", type=int, help="detections per image and category (default: 100)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(results_table(evaluate_coco_json(args.gt, args.results, args.tasks, args.max_dets)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
