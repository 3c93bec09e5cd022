"""Cascade Mask R-CNN with a mask head per stage, Cascade DSG, and both with HTC: weights, rows, labels, losses, inference."""

import itertools

import pytest
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, Instances, PolygonMasks, pairwise_iou

from dsg.cascade import CascadeMaskROIHeads, MatchedMasks, channel_of_class, mask_loss
from dsg.mask_rpn import attach_masks
from projects import config_path, load_config
from projects.errors import ConfigError
from projects.modeling.build import build_model

MASK_RCNN = 44_343_216 - 316 * 1025  # class-agnostic boxes have 4 outputs instead of 320
STAGE = (256 * 49 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * (81 + 4) + 2_643_280  # a box head and a mask head
CASCADE = MASK_RCNN + 2 * STAGE
SEMANTIC = 6 * 65_792 + 4 * 590_080 + 257 * 183  # laterals and embedding; 3x3 convolutions; logits
MPN, FUSION, FLOW = 2_622_977, 590_080, 65_792
NAMES = ("cascade_mask_rcnn", "cascade_dsg", "htc", "htc_dsg")
OFF = dict.fromkeys(("INTERLEAVED", "MASK_FLOW", "SEMANTIC", "FUSION_MASK", "SGRA_BOX", "FUSION_BOX"), False)


@pytest.mark.parametrize("name", ["cascade_mask_rcnn", "cascade_dsg", "htc", "htc_dsg"])
def test_settings_of_the_paper(name):
    """Section 4.1, and mmdetection's where it is silent."""
    cfg = load_config(config_path(f"dsg/{name}_R_50_FPN_20e.yaml"))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (16, 0.02, 20 * 7330)
    assert list(cfg.SOLVER.STEPS) == [16 * 7330, 19 * 7330]
    assert (cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST) == (0.001, 0.5)
    assert list(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS) == [0.5, 0.6, 0.7] and list(cfg.MODEL.DSG.STAGE_WEIGHTS) == [1, 0.5, 0.25]
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN == 2000 and cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO == 2
    assert cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0 and abs(cfg.MODEL.RPN.SMOOTH_L1_BETA - 1 / 9) < 1e-4


@pytest.mark.parametrize("name", ["htc", "htc_dsg"])
def test_settings_of_the_large_rows(name):
    cfg, small = (load_config(config_path(f"dsg/{name}_{size}_20e.yaml")) for size in ("X_101_64x4d_DCN_FPN", "R_50_FPN"))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (8, 0.01, 40 * 7330)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING) == ((400, 1400), "range")
    assert cfg.INPUT.MAX_SIZE_TRAIN == 1600
    assert cfg.MODEL.DSG == small.MODEL.DSG and cfg.MODEL.ROI_HEADS == small.MODEL.ROI_HEADS


def without_objects(batch):
    return [{**x, "instances": x["instances"][[]]} for x in batch]


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ("cascade_mask_rcnn", CASCADE),
        ("cascade_dsg", CASCADE + MPN + 6 * FUSION),
        ("htc", CASCADE + 2 * FLOW + SEMANTIC),
        ("htc_dsg", CASCADE + SEMANTIC + MPN + 6 * FUSION),
    ],
)
def test_weights(config, weights):
    cfg = load_config(config_path(f"dsg/{config}_R_50_FPN_20e.yaml"), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == weights


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_infers(cascade, labelled, storage, name):
    model = cascade(name).train()
    losses = model(labelled)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    of_stages = {f"loss_{kind}_stage{t}" for kind in ("cls", "box_reg", "mask") for t in range(3)}
    others = {"loss_rpn_cls", "loss_rpn_loc"} | ({"loss_mpn"} if "dsg" in name else set())
    assert set(losses) == of_stages | others | ({"loss_sem_seg"} if "htc" in name else set())
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        for output in model.eval()(labelled):
            found = output["instances"]
            assert len(found) == 9 and set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}


DSG_SWITCHES = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("on", DSG_SWITCHES, ids=lambda on: "".join("-+"[v] for v in on))
@pytest.mark.parametrize("flow", [False, True])
def test_every_setting_of_the_switches_trains_and_infers(cascade, labelled, storage, on, flow):
    keys = dict(zip(("FUSION_MASK", "SGRA_BOX", "FUSION_BOX"), on, strict=True))
    model = cascade("htc_dsg", **keys, MASK_FLOW=flow).train()
    losses = model(labelled)
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        assert all(len(output["instances"]) == 9 for output in model.eval()(labelled))


def test_each_switch_changes_the_result(cascade, labelled):
    full = cascade("htc_dsg", MASK_FLOW=True).state_dict()

    def results(**on):
        model = cascade("htc_dsg", **{**OFF, "INTERLEAVED": True, **on})
        model.load_state_dict(full, strict=False)
        with torch.no_grad():
            return model.inference(labelled, do_postprocess=False)[0]

    plain = results()
    for key in ("SGRA_BOX", "FUSION_BOX", "SEMANTIC"):
        assert not torch.allclose(results(**{key: True}).scores, plain.scores, atol=1e-4), key
    for key in ("FUSION_MASK", "MASK_FLOW"):
        found = results(**{key: True})
        assert torch.equal(found.scores, plain.scores) and not torch.allclose(found.pred_masks, plain.pred_masks), key


@pytest.mark.parametrize("name", ["htc", "htc_dsg"])
def test_without_switches_it_is_the_base_bit_by_bit(cascade, labelled, storage, name):
    """On the same weights, losses, gradients and detections."""
    models = {
        "base": cascade("cascade_mask_rcnn", "MODEL.META_ARCHITECTURE", "DSGRCNN"),
        name: cascade(name, **OFF),
    }
    missing, unexpected = models[name].load_state_dict(models["base"].state_dict(), strict=False)
    assert not unexpected and all(key.startswith("proposal_generator.mpn.") for key in missing)
    losses, detections = {}, {}
    for key, model in models.items():
        torch.manual_seed(3)
        losses[key] = model.train()(labelled)
        losses[key].pop("loss_mpn", None)
        sum(losses[key].values()).backward()
        with torch.no_grad():
            detections[key] = model.eval().inference(labelled, do_postprocess=False)
    assert losses[name] == losses["base"]
    gradients = {key: {n: p.grad for n, p in model.roi_heads.named_parameters()} for key, model in models.items()}
    assert all(torch.equal(gradients[name][key], gradient) for key, gradient in gradients["base"].items())
    for found, expected in zip(detections[name], detections["base"], strict=True):
        for field in ("scores", "pred_classes", "pred_masks"):
            assert torch.equal(found.get(field), expected.get(field))
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_htc_dsg_without_its_switches_is_htc_bit_by_bit(cascade, labelled, storage):
    models = [cascade("htc"), cascade("htc_dsg", MASK_FLOW=True, FUSION_MASK=False, SGRA_BOX=False, FUSION_BOX=False)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    losses = []
    for model in models:
        torch.manual_seed(3)
        losses.append(model.train()(labelled))
    losses[1].pop("loss_mpn")
    assert losses[0] == losses[1]
    with torch.no_grad():
        found, expected = (model.eval().inference(labelled, do_postprocess=False)[0] for model in models)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_masks, expected.pred_masks)


def test_cascade_alone_needs_no_meta_architecture_of_ours(cascade):
    assert cascade("cascade_mask_rcnn", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN").roi_heads.handed_on == ()


# Rows


def boxes_of(calls) -> list[torch.Tensor]:
    return [torch.cat([boxes.tensor for boxes in arguments[1]]) for arguments in calls]


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mask_head_and_next_box_head_see_the_same_rois(cascade, inputs, inputs_of, storage, mode, objects):
    model = getattr(cascade("cascade_dsg"), mode)()
    seen = [inputs_of(getattr(model.roi_heads, name)) for name in ("box_pooler", "mask_pooler")]
    with torch.no_grad():
        model(inputs if objects else without_objects(inputs))
    box, mask = map(boxes_of, seen)
    assert len(box) == len(mask) == 3
    for stage in (0, 1):
        assert torch.equal(mask[stage], box[stage + 1]) and not torch.equal(box[stage], box[stage + 1])


@pytest.mark.parametrize(("name", "interleaved"), [("cascade_mask_rcnn", False), ("htc", True)])
def test_whose_boxes_a_mask_head_trains_on(cascade, labelled, inputs_of, storage, name, interleaved):
    """The stage's own RoIs, and interleaved those that its box head predicts, which are the next box head's."""
    model = cascade(name).train()
    seen = [inputs_of(getattr(model.roi_heads, name)) for name in ("box_pooler", "mask_pooler")]
    model(labelled)
    box, mask = map(boxes_of, seen)
    for stage in (0, 1):
        same = [(mask[stage][:, None] == box[stage + later][None]).all(dim=2).any(dim=1) for later in (0, 1)]
        assert len(mask[stage]) and same[interleaved].all() and not same[not interleaved].any()


@pytest.mark.parametrize("name", ["cascade_mask_rcnn", "htc_dsg"])
def test_an_empty_box_keeps_its_row_and_carries_no_loss(cascade, labelled, storage, name, monkeypatch):
    """The first box head moves all boxes of odd rows out of the image."""
    model = cascade(name).train()
    heads, counted, refine = model.roi_heads, [], CascadeMaskROIHeads._refine

    def emptying(self, predictions, rois, stage):
        following = refine(self, predictions, rois, stage)
        for of_image in following if stage == 0 else ():
            of_image.proposal_boxes.tensor[1::2] = torch.tensor([96.0, 10, 96, 20])
        return following

    monkeypatch.setattr(CascadeMaskROIHeads, "_refine", emptying)
    losses_of = heads.box_predictor[1].losses

    def counting(predictions, rois):
        counted.append((len(predictions[0]), sum(map(len, rois))))
        return losses_of(predictions, rois)

    monkeypatch.setattr(heads.box_predictor[1], "losses", counting)
    seen = []
    heads.box_pooler.register_forward_pre_hook(lambda _, arguments: seen.append([len(b) for b in arguments[1]]))
    losses = model(labelled)
    assert seen[0] == seen[1] == seen[2]
    assert counted == [(sum((n + 1) // 2 for n in seen[0]),) * 2]
    assert all(loss.isfinite() for loss in losses.values())


def test_boxes_that_are_not_finite_become_empty(cascade):
    heads = cascade("cascade_mask_rcnn").roi_heads
    rois = [Instances((64, 96), proposal_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40], [8, 8, 40, 40], [80, 8, 90, 40]])))]
    deltas = torch.tensor([[float("nan"), 0, 0, 0], [0, 0, 0, 0], [100.0, 0, 0, 0]])
    following = heads._refine((torch.zeros(3, 4), deltas), rois, 0)[0].proposal_boxes
    expected = [[0.0, 0, 0, 0], [8, 8, 40, 40], [96, 8, 96, 40]]
    torch.testing.assert_close(following.tensor, torch.tensor(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objects", [False, True])
def test_no_proposals_and_no_objects(cascade, labelled, storage, name, objects):
    model = cascade(name).train()
    model.proposal_generator.post_nms_topk = {True: 0, False: 0}
    losses = model(labelled if objects else without_objects(labelled))
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())
    assert all((losses[f"loss_mask_stage{t}"] > 0) == objects for t in (0,))
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        for output in model.eval()(labelled):
            assert len(output["instances"]) == 0 and output["instances"].pred_masks.shape == (0, 64, 96)


@pytest.mark.parametrize("name", NAMES)
def test_no_foreground_at_a_later_stage_only(cascade, labelled, storage, monkeypatch, name):
    model, refine = cascade(name).train(), CascadeMaskROIHeads._refine

    def away(self, predictions, rois, stage):
        following = refine(self, predictions, rois, stage)
        for of_image in following:
            of_image.proposal_boxes.tensor[:] = torch.tensor([90.0, 0, 96, 4])
        return following

    monkeypatch.setattr(CascadeMaskROIHeads, "_refine", away)
    losses = model(labelled)
    assert losses["loss_box_reg_stage0"] > 0 and losses["loss_box_reg_stage1"] == losses["loss_box_reg_stage2"] == 0
    masks = [losses[f"loss_mask_stage{t}"] > 0 for t in range(3)]
    assert masks == [not model.roi_heads.interleaved, False, False]
    sum(losses.values()).backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]


# Labels and losses


def test_labels_by_the_stage_and_masks_by_one_half(cascade, storage):
    """IoU with the object [0, 100)^2 cropped to ten wide strips: w / 100."""
    heads = cascade("cascade_mask_rcnn").roi_heads
    truth = Instances((100, 100), gt_boxes=Boxes(torch.tensor([[0.0, 0, 100, 100]])), gt_classes=torch.tensor([2]))
    rois = [Instances((100, 100), proposal_boxes=Boxes(torch.tensor([[0.0, 0, w, 100] for w in (45, 55, 65, 75)])))]
    expected = {0: [3, 2, 2, 2], 1: [3, 3, 2, 2], 2: [3, 3, 3, 2]}
    for stage, classes in expected.items():
        heads._match(rois, [truth], stage)
        assert rois[0].gt_classes.tolist() == classes and rois[0].gt_mask_classes.tolist() == [3, 2, 2, 2]
        assert torch.equal(rois[0].gt_boxes.tensor, truth.gt_boxes.tensor.repeat(4, 1))


@pytest.mark.parametrize("name", ["cascade_mask_rcnn", "cascade_dsg"])
def test_every_stage_labels_by_its_own_threshold(cascade, inputs, storage, monkeypatch, name):
    """Where boxes do not move, a stage has the foreground that its threshold leaves, and that is what is logged."""
    model = cascade(name).train()
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    objects, generator = inputs[0]["instances"].gt_boxes, torch.Generator().manual_seed(0)
    shifts = torch.rand(60, 4, generator=generator) * 24 - 12
    jittered = [Boxes(objects.tensor.repeat(30, 1) + shifts), Boxes(torch.zeros(0, 4))]
    jittered[0].clip((64, 96))
    rois = [Instances((64, 96), proposal_boxes=boxes) for boxes in jittered]
    if name == "cascade_dsg":
        features = model.backbone(model.preprocess_image(inputs).tensor)
        attach_masks(rois, *model.proposal_generator.mpn(features, jittered))
    for of_image in rois:
        of_image.gt_classes = torch.zeros(len(of_image), dtype=torch.int64)
    monkeypatch.setattr(model.roi_heads, "label_and_sample_proposals", lambda proposals, targets: rois)
    model.roi_heads(None, model.backbone(model.preprocess_image(inputs).tensor), rois, [x["instances"] for x in inputs])
    best = pairwise_iou(objects, jittered[0]).amax(dim=0)
    counts = [int((best >= threshold).sum()) for threshold in (0.5, 0.6, 0.7)]
    assert counts[0] > counts[1] > counts[2] > 0
    logged = storage.histories()
    for stage, count in enumerate(counts):
        assert [v for v, _ in logged[f"stage{stage}/roi_head/num_fg_samples"].values()] == [count / 2]


def test_masks_follow_the_matching(cascade, inputs, storage):
    """A RoI that moves from one object to the other is trained on the other one's mask."""
    heads, objects = cascade("cascade_mask_rcnn").roi_heads, inputs[0]["instances"]
    rois = [Instances((64, 96))]
    for row in (0, 1):
        rois[0].proposal_boxes = objects.gt_boxes[[row]]
        heads._match(rois, [objects], stage=1)
        target = objects.gt_masks[[row]].crop_and_resize(rois[0].proposal_boxes.tensor, 28)
        logits = torch.zeros(1, 3, 28, 28)
        logits[0, objects.gt_classes[row]] = 20.0 * target[0].float() - 10
        assert mask_loss(logits, rois, [objects]) < 1e-4
        assert mask_loss(-logits, rois, [objects]) > 9


def test_mask_loss_is_detectron2s(inputs, storage):
    objects = inputs[0]["instances"]
    rois = Instances((64, 96), proposal_boxes=Boxes(torch.tensor([[5.0, 8, 44, 52], [30, 18, 82, 62], [6, 9, 41, 50]])))
    rois.gt_mask_classes, rois.gt_matches = torch.tensor([0, 2, 0]), torch.tensor([0, 1, 0])
    logits = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    of_detectron2 = Instances((64, 96), proposal_boxes=rois.proposal_boxes, gt_classes=rois.gt_mask_classes)
    of_detectron2.gt_masks = objects.gt_masks[torch.tensor([0, 1, 0])]
    assert mask_loss(logits, [rois], [objects]) == mask_rcnn_loss(logits, [of_detectron2])


def test_masks_of_many_rois_are_cropped_in_chunks(inputs):
    objects = inputs[0]["instances"]
    matches = torch.arange(150) % 2
    boxes = objects.gt_boxes.tensor[matches] + torch.arange(150)[:, None] / 50
    expected = objects.gt_masks[matches].crop_and_resize(boxes, 28)
    assert torch.equal(MatchedMasks(objects.gt_masks, matches).crop_and_resize(boxes, 28), expected)
    polygons = PolygonMasks([[[8, 10, 40, 10, 40, 50]], [[36, 20, 80, 20, 80, 60]]])
    found = MatchedMasks(polygons, matches).crop_and_resize(boxes, 28)
    assert torch.equal(found, polygons[matches].crop_and_resize(boxes, 28))


def test_stage_weights(cascade, inputs, storage):
    model = cascade("cascade_mask_rcnn").train()

    def losses(weights):
        model.roi_heads.stage_weights = weights
        torch.manual_seed(0)
        return model(inputs)

    plain, weighted = losses((1.0, 1.0, 1.0)), losses((1.0, 0.5, 0.25))
    for kind, (stage, weight) in itertools.product(("cls", "box_reg", "mask"), enumerate((1, 0.5, 0.25))):
        name = f"loss_{kind}_stage{stage}"
        assert weighted[name] == weight * plain[name] > 0
    assert load_config(config_path("dsg/htc_R_50_FPN_20e.yaml")).MODEL.DSG.STAGE_WEIGHTS == [1, 0.5, 0.25]


def test_scores_come_from_the_mean_of_the_logits(cascade, inputs, monkeypatch):
    model, logits = cascade("cascade_mask_rcnn"), []
    for predictor in model.roi_heads.box_predictor:
        predictor.register_forward_hook(lambda _, arguments, output: logits.append(output[0]))
    seen = {}
    last = model.roi_heads.box_predictor[-1]
    of_last = last.predict_probs
    monkeypatch.setattr(last, "predict_probs", lambda *arguments: seen.setdefault("probs", of_last(*arguments)))
    with torch.no_grad():
        model(inputs)
    expected = (sum(logits) / 3).softmax(dim=1)
    torch.testing.assert_close(torch.cat(list(seen["probs"])), expected)


def test_masks_are_the_mean_of_the_heads_probabilities(cascade, inputs):
    model, logits = cascade("cascade_mask_rcnn"), []
    for head in model.roi_heads.mask_head:
        head.predictor.register_forward_hook(lambda _, arguments, output: logits.append(output))
    with torch.no_grad():
        found = model.inference(inputs, do_postprocess=False)
    assert len(logits) == 3
    classes = torch.cat([f.pred_classes for f in found])
    expected = sum(x.sigmoid() for x in logits)[torch.arange(len(classes)), classes] / 3
    torch.testing.assert_close(torch.cat([f.pred_masks[:, 0] for f in found]), expected)


def test_channel_of_class():
    values = torch.arange(24.0).reshape(3, 2, 2, 2)
    assert torch.equal(channel_of_class(values, torch.tensor([1, 0, 1])), values[[0, 1, 2], [1, 0, 1]][:, None])
    assert torch.equal(channel_of_class(values[:, :1], torch.tensor([5, 6, 7])), values[:, :1])


# Inference, gradients, settings


def test_chunks_change_nothing(cascade, inputs, monkeypatch):
    model = cascade("htc_dsg")
    with torch.no_grad():
        expected = model.inference(inputs, do_postprocess=False)
        monkeypatch.setitem(__import__("dsg.mpn").mpn.CHUNK, "cpu", 7)
        found = model.inference(inputs, do_postprocess=False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(a.pred_masks, b.pred_masks, rtol=1e-3, atol=1e-3)


def test_boxes_have_no_gradient(cascade, inputs, storage):
    model = cascade("cascade_dsg").train()
    model(inputs)["loss_box_reg_stage1"].backward()
    gradient = model.roi_heads.box_predictor[0].bbox_pred.weight.grad
    assert gradient is None or not gradient.any()


def test_given_boxes_get_masks(cascade, inputs):
    """Test-time augmentation: the masks of boxes without proposals, and the detections' own again."""
    for name in ("cascade_mask_rcnn", "cascade_dsg", "htc"):
        model = cascade(name, "MODEL.META_ARCHITECTURE", "DSGRCNN")
        with torch.no_grad():
            found = model.inference(inputs, do_postprocess=False)
            expected = [f.pred_masks for f in found]
            given = [Instances((64, 96), pred_boxes=f.pred_boxes, pred_classes=f.pred_classes) for f in found]
            again = model.inference(inputs, given, do_postprocess=False)
        assert [g.pred_masks.shape for g in again] == [e.shape for e in expected]
        if name != "cascade_dsg":  # the boxes are the same, but F_^0 is that of the proposal there
            torch.testing.assert_close(again[0].pred_masks, expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_test_time_augmentation(cascade, inputs, small_cfg, inputs_of, name):
    """Its passes for boxes make no masks."""
    cfg = small_cfg("TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.FLIP", False, config=f"dsg/shapes_{name}_R_18_FPN.yaml")
    model = cascade(name)
    runs = inputs_of(model.roi_heads.mask_head[2].predictor)
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)([{**inputs[0], "image": inputs[0]["image"]}])[0]["instances"]
    assert len(found) == 9 and found.pred_masks.shape == (9, 64, 96) and len(runs) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mpn", ["float32", "bfloat16"])
def test_mixed_precision(cascade, labelled, storage, name, mpn):
    model = cascade(name, MPN_DTYPE_TEST=mpn)
    with torch.autocast("cpu", torch.bfloat16, enabled=mpn == "float32"):
        losses = model.train()(labelled)
        with torch.no_grad():
            outputs = model.eval()(labelled)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(len(output["instances"]) == 9 for output in outputs)


def test_detections_take_no_more_than_they_need(cascade, inputs):
    for name in NAMES:
        model = cascade(name)
        model.roi_heads.mask_on = False
        with torch.no_grad():
            found = model.inference(inputs, do_postprocess=False)[0]
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("cascade_dsg", ["MODEL.DSG.INTERLEAVED", False], "set MODEL.DSG.INTERLEAVED True"),
        ("cascade_dsg", ["MODEL.DSG.SGRA_MASK", True], "SGRA_MASK False"),
        ("cascade_dsg", ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"], "'MaskRPN'"),
        ("cascade_mask_rcnn", ["MODEL.DSG.STAGE_WEIGHTS", [1.0, 0.5]], "each of the 3 stages"),
        ("cascade_mask_rcnn", ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False], "CLS_AGNOSTIC_BBOX_REG True, found False"),
        (
            "cascade_mask_rcnn",
            ["MODEL.ROI_MASK_HEAD.NAME", "MaskPlusHead"],
            "NAME MaskRCNNConvUpsampleHead, found MaskPlus",
        ),
        ("cascade_mask_rcnn", ["MODEL.MASK_ON", False], "MASK_ON True, found False"),
        ("cascade_mask_rcnn", ["MODEL.KEYPOINT_ON", True], "KEYPOINT_ON False, found True"),
        ("cascade_mask_rcnn", ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True], "TRAIN_ON_PRED_BOXES False, found True"),
        ("cascade_mask_rcnn", ["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4]], r"IOU_THRESHOLDS \[0.5\], found \[0.4\]"),
        ("cascade_mask_rcnn", ["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", [[1.0] * 4]], "each of the 3 IOUS, found 1"),
        ("cascade_mask_rcnn", ["MODEL.DSG.MASK_FLOW", True], "MASK_FLOW False, found True"),
        ("htc", ["MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 7], "COMMON_STRIDE is 7"),
        ("htc", ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "META_ARCHITECTURE 'DSGRCNN', found 'GeneralizedRCNN'"),
        ("htc_dsg", ["MODEL.ROI_HEADS.NAME", "DSGROIHeads"], "INTERLEAVED is of cascades"),
        ("htc", ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], "SEMANTIC True needs .*, which use the branch; found 'Cascade"),
    ],
)
def test_settings_that_contradict_each_other(cascade, name, opts, message):
    with pytest.raises(ConfigError, match=message):
        cascade(name, *opts)
