#!/usr/bin/env python
"""Time of what Mask Point R-CNN adds around its network: sampling contour points, and decoding heat maps.

    python tools/benchmark_maskpoint.py

Prints two Markdown tables, for one thread: milliseconds per instance for masks of 1024 x 2048 pixels (each sampler), and
for 100 detections of 1000 x 1000 pixels with K = 101 (each decoder; "resize" is Detectron2's, timed on one
detection). Numbers are medians and ranges. What the network costs: tools/analyze_model.py.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maskpoint.contour import SAMPLINGS, ContourSampler
from maskpoint.keypoint_branch import DECODERS, decode
from projects.timing import seconds_in_turns

SIZE = 1024, 2048  # height, width
RADII = {"10 x 20": 10, "100 x 200": 100, "240 x 480": 240, "480 x 960": 480}  # of the wavy shapes that are sampled
HOLE, GRID = 8, 32  # pixels: side of the holes of a wavy shape, and of the squares that have one each
BARS = 16  # pixels from one upright bar, of half as many, to the next


def wavy_shape(radius: float) -> np.ndarray:
    """A mask of :data:`SIZE` with a contour that goes in and out, twice as wide as high."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    angle = np.arctan2(y - SIZE[0] / 2, x - SIZE[1] / 2)
    wave = 0.85 + 0.1 * np.sin(7 * angle) + 0.05 * np.sin(31 * angle)
    return np.hypot(y - SIZE[0] / 2, (x - SIZE[1] / 2) / 2) < radius * wave


def shapes() -> dict[str, np.ndarray]:
    """The masks that are sampled: wavy ones, one with holes, and a bad one: full of edges, in many parts."""
    masks = {name: wavy_shape(radius) for name, radius in RADII.items()}
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    masks["480 x 960, full of holes"] = masks["480 x 960"] & ((y % GRID >= HOLE) | (x % GRID >= HOLE))
    masks[f"{SIZE[1] // BARS} bars"] = x % BARS < BARS // 2
    return masks


def timed(call: Callable[[], object], repeats: int) -> str:
    """Median, smallest and largest of the times of a call in milliseconds, after one that is not counted."""
    times = [1e3 * seconds for seconds in seconds_in_turns([call], "cpu", repeats)[0]]
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def main(args: argparse.Namespace) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    print(f"ms per instance, k = 100, mask of {SIZE[0]} x {SIZE[1]}\n")
    print(f"| shape (half axes, pixels) | {' | '.join(SAMPLINGS)} |\n|---|{'---|' * len(SAMPLINGS)}")
    for name, mask in shapes().items():
        arguments = mask, np.random.RandomState(0)
        samplers = [ContourSampler(sampling=sampling) for sampling in SAMPLINGS]
        cells = [timed(partial(sampler, *arguments), 20 * args.repeats) for sampler in samplers]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nms to decode detections of 1000 x 1000 pixels, K = 101\n\n| decoder | detections | time |\n|---|---|---|")
    torch.manual_seed(0)
    heatmaps = torch.randn(100, 101, 56, 56)
    boxes = torch.tensor([[0.0, 0, 1000, 1000]]).expand(100, 4)
    for decoder in DECODERS:
        count, repeats = (1, 2) if decoder == "resize" else (100, args.repeats)
        print(f"| {decoder} | {count} | {timed(partial(decode, heatmaps[:count], boxes[:count], decoder), repeats)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each decoder; 20 times as many of samplers")
    main(parser.parse_args())
