#!/usr/bin/env python
"""Train rows of a results table: each config with each seed, and the table of means and spreads.

    python tools/train_rows.py configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml configs/dsg/shapes_*.yaml --seeds 1 2 3 --jobs 2

A run is train_net.py with OUTPUT_DIR <output>/<folder of the config>/<name>/seed<seed>. Runs that have finished are not run
again, interrupted ones go on where they stopped; so the same command, later, completes the table or only prints it. Runs with
other overrides (--opts, kept in overrides.json) are refused.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects import require_config
from projects.engine.launch import guarded, usable_cpus
from projects.errors import UserError

REPO = Path(__file__).resolve().parent.parent


def folder_of(config: str, seed: int, output: Path) -> Path:
    path = Path(config).resolve()
    return output / path.parent.name / path.stem / f"seed{seed}"


def overrides(opts: list[str]) -> dict[str, str]:
    """--opts as key -> value: their order means nothing."""
    return dict(zip_longest(opts[::2], opts[1::2], fillvalue=""))


def refuse_other_settings(folder: Path, opts: list[str]) -> None:
    """Raise UserError where a run that has finished or was interrupted had other overrides."""
    if not any((folder / name).is_file() for name in ("results.json", "last_checkpoint")):
        return
    kept, wanted = folder / "overrides.json", overrides(opts)
    found = json.loads(kept.read_text()) if kept.is_file() else {}  # older runs kept none
    if found != wanted:
        was, now = (" ".join(f"{key} {value}" for key, value in pairs.items()) or "none" for pairs in (found, wanted))
        raise UserError(
            f"{folder} holds a run with other settings. Its overrides: {was if kept.is_file() else 'not known'}; those of this "
            f"command: {now}. Use --output or remove the folder."
        )


def train(config: str, seed: int, args) -> bool:
    """One run, unless it has finished already; what it prints goes to run.log in its folder. True if it succeeded."""
    folder = folder_of(config, seed, args.output)
    if (folder / "results.json").is_file():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.json").write_text(json.dumps(overrides(args.opts)))
    command = [sys.executable, str(REPO / "train_net.py"), "--config-file", config, "--num-gpus", str(args.num_gpus)]
    if (folder / "last_checkpoint").is_file():
        command.append("--resume")
    command += [*args.opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    threads = max(1, usable_cpus() // args.jobs)
    with open(folder / "run.log", "a") as log:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode == 0


def minutes_of(folder: Path) -> float:
    """Minutes of training by the times that metrics.json states per iteration; NaN when it states none."""
    lines = (folder / "metrics.json").read_text().splitlines() if (folder / "metrics.json").is_file() else []
    records = [json.loads(line) for line in lines]
    times = [record["time"] for record in records if "time" in record]
    last = max((record["iteration"] for record in records), default=0)
    return statistics.fmean(times) * (last + 1) / 60 if times else float("nan")


def table(configs: list[str], seeds: list[int], output: Path, metrics: list[str] | None) -> str:
    """Markdown: a row per config, the mean of each metric over the finished seeds, and largest - smallest.

    Args:
        metrics: "task/metric" as in results.json, e.g. "segm/AP"; None: AP, PQ and mIoU of every task.
    """
    rows = []
    for config in configs:
        folders = [folder_of(config, seed, output) for seed in seeds]
        done = [folder for folder in folders if (folder / "results.json").is_file()]
        found: dict[str, list[float | None]] = {}
        for folder in done:
            for task, values in json.loads((folder / "results.json").read_text()).items():
                for name, value in values.items():
                    if f"{task}/{name}" in (metrics or [f"{task}/{usual}" for usual in ("AP", "PQ", "mIoU")]):
                        found.setdefault(f"{task}/{name}", []).append(value)
        row = {"config": "/".join(Path(config).resolve().with_suffix("").parts[-2:]), "runs": len(done)}
        for name, values in found.items():
            unmeasured = None in values  # null, where there was nothing to measure
            row[name] = "nan" if unmeasured else f"{statistics.fmean(values):.2f} ({max(values) - min(values):.2f})"
        if done:
            minutes = statistics.fmean(map(minutes_of, done))
            row["minutes"] = "-" if math.isnan(minutes) else f"{minutes:.1f}"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def main(args) -> int:
    for config in args.configs:
        require_config(config)
    runs = [(config, seed) for seed in args.seeds for config in args.configs]  # all rows once before any twice
    for run in runs:
        refuse_other_settings(folder_of(*run, args.output), args.opts)
    with ThreadPoolExecutor(args.jobs) as pool:
        work = pool.map(lambda run: train(*run, args), runs)
        succeeded = list(tqdm(work, total=len(runs), unit="run", disable=not sys.stderr.isatty()))
    print("mean (largest - smallest) over the seeds " + ", ".join(map(str, args.seeds)))
    print("\n" + table(args.configs, args.seeds, args.output, args.metrics))
    for run, good in zip(runs, succeeded, strict=True):
        if not good:
            log = folder_of(*run, args.output) / "run.log"
            reason = re.findall(r"error: .*", log.read_text())
            print(f"\nnot finished: {log}: {reason[-1] if reason else 'see there'}", file=sys.stderr)
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the CPU's cores (default: 1)")
    gpus = min(torch.cuda.device_count(), 1)
    parser.add_argument("--num-gpus", type=int, default=gpus, help="of a run (default: one, where there is one)")
    parser.add_argument("--output", type=Path, default=REPO / "output" / "rows", help="default: output/rows")
    parser.add_argument("--metrics", nargs="+", metavar="TASK/METRIC", help="columns (default: AP, PQ and mIoU of each task)")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override config keys, in all runs")
    sys.exit(guarded(main, parser.parse_args()))
