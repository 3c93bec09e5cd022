"""The RoI heads in whole models: same RoIs for both branches, fields of the detections, settings that do not go together."""

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from maskpoint.segmentation import fill
from projects.errors import ConfigError
from projects.modeling.build import build_model

from .conftest import REPO

LEAVES = sorted(path.stem for path in (REPO / "configs/maskpoint").glob("*.yaml") if not path.name.startswith("Base"))
IMAGE = np.random.RandomState(0).randint(0, 255, (50, 70, 3), dtype=np.uint8)
PIXELS = torch.from_numpy(IMAGE.transpose(2, 0, 1).copy())


def sample(count: int = 2, k: int = 33, away: bool = False) -> dict:
    """A training image of 64 x 96 with instances; ``away``: their key points lie outside of every RoI."""
    boxes = torch.tensor([[8.0, 8, 40, 48], [50, 10, 90, 60]])[:count]
    masks = torch.zeros(count, 64, 96, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    keypoints = torch.full((count, k, 3), 2.0)
    keypoints[:, :, :2] = 1000.0 if away else boxes[:, None, :2] + 5
    instances = Instances((64, 96), gt_boxes=Boxes(boxes), gt_classes=torch.arange(count))
    instances.gt_masks, instances.gt_keypoints = BitMasks(masks), Keypoints(keypoints)
    image = torch.from_numpy(np.random.RandomState(1).randint(0, 255, (3, 64, 96), dtype=np.uint8))
    return {"image": image, "instances": instances}


def losses_of(model, batch: list[dict]) -> dict[str, torch.Tensor]:
    with EventStorage(0):
        return model(batch)


def test_both_branches_train_on_the_same_rois(narrow_cfg):
    """All foreground RoIs, those without a key point inside too (Detectron2's keypoint branch leaves them out)."""
    torch.manual_seed(0)
    model = build_model(narrow_cfg())
    seen = {}
    for name in ("mask_pooler", "keypoint_pooler"):
        getattr(model.roi_heads, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: [boxes.tensor for boxes in inputs[1]]})
        )
    losses = losses_of(model, [sample(), sample(away=True)])
    assert len(seen["mask_pooler"]) == 2 and min(map(len, seen["mask_pooler"])) >= 2
    for one, other in zip(seen["mask_pooler"], seen["keypoint_pooler"], strict=True):
        assert torch.equal(one, other)
    assert {"loss_mask", "loss_keypoint", "loss_cls", "loss_box_reg"} <= set(losses)
    losses["loss_mask"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.roi_heads.keypoint_head.parameters())


@pytest.mark.parametrize("name", ["shapes_design_b", "shapes_keypoint_only"])
def test_losses_without_foreground_are_connected(narrow_cfg, name):
    model = build_model(narrow_cfg(name))
    losses = losses_of(model, [sample(0)])
    assert losses["loss_keypoint"] == 0 and ("loss_mask" in losses) == (name != "shapes_keypoint_only")
    sum(losses.values()).backward()
    for branch in ("keypoint_head", "mask_head"):
        heads = getattr(model.roi_heads, branch, None)
        assert heads is None or all(p.grad is not None for p in heads.parameters())


def predict(cfg) -> Instances:
    """Detections of a model with random weights in an image of 100 x 140 that was shrunk to half of that."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        return model([{"image": PIXELS, "height": 100, "width": 140}])[0]["instances"]


def test_fields_of_the_detections(narrow_cfg):
    found = predict(narrow_cfg())
    assert len(found) == 5 and found.image_size == (100, 140)
    assert found.pred_keypoints.shape == (5, 33, 3) and found.contour_points.tolist() == [32] * 5
    assert found.pred_masks.shape == (5, 100, 140) and found.pred_masks.dtype == torch.bool
    x0, y0, x1, y1 = found.pred_boxes.tensor[:, :, None].unbind(1)
    x, y, score = found.pred_keypoints.unbind(2)
    assert ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1) & (score > 0) & (score <= 1)).all()
    assert not [field for field in found.get_fields() if field.endswith("_maps")]


def test_masks_from_points_are_the_polygons_through_the_points(narrow_cfg):
    cfg = narrow_cfg("shapes_points_only", "MODEL.MASKPOINT.KEEP_MAPS", True)
    found = predict(cfg)
    assert found.pred_masks.shape == (5, 100, 140)
    for mask, points in zip(found.pred_masks.numpy(), found.pred_keypoints[:, :32, :2].numpy(), strict=True):
        expected = np.zeros((100, 140), np.uint8)
        fill(expected, points)
        assert (mask == expected.astype(bool)).mean() > 0.999  # coordinates are rounded to 1/16 pixel
    torch.testing.assert_close(found.pred_keypoints, predict(narrow_cfg()).pred_keypoints)  # nothing else is different
    assert found.pred_point_maps.shape == (5, 56, 56) and not found.has("pred_fused_maps")


def test_kept_maps(narrow_cfg):
    cfg = narrow_cfg("shapes_design_b", "MODEL.MASKPOINT.KEEP_MAPS", True)
    torch.manual_seed(0)
    model, heatmaps = build_model(cfg).eval(), []
    model.roi_heads.keypoint_head.heatmaps = lambda x, own=model.roi_heads.keypoint_head.heatmaps: (
        heatmaps.append(own(x)) or heatmaps[-1]
    )
    with torch.no_grad():
        (found,) = model.inference([{"image": PIXELS}], do_postprocess=False)
    torch.testing.assert_close(found.pred_point_maps, heatmaps[0].sum(dim=1))
    torch.testing.assert_close(found.pred_fused_maps, found.pred_masks[:, 0])
    assert found.pred_fused_maps.shape == (5, 28, 28)


def test_keypoint_branch_alone(narrow_cfg):
    found = predict(narrow_cfg("shapes_keypoint_only"))
    assert found.has("pred_keypoints") and not found.has("pred_masks")


def test_test_time_augmentation(narrow_cfg):
    cfg = narrow_cfg("shapes_design_b", "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64))
    model = GeneralizedRCNNWithTTA(cfg, build_model(cfg).eval())
    with torch.no_grad():
        found = model([{"image": PIXELS, "height": 50, "width": 70}])[0]["instances"]
    assert found.pred_masks.shape[1:] == (50, 70)


def test_an_augmented_test_of_one_size_is_the_plain_one(narrow_cfg):
    cfg = narrow_cfg("shapes_design_b", "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", False)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    model.roi_heads.mask_head.fusion.reduce.weight.data.normal_(std=0.5)  # so that the fusion decides the masks
    wide = torch.from_numpy(np.random.RandomState(1).randint(0, 255, (3, 64, 96), dtype=np.uint8))
    augmented = GeneralizedRCNNWithTTA(cfg, model)
    with torch.no_grad():
        found = augmented([{"image": wide, "height": 64, "width": 96}])[0]["instances"]
        plain = model([{"image": wide, "height": 64, "width": 96}])[0]["instances"]
    assert len(found) == len(plain) > 0 and torch.equal(found.pred_masks, plain.pred_masks)
    assert 0.01 < plain.pred_masks.float().mean() < 0.5


def test_branches_can_be_switched_off_to_look_for_boxes(narrow_cfg):
    model = build_model(narrow_cfg())
    model.roi_heads.mask_on = model.roi_heads.keypoint_on = False
    assert not {"loss_mask", "loss_keypoint"} & set(losses_of(model, [sample()]))
    with torch.no_grad():
        (found,) = model.eval().inference([{"image": PIXELS}], do_postprocess=False)
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON"),
        (["MODEL.MASKPOINT.MASK_FROM", "points", "MODEL.MASKPOINT.COMPONENTS", "all"], "COMPONENTS"),
        (["MODEL.MASKPOINT.MASK_FROM", "points", "TEST.AUG.ENABLED", True], "TEST.AUG"),
        (["MODEL.MASKPOINT.MASK_FROM", "points", "MODEL.MASK_ON", False], "MODEL.MASK_ON"),
        (["MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 28], "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION 28"),
        (["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 28], "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is 28"),
        (["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"], "MODEL.ROI_MASK_HEAD.NAME .*takes 'FusedMaskHead'"),
        (["MODEL.ROI_KEYPOINT_HEAD.NAME", "KRCNNConvDeconvUpsampleHead"], "MODEL.ROI_KEYPOINT_HEAD.NAME .*'ContourPointHead'"),
        (["MODEL.MASKPOINT.MASK_FROM", "both"], "MODEL.MASKPOINT.MASK_FROM"),
        (["MODEL.MASKPOINT.FUSION_DESIGN", "e"], "MODEL.MASKPOINT.FUSION_DESIGN"),
    ],
)
def test_settings_that_do_not_go_together(narrow_cfg, opts, words):
    with pytest.raises(ConfigError, match=words):
        build_model(narrow_cfg("shapes_design_b", *opts))


@pytest.mark.parametrize("design", ["b", "c", "d"])
def test_more_bins_in_both_branches(narrow_cfg, design):
    bins = [f"MODEL.ROI_{branch}_HEAD.POOLER_RESOLUTION" for branch in ("MASK", "KEYPOINT")]
    cfg = narrow_cfg(f"shapes_design_{design}", bins[0], 10, bins[1], 10)
    assert predict(cfg).pred_masks.shape == (5, 100, 140)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["shapes_design_a", "shapes_design_b", "shapes_design_c", "shapes_reduction_maxpool"])
def test_mixed_precision(narrow_cfg, name, dtype):
    torch.manual_seed(0)
    model = build_model(narrow_cfg(name, "MODEL.MASKPOINT.KEEP_MAPS", True, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True))
    for count in (2, 0):
        with torch.autocast("cpu", dtype):
            losses = losses_of(model, [sample(count)])
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.roi_heads.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype):
        (found,) = model.eval().inference([{"image": PIXELS}], do_postprocess=False)
    assert len(found) == 5
    for field in ("pred_keypoints", "pred_point_maps", "pred_fused_maps"):
        assert found.get(field).dtype == torch.float32 and torch.isfinite(found.get(field)).all(), field


@pytest.mark.parametrize("name", ["shapes_design_a", "shapes_design_c", "shapes_design_d", "shapes_reduction_avgpool"])
def test_other_designs_without_foreground(narrow_cfg, name):
    model = build_model(narrow_cfg(name))
    losses = losses_of(model, [sample(0)])
    sum(losses.values()).backward()
    assert losses["loss_mask"] == losses["loss_keypoint"] == 0
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_side_by_side_without_fusion(narrow_cfg):
    model = build_model(narrow_cfg("shapes_design_b", "MODEL.MASKPOINT.FUSION_DESIGN", "none"))
    losses = losses_of(model, [sample()])
    losses["loss_mask"].backward()
    assert losses["loss_keypoint"] > 0
    assert all(p.grad is None for p in model.roi_heads.keypoint_head.parameters())


@pytest.mark.parametrize(
    "name",
    [pytest.param(leaf, marks=() if leaf in ("corner", "shapes_design_c") else pytest.mark.slow) for leaf in LEAVES],
)
def test_default_predictor_runs_on(narrow_cfg, name):
    cfg = narrow_cfg(name)
    torch.manual_seed(0)
    found = DefaultPredictor(cfg)(IMAGE)["instances"]
    assert len(found) == 5 and found.image_size == IMAGE.shape[:2]
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON
    assert not cfg.MODEL.MASK_ON or found.pred_masks.shape == (5, *IMAGE.shape[:2])
    if cfg.MODEL.ROI_HEADS.NAME == "MaskPointROIHeads":
        points = cfg.MODEL.MASKPOINT.NUM_POINTS + (cfg.MODEL.MASKPOINT.CENTER != "none")
        assert found.pred_keypoints.shape == (5, points, 3)


def test_no_detections(narrow_cfg):
    for name in ("shapes_design_b", "shapes_points_only"):
        found = predict(narrow_cfg(name, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, "MODEL.MASKPOINT.KEEP_MAPS", True))
        assert len(found) == 0 and found.pred_keypoints.shape == (0, 33, 3) and found.pred_masks.shape == (0, 100, 140)
