import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn

from projects.layers import SgRoIAlign, prroi_pool, sg_roi_align
from projects.modeling.pooler import Pooler, replace_roi_align

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.fixture
def pyramid():
    """Features of two images of 256 x 320 pixels on four levels."""
    torch.manual_seed(0)  # the boxes of a test too: some lie outside of the map
    return [torch.randn(2, 6, int(256 * scale), int(320 * scale)) for scale in SCALES]


def boxes_of_all_sizes(count: int) -> Boxes:
    """From 4 to 400 pixels, so that every level gets some, partly outside of the image."""
    side = torch.logspace(math.log10(4), math.log10(400), count)
    start = torch.rand(count, 2) * 200 - 20
    return Boxes(torch.cat([start, start + side[:, None] * torch.tensor([1.0, 1.3])], dim=1))


@pytest.mark.parametrize("counts", [(20, 30), (25, 0), (1, 0), (0, 0)])
def test_without_maps_it_is_detectron2s_pooler(pyramid, counts):
    box_lists = [boxes_of_all_sizes(count) for count in counts]
    theirs = ROIPooler(7, SCALES, 2, "ROIAlignV2")
    ours = Pooler(7, SCALES, 2, "SgRoIAlign")
    found = ours(pyramid, box_lists)
    assert found.shape == (sum(counts), 6, 7, 7)
    torch.testing.assert_close(found, theirs(pyramid, box_lists), rtol=1e-5, atol=1e-5)


def test_one_level(pyramid):
    box_lists = [boxes_of_all_sizes(9), boxes_of_all_sizes(4)]
    found = Pooler((7, 5), [1 / 16], 0)(pyramid[2:3], box_lists)
    torch.testing.assert_close(
        found, ROIPooler((7, 5), [1 / 16], 0, "ROIAlignV2")(pyramid[2:3], box_lists), rtol=1e-5, atol=1e-5
    )
    assert Pooler(7, [1 / 16], 0)(pyramid[2:3], [Boxes(torch.zeros(0, 4))] * 2).shape == (0, 6, 7, 7)


@pytest.mark.parametrize("pooler_type", ["SgRoIAlign", "PrRoIPool"])
def test_every_box_keeps_its_row_its_level_and_its_map(pyramid, pooler_type):
    """One box at a time, with the level by the formula of the FPN paper."""
    box_lists = [boxes_of_all_sizes(12), boxes_of_all_sizes(15)]
    probs = torch.rand(27, 1, 28, 28) if pooler_type == "SgRoIAlign" else None
    found = Pooler(7, SCALES, 2, pooler_type)(pyramid, box_lists, probs)
    used, row = set(), 0
    for image, boxes in enumerate(box_lists):
        for box in boxes.tensor:
            level = math.floor(4 + math.log2(((box[2] - box[0]) * (box[3] - box[1])).sqrt().item() / 224))
            level = min(max(level, 2), 5) - 2
            used.add(level)
            roi = torch.cat([torch.tensor([float(image)]), box])[None]
            if pooler_type == "PrRoIPool":
                expected = prroi_pool(pyramid[level], roi, 7, SCALES[level])
            else:
                expected = sg_roi_align(pyramid[level], roi, probs[row : row + 1], 7, SCALES[level], 2)
            torch.testing.assert_close(found[row : row + 1], expected)
            row += 1
    assert used == {0, 1, 2, 3}


def test_aligned_reaches_the_operators(pyramid):
    boxes = [boxes_of_all_sizes(1), boxes_of_all_sizes(0)]
    roi = torch.cat([torch.zeros(1, 1), boxes[0].tensor], dim=1)
    for aligned in (False, True):
        found = Pooler(7, SCALES, 2, "PrRoIPool", aligned=aligned)(pyramid, boxes)
        torch.testing.assert_close(found, prroi_pool(pyramid[0], roi, 7, SCALES[0], aligned))
    found = Pooler(7, SCALES, 2, aligned=False)(pyramid, boxes)
    torch.testing.assert_close(found, ROIPooler(7, SCALES, 2, "ROIAlign")(pyramid, boxes), rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_level_and_the_maps(pyramid):
    """Also with boxes on one level only, or none: no level drops out of the graph."""
    pooler = Pooler(7, SCALES, 2)
    for count in (0, 1, 10):
        features = [level.clone().requires_grad_() for level in pyramid]
        probs = torch.rand(2 * count, 1, 28, 28, requires_grad=True)
        pooler(features, [boxes_of_all_sizes(count)] * 2, probs).sum().backward()
        assert all(level.grad is not None for level in features)
        assert probs.grad is not None and (count == 0 or (probs.grad != 0).any())


def test_keeps_channels_last_and_the_type(pyramid):
    features = [level.to(torch.bfloat16).contiguous(memory_format=torch.channels_last) for level in pyramid]
    output = Pooler(7, SCALES, 2)(features, [boxes_of_all_sizes(5)] * 2)
    assert output.is_contiguous(memory_format=torch.channels_last) and output.dtype == torch.bfloat16


def test_a_box_of_nan_gives_zeros(pyramid):
    boxes = boxes_of_all_sizes(5)
    boxes.tensor[2, 1] = math.nan
    output = Pooler(7, SCALES, 2)(pyramid, [boxes, boxes_of_all_sizes(0)])
    assert (output[2] == 0).all() and output.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": [1 / 4, 1 / 16]}, "powers of 1/2, each half of the one before"),
        ({"scales": [1 / 3]}, "powers of 1/2"),
        ({"scales": []}, "powers of 1/2"),
        ({"pooler_type": "ROIAlign"}, r"one of \('SgRoIAlign', 'PrRoIPool'\), got 'ROIAlign'"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pooler(**{"output_size": 7, "scales": SCALES, "sampling_ratio": 2} | arguments)


def test_wrong_inputs_are_named(pyramid):
    boxes = [boxes_of_all_sizes(3)] * 2
    pooler = Pooler(7, SCALES, 2)
    for features, box_lists, probs, message in [
        (pyramid[:2], boxes, None, "features of 4 levels, got 2"),
        (pyramid, boxes[:1], None, "boxes of 2 images.*got 1"),
        (pyramid, boxes, torch.rand(5, 1, 28, 28), "each of the 6 boxes, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            pooler(features, box_lists, probs)
    with pytest.raises(ValueError, match="PrRoIPool takes no probability maps"):
        Pooler(7, SCALES, 0, "PrRoIPool")(pyramid, boxes, torch.rand(6, 1, 28, 28))


def test_replace_roi_align_in_a_model():
    """A Mask R-CNN gives the same detections with its RoIAligns replaced, and its checkpoint still fits."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}]
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(image)[0]["instances"]
        assert replace_roi_align(model) == 8  # box and mask pooler, four levels each
        found = model(image)[0]["instances"]
    assert len(expected) > 0 and len(found) == len(expected)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-4  # a pixel at the threshold may fall either way
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, ROIAlign) for module in model.modules())
    assert replace_roi_align(model) == 0


def test_replace_roi_align_keeps_the_settings():
    model = nn.ModuleDict({"a": ROIAlign((7, 5), 0.25, 3, aligned=False), "b": nn.Linear(1, 1)})
    assert replace_roi_align(model) == 1
    assert isinstance(model["a"], SgRoIAlign)
    assert repr(model["a"]) == "FastRoIAlign(output_size=(7, 5), spatial_scale=0.25, sampling_ratio=3, aligned=False)"


def test_replaced_roi_align_takes_what_detectron2s_takes():
    """Boxes of another type than the features, and boxes that require a gradient, which they do not get."""
    features, rois = torch.randn(1, 2, 8, 8, dtype=torch.float64), torch.tensor([[0.0, 1.0, 1.0, 30.0, 20.0]])
    model = nn.ModuleDict({"a": ROIAlign(3, 0.25, 2)})
    expected = model["a"](features, rois)
    replace_roi_align(model)
    torch.testing.assert_close(model["a"](features, rois.clone().requires_grad_()), expected)


def test_the_key_replaces_every_roi_align(tiny_cfg):
    from projects.modeling.build import build_model as build

    kinds = [{type(m).__name__ for m in build(tiny_cfg("MODEL.FAST_ROI_ALIGN", fast)).modules()} for fast in (False, True)]
    assert "ROIAlign" in kinds[0] and "FastRoIAlign" not in kinds[0]
    assert "FastRoIAlign" in kinds[1] and "ROIAlign" not in kinds[1]
