#!/usr/bin/env python
"""Train a small config from scratch, evaluate it, and show what it has learned: what `make demo` calls.

Times a few steps first, and shortens the schedule on machines where all of it would take longer than --minutes. The rest is
train_net.py; the result replaces that of an earlier demo of the same config.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cv2
import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects import load_config, stated_keys
from projects.data.check import check_datasets
from projects.engine.launch import guarded
from projects.engine.trainer import build_trainer
from projects.visualization import contact_sheet

REPO = Path(__file__).resolve().parent.parent
WARM_UP, TIMED = 3, 7  # steps
TRAINING_SHARE = 0.6  # of the time that is left after them; the rest is for evaluation, and for a machine that slows down


def seconds_per_step(config_file: str, opts: list[str]) -> float:
    """Median time of a training step of this config on this machine, waiting for data included."""
    cfg = load_config(config_file, opts)
    check_datasets(cfg, stated_keys(config_file, opts))
    trainer = build_trainer(cfg)
    trainer.parallel_model.train()
    times = []
    with EventStorage(0) as trainer.storage:
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            trainer.run_step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def affordable_iterations(seconds: float, step: float) -> int:
    """How many steps, at least one, leave enough of so many seconds for the evaluation."""
    return max(1, int(seconds * TRAINING_SHARE / step))


def run(args) -> int:
    start = time.perf_counter()
    folder = REPO / "output" / "demo" / Path(args.config_file).stem
    shutil.rmtree(folder, ignore_errors=True)
    opts = [*args.opts, "OUTPUT_DIR", str(folder)]
    cfg = load_config(args.config_file, opts)
    step = seconds_per_step(args.config_file, opts)
    left = args.minutes * 60 - (time.perf_counter() - start)
    iterations = min(cfg.SOLVER.MAX_ITER, affordable_iterations(left, step))
    print(f"A step takes {step:.2f} s here: {iterations} of the schedule's {cfg.SOLVER.MAX_ITER} iterations.", flush=True)

    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(REPO / "train_net.py"), "--config-file", args.config_file]
    command += ["--num-gpus", str(min(torch.cuda.device_count(), 1))]
    code = subprocess.run([*command, *opts, "SOLVER.MAX_ITER", str(iterations)]).returncode
    if code:
        return code
    seconds = time.perf_counter() - start

    sheets = []
    for pictures in sorted(folder.glob("evaluation/*/pictures")):
        drawn = [cv2.imread(str(path)) for path in sorted(pictures.glob("*.png"))]
        sheets.append(folder / f"pictures_{pictures.parent.name}.png")
        cv2.imwrite(str(sheets[-1]), contact_sheet(drawn, columns=2))
    results = json.loads((folder / "results.json").read_text())
    metrics = {
        f"{task} {name}": values[name]
        for task, values in results.items()
        for name in ("AP", "PQ", "mIoU")
        if values.get(name) is not None
    }
    rows = [
        ("config", args.config_file),
        ("data", ", ".join(cfg.DATASETS.TRAIN)),
        ("device", torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"),
        ("iterations", f"{iterations} of {cfg.SOLVER.IMS_PER_BATCH} images"),
        ("timing, training and evaluation", f"{seconds // 60:.0f} min {seconds % 60:.0f} s"),
        *((name, f"{value:.1f}") for name, value in metrics.items()),
        ("pictures", ", ".join(str(sheet.relative_to(REPO)) for sheet in sheets)),
        ("loss curves", (folder / "losses.png").relative_to(REPO)),
        ("metrics", (folder / "results.json").relative_to(REPO)),
        ("weights", (folder / "model_final.pth").relative_to(REPO)),
    ]
    print("\n" + tabulate(rows, tablefmt="simple", disable_numparse=True))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--minutes", type=float, default=5, help="for timing, training and evaluation (default: 5)")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override config keys")
    sys.exit(guarded(run, parser.parse_args()))
