"""The rows of the tables: settings as the paper states them, a move of both players, and Detectron2's DefaultPredictor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ganmask.discriminators import Discriminators
from ganmask.losses import AdversarialLosses
from projects import load_config

FOLDER = Path(__file__).resolve().parents[2] / "configs/ganmask"
ROWS = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("Base"))
NARROW = [
    "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.CONV_DIMS", [16],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 10, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.GANMASK.DISCRIMINATOR_WIDTH", 4,
    "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
]  # fmt: skip


def row(name: str, *opts):
    return load_config(str(FOLDER / f"{name}.yaml"), list(opts))


def narrow(name: str):
    cfg = row(name, *NARROW)
    if cfg.MODEL.RESNETS.DEPTH > 34:
        widths = ["STEM_OUT_CHANNELS", 8, "RES2_OUT_CHANNELS", 32, "WIDTH_PER_GROUP", 8]
        cfg.merge_from_list([f"MODEL.RESNETS.{word}" if isinstance(word, str) else word for word in widths])
    return cfg


@pytest.mark.parametrize(
    "data, depth, images, rate, drops, iterations, sizes, test_size, longest, classes, warm_up, best",
    [
        ("phone_{}_R_101_FPN", 101, 16, 0.01, (18_000, 24_000), 27_000, (400, 600), 400, 2048, 11, 1000, "segm/AP"),
        ("cityscapes10_{}_R_50_FPN", 50, 8, 0.01, (18_000,), 24_000, (800, 1024), 1024, 2048, 10, 1000, "segm/AP"),
        ("coco_{}_R_101_FPN", 101, 8, 0.01, (120_000, 160_000), 180_000, (800,), 800, 1333, 80, 1000, ""),
        ("gland_{}_R_50_FPN", 50, 8, 0.01, (1_500,), 2_000, (400, 522), 522, 1333, 1, 100, ""),
    ],
)
def test_settings_of_section_4(data, depth, images, rate, drops, iterations, sizes, test_size, longest, classes, warm_up, best):
    for kind, losses in (("ganmask", "both"), ("mask_rcnn", "baseline")):
        cfg = row(data.format(kind))
        solver, ganmask = cfg.SOLVER, cfg.MODEL.GANMASK
        assert (losses, depth) == (ganmask.LOSSES, cfg.MODEL.RESNETS.DEPTH)
        assert (solver.IMS_PER_BATCH, solver.BASE_LR, tuple(solver.STEPS), solver.MAX_ITER) == (images, rate, drops, iterations)
        assert (tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST) == (sizes, test_size)
        assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == longest
        assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" or len(sizes) == 1
        assert (solver.OPTIMIZER, solver.MOMENTUM, solver.WEIGHT_DECAY) == ("SGD", 0.9, 0.0001)
        assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY and solver.GAMMA == 0.1
        assert (classes, warm_up, best) == (cfg.MODEL.ROI_HEADS.NUM_CLASSES, solver.WARMUP_ITERS, cfg.TEST.BEST_METRIC)
        data_sets = {name.split("_")[0] for name in cfg.DATASETS.TRAIN + cfg.DATASETS.TEST}
        assert data_sets == {data.split("_")[0].removesuffix("10")}
        assert (ganmask.BOX_WEIGHT, ganmask.MASK_WEIGHT, ganmask.FEATURE_SCALES) == (0.025, 0.5, [1, 1, 2, 2, 2, 4])
        assert (ganmask.DISCRIMINATOR_LR_FACTOR, ganmask.DISCRIMINATOR_LAYERS) == (0.2, 5)


def test_tables_5_and_6():
    assert row("phone_adversarial_R_101_FPN").MODEL.GANMASK.LOSSES == "adversarial"
    for layers, scales in ((3, [1, 1, 2, 4]), (4, [1, 1, 2, 2, 4])):
        for name in (f"phone_ganmask_{layers}_layers_R_101_FPN", f"shapes_ganmask_{layers}_layers_R_18_FPN"):
            ganmask = row(name).MODEL.GANMASK
            assert (layers, "both", scales) == (ganmask.DISCRIMINATOR_LAYERS, ganmask.LOSSES, ganmask.FEATURE_SCALES)


@pytest.mark.parametrize("name", [name for name in ROWS if "mask_rcnn" not in name])
def test_every_weight_of_both_players_gets_a_gradient(name):
    cfg = narrow(name)
    model = build_model(cfg)
    discriminators, losses = Discriminators(cfg, model.backbone.output_shape()), AdversarialLosses(cfg)
    masks = torch.zeros(2, 96, 128, dtype=torch.bool)
    masks[0, 10:50, 10:60] = masks[1, 30:80, 70:110] = True
    boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 50.0], [70.0, 30.0, 110.0, 80.0]]))
    targets = Instances((96, 128), gt_boxes=boxes, gt_classes=torch.zeros(2, dtype=torch.long), gt_masks=BitMasks(masks))
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.01)
    with EventStorage(0):
        _, samples = model([{"image": image, "instances": targets}], return_samples=True)
    assert len(samples.features) > 0
    sum(losses.discriminator(discriminators(samples.detach())).values()).backward()
    assert [n for n, p in discriminators.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in model.parameters())
    sum(losses.generator(discriminators(samples)).values()).backward()
    reached = {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"roi_heads.box_predictor.bbox_pred", "roi_heads.box_head.fc1", "roi_heads.mask_head.predictor"} <= reached


@pytest.mark.parametrize("name", ROWS)
def test_default_predictor(name):
    photo = np.random.RandomState(0).randint(0, 255, (96, 128, 3), dtype=np.uint8)
    instances = DefaultPredictor(narrow(name))(photo)["instances"]
    assert instances.has("pred_masks") and instances.image_size == (96, 128)
