"""What happens beside the training step: checkpoints, evaluation, writers, curves. Detectron2's hooks where it has them."""

import itertools
import json
import logging
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from tqdm import tqdm

from projects.data.loader import build_train_loader
from projects.loss_curves import plot_losses

from .checkpoint import rng_preserved, write_atomically

logger = logging.getLogger(__name__)


class PeriodicCheckpoint(HookBase):
    """Save every ``period`` iterations, keeping the last ``kept`` files, and ``model_final.pth`` at the end.

    Stands before the evaluation hook and saves before each evaluation (every ``eval_period`` iterations; 0: none), so that
    whatever ends an evaluation, no iteration is lost.
    """

    def __init__(self, period: int, kept: int, eval_period: int = 0):
        self.periods = [p for p in (period, eval_period) if p > 0]
        self.kept = kept

    def after_step(self):
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.trainer.save("model_final")
        elif any(done % period == 0 for period in self.periods):
            self.trainer.save_periodic()
            self.trainer.checkpointer.remove_old(self.kept)


class PreciseBN(HookBase):
    """TEST.PRECISE_BN: true averages of the batch norm statistics over NUM_ITER batches, before evaluations and at the end.

    Stands before the checkpoints, so that what is evaluated is what is saved. The batches are always the same.
    """

    def __init__(self, cfg: CfgNode, seed: int):
        self.cfg, self.seed = cfg, seed

    def after_step(self):
        done, period = self.trainer.iter + 1, self.cfg.TEST.EVAL_PERIOD
        if done < self.trainer.max_iter and (period < 1 or done % period):
            return
        if get_bn_modules(self.trainer.model):
            with rng_preserved(), EventStorage(done):
                batches = itertools.islice(build_train_loader(self.cfg, self.seed), self.cfg.TEST.PRECISE_BN.NUM_ITER)
                average_bn_statistics(self.trainer.model, batches)


@torch.no_grad()
def average_bn_statistics(model: torch.nn.Module, batches: Iterable[list[dict]]) -> None:
    """Set the statistics of every training batch norm to mean and variance of all that it sees in these batches, those of all
    processes together (each brings its own, as many as the others).

    One that sees nothing keeps its own: behind RoIs that may happen, where no image has an object. (fvcore's update_bn_stats
    divides by zero at the first such batch.)
    """
    layers = get_bn_modules(model)
    sums = {
        layer: torch.zeros(3, layer.num_features, dtype=torch.float64, device=layer.running_mean.device) for layer in layers
    }

    def add(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double()
        sums[layer] += torch.stack([torch.ones_like(values).sum(dim=1), values.sum(dim=1), values.square().sum(dim=1)])

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(sums[layer])
        count, total, square = sums[layer]
        if count[0]:
            mean = total / count
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(square / count - mean.square())


class BestCheckpoint(HookBase):
    """Keep the weights with the highest value of an evaluation metric as ``model_best.pth``.

    Stands after the evaluation hook. ``best.json`` holds metric, value and iteration, and outlives a restart.
    """

    def __init__(self, metric: str, folder: str):
        self.metric, self.folder, self.record = metric, Path(folder), Path(folder) / "best.json"
        self.seen = -1

    def _after_evaluation(self):
        value, iteration = self.trainer.storage.latest().get(self.metric, (None, -1))
        if iteration == self.seen:
            return
        self.seen = iteration
        best = json.loads(self.record.read_text()) if self.record.is_file() else {"value": float("-inf")}
        if value is not None and value > best["value"]:  # false for NaN
            self.trainer.checkpointer.save_weights(self.folder / "model_best.pth")
            best = {"metric": self.metric, "value": value, "iteration": iteration}
            write_atomically(self.record, lambda file: file.write(json.dumps(best).encode()))
            logger.info("Best %s so far: %.3f, kept as model_best.pth", self.metric, value)

    def after_step(self):
        if comm.is_main_process():
            self._after_evaluation()

    def after_train(self):
        if not comm.is_main_process():
            return
        self._after_evaluation()
        if not self.record.is_file():
            known = ", ".join(sorted(name for name in self.trainer.storage.latest() if "/" in name)) or "none"
            logger.warning("TEST.BEST_METRIC '%s' was never reported; there were: %s.", self.metric, known)


class LossCurves(HookBase):
    """Draw ``losses.png`` from ``metrics.json`` every ``period`` iterations and at the end."""

    def __init__(self, folder: str, period: int):
        self.folder, self.period = Path(folder), period

    def _draw(self):
        if (self.folder / "metrics.json").is_file():
            plot_losses(self.folder / "metrics.json", self.folder / "losses.png")

    def after_step(self):
        if self.period > 0 and (self.trainer.iter + 1) % self.period == 0:
            self._draw()

    def after_train(self):
        self._draw()


class Progress(EventWriter):
    """Losses, learning rate, times, memory and ETA: a tqdm bar on a terminal, plain log lines elsewhere."""

    def __init__(self, start_iter: int, max_iter: int, window: int):
        self.max_iter, self.window = max_iter, window
        self.bar = tqdm(initial=start_iter, total=max_iter, unit="it", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.written = -1

    def write(self):
        storage = get_event_storage()
        if storage.iter == self.written or storage.iter >= self.max_iter:
            return
        self.written = storage.iter
        latest = storage.latest_with_smoothing_hint(self.window)
        values = {name: latest[name][0] for name in sorted(latest) if "loss" in name and not name.startswith("val_")}
        values |= {name: latest[name][0] for name in ("lr", "time", "data_time") if name in latest}
        text = "  ".join(f"{name}: {value:.4g}" for name, value in values.items()) + f"  memory: {peak_memory()}"
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(storage.iter + 1 - self.bar.n)
            return
        eta = "?"
        if "time" in latest:
            seconds = storage.history("time").median(1000) * (self.max_iter - storage.iter - 1)
            eta = tqdm.format_interval(seconds)
        logger.info("iteration %d/%d  eta: %s  %s", storage.iter + 1, self.max_iter, eta, text)

    def close(self):
        self.bar.close()


def peak_memory() -> str:
    """The most memory this process has used so far: of the GPU when it uses one, else resident."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    if on_gpu:
        return f"{on_gpu / 2**20:.0f} MiB (GPU)"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


def build_writers(folder: str, start_iter: int, max_iter: int, period: int) -> list[EventWriter]:
    """Progress on the terminal (or lines), ``metrics.json`` and TensorBoard files in ``folder``.

    Each record is the median over the ``period`` iterations since the last one, so that a resumed run writes the same.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    metrics = str(Path(folder) / "metrics.json")
    return [Progress(start_iter, max_iter, period), JSONWriter(metrics, period), TensorboardXWriter(folder, period)]
