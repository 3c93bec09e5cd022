#!/usr/bin/env python
"""Take out of a checkpoint what only training needs, for use and distribution.

    python tools/strip_training_only.py output/maskplus/CONFIG/model_final.pth model_stripped.pth

The weights of MaskPlus' auxiliary mask heads (quasi-multitask learning) go, and so do the states of optimizer, schedule and
generators. The config stays as it is: evaluation, demo.py and DefaultPredictor load the result silently and predict the
same. Training cannot be resumed from it, and says so. Exit code 2 for a file that cannot be used.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maskplus.quasi_multitask import is_training_only
from projects.engine.checkpoint import STRIPPED, refuse_other_than_arrays, write_atomically
from projects.engine.launch import guarded
from projects.engine.safe_loading import load_torch
from projects.errors import CheckpointError


def strip(source: Path, target: Path, trust: bool = False) -> list[str]:
    """Write ``target``: the weights of ``source`` without the training-only ones, and a list of those under STRIPPED.

    Returns:
        The names that were taken out.

    Raises:
        CheckpointError: ``source`` is missing, damaged, no checkpoint, or has nothing to strip; ``target`` exists or cannot be
            written.
    """
    if not source.is_file():
        raise CheckpointError(f"There is no checkpoint '{source}'.")
    if target.exists():
        raise CheckpointError(f"'{target}' exists. Name a new file: training can go on from the complete one only.")
    data = load_torch(str(source), trust)
    weights = data.get("model") if isinstance(data, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"'{source}' is no checkpoint: expected a dict with the key 'model', a dict of weights.")
    refuse_other_than_arrays(str(source), weights)
    names = [name for name in weights if is_training_only(name)]
    if not names:
        raise CheckpointError(f"'{source}' holds no weights that only training needs: use it as it is.")
    for name in names:
        del weights[name]
    try:
        write_atomically(target, lambda file: torch.save({"model": weights, STRIPPED: names}, file))
    except OSError as error:
        raise CheckpointError(f"'{target}' was not written: {error}") from error
    return names


def main(args) -> int:
    """Strip, and say what that saved."""
    names = strip(args.source, args.target, args.trust)
    sizes = [path.stat().st_size / 2**20 for path in (args.source, args.target)]
    print(f"{args.target}: without {len(names)} training-only weights; {sizes[0]:.1f} MiB -> {sizes[1]:.1f} MiB")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint (.pth) of a training")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--trust", action="store_true", help="load a file that can run code; know its source")
    sys.exit(guarded(main, parser.parse_args()))
