#!/usr/bin/env python
"""Table 4 of DSG from two files of results: by how much one model's AP is above another's where objects are huddled.

    python tools/huddled_ap.py --gt datasets/coco/annotations/instances_val2017.json \\
        --baseline output/baseline/mask_rcnn_R_50_FPN_1x_single_scale/evaluation/coco_2017_val/coco_instances_results.json \\
        --results output/dsg/dsg_R_50_FPN_1x/evaluation/coco_2017_val/coco_instances_results.json

Prints the share of images in which instances overlap, how many images each pair of thresholds selects, the AP of both models
over all instances of those images (not averaged over classes), and the differences, box / mask. dsg/huddled.py says exactly
what is measured; nan stands where no image is selected.
"""

import argparse
import logging
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsg.huddled import format_cells, huddled_table, largest_overlaps, match, share_with_overlaps
from projects.engine.launch import guarded
from projects.errors import DataError
from projects.evaluation.coco_files import check_results, load_ground_truth, load_results, without_nan, write_json_atomically


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt", required=True, help="ground truth in COCO's JSON format")
    parser.add_argument("--baseline", required=True, help="detections of the baseline in COCO's results format")
    parser.add_argument("--results", required=True, help="detections of the other model, likewise")
    parser.add_argument("--tasks", nargs="+", choices=["bbox", "segm"], default=["bbox", "segm"])
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    return parser.parse_args(argv)


def read_matches(coco_gt, path: str, tasks: list[str]) -> dict:
    results = check_results(coco_gt, load_results(path), tasks)
    return {task: match(coco_gt, results, task) for task in tasks}


def main(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    coco_gt = load_ground_truth(args.gt, args.tasks)
    if not coco_gt.dataset.get("annotations"):
        raise DataError(f"{args.gt} has no annotations: there is nothing to find huddled instances in.")
    overlaps = largest_overlaps(coco_gt)
    tables = {
        name: huddled_table(overlaps, read_matches(coco_gt, path, args.tasks))
        for name, path in (("baseline", args.baseline), ("results", args.results))
    }
    baseline, results = tables.values()
    share = share_with_overlaps(overlaps)
    tasks = " / ".join({"bbox": "box", "segm": "mask"}[task] for task in args.tasks)

    def show(title: str, cell) -> None:
        print(f"{title}\n\n{format_cells({place: cell(place) for place in baseline})}\n")

    print(f"{len(overlaps)} images; in {100 * share:.1f}% of them instances overlap (box IoU > 0).\n")
    show("Images", lambda place: str(baseline[place]["images"]))
    for name, table in tables.items():
        show(f"{tasks} AP, {name}", lambda place, t=table: " / ".join(f"{t[place][task]:.1f}" for task in args.tasks))
    show(
        f"{tasks} AP, results - baseline",
        lambda place: " / ".join(signed(results[place][task] - baseline[place][task]) for task in args.tasks),
    )
    if args.json:
        cells = [
            {"T_O": t_o, "T_P": t_p, **{name: without_nan(table[t_o, t_p]) for name, table in tables.items()}}
            for t_o, t_p in baseline
        ]
        write_json_atomically({"share_with_overlaps": share, "cells": cells}, args.json)
    return 0


def signed(value: float) -> str:
    return "nan" if math.isnan(value) else f"{value:+.1f}"


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
