"""Cascade DSG: Eq. 3, and whose masks and features go where."""

import pytest
import torch

from dsg.cascade import CascadeMaskROIHeads
from dsg.mpn import logits_and_features
from projects.layers import sg_roi_align


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_equation_3(cascade, inputs, inputs_of, storage, mode, agnostic):
    """What the mask head of stage 1 and the box head of stage 2 see, against the equation written out for one level."""
    opts = ["MODEL.ROI_HEADS.IN_FEATURES", ["p3"], "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", agnostic]
    model = getattr(cascade("cascade_dsg", *opts), mode)()
    heads = model.roi_heads
    mask_inputs = inputs_of(heads.mask_head[0].mask_fcn1)
    pooled = inputs_of(heads.box_pooler)
    guided, fused = inputs_of(heads.box_head[1]), inputs_of(heads.box_fusions[0])
    scores = []
    heads.box_predictor[0].register_forward_hook(lambda _, arguments, output: scores.append(output[0]))
    with torch.no_grad():
        model(inputs)
    features = pooled[1][0][0]
    boxes = pooled[1][1]
    rois = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b.tensor], dim=1) for i, b in enumerate(boxes)])
    f_0 = fused[0][1]  # w_b^1 sees F_^0

    f_m = sg_roi_align(features, rois, None, 14, 1 / 8, 0) + heads.mask_fusions[0].conv(f_0)
    torch.testing.assert_close(mask_inputs[0][0], f_m, rtol=1e-4, atol=1e-4)
    logits, f_1 = logits_and_features(heads.mask_head[0], f_m)
    best = scores[0][:, :-1].argmax(dim=1)
    m_1 = (logits if agnostic else logits[torch.arange(len(logits)), best][:, None]).sigmoid()
    f_b = sg_roi_align(features, rois, m_1, 7, 1 / 8, 0) + heads.box_fusions[1].conv(f_1)
    torch.testing.assert_close(guided[0][0], f_b, rtol=1e-4, atol=1e-4)


def test_detections_fuse_the_features_of_their_own_proposals(cascade, inputs, inputs_of):
    """The first mask head fuses F_^0 of the source proposal, the others what the head before made of the same box.

    Without box regression a detection lies on its proposal, which says where it came from."""
    model = cascade("cascade_dsg", SGRA_BOX=False, FUSION_BOX=False)
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    first, second = (inputs_of(model.roi_heads.mask_fusions[t]) for t in (0, 1))
    own = []
    model.roi_heads.mask_head[0].mask_fcn2.register_forward_hook(lambda _, arguments, output: own.append(output))
    found = []
    model.proposal_generator.register_forward_hook(lambda _, arguments, output: found.extend(output[0]))
    with torch.no_grad():
        detections = model.inference(inputs, do_postprocess=False)
    for of_image, proposals, maps in zip(detections, found, first[-1][1].split(9), strict=True):
        apart = (of_image.pred_boxes.tensor[:, None] - proposals.proposal_boxes.tensor).abs().amax(dim=2)
        nearest = apart.min(dim=1)
        assert (nearest.values < 1e-3).all() and nearest.indices.tolist() != list(range(9))
        assert torch.equal(maps, proposals.proposal_mask_features[nearest.indices])
    assert torch.equal(second[-1][1], own[-1])


def test_shuffled_proposals_give_the_same_detections(cascade, inputs):
    model = cascade("cascade_dsg")
    images = model.preprocess_image(inputs)
    with torch.no_grad():
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        order = torch.randperm(len(proposals[0]), generator=torch.Generator().manual_seed(0))
        results = [model.roi_heads(images, features, p)[0][0] for p in (proposals, [proposals[0][order], proposals[1]])]
    for field in ("scores", "pred_classes", "pred_masks"):
        torch.testing.assert_close(results[0].get(field), results[1].get(field))


@pytest.mark.parametrize(("opts", "reached"), [({}, True), ({"DETACH_PROBS": True}, False)])
def test_box_loss_of_a_stage_reaches_the_mask_head_before_through_its_masks(cascade, inputs, storage, opts, reached):
    model = cascade("cascade_dsg", FUSION_BOX=False, **opts).train()
    model(inputs)["loss_cls_stage1"].backward()
    gradient = model.roi_heads.mask_head[0].predictor.weight.grad
    assert (gradient is not None and bool(gradient.any())) == reached


def test_mask_loss_is_taken_on_the_foreground_of_all_rois(cascade, inputs, storage, monkeypatch):
    """Cascade DSG runs its mask heads on all RoIs: the loss is the one of a run on the foreground alone, wherever it stands."""
    model, compared = cascade("cascade_dsg").train(), []
    of_all, of_foreground = type(model.roi_heads)._mask_loss, CascadeMaskROIHeads._mask_loss

    def both(self, features, rois, targets, stage):
        backwards = [of_image[list(range(len(of_image)))[::-1]] for of_image in rois]
        compared.append([loss(self, features, backwards, targets, stage) for loss in (of_foreground, of_all)])
        return of_all(self, features, rois, targets, stage)

    monkeypatch.setattr(type(model.roi_heads), "_mask_loss", both)
    model(inputs)
    for expected, found in compared:
        assert expected > 0
        torch.testing.assert_close(found, expected)
