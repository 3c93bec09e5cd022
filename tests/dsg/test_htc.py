"""Hybrid Task Cascade: mask information flow, semantic branch."""

import pytest
import torch
from detectron2.structures import BitMasks, Instances

from dsg.mpn import features_of
from dsg.semantic_branch import SemanticBranch
from projects.errors import DataError


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mask_information_flow(cascade, inputs, inputs_of, storage, mode):
    """The third mask head sees x + g_2(f_2(x + g_1(f_1(x))))."""
    model = getattr(cascade("htc", SEMANTIC=False), mode)()
    heads = model.roi_heads
    seen, pooled = inputs_of(heads.mask_head[2].mask_fcn1), []
    heads.mask_pooler.register_forward_hook(lambda _, arguments, output: pooled.append(output))
    with torch.no_grad():
        model(inputs)
        x = pooled[-1]
        f_1 = features_of(heads.mask_head[0], x)
        f_2 = features_of(heads.mask_head[1], x + heads.flows[0](f_1))
        torch.testing.assert_close(seen[-1][0], x + heads.flows[1](f_2))
    assert (heads.flows[0](f_1) >= 0).all()


def test_both_flows_are_added(cascade, inputs, inputs_of):
    model = cascade("htc_dsg", MASK_FLOW=True, SEMANTIC=False)
    heads = model.roi_heads
    seen, fused, pooled = inputs_of(heads.mask_head[1].mask_fcn1), inputs_of(heads.mask_fusions[1]), []
    heads.mask_pooler.register_forward_hook(lambda _, arguments, output: pooled.append(output))
    with torch.no_grad():
        model(inputs)
        x, previous = pooled[-1], fused[-1][1]
        expected = x + heads.flows[0](features_of(heads.mask_head[0], x)) + heads.mask_fusions[1].conv(previous)
    calls = [arguments[0] for arguments in seen if len(arguments[0]) == len(x)]
    assert any(torch.allclose(call, expected, atol=1e-5) for call in calls)


def test_semantic_branch_by_hand():
    """Two levels of constants and kernels that pass on what they get."""
    branch = SemanticBranch(in_features=["a", "b"], common=1, channels=1, num_classes=1, ignore_value=255, loss_weight=0.2)
    for name, parameter in branch.named_parameters():
        torch.nn.init.zeros_(parameter)
        if name.endswith("weight"):
            parameter.data[..., parameter.shape[-2] // 2, parameter.shape[-1] // 2] = 1
    features = {"a": torch.full((1, 1, 8, 8), 2.0), "b": torch.full((1, 1, 4, 4), 3.0)}
    logits, embedding = branch(features)
    assert logits.shape == (1, 2, 4, 4) and (logits == 5).all() and (embedding == 5).all()
    labels = torch.full((1, 32, 32), 255)
    assert branch.loss(logits, labels)["loss_sem_seg"] == 0
    labels[:, :16] = 0
    torch.testing.assert_close(branch.loss(logits, labels)["loss_sem_seg"], 0.2 * torch.tensor(2.0).log())


def test_cells_take_the_class_at_their_middle():
    branch = SemanticBranch(in_features=["a"], common=0, channels=1, num_classes=2, ignore_value=255, loss_weight=1.0)
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[:, 4:, 4:] = 1  # the middle of the first cell of 8 x 8 is at 4
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 1] = 50.0
    assert branch.loss(logits, labels)["loss_sem_seg"] < 1e-6


def test_semantic_embedding_is_added_to_boxes_and_masks(cascade, labelled, inputs_of):
    model = cascade("htc", "MODEL.ROI_HEADS.IN_FEATURES", ["p3"], MASK_FLOW=False)
    heads = model.roi_heads
    box, mask = inputs_of(heads.box_head[1]), inputs_of(heads.mask_head[2].mask_fcn1)
    pooled = {name: [] for name in ("box_pooler", "mask_pooler", "semantic_pooler")}
    for name, outputs in pooled.items():
        getattr(heads, name).register_forward_hook(lambda _, arguments, output, outputs=outputs: outputs.append(output))
    with torch.no_grad():
        model(labelled)
    semantic = pooled["semantic_pooler"]
    assert semantic[1].shape[-1] == 14
    expected = torch.nn.functional.avg_pool2d(semantic[1], 2) + pooled["box_pooler"][1]
    torch.testing.assert_close(box[0][0], expected)
    torch.testing.assert_close(mask[0][0], semantic[-1] + pooled["mask_pooler"][-1])


def test_padding_and_unlabelled_pixels_are_ignored(cascade, labelled, storage):
    model = cascade("htc").train()
    small = {**labelled[0], "image": labelled[0]["image"][:, :40, :50], "sem_seg": labelled[0]["sem_seg"][:40, :50]}
    small["instances"] = Instances((40, 50), **labelled[1]["instances"].get_fields())
    small["instances"].gt_masks = BitMasks(torch.zeros(0, 40, 50, dtype=torch.bool))
    images = model.preprocess_image([small, labelled[1]])
    labels = model._labels([small, labelled[1]], images)
    assert labels.shape == images.tensor.shape[:1] + images.tensor.shape[-2:]
    assert torch.equal(labels[0, :40, :50], small["sem_seg"])
    assert (labels[0, 40:] == 255).all() and (labels[0, :, 50:] == 255).all()
    unlabelled = [{**x, "sem_seg": torch.full((64, 96), 255)} for x in labelled]
    assert model(unlabelled)["loss_sem_seg"] == 0


def test_no_stuff_maps(cascade, inputs, storage):
    with pytest.raises(DataError, match=r"coco/stuffthingmaps/train2017/.*prepare_shapes.py"):
        cascade("htc").train()(inputs)
    with torch.no_grad():
        assert len(cascade("htc")(inputs)) == 2  # inference needs none
