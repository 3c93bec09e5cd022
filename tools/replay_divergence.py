#!/usr/bin/env python
"""Run the forward pass that diverged again, from the folder that training left.

    python tools/replay_divergence.py output/<paper>/<config>/diverged_0001234

Reads config.yaml, model.pth and rank<r>.pth, takes the same batch with the same augmentation, restores the generators, and
prints every loss. Exit code 0 when a loss is not finite again, 1 when all are finite, 2 for a folder that cannot be used.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects import load_config
from projects.data.check import register_own_datasets
from projects.data.loader import SeededDataset, load_records
from projects.data.mapper import build_mapper
from projects.engine.checkpoint import Checkpointer, set_rng_state
from projects.engine.launch import guarded
from projects.engine.safe_loading import load_torch
from projects.engine.trainer import mixed_precision
from projects.errors import CheckpointError, UserError
from projects.modeling.build import build_model


def replay(folder: Path, rank: int | None) -> dict[str, float]:
    """The losses of the recorded batch of one process (by default the first recorded one)."""
    records = sorted(folder.glob("rank*.pth" if rank is None else f"rank{rank}.pth"))
    if not records or not (folder / "config.yaml").is_file():
        raise CheckpointError(f"'{folder}' has no rank<r>.pth and config.yaml: expected a diverged_<iteration> folder.")
    record = load_torch(str(records[0]))
    cfg = load_config(str(folder / "config.yaml"))
    register_own_datasets(cfg)
    model = build_model(cfg)
    Checkpointer(model).load(str(folder / "model.pth"))
    dataset = SeededDataset(load_records(cfg), build_mapper(cfg, is_train=True), record["seed"])
    batch = [dataset[sample] for sample in record["samples"]]
    for sample in batch:
        if isinstance(sample, UserError):
            raise sample
    found = [sample.get("image_id") for sample in batch]
    if found != record["image_ids"]:
        raise CheckpointError(f"The data set has changed: the record is of images {record['image_ids']}, now come {found}.")
    set_rng_state(record["rng"])
    autocast, _ = mixed_precision(cfg)
    with EventStorage(record["iteration"]), torch.no_grad(), autocast():
        return {name: float(loss) for name, loss in model.train()(batch).items()}


def main(args) -> int:
    try:
        losses = replay(args.folder, args.rank)
    except FloatingPointError as error:  # Detectron2 breaks off when proposals are not finite
        print(error)
        return 0
    for name, loss in losses.items():
        print(f"{name:>20}  {loss:.6g}")
    return 0 if not all(map(math.isfinite, losses.values())) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, help="process whose batch is taken (default: the first recorded)")
    sys.exit(guarded(main, parser.parse_args()))
