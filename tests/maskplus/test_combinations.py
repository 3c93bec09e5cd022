"""The five techniques are independent: all combinations, with every alternative, build, train and infer."""

from itertools import product

import pytest
import torch

from projects.errors import ConfigError

BOUNDARIES = ("none", "original", "dense")
QUASI = ([], [0.5], [2.0], [0.5, 2.0])
BOX_LOSSES = {"loss_cls", "loss_box_reg"}
ALL_ON = ["CONTEXT", True, "DECONV_PYRAMID", True, "BOUNDARY", "dense", "QUASI_SCALES", [0.5, 2.0], "BIASED", True]


def check_trains_and_infers(heads, mask_losses: set[str], box_losses: set[str] = BOX_LOSSES, side: int = 28) -> None:
    optimizer = torch.optim.SGD(heads.module.parameters(), lr=0.01)
    missing = {name for name, _ in heads.module.named_parameters()}
    for _ in range(2):  # zero-initialised last layers give those before them no gradient in the first
        losses = heads.train()
        assert losses.keys() == mask_losses | box_losses
        assert all(torch.isfinite(loss) for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        missing -= {name for name, p in heads.module.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert not missing, "parameters without a gradient"
    for instances in heads.infer():
        assert instances.pred_masks.shape == (2, 1, side, side)
        assert ((instances.pred_masks > 0) & (instances.pred_masks < 1)).all()


@pytest.mark.parametrize("context, pyramid, biased", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("boundary, quasi", list(product(BOUNDARIES, QUASI)), ids=str)
def test_every_combination(heads, context, pyramid, boundary, quasi, biased):
    built = heads(
        *("CONTEXT", context, "DECONV_PYRAMID", pyramid, "BOUNDARY", boundary, "QUASI_SCALES", quasi, "BIASED", biased)
    )
    names = {0.5: "loss_mask_half", 2.0: "loss_mask_double"}
    check_trains_and_infers(built, {"loss_mask"} | {names[scale] for scale in quasi})


@pytest.mark.parametrize("dims", [[8], [8, 8], [8, 8, 8], [16, 8, 8], [22, 16, 16, 8]], ids=str)
def test_every_depth_of_contextual_fusion(heads, dims):
    built = heads("CONTEXT", True, "CONV_DIMS", dims)
    assert [conv.out_channels for conv in built.module.contextual_fusion.convs] == dims
    check_trains_and_infers(built, {"loss_mask"})


@pytest.mark.parametrize("techniques", [[], ALL_ON], ids=["none", "all"])
def test_half_mask(heads, techniques):
    built = heads(*techniques, "MASK_SCALE", 0.5)
    extra = {"loss_mask_half", "loss_mask_double"} if techniques else set()
    check_trains_and_infers(built, {"loss_mask"} | extra, side=14)


@pytest.mark.parametrize("techniques", [[], ALL_ON], ids=["none", "all"])
def test_cascade(heads, techniques):
    built = heads(*techniques, name="MaskPlusCascadeROIHeads")
    extra = {"loss_mask_half", "loss_mask_double"} if techniques else set()
    box_losses = {f"{loss}_stage{stage}" for loss in BOX_LOSSES for stage in range(3)}
    check_trains_and_infers(built, {"loss_mask"} | extra, box_losses)
    assert all(len(instances) and instances.has("pred_masks") for instances in built.detect())


@pytest.mark.parametrize("cascade", [False, True])
def test_without_techniques_it_is_detectron2s_mask_rcnn(heads, cascade):
    head = ("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    theirs = heads(*head, name="CascadeROIHeads" if cascade else "StandardROIHeads")
    ours = heads(name="MaskPlusCascadeROIHeads" if cascade else "MaskPlusROIHeads")
    expected, found = theirs.module.state_dict(), ours.module.state_dict()
    assert list(expected) == list(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    losses, expected = ours.train(), theirs.train()
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)
    for found, expected in zip(ours.detect(), theirs.detect(), strict=True):
        assert len(found) == len(expected) > 0
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.pred_masks, expected.pred_masks)


def test_losses_stay_connected_without_foreground(heads):
    built = heads(*ALL_ON)
    statistics = {name: b.clone() for name, b in built.module.named_buffers() if "running" in name}
    losses = built.train(objects=False)
    assert [losses[name].item() for name in ("loss_mask", "loss_mask_half", "loss_mask_double")] == [0, 0, 0]
    sum(losses.values()).backward()
    unconnected = [name for name, p in built.module.named_parameters() if p.grad is None]
    assert not unconnected
    assert all(torch.isfinite(p.grad).all() for p in built.module.parameters())
    assert statistics and all(torch.equal(dict(built.module.named_buffers())[name], b) for name, b in statistics.items())


def test_inference_without_detections(heads):
    built = heads(*ALL_ON, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    assert [instances.pred_masks.shape for instances in built.detect()] == [(0, 1, 28, 28)] * 2


def test_boxes_are_not_touched(heads):
    """Whatever the mask branch does, detections are those of the same weights without it."""
    plain, full = heads(), heads(*ALL_ON, seed=1)
    full.module.load_state_dict(plain.module.state_dict(), strict=False)
    for found, expected in zip(full.detect(), plain.detect(), strict=True):
        assert len(found) > 0
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
        assert not torch.equal(found.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objects", [True, False])
def test_mixed_precision(heads, dtype, objects):
    built = heads(*ALL_ON)
    with torch.autocast("cpu", dtype):
        losses = built.train(objects=objects)
        detected = built.detect()
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in built.module.parameters())
    expected = heads(*ALL_ON).train(objects=objects)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), expected[name], rtol=0.05, atol=0.05, msg=name)
    assert all(len(instances) and torch.isfinite(instances.pred_masks).all() for instances in detected)


@pytest.mark.parametrize(
    "opts, masks",
    [
        (["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True], 28),
        (["MASK_SCALE", 2.0], 56),
        (["MODEL.ROI_MASK_HEAD.NORM", "BN"], 28),
        (["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7], 14),
        (["MODEL.ROI_MASK_HEAD.NUM_CONV", 0], 28),
        (["MODEL.ROI_MASK_HEAD.NUM_CONV", 0, "MODEL.ROI_MASK_HEAD.CONV_DIM", 6, "QUASI_SCALES", [2.0]], 28),
    ],
    ids=str,
)
def test_other_shapes_of_the_mask_head(heads, opts, masks):
    built = heads(*ALL_ON, *opts)
    extra = {"loss_mask_double"} if "QUASI_SCALES" in opts else {"loss_mask_half", "loss_mask_double"}
    check_trains_and_infers(built, {"loss_mask"} | extra, side=masks)


def test_without_masks_the_boxes_train(heads):
    built = heads(*ALL_ON, "MODEL.MASK_ON", False)
    assert built.module.contextual_fusion is None and built.train().keys() == BOX_LOSSES
    assert not any(instances.has("pred_masks") for instances in built.detect())


@pytest.mark.parametrize("name", ["MaskPlusROIHeads", "MaskPlusCascadeROIHeads"])
@pytest.mark.parametrize("technique", [*zip(ALL_ON[2::2], ALL_ON[3::2], strict=True), ("MASK_SCALE", 0.5)], ids=str)
def test_techniques_of_the_mask_head_need_it(heads, name, technique):
    with pytest.raises(ConfigError, match="'MaskRCNNConvUpsampleHead'.* set that, or leave them off"):
        heads(*technique, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", name=name)


def test_contextual_fusion_needs_roi_heads_that_have_it(heads):
    with pytest.raises(ConfigError, match="'StandardROIHeads' has no contextual fusion: set 'MaskPlusROIHeads'"):
        heads("CONTEXT", True, name="StandardROIHeads")
    heads("BOUNDARY", "dense", name="StandardROIHeads")  # the mask head's own techniques need no other RoI heads


def test_half_size_needs_equal_channels_without_convolutions(heads):
    opts = ["MODEL.ROI_MASK_HEAD.NUM_CONV", 0, "MODEL.ROI_MASK_HEAD.CONV_DIM", 6]
    for technique in (("QUASI_SCALES", [0.5]), ("MASK_SCALE", 0.5)):
        with pytest.raises(ConfigError, match="from the features' 8 channels to CONV_DIM 6"):
            heads(*technique, *opts)
