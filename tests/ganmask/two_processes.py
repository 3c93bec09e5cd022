"""Runs of the game with two CPU processes, for test_processes.py: ``python two_processes.py CONFIG OUTPUT_DIR``."""

import json
import sys
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ganmask.trainer import AdversarialTrainer, frozen
from projects import load_config
from projects.engine.launch import launch


def gradients(trainer: AdversarialTrainer) -> dict[str, torch.Tensor]:
    nets = {"model": trainer.model, "discriminators": trainer.discriminators}
    named = {f"{part}.{name}": p for part, net in nets.items() for name, p in net.named_parameters()}
    return {name: p.grad.clone() for name, p in named.items() if p.requires_grad}


def weights(trainer: AdversarialTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for net in (trainer.model, trainer.discriminators) for p in net.parameters()])


def step_together(trainer: AdversarialTrainer, batches: list) -> dict[str, torch.Tensor]:
    """A step of the trainer in both processes; each net's gradients are those of its half of the step."""
    forward, batch = trainer.forward, batches[comm.get_rank()]

    def forward_this(_):
        torch.manual_seed(100 + comm.get_rank())
        return forward(batch)

    trainer.forward = forward_this
    trainer.run_step()
    trainer.forward = forward
    return gradients(trainer)


def step_alone(trainer: AdversarialTrainer, batches: list) -> dict[str, torch.Tensor]:
    """The same step in one process, which runs both halves of the batch and averages their gradients."""
    for net in (trainer.model, trainer.discriminators):
        net.zero_grad(set_to_none=True)
    halves, replaced = [], trainer.replaced
    for half, batch in enumerate(batches):
        torch.manual_seed(100 + half)
        halves.append(trainer.model(batch, return_samples=True))
    for _, samples in halves:
        losses = trainer.adversarial_losses.discriminator(trainer.discriminators(samples.detach()))
        (sum(losses.values()) / 2).backward()
    trainer.discriminator_optimizer.step()
    for losses, samples in halves:
        with frozen(trainer.discriminators):
            adversarial = trainer.adversarial_losses.generator(trainer.discriminators(samples))
        kept = {name: loss for name, loss in losses.items() if name not in replaced}
        (sum((kept | adversarial).values()) / 2).backward()
    return gradients(trainer)


def same_gradients(trainer: AdversarialTrainer, folder: Path) -> None:
    batches = comm.all_gather(next(trainer.loader))
    nets = trainer.model, trainer.discriminators
    start = [{name: t.clone() for name, t in net.state_dict().items()} for net in nets]
    trainer.iter = 0
    with EventStorage(0) as trainer.storage:
        together = step_together(trainer, batches)
        for net, state in zip(nets, start, strict=True):
            net.load_state_dict(state)
        trainer.discriminator_optimizer.state.clear()
        alone = step_alone(trainer, batches)
    torch.save({"together": together, "alone": alone}, folder / f"gradients{comm.get_rank()}.pth")


def without_objects(batch: list[dict]) -> list[dict]:
    return [dict(sample, instances=sample["instances"][:0]) for sample in batch]


def breaks_off(batch, return_samples):
    raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")


def note_equality(trainer: AdversarialTrainer, folder: Path) -> None:
    everywhere = comm.gather(weights(trainer))
    if comm.is_main_process():
        equal = all(torch.equal(everywhere[0], other) for other in everywhere)
        (folder / "result.json").write_text(json.dumps({"equal": equal, "iterations": trainer.iter}))


def case(config: str, folder: str) -> int:
    """Compare gradients. Then four iterations: in the first the second process has no foreground, in the second none has, the
    third is as usual, and in the last the second process's forward pass breaks off."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = AdversarialTrainer(load_config(config, ["OUTPUT_DIR", folder]))
    trainer.resume_or_load(resume=False)
    same_gradients(trainer, Path(folder))
    generate, without = trainer.generate, {0: [1], 1: [0, 1]}

    def changed(batch):
        if trainer.iter == 3:
            note_equality(trainer, Path(folder))
            if comm.get_rank() == 1:
                trainer.model.forward = breaks_off
        return generate(without_objects(batch) if comm.get_rank() in without.get(trainer.iter, []) else batch)

    trainer.generate = changed
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(launch(case, tuple(sys.argv[1:]), processes=2, use_gpu=False))
