#!/usr/bin/env python
"""What models cost at inference, beside a baseline: multiply-adds, weights, time, peak memory, as a Markdown table.

    python tools/analyze_model.py --baseline configs/baseline/mask_rcnn_R_50_FPN_1x.yaml configs/dsg/dsg_R_50_FPN_1x.yaml
    python tools/analyze_model.py --baseline CONFIG CONFIG,MODEL.RPN.POST_NMS_TOPK_TEST=100,INPUT.FORMAT=RGB
    python tools/analyze_model.py --baseline CONFIG CONFIG --device cuda --autocast bfloat16 --channels-last

A CONFIG may carry overrides of its own after commas; --opts at the end holds for all of them. One random image, random weights.
So that a detector does the same work with random weights as with trained ones, its last layers are set: proposals are
anchors, as many as MODEL.RPN.POST_NMS_TOPK_TEST; every proposal is of the first class with one score, so that detections are
proposals, as many as TEST.DETECTIONS_PER_IMAGE. The table says how many of both there were.

- GMAC: multiply-adds / 1e9 of one image, of everything that runs (torch's FlopCounterMode: convolutions, linear layers, matrix
  products; poolings and elementwise operations do not count).
- time: median over --repeats, smallest to largest. The models take turns in one process, and the ratio is the median of the
  ratios to the baseline's time in the same turn, so that a machine that slows down slows both.
- peak memory: weights included. On a GPU what torch had allocated at most; on the CPU, in a process of its own, the resident
  set's high-water mark above what the process held before the model was built.
"""

import argparse
import gc
import logging
import math
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects import load_config
from projects.engine.launch import guarded
from projects.errors import ConfigError
from projects.modeling.build import build_model

CERTAIN = 10.0  # logit of the one class that every proposal is of


@dataclass(frozen=True)
class Row:
    """A config of the table: ``config[,KEY=VALUE...]`` under the overrides of all."""

    text: str
    opts: tuple[str, ...]

    @property
    def name(self) -> str:
        path, *own = self.text.split(",")
        return ", ".join([Path(path).stem, *own])

    def config(self, device: str):
        path, *own = self.text.split(",")
        pairs = [word.partition("=") for word in own]
        if not all(equals for _, equals, _ in pairs):
            raise ConfigError(f"'{self.text}': expected CONFIG,KEY=VALUE,KEY=VALUE.")
        overrides = [word for key, _, value in pairs for word in (key, value)]
        return load_config(path, [*self.opts, *overrides, "MODEL.DEVICE", device, "MODEL.WEIGHTS", ""])


@dataclass(frozen=True)
class Setting:
    """How all models run."""

    device: str
    size: tuple[int, int]  # height, width of the image that the model sees
    threads: int
    autocast: str  # name of a dtype, or ""
    channels_last: bool

    def build(self, row: Row) -> nn.Module:
        torch.manual_seed(0)
        model = build_model(row.config(self.device)).eval()
        fix_last_layers(model)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def inputs(self) -> list[dict]:
        height, width = self.size
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator).to(self.device)
        return [{"image": image, "height": height, "width": width}]

    def run(self, model: nn.Module) -> list[dict]:
        precision = torch.autocast(self.device, getattr(torch, self.autocast)) if self.autocast else nullcontext()
        with torch.inference_mode(), precision:
            outputs = model(self.inputs())
        if self.device == "cuda":
            torch.cuda.synchronize()
        return outputs


def fix_last_layers(model: nn.Module) -> None:
    """Make proposals of anchors and detections of proposals (see above); a model without such layers stays as it is."""
    for module in model.modules():
        if isinstance(module, StandardRPNHead):
            nn.init.zeros_(module.anchor_deltas.weight)
            nn.init.zeros_(module.anchor_deltas.bias)
        elif isinstance(module, FastRCNNOutputLayers):
            for layer in (module.bbox_pred, module.cls_score):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            with torch.no_grad():
                module.cls_score.bias[0] = CERTAIN


def proposals_and_detections(model: nn.Module, setting: Setting) -> tuple[str, str]:
    """How many proposals and detections the image had; "-" where the model knows no such thing."""
    found = []
    generator = getattr(model, "proposal_generator", None)
    hook = generator and generator.register_forward_hook(lambda module, inputs, output: found.append(len(output[0][0])))
    output = setting.run(model)[0]
    if hook:
        hook.remove()
    return str(found[0]) if found else "-", str(len(output["instances"])) if "instances" in output else "-"


def gigamacs(model: nn.Module, setting: Setting) -> float:
    """Multiply-adds of one image, in 1e9."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv_flops})
    with torch.no_grad(), counter:
        model(setting.inputs())
    return counter.get_total_flops() / 2e9  # a multiply-add is two of its operations


def _deform_conv_flops(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def times(models: list[nn.Module], setting: Setting, repeats: int) -> list[list[float]]:
    """Seconds of each model in each turn, after one turn that is not counted."""
    found = [[] for _ in models]
    for turn in tqdm(range(repeats + 1), desc="turns", disable=not sys.stderr.isatty()):
        for model, durations in zip(models, found, strict=True):
            start = time.perf_counter()
            setting.run(model)
            if turn:
                durations.append(time.perf_counter() - start)
    return found


def peak_memory(row: Row, setting: Setting) -> float:
    """MB (1e6 bytes) at most, weights included; nan where the machine does not tell."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory_of_this_process, row, setting).result()


def _peak_memory_of_this_process(row: Row, setting: Setting) -> float:
    logging.disable(logging.WARNING)
    torch.set_num_threads(setting.threads)
    if setting.device == "cuda":
        model = setting.build(row)
        setting.run(model)
        torch.cuda.reset_peak_memory_stats()
        setting.run(model)
        return torch.cuda.max_memory_allocated() / 1e6
    row.config(setting.device)  # what is imported and loaded on first use comes before the measurement
    nn.Conv2d(8, 8, 3)(torch.ones(1, 8, 16, 16))
    gc.collect()
    before = _resident("VmRSS")
    model = setting.build(row)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:  # not Linux, or not allowed
        return float("nan")
    setting.run(model)
    return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> int:
    """kB"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def table(rows: list[Row], setting: Setting, repeats: int, memory: bool) -> list[str]:
    """The lines of the Markdown table; the first row is the baseline."""
    models = [setting.build(row) for row in rows]
    counts = [proposals_and_detections(model, setting) for model in models]
    macs = [gigamacs(model, setting) for model in models]
    weights = [sum(p.numel() for p in model.parameters()) for model in models]
    seconds = times(models, setting, repeats) if repeats else None
    del models
    peaks = [peak_memory(row, setting) for row in rows] if memory else None

    header = ["model", "proposals", "detections", "weights", "GMAC", "ratio"]
    header += ["time", "smallest to largest", "ratio"] if seconds else []
    header += ["peak memory", "ratio"] if peaks else []
    lines = [header, ["---"] * len(header)]
    for i, row in enumerate(rows):
        cells = [row.name, *counts[i], f"{weights[i]:,}", f"{macs[i]:.1f}", f"{macs[i] / macs[0]:.2f}x"]
        if seconds:
            ms = [1e3 * value for value in seconds[i]]
            ratios = [a / b for a, b in zip(seconds[i], seconds[0], strict=True)]
            cells += [f"{statistics.median(ms):.0f} ms", f"{min(ms):.0f} to {max(ms):.0f}", f"{statistics.median(ratios):.2f}x"]
        if peaks:
            cells += [f"{peaks[i]:.0f} MB", f"{peaks[i] / peaks[0]:.2f}x"]
        lines.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def describe(setting: Setting, repeats: int) -> str:
    if setting.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        machine = f"{names[0] if names else platform.machine()}, {setting.threads} threads"
    layout = "channels_last" if setting.channels_last else "NCHW"
    return (
        f"{machine}; torch {torch.__version__}; image of {setting.size[0]} x {setting.size[1]}; "
        f"{setting.autocast or 'float32'}, {layout}; medians of {repeats}"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG[,KEY=VALUE...]")
    parser.add_argument("--baseline", required=True, metavar="CONFIG", help="what the ratios are to, the table's first row")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"), help="default: 800 1333")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns (default 7; 0: no times)")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], default="", help="run all models under autocast")
    parser.add_argument("--channels-last", action="store_true", help="weights of all models in channels_last memory")
    parser.add_argument("--skip-memory", action="store_true", help="no peak memory")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override config keys of all rows")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    setting = Setting(args.device, tuple(args.size), args.threads, args.autocast, args.channels_last)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here.")
    torch.set_num_threads(args.threads)
    rows = [Row(text, tuple(args.opts)) for text in [args.baseline, *args.configs]]
    print(describe(setting, args.repeats) + "\n", flush=True)
    print("\n".join(table(rows, setting, args.repeats, not args.skip_memory)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
