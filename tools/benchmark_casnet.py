#!/usr/bin/env python
"""Times CASNet on images of 1024 x 2048 and prints Markdown tables: the post-processing against the network and against a loop
over pixels, its memory, and what panoptic segmentation costs more than instance segmentation.

    python tools/benchmark_casnet.py --threads 2

The network has random weights, since its time does not depend on them. The post-processing gets a made-up street: 60 instances
of the eight things, most of the lower half of the image, and predictions that are the targets with noise.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from casnet.panoptic import panoptic_map
from casnet.postprocess import CommonAttributeSupport, boxes_of_masks, cell_of_pixels, predicted_boxes, thing_classes
from casnet.targets import grid_targets
from projects import config_path, load_config
from projects.memory import added_peak
from projects.timing import seconds_in_turns

NETWORK, POST_PROCESSING = "the W48 network (backbone and heads)", "post-processing"  # rows of the table
SIZE, STRIDE, INSTANCES, THING_LABELS = (1024, 2048), 4, 60, list(range(11, 19))


def street(device: str) -> dict[str, Tensor]:
    """ "labels" (H, W), "distances" (4, h, w), "probabilities" (8, h, w) of the made-up image."""
    generator = torch.Generator().manual_seed(0)
    owner, labels = torch.zeros(SIZE, dtype=torch.int16), torch.zeros(SIZE, dtype=torch.long)
    classes = torch.arange(INSTANCES) % len(THING_LABELS)
    columns = torch.arange(SIZE[1]) + 0.5
    rows = torch.arange(SIZE[0])[:, None] + 0.5
    for i in range(INSTANCES):  # a jittered lattice of ellipses: they touch, and none hides another
        x = (i % 12 + 0.5) * SIZE[1] / 12 + 20 * torch.rand((), generator=generator)
        y = 450 + (i // 12 + 0.5) * 110 + 10 * torch.rand((), generator=generator)
        owner[((columns - x) / 88) ** 2 + ((rows - y) / 62) ** 2 <= 1] = i + 1
    labels[owner > 0] = classes[owner[owner > 0].long() - 1] + THING_LABELS[0]
    boxes = torch.cat([boxes_of_masks((owner == i + 1)[None]) for i in range(INSTANCES)])
    targets = grid_targets(owner, boxes, classes, STRIDE, len(THING_LABELS), 0.1)
    noise = torch.rand(targets.distances.shape, generator=generator) * 2 - 1
    distances = (targets.distances + noise).clamp(min=0.1)
    chance = torch.rand(targets.central.shape, generator=generator) * 0.3
    probabilities = torch.where(targets.central, 0.99 - chance, chance)
    return {name: value.to(device) for name, value in
            (("labels", labels), ("distances", distances), ("probabilities", probabilities))}  # fmt: skip


def post_process(scene: dict[str, Tensor], support: CommonAttributeSupport, panoptic: bool = False):
    """What CASNet does after the semantic map is there."""
    classes = thing_classes(scene["labels"], THING_LABELS)
    grid_size = tuple(side / STRIDE for side in SIZE)
    owner, instances, seeds = support(classes, scene["distances"], scene["probabilities"], grid_size)
    if panoptic:
        return panoptic_map(scene["labels"], owner, instances, THING_LABELS)
    return owner, instances, seeds


def plain_loop(scene: dict[str, Tensor], support: CommonAttributeSupport, pixels: int) -> tuple[float, float]:
    """The votes of section III.C, pixel by pixel and seed by seed, of every so many thing pixels, `pixels` in all.

    Returns the seconds that all thing pixels would take, and the part of the looked-at pixels whose vote is the vectorised one.
    """
    grid_size, grid_shape = tuple(side / STRIDE for side in SIZE), scene["distances"].shape[1:]
    classes = thing_classes(scene["labels"], THING_LABELS).flatten().cpu()
    boxes = predicted_boxes(scene["distances"]).cpu()
    seeds = support.find_seeds(scene["probabilities"].cpu(), boxes, grid_size)
    found = (classes >= 0).nonzero().squeeze(1)
    looked_at = found[:: max(len(found) // pixels, 1)]
    own = boxes[cell_of_pixels(SIZE, grid_size, grid_shape).flatten()[looked_at]]
    expected = support.vote(own, classes[looked_at], seeds).tolist()
    seed_boxes, seed_classes = seeds.boxes.tolist(), seeds.classes.tolist()
    own_boxes, own_classes = own.tolist(), classes[looked_at].tolist()
    start, same = time.perf_counter(), 0
    for (x0, y0, x1, y1), own_class, vote in zip(own_boxes, own_classes, expected, strict=True):
        ious, area = [], (x1 - x0) * (y1 - y0)
        for (a0, b0, a1, b1), seed_class in zip(seed_boxes, seed_classes, strict=True):
            width, height = min(x1, a1) - max(x0, a0), min(y1, b1) - max(y0, b0)
            common = width * height if width > 0 and height > 0 else 0.0
            ious.append(common / (area + (a1 - a0) * (b1 - b0) - common) if seed_class == own_class else -1.0)
        least = max(max(ious) - support.tie_margin, 0)
        near = [k for k, iou in enumerate(ious) if iou >= least]
        winner = min(near, key=lambda k: (x0 + x1 - seed_boxes[k][0] - seed_boxes[k][2]) ** 2
                     + (y0 + y1 - seed_boxes[k][1] - seed_boxes[k][3]) ** 2)  # fmt: skip
        same += winner == vote
    seconds = time.perf_counter() - start
    return seconds * len(found) / len(looked_at), same / len(looked_at)


def model_of(row: str, device: str) -> torch.nn.Module:
    cfg = load_config(config_path(f"casnet/{row}.yaml"), ["MODEL.DEVICE", device, "MODEL.CASNET.HRNET_WEIGHTS", ""])
    return build_model(cfg).eval()


def network(model: torch.nn.Module, image: Tensor) -> Callable:
    """Backbone and heads, without the semantic map's enlarging and what follows it."""

    def run():
        fused = model.fusion(model.backbone(image))
        return [head(fused) for head in model.heads.values()]

    return run


def spread(values: list[float], digits: int = 0) -> str:
    """The median, and the smallest and the largest."""
    median, *ends = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({' to '.join(ends)})"


@torch.no_grad()
def report(device: str, repeats: int, loop_pixels: int) -> list[str]:
    scene, support = street(device), CommonAttributeSupport(max_seeds=200)
    owner, instances, seeds = post_process(scene, support)  # what a first call loads does not count below
    lines = ["| added at the peak of the post-processing, MAX_PAIRS | MB |", "|---|---|"]
    for pairs in (250_000, 1_000_000, 4_000_000, 16_000_000):
        limited = CommonAttributeSupport(max_seeds=200, max_pairs=pairs)
        lines.append(f"| {pairs:,} | {added_peak(lambda limited=limited: post_process(scene, limited), device):.0f} |")
    loop, same = plain_loop(scene, support, loop_pixels)

    image = torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = [{"image": image, "height": SIZE[0], "width": SIZE[1]}]
    batch = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    models = [model_of(f"{task}_joint", device) for task in ("instance", "panoptic")]
    pairs = {
        NETWORK: [network(model, batch) for model in models],
        POST_PROCESSING: [lambda panoptic=panoptic: post_process(scene, support, panoptic) for panoptic in (False, True)],
        "the whole model, random weights, no seeds": [lambda model=model: model(inputs) for model in models],
    }
    times = {name: seconds_in_turns(pair, device, repeats) for name, pair in pairs.items()}

    pixels = int((owner >= 0).sum())
    share = 100 * statistics.median(times[POST_PROCESSING][1]) / statistics.median(times[NETWORK][1])
    return [
        *lines,
        "",
        f"| {device}, 1024 x 2048, {len(seeds.cells)} seeds, {len(instances)} instances, {pixels:,} thing pixels "
        "| instance, ms | panoptic, ms | overhead, % |",
        "|---|---|---|---|",
        *(
            f"| {name} | {spread([1e3 * s for s in instance])} | {spread([1e3 * s for s in panoptic])} "
            f"| {spread([100 * (b / a - 1) for a, b in zip(instance, panoptic, strict=True)], 1)} |"
            for name, (instance, panoptic) in times.items()
        ),
        "",
        f"The panoptic post-processing takes {share:.1f} % of its network's time. The votes alone take {loop:.1f} s in a loop "
        f"over pixels and seeds in Python (estimated by {loop_pixels:,} pixels, of which {same:.2%} vote alike).",
    ]


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], nargs="*", help="default: the CPU, and a GPU where there is one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    parser.add_argument("--loop-pixels", type=int, default=5000, help="pixels of the plain loop, for an estimate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for device in args.device or ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"\n{describe(device)}; torch {torch.__version__}; medians of {args.repeats} (smallest to largest)\n", flush=True)
        print("\n".join(report(device, args.repeats, args.loop_pixels)), flush=True)


if __name__ == "__main__":
    main()
