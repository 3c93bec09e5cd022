"""The MPN and the MaskRPN around it: the layers, the chunks, the fields, the loss, the gradients."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, pairwise_iou

from dsg import mpn as mpn_module
from dsg.mpn import in_chunks, logits_and_features
from projects.errors import ConfigError


def test_layers_are_those_of_the_standard_mask_head_and_features_come_after_the_last_convolution():
    torch.manual_seed(0)
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=5, height=14, width=14), num_classes=3, conv_dims=[6] * 5)
    x = torch.randn(2, 5, 14, 14)
    caught = []
    head.mask_fcn4.register_forward_hook(lambda module, arguments, output: caught.append(output))
    logits, features = logits_and_features(head, x)
    torch.testing.assert_close(logits, head.layers(x))
    assert logits.shape == (2, 3, 28, 28) and features.shape == (2, 6, 14, 14)
    torch.testing.assert_close(features, caught[0])


@pytest.mark.parametrize("counts", [(5, 0, 4), (0,), (0, 0), (1, 7)])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunks_hold_every_box_once_in_its_image_and_order(counts, size):
    boxes = [Boxes(torch.rand(count, 4)) for count in counts]
    parts = list(in_chunks(boxes, size))
    assert len(parts) == max(1, -(-sum(counts) // size))
    assert all(sum(map(len, part)) <= size for part in parts)
    for image, expected in enumerate(boxes):
        assert torch.equal(Boxes.cat([part[image] for part in parts]).tensor, expected.tensor)


@pytest.mark.parametrize("channels_last", [False, True])
def test_chunks_change_nothing(small_model, monkeypatch, channels_last):
    mpn = small_model().proposal_generator.mpn
    features = {f"p{level}": torch.randn(2, 8, 128 >> level, 192 >> level) for level in range(2, 6)}
    if channels_last:
        features = {name: level.contiguous(memory_format=torch.channels_last) for name, level in features.items()}
    corners = torch.rand(11, 2) * 40
    boxes = Boxes(torch.cat([corners, corners + 5 + 40 * torch.rand(11, 2)], dim=1))
    in_one_go = mpn(features, [boxes[:7], boxes[7:]])  # gradients are on
    monkeypatch.setitem(mpn_module.CHUNK, "cpu", 3)
    with torch.no_grad():
        chunked = mpn(features, [boxes[:7], boxes[7:]])
    assert in_one_go[0].shape == (11, 1, 28, 28) and in_one_go[1].shape == (11, 12, 14, 14)
    assert in_one_go[0].requires_grad and not chunked[0].requires_grad
    for expected, found in zip(in_one_go, chunked, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        logits, mask_features = mpn(features, [boxes[:0], boxes[:0]])
    assert logits.shape == (0, 1, 28, 28) and mask_features.shape == (0, 12, 14, 14)


def test_bfloat16_at_inference_only(small_model, inputs, storage):
    model, exact = small_model("MODEL.DSG.MPN_DTYPE_TEST", "bfloat16"), small_model()
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        boxes = [Boxes(torch.tensor([[8.0, 10.0, 40.0, 50.0], [30.0, 5.0, 90.0, 60.0]]))] * 2
        logits, mask_features = model.proposal_generator.mpn(features, boxes)
        expected = exact.proposal_generator.mpn(features, boxes)
        assert len(model(inputs)[0]["instances"]) > 0
    assert logits.dtype == torch.float32 and mask_features.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected[0], rtol=0.03, atol=0.03 * expected[0].abs().max().item())
    assert not torch.equal(logits, expected[0])
    model.train()
    assert model.proposal_generator.mpn(features, boxes)[1].dtype == torch.float32
    with torch.no_grad():  # the losses on data that is not trained on
        assert model.proposal_generator.mpn(features, boxes)[1].dtype == torch.float32


def test_proposals_are_sampled_and_carry_the_masks(small_model, inputs, storage):
    model = small_model().train()
    images = model.preprocess_image(inputs)
    proposals, losses = model.proposal_generator(images, model.backbone(images.tensor), [x["instances"] for x in inputs])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_mpn"}
    for of_image, x in zip(proposals, inputs, strict=True):
        assert 0 < len(of_image) <= 16 and of_image.has("gt_classes")
        assert of_image.proposal_mask_probs.shape == (len(of_image), 1, 28, 28)
        assert of_image.proposal_mask_probs.min() > 0 and of_image.proposal_mask_probs.max() < 1
        assert of_image.proposal_mask_features.shape == (len(of_image), 12, 14, 14)
        overlaps = pairwise_iou(of_image.proposal_boxes, x["instances"].gt_boxes)
        assert (overlaps == 1).any(dim=0).all()  # the ground truth is among the proposals
    assert model.roi_heads.label_and_sample_proposals(proposals, None) is proposals
    model.eval()
    with torch.no_grad():
        proposals, losses = model.proposal_generator(images, model.backbone(images.tensor))
    assert losses == {} and [len(p) for p in proposals] == [20, 20]
    assert all(p.proposal_mask_probs.shape == (20, 1, 28, 28) for p in proposals)


def test_masks_are_those_of_the_proposals_boxes(small_model, inputs):
    model = small_model()
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        for image in (0, 1):
            row = 3
            boxes = [Boxes(torch.zeros(0, 4))] * 2
            boxes[image] = proposals[image].proposal_boxes[row]
            logits, mask_features = model.proposal_generator.mpn(features, boxes)
            torch.testing.assert_close(proposals[image].proposal_mask_probs[row], 1 / (1 + (-logits[0]).exp()))
            torch.testing.assert_close(proposals[image].proposal_mask_features[row], mask_features[0])


def test_mask_loss_is_taken_where_iou_is_at_least_half(small_model, inputs, storage):
    """By hand: cross entropy with the ground truth mask inside the box, over the RoIs that overlap an object enough."""
    model = small_model().train()
    images = model.preprocess_image(inputs)
    truth = [x["instances"] for x in inputs]
    proposals, losses = model.proposal_generator(images, model.backbone(images.tensor), truth)
    overlaps = pairwise_iou(proposals[0].proposal_boxes, truth[0].gt_boxes)
    best, matched = overlaps.max(dim=1)
    rows = (best >= 0.5).nonzero().squeeze(1)
    assert 2 <= len(rows) < len(best)
    boxes = proposals[0].proposal_boxes.tensor[rows]
    targets = truth[0].gt_masks[matched[rows]].crop_and_resize(boxes, 28).float()
    probs = proposals[0].proposal_mask_probs[rows, 0]
    torch.testing.assert_close(losses["loss_mpn"], F.binary_cross_entropy(probs, targets))
    names = storage.latest()
    assert "mpn/mask_rcnn/accuracy" in names and "mask_rcnn/accuracy" not in names


def test_mask_loss_reaches_the_pyramid_through_the_mpn(small_model, inputs, storage):
    model = small_model().train()
    images = model.preprocess_image(inputs)
    features = {name: level.detach().requires_grad_() for name, level in model.backbone(images.tensor).items()}
    _, losses = model.proposal_generator(images, features, [x["instances"] for x in inputs])
    losses["loss_mpn"].backward()
    assert any(features[name].grad is not None and features[name].grad.any() for name in ("p2", "p3", "p4", "p5"))
    assert all(p.grad is not None and p.grad.any() for p in model.proposal_generator.mpn.parameters())
    assert all(p.grad is None for p in model.proposal_generator.rpn_head.parameters())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.MASK_ON", False), "set MODEL.MASK_ON True"),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"), "needs the masks that MODEL.PROPOSAL_GENERATOR.NAME 'MaskRPN'"),
        (("MODEL.DSG.MPN_DTYPE_TEST", "float8"), "'float8': expected one of float32, bfloat16"),
        (("MODEL.DSG.MASK_FEATURES_TEST", "both"), "'both': expected 'proposal' or 'detection'"),
        (("MODEL.DSG.FUSION_KERNEL", 2), "FUSION_KERNEL must be odd .*, found 2"),
        (("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPool"), "must be 'ROIAlignV2', found 'ROIPool'"),
        (("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"), "must be 'ROIAlignV2', found 'ROIAlign'"),
        (("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 8), "found 14 and 8"),
        (("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True), "TRAIN_ON_PRED_BOXES False"),
        (("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), "expected DSGROIHeads or CascadeDSGROIHeads, found StandardROIHeads"),
        (("MODEL.ROI_MASK_HEAD.NUM_CONV", 0), "NUM_CONV 1 or more"),
    ],
)
def test_configs_that_cannot_be_are_refused(small_model, opts, message):
    with pytest.raises(ConfigError, match=message):
        small_model(*opts)
