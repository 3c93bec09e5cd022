#!/usr/bin/env python
"""Time and memory of a training iteration of GAN Mask R-CNN against Mask R-CNN, as a Markdown table.

    python tools/benchmark_ganmask.py
    python tools/benchmark_ganmask.py --config configs/ganmask/coco_ganmask_R_101_FPN.yaml --opts SOLVER.IMS_PER_BATCH 4

The config's model takes training steps from random weights, with MODEL.GANMASK.LOSSES "baseline" (which is Mask R-CNN),
"adversarial" and "both", on pictures of the shapes data set that are made for it.

- time: of an iteration, without the wait for its images. The three take turns in one process, on the same images; the ratio is
  the median of the ratios to Mask R-CNN's time in the same turn.
- peak memory: what a trainer and its first iterations add to the process, weights and optimizers included.
- foreground RoIs: per image. The discriminators' cost grows with them. A trained model has more than a new one, which
  --opts MODEL.ROI_HEADS.IOU_THRESHOLDS '[0.1]' makes up for.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganmask.trainer import AdversarialTrainer
from projects import config_path, load_config
from projects.data.builtin import register_shapes
from projects.data.shapes import generate_shapes
from projects.engine.launch import guarded
from projects.errors import ConfigError
from projects.memory import added_peak

LOSSES = ("baseline", "adversarial", "both")
PICTURES, CLASSES = 32, 8  # of the shapes data set


def config_of(args: argparse.Namespace, losses: str, folder: str) -> CfgNode:
    """The config with these LOSSES, on the pictures; its trainers write to ``folder``."""
    opts = ["MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES, "DATASETS.TRAIN", ("shapes_train",)]
    opts += ["SEED", 0, "SOLVER.BASE_LR", 1e-10]  # a rate that costs what others cost, and lets nothing diverge
    opts += ["DATALOADER.NUM_WORKERS", 0, *args.opts, "MODEL.DEVICE", args.device, "MODEL.GANMASK.LOSSES", losses]
    return load_config(args.config, [*opts, "OUTPUT_DIR", folder])


def trainer_of(cfg: CfgNode) -> AdversarialTrainer:
    torch.manual_seed(0)
    trainer = AdversarialTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.parallel_model.train()
    return trainer


def step(trainer: AdversarialTrainer, iteration: int) -> tuple[float, float]:
    """Seconds of an iteration without the wait for its images, and foreground RoIs per image."""
    trainer.iter, start = iteration, time.perf_counter()
    with EventStorage(iteration) as trainer.storage:
        trainer.run_step()
        if trainer.cfg.MODEL.DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        logged = {name: value for name, (value, _) in trainer.storage.latest().items()}
    return seconds - logged["data_time"], logged["roi_head/num_fg_samples"]


def train(cfg: CfgNode) -> None:
    trainer = trainer_of(cfg)
    for iteration in range(2):  # the optimizers have states from the first on
        step(trainer, iteration)


def report(cfgs: dict[str, CfgNode], device: str, repeats: int) -> list[str]:
    """The lines of the table."""
    train(cfgs["both"])  # what is loaded on first use does not count
    peaks = {losses: added_peak(lambda cfg=cfg: train(cfg), device) for losses, cfg in cfgs.items()}
    trainers = {losses: trainer_of(cfg) for losses, cfg in cfgs.items()}
    seconds, foreground = ({losses: [] for losses in cfgs} for _ in range(2))
    for turn in range(repeats + 1):
        for losses, trainer in trainers.items():
            duration, count = step(trainer, turn)
            if turn:  # the first one warms up
                seconds[losses].append(duration)
                foreground[losses].append(count)

    columns = ("LOSSES", "ms per iteration", "smallest to largest", "ratio", "peak memory", "ratio", "foreground RoIs")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for losses, found in seconds.items():
        ratios = [own / other for own, other in zip(found, seconds["baseline"], strict=True)]
        lines.append(
            f"| {losses} | {1e3 * statistics.median(found):.1f} | {1e3 * min(found):.1f} to {1e3 * max(found):.1f} "
            f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) | {peaks[losses]:.0f} MB "
            f"| {peaks[losses] / peaks['baseline']:.2f}x | {statistics.mean(foreground[losses]):.1f} |"
        )
    return lines


def describe(args: argparse.Namespace, cfg: CfgNode) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{names[0]}, {torch.get_num_threads()} threads"
    return (
        f"{machine}; torch {torch.__version__}; {Path(args.config).stem}, {cfg.SOLVER.IMS_PER_BATCH} images, shorter side "
        f"{tuple(cfg.INPUT.MIN_SIZE_TRAIN)}; medians of {args.repeats}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = config_path("ganmask/shapes_ganmask_R_18_FPN.yaml")
    parser.add_argument("--config", default=small, metavar="CONFIG", help="of ganmask/ (default: shapes_ganmask_R_18_FPN)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, default=10, help="timed turns (default 10)")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override config keys")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here.")
    if args.repeats < 1:
        raise ConfigError(f"--repeats is {args.repeats}: expected at least 1.")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark_ganmask_") as folder:
        generate_shapes(folder, train=PICTURES, val=1, workers=1, progress=False)
        register_shapes(folder)
        cfgs = {losses: config_of(args, losses, f"{folder}/output") for losses in LOSSES}
        print(describe(args, cfgs["both"]) + "\n", flush=True)
        print("\n".join(report(cfgs, args.device, args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
