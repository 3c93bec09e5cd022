"""Training and evaluation on the shapes, as train_net.py runs them, for a few steps."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from projects.engine.trainer import build_trainer
from projects.evaluation.evaluate import evaluate, validation_losses

FEW = [
    "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.LOG_PERIOD", 1, "SOLVER.BASE_LR", 0.01,
    "DATALOADER.NUM_WORKERS", 0, "INPUT.CROP.SIZE", [64, 80], "INPUT.MIN_SIZE_TRAIN", (56, 80), "TEST.PICTURES", 1,
]  # fmt: skip
COCO_FORMAT = [  # of the panoptic shapes: eleven classes, the things first
    "DATASETS.TRAIN", ("shapes_train_panoptic",), "DATASETS.TEST", ("shapes_val_panoptic",),
    "MODEL.CASNET.THING_LABELS", list(range(8)), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 11,
]  # fmt: skip


@pytest.mark.parametrize("opts", [COCO_FORMAT, []], ids=["COCO", "Cityscapes"])
def test_panoptic_training_and_evaluation(cityscapes_root, narrow, tmp_path, opts):
    cfg = narrow("shapes_panoptic_joint", *FEW, *opts, "OUTPUT_DIR", str(tmp_path))
    trainer = build_trainer(cfg)
    trainer.train()
    losses = trainer.storage.history("total_loss").values()
    assert len(losses) == 4 and losses[-1][0] < losses[0][0]
    assert {"PQ", "SQ", "RQ", "PQ_th", "PQ_st"} <= trainer.results["panoptic_seg"].keys()
    assert trainer.results["segm"]["AP"] >= 0 and (opts or trainer.results["sem_seg"]["mIoU"] >= 0)
    assert len(list((tmp_path / "evaluation" / cfg.DATASETS.TEST[0] / "pictures").glob("*.png"))) == 1
    means = validation_losses(cfg, trainer.model)
    assert sorted(means) == ["val_loss_attributes", "val_loss_probability", "val_loss_semantic", "val_total_loss"]


def test_the_oracle_is_evaluated_with_the_weights_of_joint(shapes_root, narrow, tmp_path):
    opts = [*FEW, "OUTPUT_DIR", str(tmp_path)]
    model = build_model(narrow("shapes_instance_joint", *opts))
    model.heads["probability"][3].bias.data.fill_(1.0)  # seeds everywhere
    oracle_cfg = narrow("shapes_instance_oracle", *opts)
    oracle = build_model(oracle_cfg)
    oracle.load_state_dict(model.state_dict())
    results = evaluate(oracle_cfg, oracle.eval())
    assert list(results) == ["segm"] and "AP50-bicycle" in results["segm"]
    assert results["segm"]["AP50"] > 0  # some instances are the only one of their class: their pixels are given


def test_schedule_of_section_iv(narrow):
    """24 epochs without warm-up, a tenth of the rate after 18 and 22 of them."""
    cfg = narrow("panoptic_joint")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = {}
    for iteration in range(cfg.SOLVER.MAX_ITER):
        rates[iteration] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    assert [rates[i] for i in (0, 6693, 6694, 8180, 8181, 8924)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 24 * 2975
