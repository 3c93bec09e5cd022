"""Whole DSG models: weights, all switches, the way back to Mask R-CNN, empty images, mixed precision, DefaultPredictor."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor

from projects import config_path, load_config
from projects.modeling.build import build_model

MASK_RCNN, MPN, FUSION = 44_343_216, 2_622_977, 590_080
OUTPUT_FIELDS = {"pred_boxes", "scores", "pred_classes", "pred_masks"}


@pytest.mark.parametrize(
    ("config", "opts", "weights"),
    [
        ("baseline/mask_rcnn_R_50_FPN_1x_single_scale.yaml", [], MASK_RCNN),
        ("dsg/dsg_mrpn.yaml", [], MASK_RCNN + MPN),
        ("dsg/dsg_mrpn_fm.yaml", [], MASK_RCNN + MPN + FUSION),
        ("dsg/dsg_mrpn_fm_sgb.yaml", [], MASK_RCNN + MPN + FUSION),
        ("dsg/dsg_R_50_FPN_1x.yaml", [], MASK_RCNN + MPN + 2 * FUSION),
        ("dsg/dsg_sgm.yaml", [], MASK_RCNN + MPN + 2 * FUSION),
        ("dsg/dsg_R_50_FPN_1x.yaml", ["MODEL.DSG.FUSION_KERNEL", 1], MASK_RCNN + MPN + 2 * 65_792),
    ],
)
def test_weights_of_table_1(config, opts, weights):
    """The paper's 44.35 M, 46.97 M, 47.56 M and 48.15 M, less 4,100 for the box outputs of the background in its code base."""
    cfg = load_config(config_path(config), [*opts, "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == weights


@pytest.mark.parametrize(
    ("config", "on"),
    [
        ("dsg_mrpn", (False, False, False, False)),
        ("dsg_mrpn_fm", (True, False, False, False)),
        ("dsg_mrpn_fm_sgb", (True, True, False, False)),
        ("dsg_R_50_FPN_1x", (True, True, True, False)),
        ("dsg_sgm", (True, True, True, True)),
        ("dsg_X_101_32x4d_DCN_FPN_2x", (True, True, True, False)),
        ("shapes_dsg_R_18_FPN", (True, True, True, False)),
    ],
)
def test_switches_of_table_1(config, on):
    cfg = load_config(config_path(f"dsg/{config}.yaml"))
    dsg = cfg.MODEL.DSG
    assert on == (dsg.FUSION_MASK, dsg.SGRA_BOX, dsg.FUSION_BOX, dsg.SGRA_MASK)
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME) == ("DSGRCNN", "MaskRPN")
    assert (dsg.FUSION_KERNEL, dsg.DETACH_PROBS, dsg.MPN_DTYPE_TEST) == (3, False, "float32")


@pytest.mark.parametrize("on", list(itertools.product([False, True], repeat=4)), ids=lambda on: "".join("-+"[v] for v in on))
def test_every_setting_of_the_switches_trains_and_infers(small_model, switches, inputs, storage, on):
    names = ("FUSION_MASK", "SGRA_BOX", "FUSION_BOX", "SGRA_MASK")
    model = small_model(*switches(**dict(zip(names, on, strict=True)))).train()
    losses = model(inputs)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_mpn", "loss_cls", "loss_box_reg", "loss_mask"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    heads = [model.proposal_generator, model.roi_heads]
    assert not [name for part in heads for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    has = [model.roi_heads.mask_fusion is not None, model.roi_heads.box_fusion is not None]
    assert has == [on[0], on[2]]
    with torch.no_grad():
        outputs = model.eval()(inputs)
    for output in outputs:
        assert len(output["instances"]) == 9 and set(output["instances"].get_fields()) == OUTPUT_FIELDS


def test_each_switch_changes_the_result(small_model, switches, inputs):
    """On the same weights, so that what differs is the technique."""
    full = small_model("MODEL.DSG.SGRA_MASK", True)
    weights = full.state_dict()

    def results(**on):
        model = small_model(*switches(**on))
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return model(inputs)[0]["instances"]

    plain = results()
    for key in ("SGRA_BOX", "FUSION_BOX"):
        assert not torch.allclose(results(**{key: True}).scores, plain.scores, atol=1e-4)
    for key in ("FUSION_MASK", "SGRA_MASK"):
        found = results(**{key: True})
        assert torch.equal(found.scores, plain.scores)
        assert (found.pred_masks != plain.pred_masks).any()


def test_without_switches_it_is_mask_rcnn(small_model, switches, inputs):
    """The same weights give the same detections, whose masks agree but for pixels at the threshold."""
    mask_rcnn = small_model(config="baseline/shapes_mask_rcnn_R_18_FPN.yaml")
    dsg = small_model(*switches())
    missing, unexpected = dsg.load_state_dict(mask_rcnn.state_dict(), strict=False)
    assert not unexpected and missing and all(name.startswith("proposal_generator.mpn.") for name in missing)
    with torch.no_grad():
        for found, expected in zip(dsg(inputs), mask_rcnn(inputs), strict=True):
            found, expected = found["instances"], expected["instances"]
            torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
            assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


def no_objects(inputs):
    return [{**x, "instances": x["instances"][[]]} for x in inputs]


def test_images_without_objects_give_connected_zeros(small_model, inputs, storage):
    model = small_model("MODEL.DSG.SGRA_MASK", True).train()
    losses = model(no_objects(inputs))
    assert losses["loss_mpn"] == losses["loss_mask"] == losses["loss_box_reg"] == 0 and losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("objects", [False, True])
def test_no_proposals(small_model, inputs, storage, objects):
    """Training: the ground truth boxes are all that is left, or nothing. Inference: nothing."""
    model = small_model("MODEL.DSG.SGRA_MASK", True).train()
    model.proposal_generator.post_nms_topk = {True: 0, False: 0}
    losses = model(inputs if objects else no_objects(inputs))
    heads = [losses[name] for name in ("loss_mpn", "loss_cls", "loss_box_reg", "loss_mask")]
    assert all(loss.isfinite() and loss.requires_grad for loss in heads)
    assert (losses["loss_mpn"] > 0) == (losses["loss_mask"] > 0) == objects
    sum(losses.values()).backward()
    parts = (model.proposal_generator.mpn, model.roi_heads)
    assert not [name for part in parts for name, p in part.named_parameters() if p.grad is None]
    with torch.no_grad():
        for output in model.eval()(inputs):
            assert len(output["instances"]) == 0 and output["instances"].pred_masks.shape == (0, 64, 96)


def test_mixed_precision(small_model, inputs, storage):
    model = small_model("MODEL.DSG.SGRA_MASK", True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(inputs)
        with torch.no_grad():
            outputs = model.eval()(inputs)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(len(output["instances"]) == 9 for output in outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["shapes_dsg_R_18_FPN", "shapes_htc_dsg_R_18_FPN", "dsg_R_101_DCN_FPN_2x"])
def test_mixed_precision_on_a_gpu(small_model, inputs, storage, config):
    model = small_model("MODEL.DEVICE", "cuda", config=f"dsg/{config}.yaml").train()
    batch = [{**x, "sem_seg": torch.zeros(64, 96, dtype=torch.int64)} for x in inputs]
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(batch)
        with torch.no_grad():
            outputs = model.eval()(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert len(outputs) == 2 and all(output["instances"].scores.isfinite().all() for output in outputs)


def test_detections_take_no_more_than_they_need(small_model, inputs):
    """What the heads hand on inside, features of all proposals, does not stay with the results."""
    model = small_model()
    model.roi_heads.mask_on = False
    with torch.no_grad():
        outputs = model.inference(inputs, do_postprocess=False)
    assert set(outputs[0].get_fields()) == OUTPUT_FIELDS - {"pred_masks"}


CONFIGS = Path(config_path("dsg/dsg_mrpn.yaml")).parents[1]
ROWS = [*CONFIGS.glob("dsg/*.yaml"), *CONFIGS.glob("baseline/*single_scale.yaml")]


@pytest.mark.parametrize("path", sorted(ROWS), ids=lambda path: path.stem)
def test_default_predictor_on_every_row(path):
    cfg = load_config(str(path))
    opts = {
        "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.RESNETS.NORM": "BN", "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 8, "MODEL.ROI_MASK_HEAD.CONV_DIM": 8, "MODEL.RPN.CONV_DIMS": [8],
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "TEST.DETECTIONS_PER_IMAGE": 5,
        "INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96,
    }  # fmt: skip
    if cfg.MODEL.RESNETS.DEPTH > 34:  # Detectron2 builds R18 in one width only
        opts |= {"MODEL.RESNETS.STEM_OUT_CHANNELS": 8, "MODEL.RESNETS.RES2_OUT_CHANNELS": 32}
        opts["MODEL.RESNETS.WIDTH_PER_GROUP"] = max(8 // cfg.MODEL.RESNETS.NUM_GROUPS, 1)
    if cfg.MODEL.RESNETS.NUM_GROUPS > 32:
        opts["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 64
    cfg.merge_from_list([word for pair in opts.items() for word in pair])
    torch.manual_seed(0)
    predictor = DefaultPredictor(cfg)
    for module in predictor.model.modules():  # else what random weights give grows from layer to layer
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        predictor.model.backbone.train()(50 * torch.randn(2, 3, 64, 96))
    predictor.model.eval()
    found = predictor(np.random.RandomState(0).randint(0, 256, (48, 64, 3), dtype=np.uint8))["instances"]
    assert len(found) == 5 and found.pred_masks.shape == (5, 48, 64)
