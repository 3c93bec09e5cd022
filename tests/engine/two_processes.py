"""Runs with two CPU processes, for test_processes.py: ``python two_processes.py CASE CONFIG OUTPUT_DIR``."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from projects import load_config
from projects.engine import trainer as trainer_module
from projects.engine.divergence import mean_over_processes
from projects.engine.hooks import average_bn_statistics
from projects.engine.launch import launch
from projects.engine.trainer import StandardTrainer
from projects.errors import DataError


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(trainer: StandardTrainer, folder: Path) -> None:
    """Save the gradients of a step of the two processes, and what one process gets that runs both halves and averages."""
    batches = comm.all_gather(next(trainer.loader))
    with EventStorage(0):
        torch.manual_seed(100 + comm.get_rank())
        sum(trainer.parallel_model(batches[comm.get_rank()]).values()).backward()
        together = gradients(trainer.model)
        trainer.model.zero_grad(set_to_none=True)
        for half, batch in enumerate(batches):
            torch.manual_seed(100 + half)
            (sum(trainer.model(batch).values()) / 2).backward()
        alone = gradients(trainer.model)
        trainer.model.zero_grad(set_to_none=True)
    torch.save({"together": together, "alone": alone}, folder / f"gradients{comm.get_rank()}.pth")


def same_batch_norms(rank: int) -> None:
    """Rows 0 and 2 in the first process, 1 and 3 in the second; then none in the second."""
    layer = torch.nn.BatchNorm1d(1)
    rows = torch.tensor([[0.0], [2.0]])
    average_bn_statistics(layer, [rows + rank])
    assert (layer.running_mean.item(), layer.running_var.item()) == (1.5, 1.25)
    average_bn_statistics(layer, [rows if rank == 0 else rows[:0]])
    assert (layer.running_mean.item(), layer.running_var.item()) == (1, 1)


def without_objects(batch: list[dict]) -> list[dict]:
    return [dict(sample, instances=sample["instances"][:0]) for sample in batch]


def second_process_only(change):
    return change if comm.get_rank() == 1 else lambda losses_or_batch: losses_or_batch


def broken(_):
    raise DataError("an image that cannot be read")


def same_statistics(cfg, model: torch.nn.Module) -> dict:
    """Stands for the evaluation."""
    statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
    everywhere = comm.all_gather(torch.cat(statistics))
    return {"evaluated": {"equal": float(torch.equal(*everywhere)), "statistics": len(statistics)}}


def case(name: str, config: str, folder: str) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = load_config(config, ["OUTPUT_DIR", folder])
    trainer = StandardTrainer(cfg)
    trainer.resume_or_load(resume=False)
    forward = trainer.parallel_model.forward
    if name == "gradients":
        rank = comm.get_rank()
        assert mean_over_processes({"a": torch.tensor(float(rank))}, flag=rank == 1) == ({"a": 0.5}, True)
        same_batch_norms(rank)
        same_gradients(trainer, Path(folder))
        change = second_process_only(without_objects)
        trainer.parallel_model.forward = lambda batch: forward(change(batch))
    elif name == "diverge":
        change = second_process_only(lambda losses: {key: loss * float("nan") for key, loss in losses.items()})
        trainer.parallel_model.forward = lambda batch: change(forward(batch))
    elif name == "user_error":
        change = second_process_only(broken)
        trainer.parallel_model.forward = lambda batch: forward(change(batch))
    elif name == "user_error_in_both":
        trainer.parallel_model.forward = lambda batch: comm.synchronize() or broken(batch)
    elif name == "batch_norm":
        trainer_module.evaluate = same_statistics
    elif name == "signal" and comm.get_rank() == 0:
        threading.Timer(1.0, os.kill, (os.getppid(), signal.SIGTERM)).start()
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    everywhere = comm.gather(weights)
    if comm.is_main_process():
        equal = all(torch.equal(weights, other) for other in everywhere)
        (Path(folder) / "result.json").write_text(json.dumps({"equal": equal, "iterations": trainer.iter, **trainer.results}))
    return 0 if trainer.stopped_by is None else 128 + trainer.stopped_by


if __name__ == "__main__":
    sys.exit(launch(case, tuple(sys.argv[1:]), processes=2, use_gpu=False))
