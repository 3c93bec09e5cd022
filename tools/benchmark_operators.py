"""Times SgRoIAlign and PrRoIPool against torchvision's RoIAlign on the same boxes, and prints Markdown tables.

    python tools/benchmark_operators.py               everything: about five minutes on two CPU cores
    python tools/benchmark_operators.py --device cpu --skip-model

Each row times both operators in turn, in one process, and gives medians; memory is the peak of a process of its own that
calls one operator once, above what it held before the call.
"""

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import roi_align

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects.layers import extension, prroi_pool, sg_roi_align
from projects.timing import seconds_in_turns

SHAPE, SCALE, BOXES = (1, 256, 200, 304), 1 / 4, 512
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def make_boxes(count: int, device: str) -> torch.Tensor:
    """(count, 5): boxes of 20 to 220 pixels inside the image that the map covers."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(count, 2, generator=generator) * 200 + 20
    extent = torch.tensor([SHAPE[3], SHAPE[2]]) / SCALE
    start = torch.rand(count, 2, generator=generator) * (extent - size)
    return torch.cat([torch.zeros(count, 1), start, start + size], dim=1).to(device)


def make_features(layout: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    features = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return features.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


def forward_and_backward(function: Callable, *inputs: torch.Tensor) -> Callable:
    """A call of ``function(*inputs)`` and of the gradient to all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    grad = torch.randn_like(function(*inputs))

    def run():
        torch.autograd.grad(function(*leaves), leaves, grad)

    return run


def median_times(functions: list[Callable], device: str, repeats: int) -> list[float]:
    """Median milliseconds of each function; they take turns, so that both see the same machine."""
    return [1e3 * statistics.median(found) for found in seconds_in_turns(functions, device, repeats)]


# ---- The operators


def cases(device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Callable]]]:
    """Row name -> {"torchvision": ..., "ours": ...}, each a function that prepares and returns the call to be timed."""
    boxes = make_boxes(BOXES, device)
    their_boxes = boxes.to(dtype)  # torchvision wants one type
    prob = torch.rand(BOXES, 1, 28, 28, generator=torch.Generator().manual_seed(2)).to(device)
    rows = {}
    for size in (7, 14):
        for layout in LAYOUTS:

            def theirs(features, boxes=their_boxes, size=size):
                return roi_align(features, boxes, size, SCALE, 2, True)

            def plain(features, size=size):
                return sg_roi_align(features, boxes, None, size, SCALE, 2)

            def guided(features, prob=prob, size=size):
                return sg_roi_align(features, boxes, prob, size, SCALE, 2)

            def call(function, *more, layout=layout):
                features = make_features(layout, dtype, device)
                return lambda: function(features, *more)

            def train(function, *more, layout=layout):
                return forward_and_backward(function, make_features(layout, dtype, device), *more)

            name = f"SgRoIAlign {size}x{size}, {layout}"
            rows[f"{name}, forward"] = {"torchvision": lambda c=call, t=theirs: c(t), "ours": lambda c=call, g=guided: c(g)}
            rows[f"{name}, forward, no map"] = {
                "torchvision": lambda c=call, t=theirs: c(t),
                "ours": lambda c=call, p=plain: c(p),
            }
            rows[f"{name}, forward + backward"] = {
                "torchvision": lambda c=train, t=theirs: c(t),
                "ours": lambda c=train, g=guided: c(g, prob),
            }
            rows[f"{name}, forward + backward, no map"] = {
                "torchvision": lambda c=train, t=theirs: c(t),
                "ours": lambda c=train, p=plain: c(p),
            }
    few = make_boxes(128, device)
    their_few = few.to(dtype)
    for layout in LAYOUTS:

        def sampled(features):
            return roi_align(features, their_few, 28, SCALE, 4, True)

        def train(function, *more, layout=layout):
            return forward_and_backward(function, make_features(layout, dtype, device), *more)

        rows[f"PrRoIPool 28x28 of 128 boxes, {layout}, forward + backward (boxes too)"] = {
            "torchvision": lambda c=train: c(sampled),
            "ours": lambda c=train: c(lambda features, rois: prroi_pool(features, rois, 28, SCALE), few),
        }
    return rows


def operator_table(device: str, dtype: torch.dtype, repeats: int, memory: bool) -> list[str]:
    lines = [
        f"| {device}, {str(dtype).removeprefix('torch.')} | torchvision RoIAlign | ours | ratio |"
        + (" peak memory, torchvision | ours |" if memory else ""),
        "|---|---|---|---|" + ("---|---|" if memory else ""),
    ]
    for name, row in cases(device, dtype).items():
        theirs, ours = (row[side]() for side in ("torchvision", "ours"))
        try:
            theirs()
        except RuntimeError as error:
            if "not implemented for" not in str(error):  # as torchvision's of bfloat16 on the CPU
                raise
            (time_ours,) = median_times([ours], device, repeats)
            line = f"| {name} | not supported | {time_ours:.1f} ms | |"
        else:
            time_theirs, time_ours = median_times([theirs, ours], device, repeats)
            line = f"| {name} | {time_theirs:.1f} ms | {time_ours:.1f} ms | **{time_theirs / time_ours:.1f}x** |"
        if memory:
            peaks = [peak_memory(device, dtype, name, side) for side in ("torchvision", "ours")]
            line += "".join(f" {peak:.0f} MB |" for peak in peaks)
        lines.append(line)
    return lines


def peak_memory(device: str, dtype: torch.dtype, name: str, side: str) -> float:
    """MB that one call holds at most, above what was there before it, measured in a fresh process."""
    if device == "cuda":
        call = cases(device, dtype)[name][side]()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_of_this_process, (dtype, name, side, torch.get_num_threads()))


def _peak_memory_of_this_process(dtype: torch.dtype, name: str, side: str, threads: int) -> float:
    """By the kernel's own account: high-water mark of the resident set during the call, minus the resident set before."""
    torch.set_num_threads(threads)
    call = cases("cpu", dtype)[name][side]()
    small = torch.ones(1, 1, 8, 8, dtype=dtype)
    box = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0]])
    for first_use in (sg_roi_align(small, box, None, 2, 1.0, 2), prroi_pool(small, box, 2, 1.0), roi_align(small, box, 2)):
        del first_use  # what is loaded on first use is loaded now
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:  # not Linux, or not allowed
        return float("nan")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


# ---- A whole model


def model_table(device: str, repeats: int) -> list[str]:
    """Mask R-CNN R50-FPN inference, random weights, one image of 800 x 1333, 1000 proposals, with either pooler."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    from projects.modeling.pooler import replace_roi_align

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", device
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # random weights: keep 100 detections for the mask head
    models = []
    for exchanged in (False, True):
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        for last_layer in (
            model.proposal_generator.rpn_head.anchor_deltas,
            model.roi_heads.box_predictor.bbox_pred,
            model.roi_heads.box_predictor.cls_score,
        ):  # so that proposals are anchors, and detections proposals
            nn.init.zeros_(last_layer.weight)
        if exchanged:
            replace_roi_align(model)
        models.append(model)
    image = torch.randint(0, 256, (3, 800, 1333), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spent = {model: [] for model in models}  # (box pooler, mask pooler) of each run in turn, ms

    def time_poolers(model):
        """Note the time inside the box and the mask pooler."""
        for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):

            def timed(*args, forward=pooler.forward):
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                output = forward(*args)
                if device == "cuda":
                    torch.cuda.synchronize()
                spent[model].append((time.perf_counter() - start) * 1e3)
                return output

            pooler.forward = timed

    for model in models:
        time_poolers(model)

    @torch.no_grad()
    def run(model):
        return model([{"image": image, "height": 800, "width": 1333}])

    detections = [len(run(model)[0]["instances"]) for model in models]
    whole = median_times([lambda: run(models[0]), lambda: run(models[1])], device, repeats)
    poolers = [statistics.median(map(sum, batched(spent[model][-2 * repeats :], 2))) for model in models]
    rows = [("the image", whole), ("of this, box and mask pooler", poolers)]
    return [
        f"| Mask R-CNN R50-FPN, {device}, 800 x 1333, 1000 proposals, {detections[0]} detections "
        "| torchvision RoIAlign | SgRoIAlign, no map | ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {a:.0f} ms | {b:.0f} ms | **{a / b:.2f}x** |" for name, (a, b) in rows),
    ]


def batched(values: list, size: int) -> list[list]:
    return [values[i : i + size] for i in range(0, len(values), size)]


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
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of which the median is taken (default 7)")
    parser.add_argument("--skip-model", action="store_true", help="only the operators")
    parser.add_argument("--skip-memory", action="store_true", help="only times")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for device in args.device or ["cpu"] + ["cuda"] * torch.cuda.is_available():
        extension.is_available(torch.device(device))  # warns where nothing is compiled
        print(f"\n{describe(device)}; torch {torch.__version__}; medians of {args.repeats}", flush=True)
        dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
        for dtype in dtypes:
            print("\n" + "\n".join(operator_table(device, dtype, args.repeats, not args.skip_memory)), flush=True)
        if not args.skip_model:
            print("\n" + "\n".join(model_table(device, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
