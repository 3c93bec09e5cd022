"""DSG's heads: guided pooling, fusion, which proposal a detection comes from, the routes of the gradients, given boxes."""

import math

import pytest
import torch
from detectron2.modeling.test_time_augmentation import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances

from dsg.fusion import FeatureFusion
from dsg.roi_heads import resample_probs

SIZE = (64, 96)
LEVELS = ("p2", "p3", "p4", "p5")


def pyramid(images: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(images, 8, 16 >> i, 24 >> i, generator=generator) for i, name in enumerate(LEVELS)}


def proposals_at(boxes: torch.Tensor) -> Instances:
    """Proposals whose P is flat and whose F_ is everywhere the number of the row (counted from 1)."""
    rows = torch.arange(1.0, len(boxes) + 1)
    return Instances(
        SIZE,
        proposal_boxes=Boxes(boxes),
        objectness_logits=torch.zeros(len(boxes)),
        proposal_mask_probs=(rows / 100)[:, None, None, None].expand(-1, 1, 28, 28).clone(),
        proposal_mask_features=rows[:, None, None, None].expand(-1, 12, 14, 14).clone(),
    )


def boxes_apart(count: int) -> torch.Tensor:
    """Boxes of 8 x 8 pixels that do not overlap, so that non-maximum suppression leaves them alone."""
    index = torch.arange(count)
    corners = torch.stack([index % 9 * 10.0, index // 9 * 10.0], dim=1)
    return torch.cat([corners, corners + 8], dim=1)


def make_boxes_stay(heads) -> None:
    """Detections get their proposal's box, so that a test can tell where they come from."""
    torch.nn.init.zeros_(heads.box_predictor.bbox_pred.weight)
    torch.nn.init.zeros_(heads.box_predictor.bbox_pred.bias)


# ---- SgRA_B ---------------------------------------------------------------------------------------------------------


def test_guided_pooling_separates_huddled_objects_and_roi_align_does_not(small_model, switches, inputs_of):
    """Figure 1: two objects side by side and a RoI for each in the middle of both, here the same one."""
    boxes = torch.tensor([[8.0, 4.0, 64.0, 60.0]]).repeat(2, 1)
    proposals = proposals_at(boxes)
    probs = torch.zeros(2, 1, 28, 28)
    probs[0, :, :, :14] = 1  # the object on the left
    probs[1, :, :, 14:] = 1  # the one on the right
    proposals.proposal_mask_probs = probs
    features, pooled = pyramid(), {}
    for guided in (False, True):
        heads = small_model(*switches(SGRA_BOX=guided)).roi_heads
        calls = inputs_of(heads.box_head)
        with torch.no_grad():
            heads([None], features, [proposals])
        pooled[guided] = calls[0][0]
    plain, (left, right) = pooled[False], pooled[True]
    assert torch.equal(plain[0], plain[1])
    assert (left - right).abs().max() > 0.1
    # Eq. 2: f * (1 + p) in bins that lie in one object; the middle bin has both.
    torch.testing.assert_close(left[:, :, :3], 2 * plain[0, :, :, :3])
    torch.testing.assert_close(left[:, :, 4:], plain[0, :, :, 4:])
    torch.testing.assert_close(right[:, :, :3], plain[0, :, :, :3])
    torch.testing.assert_close(right[:, :, 4:], 2 * plain[0, :, :, 4:])


def test_boxes_of_both_images_are_guided_by_their_own_maps(small_model, switches, inputs_of):
    heads, plain = small_model(*switches(SGRA_BOX=True)).roi_heads, small_model(*switches()).roi_heads
    calls, unguided = inputs_of(heads.box_head), inputs_of(plain.box_head)
    proposals = [proposals_at(boxes_apart(5)), proposals_at(boxes_apart(9)[5:])]  # maps of 0.01, 0.02, ...
    with torch.no_grad():
        heads([None] * 2, pyramid(2), proposals)
        plain([None] * 2, pyramid(2), proposals)
    factors = 1 + torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.01, 0.02, 0.03, 0.04])
    torch.testing.assert_close(calls[0][0], unguided[0][0] * factors[:, None, None, None])


# ---- F_B and F_M ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "weights"), [(3, 590_080), (1, 65_792)])
def test_fusion_adds_a_convolution(kernel, weights):
    fusion = FeatureFusion(256, 256, kernel, stride=2)
    assert sum(p.numel() for p in fusion.parameters()) == weights
    x, mask_features = torch.randn(2, 256, 7, 7), torch.randn(2, 256, 14, 14)
    fused = fusion(x, mask_features)
    assert fused.shape == x.shape and (fused - x).min() < 0  # no ReLU
    with torch.no_grad():
        fusion.conv.weight.zero_()
        fusion.conv.weight[:, :, kernel // 2, kernel // 2] = torch.eye(256)
    torch.testing.assert_close(fusion(x, mask_features), x + mask_features[:, :, ::2, ::2])
    assert FeatureFusion(256, 256, kernel)(mask_features, mask_features).shape == mask_features.shape


def test_box_head_gets_pooled_features_plus_fused_ones(small_model, switches, inputs_of):
    heads, plain = small_model(*switches(FUSION_BOX=True)).roi_heads, small_model(*switches()).roi_heads
    calls, unfused = inputs_of(heads.box_head), inputs_of(plain.box_head)
    proposals = [proposals_at(boxes_apart(4))]
    with torch.no_grad():
        heads([None], pyramid(), proposals)
        plain([None], pyramid(), proposals)
        expected = unfused[0][0] + heads.box_fusion.conv(proposals[0].proposal_mask_features)
    torch.testing.assert_close(calls[0][0], expected)


def test_every_detection_gets_the_mask_features_of_its_own_proposal(small_model, switches, inputs_of):
    """Also with a proposal of NaN, whose row box inference drops before it counts, and with several images."""
    heads = small_model(*switches(FUSION_MASK=True, SGRA_MASK=True), "TEST.DETECTIONS_PER_IMAGE", 100).roi_heads
    make_boxes_stay(heads)
    fused, pooled = inputs_of(heads.mask_fusion), inputs_of(heads.mask_pooler)
    first, second = boxes_apart(12), boxes_apart(20)[12:]
    first[4, 1] = math.nan
    second[0, 2] = math.inf
    proposals = [proposals_at(first), proposals_at(second)]
    with torch.no_grad():
        results, _ = heads([None] * 2, pyramid(2), proposals)
    _, mask_features = fused[0]
    assert [len(r) for r in results] == [11 * 3, 7 * 3]  # every finite proposal is detected once as each class
    boxes = torch.cat([r.pred_boxes.tensor for r in results])
    expected = []
    for found, sources in zip(results, (first, second), strict=True):
        expected += [1 + (sources == box).all(dim=1).nonzero().item() for box in found.pred_boxes.tensor]
    assert mask_features.shape == (len(boxes), 12, 14, 14)
    assert mask_features[:, 0, 0, 0].tolist() == expected
    assert (mask_features == mask_features[:, :1, :1, :1]).all()
    _, _, probs = pooled[0]
    torch.testing.assert_close(probs[:, 0, 9, 9], torch.tensor(expected) / 100)


def test_order_of_the_proposals_does_not_matter(small_model):
    model = small_model("MODEL.DSG.SGRA_MASK", True)
    generator = torch.Generator().manual_seed(3)
    proposals = proposals_at(boxes_apart(15) + torch.rand(15, 4, generator=generator))
    proposals.proposal_mask_probs = torch.rand(15, 1, 28, 28, generator=generator)
    proposals.proposal_mask_features = torch.randn(15, 12, 14, 14, generator=generator)
    shuffled = proposals[torch.randperm(15, generator=generator)]
    with torch.no_grad():
        (expected,), _ = model.roi_heads([None], pyramid(), [proposals])
        (found,), _ = model.roi_heads([None], pyramid(), [shuffled])
    assert len(expected) == 9
    for name in ("pred_boxes", "scores", "pred_classes", "pred_masks"):
        a, b = (getattr(i, name) for i in (found, expected))
        torch.testing.assert_close(*(x.tensor if name == "pred_boxes" else x for x in (a, b)), rtol=1e-4, atol=1e-5)


# ---- SgRA_M ---------------------------------------------------------------------------------------------------------


def read_map(probs: torch.Tensor, source: list[float], x: float, y: float) -> float:
    """The map that spans ``source``, at a place in image pixels: bilinear between cell centres, clamped, 0 outside."""
    side = probs.shape[-1]
    u, v = (x - source[0]) / (source[2] - source[0]), (y - source[1]) / (source[3] - source[1])
    if not (0 <= u <= 1 and 0 <= v <= 1):
        return 0.0
    places = []
    for fraction in (u, v):
        place = min(max(fraction * side - 0.5, 0), side - 1)
        low = min(int(place), side - 2)
        places.append((low, place - low))
    (i, a), (j, b) = places
    return float(
        (1 - b) * ((1 - a) * probs[j, i] + a * probs[j, i + 1]) + b * ((1 - a) * probs[j + 1, i] + a * probs[j + 1, i + 1])
    )


def test_maps_are_read_in_the_detection_and_are_zero_outside_of_the_proposal():
    generator = torch.Generator().manual_seed(4)
    probs = 0.1 + 0.9 * torch.rand(5, 1, 6, 6, generator=generator)
    sources = torch.tensor([[10.0, 20.0, 40.0, 44.0]]).repeat(5, 1)
    targets = torch.tensor(
        [
            [10.0, 20.0, 40.0, 44.0],
            [13.0, 22.0, 31.0, 40.0],
            [1.0, 30.0, 60.0, 70.0],
            [50.0, 50.0, 60.0, 60.0],
            [9.0, 19.0, 13.0, 22.0],
        ]
    )
    found = resample_probs(probs, sources, targets)
    assert found.shape == probs.shape
    torch.testing.assert_close(found[0], probs[0])  # its own box
    assert (found[3] == 0).all()
    for row, target in enumerate(targets.tolist()):
        for j in range(6):
            for i in range(6):
                x = target[0] + (i + 0.5) / 6 * (target[2] - target[0])
                y = target[1] + (j + 0.5) / 6 * (target[3] - target[1])
                expected = read_map(probs[row, 0], sources[row].tolist(), x, y)
                assert found[row, 0, j, i].item() == pytest.approx(expected, abs=1e-5)
    assert (found[2] == 0).any() and (found[2] > 0).any()


def test_maps_in_bfloat16_are_read_at_exact_places():
    """A box of 230 pixels: places in bfloat16 would be off by a cell."""
    probs = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[301.0, 207.0, 531.0, 447.0]]), torch.tensor([[311.0, 230.0, 523.0, 440.0]])
    found = resample_probs(probs.bfloat16(), *boxes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), resample_probs(probs, *boxes), rtol=0, atol=0.005)


def test_maps_of_proposals_without_area_are_zero():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 9.0], [math.nan, 0.0, 1.0, 1.0]])
    found = resample_probs(torch.ones(2, 1, 4, 4), boxes, torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 2))
    assert (found == 0).all()
    assert resample_probs(torch.ones(0, 1, 4, 4), boxes[:0], boxes[:0]).shape == (0, 1, 4, 4)


def test_mask_head_is_guided_by_the_resampled_map(small_model, switches, inputs_of):
    heads = small_model(*switches(SGRA_MASK=True)).roi_heads
    calls = inputs_of(heads.mask_pooler)
    proposals = proposals_at(boxes_apart(6))
    proposals.proposal_mask_probs = torch.rand(6, 1, 28, 28)
    with torch.no_grad():
        (results,), _ = heads([None], pyramid(), [proposals])
    _, (boxes,), probs = calls[0]
    assert torch.equal(boxes.tensor, results.pred_boxes.tensor) and probs.shape == (len(results), 1, 28, 28)
    assert not any(torch.equal(a, b) for a in probs for b in proposals.proposal_mask_probs)  # boxes have moved
    candidates = [
        resample_probs(p.expand(len(results), -1, -1, -1), box.expand(len(results), -1), results.pred_boxes.tensor)
        for p, box in zip(proposals.proposal_mask_probs, boxes_apart(6), strict=True)
    ]
    for row, found in enumerate(probs):
        assert any(torch.equal(found, candidate[row]) for candidate in candidates)


# ---- Gradients ------------------------------------------------------------------------------------------------------


def heads_losses(model, inputs):
    images = model.preprocess_image(inputs)
    features, truth = model.backbone(images.tensor), [x["instances"] for x in inputs]
    proposals, _ = model.proposal_generator(images, features, truth)
    return model.roi_heads(images, features, proposals, truth)[1]


def reaches(loss: torch.Tensor, module: torch.nn.Module) -> bool:
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize(
    ("on", "detach", "box_reaches", "mask_reaches"),
    [
        ({}, False, False, False),
        ({"SGRA_BOX": True}, False, True, False),
        ({"SGRA_BOX": True}, True, False, False),
        ({"SGRA_MASK": True}, False, False, True),
        ({"SGRA_MASK": True}, True, False, False),
        ({"FUSION_BOX": True}, True, True, False),
        ({"FUSION_MASK": True}, True, False, True),
        ({"FUSION_MASK": True, "SGRA_BOX": True, "FUSION_BOX": True}, False, True, True),
    ],
)
def test_losses_of_the_heads_reach_the_mpn_where_they_use_it(
    small_model, switches, inputs, storage, on, detach, box_reaches, mask_reaches
):
    model = small_model(*switches(**on), "MODEL.DSG.DETACH_PROBS", detach).train()
    losses = heads_losses(model, inputs)
    mpn = model.proposal_generator.mpn
    assert reaches(losses["loss_cls"], mpn) == reaches(losses["loss_box_reg"], mpn) == box_reaches
    assert reaches(losses["loss_mask"], mpn) == mask_reaches
    assert reaches(losses["loss_cls"], model.backbone.bottom_up)  # with and without the MPN


def test_through_p_the_gradient_reaches_the_last_layer_of_the_mpn(small_model, switches, inputs, storage):
    """P has the whole MPN behind it, F_ only its convolutions."""
    for key, expected in (("SGRA_BOX", True), ("FUSION_BOX", False)):
        model = small_model(*switches(**{key: True})).train()
        loss = heads_losses(model, inputs)["loss_cls"]
        assert reaches(loss, model.proposal_generator.mpn.head.predictor) == expected
        assert reaches(loss, model.proposal_generator.mpn.head.mask_fcn1)


# ---- Boxes that are given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sgra_mask", [False, True])
def test_given_boxes_get_the_masks_that_proposals_of_the_same_boxes_have(small_model, inputs, sgra_mask):
    model = small_model("MODEL.DSG.SGRA_MASK", sgra_mask)
    make_boxes_stay(model.roi_heads)
    with torch.no_grad():
        detected = model.inference(inputs, do_postprocess=False)
        given = [
            Instances(d.image_size, pred_boxes=d.pred_boxes, pred_classes=d.pred_classes, scores=d.scores) for d in detected
        ]
        found = model.inference(inputs, given, do_postprocess=False)
        shown = model.inference(inputs, given)
    for a, b, output in zip(found, detected, shown, strict=True):
        assert len(a) == 9 and set(a.get_fields()) == {"pred_boxes", "pred_classes", "scores", "pred_masks"}
        torch.testing.assert_close(a.pred_masks, b.pred_masks, rtol=1e-4, atol=1e-5)
        assert output["instances"].pred_masks.shape[1:] == SIZE
    assert (found[0].pred_masks[0] - found[0].pred_masks[1]).abs().max() > 1e-3


def test_given_boxes_without_the_mpn_are_an_error_where_it_is_needed(small_model, switches):
    given = [Instances(SIZE, pred_boxes=Boxes(boxes_apart(2)), pred_classes=torch.tensor([0, 1]))]
    for on in ({"FUSION_MASK": True}, {"SGRA_MASK": True}):
        with pytest.raises(ValueError, match="META_ARCHITECTURE 'DSGRCNN'"):
            small_model(*switches(**on)).roi_heads.forward_with_given_boxes(pyramid(), given)
    found = small_model(*switches(SGRA_BOX=True)).roi_heads.forward_with_given_boxes(pyramid(), given)
    assert found[0].pred_masks.shape == (2, 1, 28, 28)


def test_test_time_augmentation(small_cfg, small_model, inputs):
    opts = ["TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.MAX_SIZE", 128, "MODEL.DSG.SGRA_MASK", True]
    model = GeneralizedRCNNWithTTA(small_cfg(*opts), small_model(*opts))
    with torch.no_grad():
        (output,) = model([{"image": inputs[0]["image"], "height": 64, "width": 96}])
    found = output["instances"]
    assert len(found) == 9 and found.pred_masks.shape == (9, *SIZE)
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}


# ---- F_ of the detection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["shapes_dsg_R_18_FPN", "shapes_cascade_dsg_R_18_FPN"])
def test_mask_features_of_the_detections(small_model, inputs, config):
    """MASK_FEATURES_TEST "detection": what boxes get that are given as they are; the boxes themselves stay the same."""
    found = {}
    for whose in ("proposal", "detection"):
        model = small_model("MODEL.DSG.MASK_FEATURES_TEST", whose, config=f"dsg/{config}.yaml")
        with torch.no_grad():
            found[whose] = model.inference(inputs, do_postprocess=False)
    given = [Instances((64, 96), pred_boxes=f.pred_boxes, pred_classes=f.pred_classes) for f in found["proposal"]]
    with torch.no_grad():
        expected = model.inference(inputs, given, do_postprocess=False)
    for own, theirs, again in zip(found["detection"], found["proposal"], expected, strict=True):
        assert set(own.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
        assert torch.equal(own.pred_boxes.tensor, theirs.pred_boxes.tensor)
        torch.testing.assert_close(own.pred_masks, again.pred_masks)
        assert not torch.allclose(own.pred_masks, theirs.pred_masks)
