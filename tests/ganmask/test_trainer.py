"""The game: who steps when, what a checkpoint holds, and that without it training is Mask R-CNN's."""

import json
import signal

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image

from ganmask.discriminators import Judgement
from ganmask.losses import box_generator_loss, mask_distance
from ganmask.trainer import AdversarialTrainer
from projects.engine.divergence import DivergedError
from projects.engine.trainer import StandardTrainer, build_trainer
from projects.errors import CheckpointError, ConfigError

GAME = {"loss_adv_box", "loss_adv_mask"}
MASK_RCNN = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}


def run(cfg, resume: bool = False, stop_after: int | None = None, seed: int = 0):
    """Train; with ``stop_after``, until SIGTERM arrives in the iteration of that number."""
    torch.manual_seed(seed)
    trainer = build_trainer(cfg)
    trainer.resume_or_load(resume)
    if stop_after is not None:
        step = trainer.run_step

        def step_then_signal():
            if trainer.iter == stop_after:
                signal.raise_signal(signal.SIGTERM)
            step()

        trainer.run_step = step_then_signal
    trainer.train()
    return trainer


def tensors_of(trainer) -> dict[str, torch.Tensor]:
    """Weights and buffers of the nets, and the states of the optimizers."""
    parts = {"model": trainer.model, "discriminators": getattr(trainer, "discriminators", None)}
    tensors = {f"{part}.{name}": t for part, net in parts.items() if net for name, t in net.state_dict().items()}
    for optimizer in ("optimizer", "discriminator_optimizer"):
        if hasattr(trainer, optimizer):
            for i, values in getattr(trainer, optimizer).state_dict()["state"].items():
                tensors |= {f"{optimizer}.{i}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def weights(trainer) -> dict[str, torch.Tensor]:
    named = {"model": trainer.model, "discriminators": trainer.discriminators}
    return {f"{part}.{name}": p.detach().clone() for part, net in named.items() for name, p in net.named_parameters()}


def with_gradient(net: torch.nn.Module, prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("losses", ["both", "adversarial"])
def test_who_steps_in_each_half(gan_cfg, losses):
    """First the discriminators alone, then the generator alone; and against the discriminators as they are by then."""
    opts = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.WARMUP_ITERS", 0, "SOLVER.WEIGHT_DECAY", 0.0]
    trainer = AdversarialTrainer(gan_cfg("MODEL.GANMASK.LOSSES", losses, *opts))
    seen, record = {}, trainer.record

    def between(found, *others):
        seen["between"], seen["losses"] = weights(trainer), {name: loss.item() for name, loss in found.items()}
        seen["discriminators"] = with_gradient(trainer.discriminators, "discriminators")
        seen["generator"] = with_gradient(trainer.model, "model")
        trainer.discriminator_optimizer.zero_grad(set_to_none=True)
        return record(found, *others)

    trainer.record = between
    before = weights(trainer)
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    after = weights(trainer)
    discriminators = {name for name in before if name.startswith("discriminators.")}
    assert set(differing(before, seen["between"])) == seen["discriminators"] == discriminators
    assert not seen["generator"]
    generator = with_gradient(trainer.model, "model")
    assert set(differing(seen["between"], after)) == generator
    assert not with_gradient(trainer.discriminators, "discriminators")
    assert {name.split(".")[1] for name in generator} == {"backbone", "proposal_generator", "roi_heads"}
    assert "model.roi_heads.box_predictor.bbox_pred.weight" in generator
    expected = MASK_RCNN - ({"loss_box_reg", "loss_mask"} if losses == "adversarial" else set()) | GAME
    assert seen["losses"].keys() == expected


def test_the_generator_plays_against_the_updated_discriminators(gan_cfg):
    trainer = AdversarialTrainer(gan_cfg("SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.05))
    batch, kept, generate = next(trainer.loader), {}, trainer.generate

    def generate_and_keep(batch):
        losses, kept["samples"] = generate(batch)
        return losses, kept["samples"]

    trainer.generate, trainer.iter = generate_and_keep, 0
    judged = {}
    with EventStorage(0) as trainer.storage:
        train = trainer.train_discriminators

        def train_and_look(samples):
            judged["before"] = trainer.discriminators(samples)
            train(samples)
            judged["after"] = trainer.discriminators(samples)

        trainer.train_discriminators = train_and_look
        losses = trainer.forward(batch)
        latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    after, scales = judged["after"], [1.0, 1.0, 2.0, 2.0, 2.0, 4.0]
    distances = {time: mask_distance(j.real_features, j.fake_features, scales).item() for time, j in judged.items()}
    assert losses["loss_adv_box"].item() == pytest.approx(0.025 * box_generator_loss(after.fake_scores).item(), rel=1e-5)
    assert losses["loss_adv_mask"].item() == pytest.approx(0.5 * distances["after"], rel=1e-5)
    assert latest["loss_disc_mask"] == pytest.approx(-0.5 * distances["before"], rel=1e-5)
    assert distances["after"] != pytest.approx(distances["before"], rel=1e-4)
    before = judged["before"]
    assert latest["accuracy_box_real"] == pytest.approx((before.real_scores > 0).float().mean().item())
    assert latest["accuracy_box_fake"] == pytest.approx((before.fake_scores < 0).float().mean().item())


def test_the_discriminators_learn(gan_cfg):
    """On the same samples again and again they win."""
    trainer = AdversarialTrainer(gan_cfg("SOLVER.WARMUP_ITERS", 0, "MODEL.GANMASK.DISCRIMINATOR_STEPS", 40))
    trainer.iter = 0
    with EventStorage(0) as trainer.storage:
        _, samples = trainer.generate(next(trainer.loader))
        apart = samples.detach()._replace(fake_boxes=samples.features, real_boxes=samples.features + 0.3)
        trainer.train_discriminators(apart)
        latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["accuracy_box_real"] > 0.9 and latest["accuracy_box_fake"] > 0.9
    assert latest["loss_disc_box"] < 0.025 * 2 * 0.69


def test_learning_rate_follows_the_generators(gan_cfg, make_samples):
    opts = ["SOLVER.WARMUP_ITERS", 2, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (4,)]
    trainer = AdversarialTrainer(gan_cfg(*opts, "SOLVER.MAX_ITER", 6, "MODEL.GANMASK.DISCRIMINATOR_LR_FACTOR", 0.25))
    rates = []
    with EventStorage(0) as trainer.storage:
        for _ in range(6):
            trainer.train_discriminators(make_samples(2, 16))
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            own = [group["lr"] for group in trainer.discriminator_optimizer.param_groups]
            assert own == [pytest.approx(rates[-1] / 4)] * len(own)
            trainer.optimizer.step()
            trainer.scheduler.step()
    assert rates[2] == 0.001 and rates[4] == pytest.approx(0.0001) and len(set(rates)) == 4


def test_several_discriminator_steps(gan_cfg):
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.OPTIMIZER", "AdamW"]
    trainer = run(gan_cfg(*opts, "MODEL.GANMASK.DISCRIMINATOR_STEPS", 3))
    steps = {float(state["step"]) for state in trainer.discriminator_optimizer.state.values()}
    assert steps == {6.0} and {float(state["step"]) for state in trainer.optimizer.state.values()} == {2.0}


def test_without_the_game_training_is_mask_rcnn_bit_by_bit(gan_cfg, tmp_path):
    """StandardTrainer with Detectron2's model; LOSSES "baseline"; and a game until it starts."""

    def iterations(name: str, *opts):
        return run(gan_cfg("SOLVER.MAX_ITER", 3, "OUTPUT_DIR", str(tmp_path / name), *opts))

    models = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
    plain = iterations("plain", *models, "SOLVER.TRAINER", "StandardTrainer")
    assert type(plain) is StandardTrainer
    expected = tensors_of(plain)

    baseline = iterations("baseline", "MODEL.GANMASK.LOSSES", "baseline")
    assert not hasattr(baseline, "discriminators")
    assert differing(tensors_of(baseline), expected) == []

    late = iterations("late", "MODEL.GANMASK.START_ITER", 2)
    assert differing({key: t for key, t in tensors_of(late).items() if not key.startswith("discriminator")}, expected)
    curves = {name: records(tmp_path / name) for name in ("plain", "baseline", "late")}
    own = {name: [{loss: record[loss] for loss in MASK_RCNN} for record in curve] for name, curve in curves.items()}
    assert own["baseline"] == own["late"] == own["plain"]
    assert ["loss_adv_box" in record for record in curves["late"]] == [False, False, True]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_resumed_run_is_the_same_run_bit_by_bit(gan_cfg, tmp_path, optimizer):
    """Interrupted before and after the game starts."""
    opts = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.MAX_ITER", 6, "MODEL.GANMASK.START_ITER", 2]
    whole = run(gan_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = gan_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "parts"))
    assert run(cfg, stop_after=0).iter == 0
    assert run(cfg, resume=True, stop_after=3, seed=1).iter == 3
    parts = run(cfg, resume=True, seed=2)
    assert parts.start_iter == 4
    expected, found = tensors_of(whole), tensors_of(parts)
    assert {name.split(".")[0] for name in expected} == {"model", "discriminators", "optimizer", "discriminator_optimizer"}
    assert differing(expected, found) == []
    for a, b in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        for name in ("total_loss", "loss_disc_box", "loss_disc_mask", "loss_adv_mask", "accuracy_box_real"):
            assert a.get(name) == b.get(name), name


def test_a_game_does_not_go_on_without_its_discriminators(gan_cfg, caplog):
    run(gan_cfg("SOLVER.MAX_ITER", 2, "MODEL.GANMASK.LOSSES", "baseline"))
    with pytest.raises(CheckpointError, match="model_final.pth' has no discriminators.*START_ITER 2"):
        run(gan_cfg("SOLVER.MAX_ITER", 3), resume=True)
    assert run(gan_cfg("SOLVER.MAX_ITER", 3, "MODEL.GANMASK.START_ITER", 2), resume=True).start_iter == 2
    assert "has no discriminators: they are new, for the game that starts in iteration 2" in caplog.text
    assert run(gan_cfg("SOLVER.MAX_ITER", 4), resume=True).start_iter == 3


def test_the_detector_is_a_plain_mask_rcnn(gan_cfg, tmp_path):
    cfg = gan_cfg("SOLVER.MAX_ITER", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    trainer = run(cfg)
    assert not [m for m in trainer.model.modules() if "iscriminator" in type(m).__name__]
    path = str(tmp_path / "output/model_final.pth")
    saved = torch.load(path, weights_only=True)
    assert saved["discriminators"].keys() == trainer.discriminators.state_dict().keys()
    plain = gan_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
    models = [build_model(plain).eval(), build_model(cfg).eval()]
    for model in models:
        assert saved["model"].keys() == model.state_dict().keys()
        DetectionCheckpointer(model).load(path)
    image = {"image": torch.randint(0, 255, (3, 64, 96)), "height": 64, "width": 96}
    with torch.no_grad():
        ours, theirs = (model([image])[0]["instances"].get_fields() for model in models[::-1])
    assert len(ours["scores"]) > 0 and torch.equal(ours["pred_boxes"].tensor, theirs["pred_boxes"].tensor)
    assert torch.equal(ours["scores"], theirs["scores"]) and torch.equal(ours["pred_masks"], theirs["pred_masks"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracies_by_hand(gan_cfg, dtype):
    """301 samples, which bfloat16 cannot count: 297 real boxes pass for real, 60 fake ones for fake."""
    trainer = AdversarialTrainer(gan_cfg())
    real, fake = torch.ones(301, dtype=dtype), torch.ones(301, dtype=dtype)
    real[:4], fake[:60] = -1, -1
    with EventStorage(0) as trainer.storage:
        trainer.log(Judgement(real, fake, [], []), {})
        logged = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert logged == {"accuracy_box_real": pytest.approx(297 / 301), "accuracy_box_fake": pytest.approx(60 / 301)}


def test_a_collapse_can_be_seen(gan_cfg, tmp_path):
    """Losses and accuracies are in metrics.json, in TensorBoard's files and in the picture."""
    run(gan_cfg("SOLVER.MAX_ITER", 3))
    folder = tmp_path / "output"
    for record in records(folder):
        assert 0 <= record["accuracy_box_real"] <= 1 and 0 <= record["accuracy_box_fake"] <= 1
        assert {"loss_adv_box", "loss_adv_mask", "loss_disc_box", "loss_disc_mask"} <= record.keys()
        assert record["total_loss"] == pytest.approx(sum(record[name] for name in MASK_RCNN | GAME), rel=1e-5)
    events = b"".join(path.read_bytes() for path in folder.glob("events.out.tfevents*"))
    assert all(name in events for name in (b"accuracy_box_real", b"accuracy_box_fake", b"loss_disc_mask"))
    with Image.open(folder / "losses.png") as picture:
        width, height = picture.size
    assert width > 2 * height, "the accuracies have no panel of their own"


def without_objects(batch: list[dict]) -> list[dict]:
    return [dict(sample, instances=sample["instances"][:0]) for sample in batch]


@pytest.mark.parametrize("losses", ["both", "adversarial"])
def test_images_without_objects(gan_cfg, tmp_path, losses):
    trainer = AdversarialTrainer(gan_cfg("SOLVER.MAX_ITER", 2, "MODEL.GANMASK.LOSSES", losses))
    generate = trainer.generate
    trainer.generate = lambda batch: generate(without_objects(batch))
    trainer.train()
    for record in records(tmp_path / "output"):
        assert [record[name] for name in sorted(GAME)] == [0, 0] and "accuracy_box_real" not in record
        assert record["loss_disc_box"] == record["loss_disc_mask"] == 0
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.discriminators.named_parameters())}
    assert [name for name, p in named.items() if p.requires_grad and p.grad is None] == []


def test_divergence_stops_before_anyone_steps(gan_cfg):
    trainer = AdversarialTrainer(gan_cfg("SOLVER.MAX_ITER", 2))
    generate, before = trainer.generate, weights(trainer)

    def broken(batch):
        losses, samples = generate(batch)
        return losses | {"loss_cls": losses["loss_cls"] * float("nan")}, samples

    trainer.generate = broken
    with pytest.raises(DivergedError, match="loss_cls not finite"):
        trainer.train()
    assert differing(before, weights(trainer)) == []


def test_losses_that_are_left_out_may_be_anything(gan_cfg, tmp_path):
    trainer = AdversarialTrainer(gan_cfg("SOLVER.MAX_ITER", 2, "MODEL.GANMASK.LOSSES", "adversarial"))
    generate = trainer.generate

    def broken(batch):
        losses, samples = generate(batch)
        return losses | {"loss_mask": losses["loss_mask"] * float("inf")}, samples

    trainer.generate = broken
    trainer.train()
    for record in records(tmp_path / "output"):
        assert "loss_mask" not in record and record["total_loss"] < float("inf")


def test_forward_that_breaks_off(gan_cfg):
    trainer = AdversarialTrainer(gan_cfg("SOLVER.MAX_ITER", 2))

    def broken(batch, return_samples):
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")

    trainer.parallel_model.forward = broken
    with pytest.raises(DivergedError, match="forward not finite"):
        trainer.train()


def test_discriminators_that_diverge_are_noticed(gan_cfg):
    trainer = AdversarialTrainer(gan_cfg("SOLVER.MAX_ITER", 3))
    before = weights(trainer)
    trainer.discriminators.box[0][0].weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="loss_adv_box not finite.*a later MODEL.GANMASK.START_ITER"):
        trainer.train()
    generator = [name for name in before if name.startswith("model.")]
    assert all(torch.equal(before[name], weights(trainer)[name]) for name in generator)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.GANMASK.LOSSES", "gan"], "LOSSES is 'gan': expected 'both', 'adversarial' or 'baseline'"),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "AdversarialTrainer needs GANMaskRCNN"),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "'StandardROIHeads': AdversarialTrainer needs GANMaskROIHeads"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], "'PrecomputedProposals': AdversarialTrainer needs a gen"),
        (["MODEL.GANMASK.DISCRIMINATOR_STEPS", 0], "DISCRIMINATOR_STEPS is 0: expected at least 1"),
        (["SOLVER.ACCUMULATE", 2], "ACCUMULATE is 2: AdversarialTrainer.*needs 1"),
    ],
)
def test_bad_settings(gan_cfg, opts, message):
    with pytest.raises(ConfigError, match=message):
        AdversarialTrainer(gan_cfg(*opts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(gan_cfg, tmp_path, dtype):
    cfg = gan_cfg("SOLVER.MAX_ITER", 4, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype)
    trainer = AdversarialTrainer(cfg)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    for player in ("model.", "discriminators."):
        assert [name for name in differing(before, after) if name.startswith(player)]
    for record in records(tmp_path / "output"):
        assert record.keys() >= GAME and 0 <= record["accuracy_box_real"] <= 1
