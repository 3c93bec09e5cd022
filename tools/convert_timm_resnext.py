#!/usr/bin/env python
"""ImageNet weights of a ResNet or ResNeXt of timm as a file for MODEL.WEIGHTS, for backbones of which Detectron2 has none.

    python tools/convert_timm_resnext.py resnext101_32x4d.gluon_in1k weights/resnext101_32x4d.pth

The config that uses them needs MODEL.RESNETS.STRIDE_IN_1X1 False, INPUT.FORMAT "RGB", and timm's mean and deviation, which
are printed. Models that Detectron2 does not have are refused: by the names of their weights (deep stems,
squeeze-and-excitation, ...), or because its ResNet gives other features with them (blur pooling, other activations, ...).
"""

import argparse
import re
import sys
from pathlib import Path

import timm
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects.engine.launch import guarded
from projects.errors import CheckpointError, ConfigError

IN_BLOCK = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"} | {f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)}
STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
DEPTHS = {  # (whether blocks are bottlenecks, blocks of each stage) -> MODEL.RESNETS.DEPTH
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


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


def detectron2_resnet(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Detectron2's ResNet with converted weights, in eval mode. Raises CheckpointError where it has none that they fill."""
    blocks = tuple(sum(bool(re.fullmatch(rf"res{i}\.\d+\.conv1\.weight", name)) for name in weights) for i in (2, 3, 4, 5))
    bottlenecks = "res2.0.conv3.weight" in weights
    if (bottlenecks, blocks) not in DEPTHS:
        kind = "bottlenecks" if bottlenecks else "basic blocks"
        raise CheckpointError(f"timm's model has {blocks} {kind} in its stages: Detectron2's ResNet has no such depth.")
    width, of_group = weights["res2.0.conv2.weight"].shape[:2]
    cfg = get_cfg()
    settings = {
        "DEPTH": DEPTHS[bottlenecks, blocks],
        "NUM_GROUPS": width // of_group,
        "WIDTH_PER_GROUP": of_group,
        "RES2_OUT_CHANNELS": 256 if bottlenecks else 64,
        "STRIDE_IN_1X1": False,
        "OUT_FEATURES": ["res5"],
    }
    for key, value in settings.items():
        cfg.MODEL.RESNETS[key] = value
    try:
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
        model.load_state_dict(weights)
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(f"timm's weights do not fit Detectron2's ResNet: {error}.") from error
    return model


def refuse_other_features(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Raise CheckpointError unless both give the same features of an image of noise."""
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs.eval().forward_features(image), ours(image)["res5"]
    if expected.shape != found.shape or (expected - found).abs().max() > 1e-3 * expected.abs().max():
        raise CheckpointError(
            "Detectron2's ResNet gives other features with these weights: timm's model has parts without weights that it lacks."
        )


def main(args) -> int:
    if not timm.is_model(args.model):
        raise ConfigError(f"timm {timm.__version__} has no model '{args.model}'. timm.list_models('resnext*') lists some.")
    try:
        model = timm.create_model(args.model, pretrained=True)
    except Exception as error:  # whatever the download raises
        raise CheckpointError(f"The weights of '{args.model}' could not be fetched: {error}.") from error
    weights = convert(model.state_dict())
    refuse_other_features(model, detectron2_resnet(weights))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f"{args.output.name}.part")
    torch.save({"model": weights, "matching_heuristics": True, "__author__": f"timm {args.model}"}, partial)
    partial.replace(args.output)
    mean, std = ([round(255 * value, 3) for value in model.pretrained_cfg[key]] for key in ("mean", "std"))
    print(f"Wrote {args.output}. For its config: MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, INPUT.FORMAT 'RGB'.")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name, with the tag of the weights")
    parser.add_argument("output", type=Path, help="file to write")
    sys.exit(guarded(main, parser.parse_args()))
