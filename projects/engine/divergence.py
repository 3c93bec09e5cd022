"""The guard against non-finite losses: all processes stop together, and what led there is kept."""

import json
import logging
import math
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm

from projects.errors import UserError

from .checkpoint import write_atomically

logger = logging.getLogger(__name__)


class DivergedError(UserError):
    """A loss is not finite. Raised by all processes in the same iteration, before the model's backward pass."""


def mean_over_processes(losses: dict[str, torch.Tensor], flag: bool) -> tuple[dict[str, float], bool]:
    """Mean of each scalar loss over the processes, and whether ``flag`` is set in any of them.

    A loss that is not finite anywhere comes out non-finite everywhere, and when a process has no losses at all because its
    forward pass broke off, all get ``{"forward": nan}``: the processes decide alike, before any waits for gradients.
    """
    device = next(iter(losses.values())).device if losses else None
    if comm.get_world_size() > 1:
        device = device or ("cuda" if dist.get_backend() == "nccl" else "cpu")
        flags = torch.tensor([float(not losses), float(flag)], device=device)
        dist.all_reduce(flags)
        failed, flag = (flags > 0).tolist()
    else:
        failed = not losses
    if failed:
        return {"forward": math.nan}, flag
    names = sorted(losses)
    means = torch.stack([losses[name].detach().float().reshape(()) for name in names])
    if comm.get_world_size() > 1:
        dist.all_reduce(means)
    means = (means / comm.get_world_size()).tolist()
    return dict(zip(names, means, strict=True)), flag


def check_finite(means: dict[str, float], losses: dict[str, torch.Tensor], batch: list[dict], context: dict) -> None:
    """Raise DivergedError in every process when a mean of :func:`mean_over_processes` is not finite.

    Args:
        means: losses over all processes.
        losses: losses of this process; empty when its forward pass broke off.
        batch: the mapped samples of this process.
        context: "cfg", "iteration", "seed" (of the loader), "rng" (generator states before the step), and "save_weights", a
            function that writes the model's weights to a path, "advice", what the trainer adds to the message.

    Writes ``OUTPUT_DIR/diverged_<iteration>/``: ``rank<r>.pth`` of each process whose own loss is not finite (losses, image
    ids, samples, generator states), ``model.pth`` and ``config.yaml``. ``tools/replay_divergence.py`` runs it again.
    """
    bad = [name for name, mean in means.items() if not math.isfinite(mean)]
    if not bad:
        return
    cfg: CfgNode = context["cfg"]
    folder = Path(cfg.OUTPUT_DIR) / f"diverged_{context['iteration']:07d}"
    own = {name: float(loss.detach()) for name, loss in losses.items()} or {"forward": math.nan}
    ids = [sample.get("image_id") for sample in batch]
    if not all(map(math.isfinite, own.values())):
        logger.error("Iteration %d: losses %s on images %s", context["iteration"], json.dumps(own), ids)
        record = {
            "losses": own,
            "iteration": context["iteration"],
            "image_ids": ids,
            "file_names": [sample.get("file_name") for sample in batch],
            "samples": [sample["drawn_as"] for sample in batch],
            "seed": context["seed"],
            "rng": context["rng"],
        }
        write_atomically(folder / f"rank{comm.get_rank()}.pth", lambda file: torch.save(record, file))
    if comm.is_main_process():
        write_atomically(folder / "config.yaml", lambda file: file.write(cfg.dump().encode()))
        context["save_weights"](folder / "model.pth")
    comm.synchronize()
    all_ids = comm.all_gather(ids)  # so that every process has the same message
    raise DivergedError(
        f"Training diverged in iteration {context['iteration']}: {', '.join(bad)} not finite. Image ids by process: {all_ids}. "
        f"The weights before this step and what reproduces it are in '{folder}': run `python tools/replay_divergence.py "
        f"{folder}`. Usual remedies: a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, SOLVER.CLIP_GRADIENTS.ENABLED True, "
        f"data without defects (tools/validate_dataset.py).{context['advice']}"
    )
