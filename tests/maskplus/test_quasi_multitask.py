"""Quasi-multitask learning: a help in training that inference knows nothing of."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from maskplus.quasi_multitask import QuasiMultitask, ScaledMaskHead, is_training_only
from projects.errors import ConfigError


def head(scale: float, channels: int = 4) -> ScaledMaskHead:
    return ScaledMaskHead(ShapeSpec(channels=channels, height=14, width=14), scale=scale, num_classes=3, conv_dims=[6, 6, 6])


@pytest.mark.parametrize("scale, side", [(0.5, 14), (1.0, 28), (2.0, 56)])
def test_mask_size(arithmetic, scale, side):
    assert head(scale).layers(arithmetic(2, 4, 14, 14).float()).shape == (2, 3, side, side)


def test_layers_of_each_scale():
    layers = {scale: [name for name in head(scale).state_dict() if name.endswith("weight")] for scale in (0.5, 1.0, 2.0)}
    convs = ["mask_fcn1.weight", "mask_fcn2.weight"]
    assert layers[0.5] == [*convs, "predictor.weight"]
    assert layers[1.0] == [*convs, "deconv.weight", "predictor.weight"]
    assert sorted(layers[2.0]) == sorted([*convs, "deconv.weight", "deconv2.weight", "predictor.weight"])


def test_double_is_two_deconvolutions_with_relu():
    """One channel, all weights 1, biases of the deconvolutions -2 and 3, of the logits 0.5: relu(relu(5 - 2) + 3) + 0.5."""
    module = ScaledMaskHead(ShapeSpec(channels=1), scale=2.0, num_classes=1, conv_dims=[1])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_({"deconv.bias": -2.0, "deconv2.bias": 3.0, "predictor.bias": 0.5}.get(name, 1.0))
        assert (module.layers(torch.full((1, 1, 2, 2), 5.0)) == 6.5).all()
        assert (module.layers(torch.full((1, 1, 2, 2), -5.0)) == 3.5).all()


def test_scale_one_is_detectron2s_head(arithmetic):
    shape, arguments = ShapeSpec(channels=4), {"num_classes": 3, "conv_dims": [6, 6, 6]}
    torch.manual_seed(0)
    theirs = MaskRCNNConvUpsampleHead(shape, **arguments)
    torch.manual_seed(0)
    ours = ScaledMaskHead(shape, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = arithmetic(2, 4, 14, 14).float()
    assert torch.equal(ours.layers(x), theirs.layers(x))


@pytest.mark.parametrize("side", ["half", "double"])
def test_loss_by_hand(arithmetic, side):
    """Logits are 0.8 everywhere; the object fills the left half of the box: (log(1 + e^-0.8) + log(1 + e^0.8)) / 2."""
    module = QuasiMultitask({"mask_half": head(0.5), "mask_double": head(2.0)})
    with torch.no_grad():
        for member in module.values():
            member.predictor.weight.zero_()
            member.predictor.bias.copy_(torch.tensor([9.0, 0.8, 9.0]))
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, :, :28] = True
    proposals = Instances(
        (64, 64),
        proposal_boxes=Boxes(torch.tensor([[0.0, 0.0, 56.0, 56.0]])),
        gt_classes=torch.tensor([1]),
        gt_masks=BitMasks(masks),
    )
    with EventStorage(0):
        losses = module(arithmetic(1, 4, 14, 14).float(), [proposals])
    assert losses.keys() == {"loss_mask_half", "loss_mask_double"}
    expected = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(0.8))) / 2
    assert losses[f"loss_mask_{side}"].item() == pytest.approx(expected, rel=1e-6)


def test_inference_is_that_of_the_model_without_it(heads):
    plain, quasi = heads("CONTEXT", True), heads("CONTEXT", True, "QUASI_SCALES", [0.5, 2.0], seed=1)
    missing = quasi.module.load_state_dict(plain.module.state_dict(), strict=True)  # the auxiliary weights may be absent
    assert not missing.missing_keys

    def never(module, inputs):
        raise AssertionError("an auxiliary head ran at inference")

    for module in quasi.module.mask_head.quasi_multitask.modules():
        module.register_forward_pre_hook(never)
    for found, expected in zip([*quasi.detect(), *quasi.infer()], [*plain.detect(), *plain.infer()], strict=True):
        assert len(found) == len(expected) > 0
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_masks, expected.pred_masks)


def test_it_helps_through_the_features_only(heads):
    """Its losses reach what lies below the mask head, contextual fusion included, and nothing of the mask head itself."""
    built = heads("CONTEXT", True, "DECONV_PYRAMID", True, "BOUNDARY", "dense", "QUASI_SCALES", [0.5])
    p2 = built.features["p2"].requires_grad_()
    built.train()["loss_mask_half"].backward()
    reached = {name for name, p in built.module.named_parameters() if p.grad is not None and p.grad.any()}
    assert p2.grad.any()
    assert reached == {
        name for name, _ in built.module.named_parameters() if is_training_only(name) or name.startswith("contextual_fusion")
    }


def test_main_loss_and_its_statistics_stay_what_they_are(heads):
    plain, quasi = heads(), heads("QUASI_SCALES", [0.5, 2.0], seed=1)
    quasi.module.load_state_dict(plain.module.state_dict())
    assert torch.equal(quasi.train()["loss_mask"], plain.train()["loss_mask"])
    found, expected = quasi.storage.latest(), plain.storage.latest()
    assert found["mask_rcnn/accuracy"] == expected["mask_rcnn/accuracy"]
    assert len(quasi.storage.history("mask_rcnn/accuracy").values()) == 1
    assert {"mask_half/mask_rcnn/accuracy", "mask_double/mask_rcnn/accuracy"} <= found.keys()


def test_absent_weights_are_missed_where_only_some_are_absent(heads):
    module = heads("QUASI_SCALES", [0.5, 2.0]).module
    state = module.state_dict()
    auxiliary = [name for name in state if is_training_only(name)]
    assert len(auxiliary) == 4 + 8
    without = {name: value for name, value in state.items() if name not in auxiliary}
    assert module.load_state_dict(without, strict=False).missing_keys == []
    del without["mask_head.predictor.bias"]
    assert module.load_state_dict(without, strict=False).missing_keys == ["mask_head.predictor.bias"]
    some = {name: value for name, value in state.items() if name != auxiliary[3]}
    assert module.load_state_dict(some, strict=False).missing_keys == [auxiliary[3]]


@pytest.mark.parametrize("with_versions", [False, True])
def test_absence_is_forgiven_with_batch_norm_too(heads, with_versions):
    """Its counter of batches is missing only from files that state the versions of their layers."""
    module = heads("QUASI_SCALES", [0.5, 2.0], "MODEL.ROI_MASK_HEAD.NORM", "BN").module
    state = module.state_dict()
    auxiliary = [name for name in state if is_training_only(name)]
    assert any(name.endswith("num_batches_tracked") for name in auxiliary)
    state = state if with_versions else dict(state)
    del state[auxiliary[0]]
    assert module.load_state_dict(state, strict=False).missing_keys == auxiliary[:1]
    for name in auxiliary[1:]:
        del state[name]
    assert module.load_state_dict(state, strict=False).missing_keys == []


def test_wrong_scales_are_refused(heads):
    for scales in ([1.0], [0.5, 0.5], [0.5, 3.0], [[0.5]], ["2"]):
        with pytest.raises(ConfigError, match=r"QUASI_SCALES is .*expected \[\], \[0.5\], \[2.0\] or \[0.5, 2.0\]"):
            heads("QUASI_SCALES", scales)
    with pytest.raises(ConfigError, match=r"scale of a mask is 4.0: expected one of 0.5, 1.0, 2.0"):
        heads("MASK_SCALE", 4.0)
