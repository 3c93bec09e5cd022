import contextlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from projects.engine.checkpoint import rng_state, set_rng_state
from projects.engine.divergence import DivergedError
from projects.engine.hooks import average_bn_statistics, peak_memory
from projects.engine.launch import guarded
from projects.engine.optimizer import build_optimizer
from projects.engine.trainer import StandardTrainer
from projects.errors import CheckpointError, ConfigError
from projects.evaluation import evaluate

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(cfg: CfgNode, resume: bool = False, stop_after: int | None = None, seed: int = 0) -> StandardTrainer:
    """Train; with ``stop_after``, until SIGTERM arrives in the iteration of that number."""
    torch.manual_seed(seed)
    trainer = StandardTrainer(cfg)
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


def state_of(trainer: StandardTrainer) -> dict[str, torch.Tensor]:
    tensors = dict(trainer.model.state_dict())
    for i, values in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return tensors


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_same_run_bit_by_bit(tiny_cfg, tmp_path, workers):
    opts = ["SOLVER.MAX_ITER", 20, "DATALOADER.NUM_WORKERS", workers, "TEST.EVAL_PERIOD", 5, "DATASETS.TEST", ()]
    whole = run(tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "parts"))
    first = run(cfg, stop_after=9)
    assert first.stopped_by == signal.SIGTERM and first.iter == 9
    second = run(cfg, resume=True, seed=1)
    assert second.start_iter == 10
    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    curve = {name: losses(tmp_path / name) for name in ("whole", "parts")}
    assert curve["whole"] == curve["parts"] and len(curve["whole"]) == 20


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


def test_workers_do_not_change_what_is_seen(tiny_cfg):
    batches = []
    for workers in (0, 1, 2):
        trainer = StandardTrainer(tiny_cfg("DATALOADER.NUM_WORKERS", workers))
        batches.append([next(trainer.loader) for _ in range(4)])
    for other in batches[1:]:
        for batch, expected in zip(other, batches[0], strict=True):
            assert [s["image_id"] for s in batch] == [s["image_id"] for s in expected]
            assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, expected, strict=True))


def test_a_finished_run_can_go_on(tiny_cfg, tmp_path):
    run(tiny_cfg("SOLVER.MAX_ITER", 2, "DATASETS.TEST", ()))
    longer = tiny_cfg("SOLVER.MAX_ITER", 4, "DATASETS.TEST", ())
    interrupted = run(longer, resume=True, stop_after=2)
    assert interrupted.start_iter == 2 and interrupted.iter == 2
    names = {path.name for path in (tmp_path / "output").glob("model_*.pth")}
    assert names == {"model_0000001.pth", "model_0000002.pth"}
    assert run(longer, resume=True).start_iter == 3
    assert run(longer, resume=True).start_iter == 4
    with pytest.raises(ConfigError, match=r"SOLVER.MAX_ITER is 3, .*model_final.pth' was saved after 4 iterations"):
        run(tiny_cfg("SOLVER.MAX_ITER", 3, "DATASETS.TEST", ()), resume=True)


def test_a_damaged_final_is_set_aside(tiny_cfg, tmp_path):
    opts = ["DATASETS.TEST", (), "SOLVER.CHECKPOINT_PERIOD", 2]
    run(tiny_cfg("SOLVER.MAX_ITER", 3, *opts))
    folder = tmp_path / "output"
    final = folder / "model_final.pth"
    final.write_bytes(final.read_bytes()[:1000])
    interrupted = run(tiny_cfg("SOLVER.MAX_ITER", 9, *opts), resume=True, stop_after=2)
    assert interrupted.start_iter == 2
    names = {path.name for path in folder.glob("model_*")}
    assert names == {"model_0000001.pth", "model_0000002.pth", "model_final.pth.damaged"}
    assert all(torch.load(path, weights_only=True) for path in folder.glob("model_0*.pth"))


def evaluated_instead(monkeypatch, function) -> None:
    monkeypatch.setattr("projects.engine.trainer.evaluate", lambda cfg, model: function() or {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_in_an_evaluation_ends_it_and_loses_nothing(tiny_cfg, tmp_path, monkeypatch, number):
    opts = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0]
    evaluated_instead(monkeypatch, lambda: None)
    whole = run(tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "parts"))
    after = []
    evaluated_instead(monkeypatch, lambda: signal.raise_signal(number) or after.append("the signal"))
    for _ in range(2):  # a periodic evaluation and the last one
        assert guarded(run, cfg, True) == 128 + number
    assert not after
    evaluated_instead(monkeypatch, lambda: None)
    parts = run(cfg, resume=True)
    assert parts.start_iter == 4
    expected, found = state_of(whole), state_of(parts)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_one_signal_that_comes_twice_is_one(tiny_cfg, monkeypatch):
    trainer = StandardTrainer(tiny_cfg("SOLVER.MAX_ITER", 4, "DATASETS.TEST", ()))
    step = trainer.run_step

    def signalled_twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        step()

    trainer.run_step = signalled_twice
    trainer.train()
    assert trainer.stopped_by == signal.SIGINT and trainer.iter == 0


def test_after_an_error_nothing_is_evaluated_and_the_curves_are_written(tiny_cfg, tmp_path, monkeypatch):
    evaluated = []
    evaluated_instead(monkeypatch, lambda: evaluated.append(1))
    trainer = StandardTrainer(tiny_cfg("SOLVER.MAX_ITER", 2, "SOLVER.LOG_PERIOD", 10))
    step = trainer.run_step

    def fails_in_the_last_iteration():
        step()
        if trainer.iter == 1:
            raise RuntimeError("in the last iteration")

    trainer.run_step = fails_in_the_last_iteration
    with pytest.raises(RuntimeError, match="in the last iteration"):
        trainer.train()
    assert not evaluated
    assert losses(tmp_path / "output").keys() == {1} and (tmp_path / "output/losses.png").is_file()


def test_weights_that_fill_nothing_are_refused(tiny_cfg, tmp_path):
    torch.save({"model": {"another.weight": torch.zeros(3)}}, tmp_path / "another.pth")
    with pytest.raises(CheckpointError, match="another.pth' fills none of the model's"):
        run(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "another.pth")))


@pytest.mark.parametrize("images", [1, 4])
def test_resuming_with_another_batch_size_goes_on_after_as_many_images(tiny_cfg, caplog, images):
    opts = ["DATALOADER.ASPECT_RATIO_GROUPING", False, "DATALOADER.NUM_WORKERS", 0]
    before = StandardTrainer(tiny_cfg(*opts, "SOLVER.IMS_PER_BATCH", 2)).loader
    seen = [sample["drawn_as"] for _ in range(6) for sample in next(before)]
    loader = StandardTrainer(tiny_cfg(*opts, "SOLVER.IMS_PER_BATCH", images)).loader
    state = StandardTrainer(tiny_cfg(*opts, "SOLVER.IMS_PER_BATCH", 2)).loader.state_dict() | {"batches": 4}
    loader.load_state_dict(state)
    assert [sample["drawn_as"] for _ in range(4 // images) for sample in next(loader)] == seen[8:]
    assert f"2 images per batch, this run has 1 and {images}" in caplog.text


def test_a_cpu_run_leaves_the_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    state = rng_state()
    assert "cuda" not in state
    set_rng_state(state | {"cuda": torch.zeros(16, dtype=torch.uint8)})
    assert not torch.cuda.is_initialized() and "GPU" not in peak_memory()


def test_resuming_another_model_is_refused(tiny_cfg):
    run(tiny_cfg("SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()))
    with pytest.raises(CheckpointError, match="do not fit this config|does not fit this config"):
        run(tiny_cfg("SOLVER.MAX_ITER", 2, "DATASETS.TEST", (), "MODEL.ROI_MASK_HEAD.CONV_DIM", 8), resume=True)


def test_precise_bn_is_saved_and_resumes_exactly(tiny_cfg, tmp_path):
    opts = ["SOLVER.MAX_ITER", 6, "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 2, "TEST.PRECISE_BN.ENABLED", True]
    opts += ["TEST.PRECISE_BN.NUM_ITER", 2, "DATALOADER.NUM_WORKERS", 0]
    plain = run(tiny_cfg(*opts, "TEST.PRECISE_BN.ENABLED", False, "OUTPUT_DIR", str(tmp_path / "plain")))
    whole = run(tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "parts"))
    run(cfg, stop_after=2)
    parts = run(cfg, resume=True)
    expected, found, without = state_of(whole), state_of(parts), state_of(plain)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [name for name in expected if not torch.equal(expected[name], without[name])]
    saved = torch.load(tmp_path / "whole/model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(expected[name], value) for name, value in saved.items())


class BehindRoIs(torch.nn.Module):
    """A batch norm on all values of a batch, and one on those above 0, as on foreground RoIs: (N, 2) each."""

    def __init__(self):
        super().__init__()
        self.all, self.some, self.unused = (torch.nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x):
        self.all(x)
        self.some(x[x[:, 0] > 0])


def test_precise_bn_by_hand():
    """Mean and variance of all rows, whatever batch they come in; a layer without any row keeps its statistics."""
    model = BehindRoIs()
    batches = [torch.tensor([[1.0, 2.0], [3.0, 6.0], [-1.0, 4.0]]), torch.tensor([[-3.0, 0.0], [-5.0, 8.0]])]
    average_bn_statistics(model, batches)
    assert model.all.running_mean.tolist() == [-1, 4]
    torch.testing.assert_close(
        model.all.running_var, torch.tensor([8.0, 8.0])
    )  # (4 + 16 + 0 + 4 + 16) / 5, (4 + 4 + 16 + 16) / 5
    assert model.some.running_mean.tolist() == [2, 4] and model.some.running_var.tolist() == [1, 4]
    assert model.unused.running_mean.tolist() == [0, 0] and model.unused.running_var.tolist() == [1, 1]
    average_bn_statistics(model, batches[1:])  # no row for the second layer
    assert model.all.running_mean.tolist() == [-4, 4]
    assert model.some.running_mean.tolist() == [2, 4] and model.some.running_var.tolist() == [1, 4]
    assert model.all.training and not model.all._forward_pre_hooks


def test_training_leaves_what_a_person_looks_at(tiny_cfg, tmp_path):
    cfg = tiny_cfg(
        *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_KEPT", 2, "TEST.EVAL_PERIOD", 2),
        *("TEST.VALIDATION_LOSS", True, "TEST.BEST_METRIC", "bbox/AP", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    )
    trainer = run(cfg)
    folder = tmp_path / "output"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"losses.png", "metrics.json", "last_checkpoint", "model_best.pth", "best.json"} <= names
    assert {name for name in names if name.startswith("model_0")} == {"model_0000001.pth", "model_0000002.pth"}
    assert len([name for name in names if "shapes_val/pictures" in name]) == 2
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    with_validation = [row for row in rows if "val_total_loss" in row]
    assert len(with_validation) == 2 and {"val_loss_mask", "val_loss_rpn_cls"} <= with_validation[0].keys()
    assert {"bbox", "segm"} <= trainer.results.keys()
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 3


def test_validation_loss_moves_no_weight_and_no_generator(tiny_cfg, monkeypatch):
    opts = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 1]
    plain = run(tiny_cfg(*opts, "DATASETS.TEST", (), "OUTPUT_DIR", str(tiny_cfg().OUTPUT_DIR) + "_plain"))
    iterations = []  # that losses which depend on it see
    monkeypatch.setattr(evaluate, "EventStorage", lambda iteration: iterations.append(iteration) or EventStorage(iteration))
    evaluated = run(tiny_cfg(*opts, "TEST.VALIDATION_LOSS", True))
    assert iterations == [0, 1, 2, 3]
    expected, found = state_of(plain), state_of(evaluated)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_accumulated_batches_make_one_step_on_their_mean_gradient(tiny_cfg):
    opts = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.1, "DATALOADER.NUM_WORKERS", 0]
    trainer, plain = StandardTrainer(tiny_cfg(*opts, "SOLVER.ACCUMULATE", 2)), StandardTrainer(tiny_cfg(*opts))
    plain.model.load_state_dict(trainer.model.state_dict())
    torch.manual_seed(0)
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
        logged = {name: value for name, (value, _) in trainer.storage.latest().items()}
    torch.manual_seed(0)
    with EventStorage(0):
        found = [plain.model(next(plain.loader)) for _ in range(2)]
    (sum(sum(losses.values()) for losses in found) / 2).backward()
    plain.optimizer.step()
    gradients = [{name: p.grad for name, p in t.model.named_parameters()} for t in (trainer, plain)]
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    for name, expected in state_of(plain).items():
        torch.testing.assert_close(state_of(trainer)[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    for name in found[0]:
        assert logged[name] == pytest.approx((found[0][name] + found[1][name]).item() / 2, rel=1e-5)
    assert trainer.loader.batches == 2 and trainer.scheduler.last_epoch == 1


def test_accumulation_resumes_exactly(tiny_cfg, tmp_path):
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.ACCUMULATE", 3, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", ()]
    whole = run(tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "whole")))
    cfg = tiny_cfg(*opts, "OUTPUT_DIR", str(tmp_path / "parts"))
    run(cfg, stop_after=1)
    parts = run(cfg, resume=True, seed=1)
    assert parts.start_iter == 2 and parts.loader.batches == 12
    expected, found = state_of(whole), state_of(parts)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_nothing_to_accumulate_is_refused(tiny_cfg):
    with pytest.raises(ConfigError, match="SOLVER.ACCUMULATE is 0: expected at least 1"):
        StandardTrainer(tiny_cfg("SOLVER.ACCUMULATE", 0))


def test_diverging_loss_is_named_and_can_be_replayed(tiny_cfg, tmp_path):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 1e20, "DATASETS.TEST", (), "SOLVER.OPTIMIZER", "SGD")
    with pytest.raises(DivergedError, match=r"(loss_\w+|forward) not finite.*Image ids") as caught:
        run(cfg)
    folder = next((tmp_path / "output").glob("diverged_*"))
    assert str(folder) in str(caught.value)
    assert sum(path.stat().st_size for path in folder.glob("rank*.pth")) < 100_000
    done = subprocess.run(
        [sys.executable, REPO / "tools/replay_divergence.py", folder], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and re.search(r"\b(nan|inf|NaN)\b", done.stdout), done.stdout + done.stderr


def test_replay_builds_the_model_as_training_did(tiny_cfg, tmp_path, monkeypatch):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 6, "SOLVER.BASE_LR", 1e20, "DATASETS.TEST", (), "MODEL.FAST_ROI_ALIGN", True)
    with pytest.raises(DivergedError):
        run(cfg)
    replaced = []
    monkeypatch.setattr("projects.modeling.build.replace_roi_align", replaced.append)
    spec = importlib.util.spec_from_file_location("replay_divergence", REPO / "tools/replay_divergence.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with contextlib.suppress(FloatingPointError):
        tool.replay(next((tmp_path / "output").glob("diverged_*")), None)
    assert len(replaced) == 1


def test_weights_after_divergence_are_those_before_the_step(tiny_cfg, tmp_path, monkeypatch):
    trainer = StandardTrainer(tiny_cfg("SOLVER.MAX_ITER", 3, "DATASETS.TEST", ()))
    forward = trainer.parallel_model.forward
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(
        trainer.parallel_model, "forward", lambda batch: {k: v * float("inf") for k, v in forward(batch).items()}
    )
    with pytest.raises(DivergedError, match="iteration 0"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("name, kind", [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_optimizer_follows_detectron2s_rules(tiny_cfg, name, kind):
    cfg = tiny_cfg(
        *("SOLVER.OPTIMIZER", name, "SOLVER.WEIGHT_DECAY", 0.3, "SOLVER.WEIGHT_DECAY_NORM", 0.1),
        *("SOLVER.WEIGHT_DECAY_BIAS", 0.2, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.BASE_LR", 0.5),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01),
    )
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, kind)
    rules = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rules[id(model[0].weight)] == (0.5, 0.3)
    assert rules[id(model[0].bias)] == (1.0, 0.2)
    assert rules[id(model[1].weight)] == (0.5, 0.1)
    model(torch.randn(4, 2) * 100).square().sum().backward()
    model[0].weight.grad.fill_(5.0)
    optimizer.step()
    assert model[0].weight.grad.max() == pytest.approx(0.01)


def test_unknown_optimizer_is_refused(tiny_cfg):
    with pytest.raises(ConfigError, match="Lion.*SGD, AdamW"):
        build_optimizer(tiny_cfg("SOLVER.OPTIMIZER", "Lion"), torch.nn.Linear(1, 1))
