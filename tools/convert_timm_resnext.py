#!/usr/bin/env python
"""ImageNet weights of a ResNet or ResNeXt of timm as a file for MODEL.WEIGHTS, for backbones of which Detectron2 has none.

    python tools/convert_timm_resnext.py resnext101_32x4d.gluon_in1k weights/resnext101_32x4d.pth

The config that uses them needs MODEL.RESNETS.STRIDE_IN_1X1 False, INPUT.FORMAT "RGB", and timm's mean and deviation, which
are printed. Models whose stem or blocks Detectron2 does not have (deep stems, squeeze-and-excitation, ...) are refused.
"""

import argparse
import re
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects.engine.launch import guarded
from projects.errors import CheckpointError, ConfigError

IN_BLOCK = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"} | {f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)}
STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> those of Detectron2's ResNet; the classifier is left out. Raises CheckpointError for an unknown name."""
    converted = {}
    for name, value in weights.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"layer([1-4])\.(\d+)\.(conv[123]|bn[123]|downsample\.[01])", layer)
        if block:
            stage, number, part = block.groups()
            layer = f"res{int(stage) + 1}.{number}.{IN_BLOCK.get(part, part)}"
        elif layer in STEM:
            layer = STEM[layer]
        else:
            raise CheckpointError(f"timm's weights have '{name}', for which Detectron2's ResNet has no place.")
        converted[f"{layer}.{kind}"] = value
    return converted


def main(args) -> int:
    if not timm.is_model(args.model):
        raise ConfigError(f"timm {timm.__version__} has no model '{args.model}'. timm.list_models('resnext*') lists some.")
    try:
        model = timm.create_model(args.model, pretrained=True)
    except Exception as error:  # whatever the download raises
        raise CheckpointError(f"The weights of '{args.model}' could not be fetched: {error}.") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": convert(model.state_dict()), "matching_heuristics": True, "__author__": f"timm {args.model}"}
    torch.save(content, args.output)
    mean, std = ([round(255 * value, 3) for value in model.pretrained_cfg[key]] for key in ("mean", "std"))
    print(f"Wrote {args.output}. For its config: MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, INPUT.FORMAT 'RGB'.")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name, with the tag of the weights")
    parser.add_argument("output", type=Path, help="file to write")
    sys.exit(guarded(main, parser.parse_args()))
