"""Edge feature fusion: every design, reduction and mode against five lines written from the paper, and how it starts."""

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from maskpoint.fusion import DESIGNS, MODES, REDUCTIONS, EdgeFusion
from maskpoint.keypoint_branch import ContourPointHead
from maskpoint.mask_head import FusedMaskHead
from projects.errors import ConfigError

K, CLASSES = 5, 3


def reference(fusion: EdgeFusion, heatmaps, mask_logits, design, reduction, mode):
    """Equations 1 and 2, heat map by heat map."""
    if reduction == "conv" and design in ("a", "b"):
        weight, bias = fusion.reduce.weight, fusion.reduce.bias

    def reduce(x, channel):
        if design in ("c", "d"):
            return x
        if reduction == "conv":
            return F.conv2d(x, weight[:, channel : channel + 1], stride=2, padding=1)
        windows = x.unfold(2, 2, 2).unfold(3, 2, 2)
        return windows.amax(dim=(4, 5)) if reduction == "maxpool" else windows.mean(dim=(4, 5))

    maps = [heatmaps[:, i : i + 1] for i in range(K)]
    edge = reduce(sum(maps), 0) if design == "a" else sum(reduce(x, i) for i, x in enumerate(maps))
    edge = edge + bias if reduction == "conv" and design in ("a", "b") else edge
    pairs = [(mask_logits[:, c : c + 1], edge) for c in range(CLASSES)]
    fused = {"multiply": lambda m, e: m * e, "add": lambda m, e: m + e, "max": lambda m, e: torch.where(m > e, m, e)}[mode]
    return torch.cat([fused(m, e) for m, e in pairs], dim=1)


@pytest.mark.parametrize(("design", "reduction", "mode"), list(itertools.product(DESIGNS, REDUCTIONS, MODES)))
def test_designs_reductions_and_modes(design, reduction, mode):
    fusion = EdgeFusion(K, design, reduction, mode)
    if design in ("a", "b") and reduction == "conv":
        torch.nn.init.normal_(fusion.reduce.weight)
        torch.nn.init.normal_(fusion.reduce.bias)
        assert fusion.reduce.weight.shape == (1, K if design == "b" else 1, 3, 3)
    else:
        assert not list(fusion.parameters())
    heatmaps = torch.randn(2, K, 28 if design == "d" else 56, 28 if design == "d" else 56)
    mask_logits = torch.randn(2, CLASSES, 56 if design == "c" else 28, 56 if design == "c" else 28)
    found = fusion(heatmaps, mask_logits)
    assert found.shape == mask_logits.shape
    torch.testing.assert_close(found, reference(fusion, heatmaps, mask_logits, design, reduction, mode), rtol=1e-4, atol=1e-4)


def test_910_weights_at_the_size_of_the_paper():
    assert sum(p.numel() for p in EdgeFusion(101).parameters()) == 910


@pytest.mark.parametrize(("mode", "neutral"), [("multiply", 1), ("add", 0), ("max", 0)])
@pytest.mark.parametrize("design", ["a", "b"])
def test_convolution_starts_with_one_number_for_all(design, mode, neutral):
    """So multiplication and addition leave the logits as they are, and the maximum takes the negative ones away."""
    fusion = EdgeFusion(101, design, mode=mode)
    heatmaps = torch.randn(2, 101, 56, 56)
    edge = fusion.edge_map(heatmaps)
    assert edge.shape == (2, 1, 28, 28)
    assert (edge - neutral).abs().max() < 0.3 and edge.std() > 0
    empty, mask_logits = torch.zeros_like(heatmaps), torch.randn(2, CLASSES, 28, 28)
    assert fusion.edge_map(empty).unique().tolist() == [neutral]
    assert torch.equal(fusion(empty, mask_logits), mask_logits.clamp(min=0) if mode == "max" else mask_logits)


@pytest.mark.parametrize(
    ("setting", "key"),
    [({"design": "e"}, "FUSION_DESIGN"), ({"reduction": "mean"}, "REDUCTION"), ({"mode": "mul"}, "FUSION_MODE")],
)
def test_wrong_settings_are_named(setting, key):
    with pytest.raises(ConfigError, match=f"MODEL.MASKPOINT.{key}"):
        EdgeFusion(K, **setting)


def foreground(count: int = 2) -> list[Instances]:
    """Foreground proposals of one image of 64 x 64 with masks and classes."""
    boxes = torch.tensor([[4.0, 4, 60, 60], [10, 20, 50, 44]])[:count]
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    masks[:, 16:40, 12:44] = True
    return [
        Instances((64, 64), proposal_boxes=Boxes(boxes), gt_masks=BitMasks(masks), gt_classes=torch.arange(count) % CLASSES)
    ]


def mask_head(fusion: EdgeFusion | None, channels: int = 8) -> FusedMaskHead:
    torch.manual_seed(0)
    shape = ShapeSpec(channels=channels, height=14, width=14)
    return FusedMaskHead(shape, num_classes=CLASSES, conv_dims=[channels] * 3, fusion=fusion)


@pytest.mark.parametrize("design", ["none", *DESIGNS])
def test_mask_head(design):
    fusion = None if design == "none" else EdgeFusion(K, design)
    head = mask_head(fusion)
    side = 56 if design == "c" else 28
    x, heatmaps = torch.randn(2, 8, 14, 14), torch.randn(2, K, *[28 if design == "d" else 56] * 2)
    logits = head.layers(x)
    assert logits.shape == (2, CLASSES, side, side)
    fused = logits if fusion is None else fusion(heatmaps, logits)
    instances = foreground()
    with EventStorage(0):
        loss = head(x, instances, heatmaps)["loss_mask"]
    truth = instances[0].gt_masks.crop_and_resize(instances[0].proposal_boxes.tensor, side).float()
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(fused[[0, 1], [0, 1]], truth))
    detections = [Instances((64, 64), pred_boxes=Boxes(torch.rand(2, 4)), pred_classes=torch.tensor([2, 1]))]
    found = head.eval()(x, detections, heatmaps)[0].pred_masks
    torch.testing.assert_close(found, fused[[0, 1], [2, 1]][:, None].sigmoid())


def test_other_heads_give_no_heat_maps():
    """Without fusion the mask head is Detectron2's and needs none."""
    x, detections = torch.randn(2, 8, 14, 14), [Instances((64, 64), pred_classes=torch.tensor([2, 1]))]
    assert mask_head(None).eval()(x, detections)[0].pred_masks.shape == (2, 1, 28, 28)
    with pytest.raises(ConfigError, match="set that, or MODEL.MASKPOINT.FUSION_DESIGN 'none'"):
        mask_head(EdgeFusion(K, "b")).eval()(x, detections)


def test_weights_of_mask_rcnn_have_their_names():
    from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

    shape = ShapeSpec(channels=8, height=14, width=14)
    plain = MaskRCNNConvUpsampleHead(shape, num_classes=CLASSES, conv_dims=[8, 8, 8])
    head = mask_head(None)
    head.load_state_dict(plain.state_dict())
    x = torch.randn(1, 8, 14, 14)
    torch.testing.assert_close(head.layers(x), plain.layers(x))
    more = set(mask_head(EdgeFusion(K, "c")).state_dict()) - set(plain.state_dict())
    assert more == {"deconv2.weight", "deconv2.bias"}


@pytest.mark.parametrize("design", ["a", "b"])
def test_initialisation_keeps_the_mask_gradients(design):
    """At the paper's widths but for the number of convolutions: the gradient norm with fusion is within a factor of 2."""
    torch.manual_seed(0)
    x = torch.randn(2, 256, 14, 14).relu()
    shape = ShapeSpec(channels=256, height=14, width=14)
    keypoint_head = ContourPointHead(shape, num_points=100, num_keypoints=101, conv_dims=[512] * 2)
    with torch.no_grad():
        heatmaps = keypoint_head.heatmaps(x)
    norms = []
    for fusion in (None, EdgeFusion(101, design)):
        head = mask_head(fusion, 256)
        with EventStorage(0):
            head(x, foreground(), heatmaps)["loss_mask"].backward()
        own = [p.grad.norm() for name, p in head.named_parameters() if not name.startswith("fusion")]
        norms.append(torch.stack(own).norm().item())
    assert 0.5 < norms[1] / norms[0] < 2


@pytest.mark.parametrize(("design", "mode"), list(itertools.product(DESIGNS, MODES)))
def test_mask_loss_reaches_the_keypoint_branch(design, mode):
    torch.manual_seed(0)
    shape = ShapeSpec(channels=8, height=14, width=14)
    branch = ContourPointHead(shape, num_points=K, num_keypoints=K, conv_dims=[8], upsample=design != "d")
    x = torch.randn(2, 8, 14, 14)
    with EventStorage(0):
        mask_head(EdgeFusion(K, design, mode=mode))(x, foreground(), branch.heatmaps(x))["loss_mask"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())
