"""Biased training: alpha is a function of the iteration alone."""

import json
import signal
from pathlib import Path

import pytest
import torch

from maskplus.biased_training import BiasedTraining
from projects import load_config
from projects.engine.trainer import StandardTrainer
from projects.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


def test_alpha_of_the_paper(heads):
    built = heads("BIASED", True, "SOLVER.MAX_ITER", 180_000)
    biased = built.module.mask_head.biased_training
    assert [biased.weight(i) for i in (0, 1, 89_999, 90_000, 179_999)] == [1.5, 1.5, 1.5, 1.0, 1.0]


@pytest.mark.parametrize("fraction, first", [(0.0, 0), (0.07, 7), (0.5, 50), (0.57, 57), (1.0, 100)])
def test_fraction(heads, fraction, first):
    built = heads("BIASED", True, "BIASED_FRACTION", fraction, "BIASED_ALPHA", 2.0, "SOLVER.MAX_ITER", 100)
    biased = built.module.mask_head.biased_training
    assert biased == BiasedTraining(2.0, first)
    assert [i for i in range(100) if biased.weight(i) == 2.0] == list(range(first))


def test_all_mask_losses_and_no_other_are_weighed(heads):
    techniques = ["QUASI_SCALES", [0.5, 2.0]]
    plain = heads(*techniques)
    biased = heads(*techniques, "BIASED", True)  # MAX_ITER is 10
    expected = plain.train()
    for iteration, alpha in ((4, 1.5), (5, 1.0)):
        losses = biased.train(iteration)
        assert biased.storage.latest()["biased_training/alpha"][0] == alpha
        for name, loss in losses.items():
            assert loss.item() == pytest.approx((alpha if "mask" in name else 1) * expected[name].item(), rel=1e-6), name


def test_wrong_keys_are_refused(heads):
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"BIASED_ALPHA is {alpha}: expected a positive weight"):
            heads("BIASED", True, "BIASED_ALPHA", alpha)
    with pytest.raises(ConfigError, match="BIASED_FRACTION is 50.0: expected a part of the training, 0 to 1"):
        heads("BIASED", True, "BIASED_FRACTION", 50.0)


def test_a_validation_loss_is_weighed_as_its_iteration_is(heads):
    built = heads("BIASED", True)  # MAX_ITER is 10
    losses = {}
    for iteration in (0, 9):
        with torch.no_grad():
            losses[iteration] = built.train(iteration)
    assert losses[0]["loss_mask"].item() == pytest.approx(1.5 * losses[9]["loss_mask"].item(), rel=1e-6)
    assert losses[0]["loss_cls"] == losses[9]["loss_cls"]


def run(tiny_opts, folder: Path, resume: bool = False, stop_after: int | None = None) -> StandardTrainer:
    """Train the complete small model for 4 iterations; with ``stop_after``, SIGTERM arrives in that one."""
    config = str(REPO / "configs/maskplus/shapes_maskplus_R_18_FPN.yaml")
    words = ["SOLVER.MAX_ITER", 4, "DATASETS.TEST", (), "MODEL.MASKPLUS.CONV_DIMS", [20, 16], "OUTPUT_DIR", str(folder)]
    torch.manual_seed(int(resume))
    trainer = StandardTrainer(load_config(config, [*tiny_opts, *words]))
    trainer.resume_or_load(resume)
    step = trainer.run_step

    def step_then_signal():
        if trainer.iter == stop_after:
            signal.raise_signal(signal.SIGTERM)
        step()

    trainer.run_step = step_then_signal
    trainer.train()
    return trainer


def curve(folder: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: row[name] for row in rows if name in row}


def test_a_run_resumed_across_the_switch_is_the_same_run(tiny_opts, tmp_path):
    whole = run(tiny_opts, tmp_path / "whole")
    assert list(curve(tmp_path / "whole", "biased_training/alpha").values()) == [1.5, 1.5, 1.0, 1.0]
    assert run(tiny_opts, tmp_path / "parts", stop_after=0).iter == 0
    second = run(tiny_opts, tmp_path / "parts", resume=True)
    assert second.start_iter == 1
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert "roi_heads.mask_head.boundary_refinement.blocks.0.0.running_mean" in expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for name in ("loss_mask", "loss_mask_half", "total_loss", "biased_training/alpha"):
        assert curve(tmp_path / "whole", name) == curve(tmp_path / "parts", name), name
