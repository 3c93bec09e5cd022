#!/usr/bin/env python
"""Time of a COCO evaluation by faster-coco-eval (as this project runs it) and by pycocotools, on made-up results.

Both get the same ground truth and detections in one process, in turn; timed is all from a list of detections to the
summary. Prints a Markdown table: medians, their ratio, and the largest difference between any two numbers of the summaries.

    python tools/benchmark_coco_eval.py --images 2000 --instances 20 --repeats 3
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO as PycocotoolsCOCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects.evaluation.coco_files import load_ground_truth
from projects.evaluation.coco_metrics import run_coco_eval

HEIGHT, WIDTH = 240, 320


def make_data(images: int, instances: int, classes: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """Ground truth and detections: as many of both, ellipses, three quarters of the detections near an object."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        centers = rng.uniform(0, [WIDTH, HEIGHT], (instances, 2))
        radii = np.exp(rng.uniform(np.log(5), np.log(70), (instances, 2)))
        categories = rng.integers(1, classes + 1, instances)
        shift = rng.normal(0, 0.1, (2, instances, 2)) * radii
        near = rng.uniform(size=(instances, 1)) < 0.75
        found = np.where(near, centers + shift[0], rng.uniform(0, [WIDTH, HEIGHT], (instances, 2)))
        for center, radius, category in zip(centers, radii, categories, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(category),
                    "iscrowd": 0,
                    "area": float(np.pi * radius.prod()),
                    "bbox": [*(center - radius).tolist(), *(2 * radius).tolist()],
                    "segmentation": [(center + radius * circle).ravel().tolist()],
                }
            )
        radii = radii + np.abs(shift[1])
        polygons = (found[:, None] + radii[:, None] * circle).reshape(instances, -1).tolist()
        for i, rle in enumerate(mask_util.frPyObjects(polygons, HEIGHT, WIDTH)):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(categories[i]),
                    "score": float(rng.uniform()),
                    "bbox": [*(found[i] - radii[i]).tolist(), *(2 * radii[i]).tolist()],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, classes + 1)],
        "annotations": annotations,
    }
    return dataset, results


def time_pycocotools(dataset: dict, results: list[dict], task: str) -> tuple[float, np.ndarray]:
    """(seconds, summary)"""
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = PycocotoolsCOCO()
        coco_gt.dataset = dataset
        coco_gt.createIndex()
        start = time.perf_counter()
        if task == "segm":
            for result in results:
                del result["bbox"]
        evaluation = COCOeval(coco_gt, coco_gt.loadRes(results), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return time.perf_counter() - start, evaluation.stats


def time_faster(dataset: dict, results: list[dict], task: str) -> tuple[float, np.ndarray]:
    """(seconds, summary)"""
    coco_gt = load_ground_truth(dataset, [task])
    start = time.perf_counter()
    stats = run_coco_eval(coco_gt, results, task).stats
    return time.perf_counter() - start, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--instances", type=int, default=20, help="objects, and as many detections, per image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--tasks", nargs="+", choices=["bbox", "segm"], default=["bbox", "segm"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    made = json.dumps(make_data(args.images, args.instances, args.classes))
    print(
        f"{args.images} images of {WIDTH} x {HEIGHT}, {args.instances} objects and detections each, "
        f"{args.classes} classes; median of {args.repeats}. {os.cpu_count()} CPU cores, "
        f"Python {platform.python_version()}, pycocotools {version('pycocotools')}, "
        f"faster-coco-eval {version('faster-coco-eval')}.\n"
    )
    rows = ["| task | pycocotools (s) | faster-coco-eval (s) | ratio | largest difference |", "|---|---|---|---|---|"]
    bar = tqdm(total=len(args.tasks) * args.repeats, desc="evaluations of both", disable=not sys.stderr.isatty())
    for task in args.tasks:
        seconds, stats = {time_pycocotools: [], time_faster: []}, []
        for _ in range(args.repeats):
            for timer in seconds:
                duration, summary = timer(*json.loads(made), task)  # fresh data: both libraries write into it
                seconds[timer].append(duration)
                stats.append(summary)
            bar.update()
        slow, fast = (median(values) for values in seconds.values())
        difference = max(float(np.abs(summary - stats[0]).max()) for summary in stats)
        rows.append(f"| {task} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} | {difference:.1e} |")
    bar.close()
    print("\n".join(rows))


if __name__ == "__main__":
    main()
