"""The curves of a training run, from the ``metrics.json`` of Detectron2's JSONWriter (one JSON per line)."""

import json
import logging
import os
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (iterations, values)

SCORES = ("AP", "PQ", "mIoU")  # results with these last names get a curve, e.g. "segm/AP"


def read_metrics(path: str | Path) -> Series:
    """Read a ``metrics.json``.

    A resumed run writes some iterations again: of each quantity, everything from such an iteration on is
    replaced. Lines that are not whole (the run was killed while it wrote) are left out.

    Returns:
        Per quantity its iterations (ascending) and values, both (number of records,).
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            iteration = record.pop("iteration")
        except (ValueError, AttributeError, KeyError, TypeError):
            logger.info("%s: line %d is not a whole record and is left out", path, number)
            continue
        for name, value in record.items():
            if isinstance(value, (int, float)):
                earlier = points.setdefault(name, [])
                while earlier and earlier[-1][0] >= iteration:
                    earlier.pop()
                earlier.append((iteration, value))
    columns = {name: np.array(pairs, dtype=float).T for name, pairs in points.items()}
    return {name: (iterations.astype(int), values) for name, (iterations, values) in columns.items()}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` (odd) values round each one, as far as they exist and are finite."""
    finite = np.isfinite(values)
    filled = np.pad(np.where(finite, values, 0.0), window // 2)
    counted = np.pad(finite.astype(float), window // 2)
    kernel = np.ones(window)
    total, count = np.convolve(filled, kernel, "valid"), np.convolve(counted, kernel, "valid")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def plot_losses(metrics_json: str | Path, png: str | Path) -> None:
    """Draw the curves of a run: total loss and each ``loss_*``, raw and smoothed; the learning rate (dashed).

    Quantities ``accuracy_*`` get a panel of their own. Once the run was evaluated, a last one shows validation losses
    (``val_*``) and, dashed, AP, PQ, mIoU; only the latter where no validation loss was measured.
    The file appears under its name when it is whole.
    """
    series = read_metrics(metrics_json)
    losses = [name for name in sorted(series) if name.startswith("loss_")]
    losses = ["total_loss"] * ("total_loss" in series) + losses
    validation = [name for name in sorted(series) if name.startswith("val_")]
    scores = [name for name in sorted(series) if name.split("/")[-1] in SCORES]
    accuracies = [name for name in sorted(series) if name.startswith("accuracy_")]
    panels = [("training loss", losses, "learning rate", ["lr"] * ("lr" in series))]
    if accuracies:
        panels.append(("accuracy", accuracies, "", []))
    if validation or scores:
        measured = ("validation loss", validation, "AP, PQ, mIoU", scores) if validation else ("AP, PQ, mIoU", scores, "", [])
        panels.append(measured)
    palette = cycle(colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])
    colors = {"lr": "black"} | dict(zip(losses, palette, strict=False))  # a loss and its val_ share a colour
    colors |= {name: colors.get(name.removeprefix("val_")) or next(palette) for name in accuracies + validation + scores}
    figure = Figure(figsize=(8 * len(panels), 5.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _plot_panel(axes, series, colors, *panel)
    partial = Path(png).with_name(f".{Path(png).name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, png)


def _plot_panel(
    axes: Axes, series: Series, colors: dict, left_title: str, left: list[str], right_title: str, right: list[str]
) -> None:
    """Curves on the left axis, raw (pale) and smoothed, and on the right axis, dashed."""
    axes.set(xlabel="iteration", ylabel=left_title)
    axes.grid(alpha=0.3)
    handles = []
    for name in left:
        (iterations, values), color = series[name], colors[name]
        axes.plot(iterations, values, color=color, alpha=0.3, linewidth=1)
        smoothed = smooth(values, 2 * (len(values) // 20) + 1)
        handles += axes.plot(iterations, smoothed, color=color, label=name, marker=_marker(values))
    if right:
        right_axes = axes.twinx()
        right_axes.set_ylabel(right_title)
        for name in right:
            (iterations, values), color = series[name], colors[name]
            handles += right_axes.plot(iterations, values, color=color, label=name, linestyle="dashed", marker=_marker(values))
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)


def _marker(values: np.ndarray) -> str:
    """A dot at every value where there are few: one value alone makes no line."""
    return "." if len(values) < 20 else ""
