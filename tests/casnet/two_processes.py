"""A run with two CPU processes, for test_processes.py: ``python two_processes.py CONFIG OUTPUT_DIR``."""

import copy
import json
import sys
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from projects import load_config
from projects.engine.launch import launch
from projects.engine.trainer import StandardTrainer


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def without_things(batch: list[dict]) -> list[dict]:
    return [dict(sample, owner=sample["owner"].clamp(max=0), instances=sample["instances"][:0]) for sample in batch]


def same_gradients(trainer: StandardTrainer, folder: Path) -> None:
    """Save the gradients of a step of the two processes, and what one process gets that runs all batches and averages."""
    model, forward, start = trainer.model, trainer.forward, copy.deepcopy(trainer.model.state_dict())
    batches = [next(trainer.loader) for _ in range(trainer.accumulate)]
    batches = [without_things(batch) if comm.get_rank() == 1 else batch for batch in batches]
    trainer.iter, own = 0, iter(batches)
    trainer.forward = lambda _: forward(next(own))
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
    trainer.forward = forward
    together = gradients(model)

    model.load_state_dict(start)
    model.zero_grad(set_to_none=True)
    everything = [batch for of_process in comm.all_gather(batches) for batch in of_process]
    for batch in everything:
        (sum(model(batch).values()) / len(everything)).backward()
    torch.save({"together": together, "alone": gradients(model)}, folder / f"gradients{comm.get_rank()}.pth")
    model.load_state_dict(start)


def case(config: str, folder: str) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = StandardTrainer(load_config(config, ["OUTPUT_DIR", folder]))
    trainer.resume_or_load(resume=False)
    trainer.parallel_model.train()
    same_gradients(trainer, Path(folder))
    forward = trainer.forward
    if comm.get_rank() == 1:
        trainer.forward = lambda batch: forward(without_things(batch))
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    everywhere = comm.gather(weights)
    if comm.is_main_process():
        equal = all(torch.equal(weights, other) for other in everywhere)
        (Path(folder) / "result.json").write_text(json.dumps({"equal": equal, "iterations": trainer.iter}))
    return 0


if __name__ == "__main__":
    sys.exit(launch(case, tuple(sys.argv[1:]), processes=2, use_gpu=False))
