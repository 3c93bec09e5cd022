"""The generator's samples: what they hold, and where their gradients go."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from ganmask.discriminators import Discriminators
from ganmask.losses import box_generator_loss
from ganmask.roi_heads import of_classes
from ganmask.samples import SamplePooler, Samples
from projects.errors import ConfigError
from projects.layers import prroi_pool
from projects.modeling.pooler import Pooler

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
SIZE = (64, 96)  # of the images


def pyramid(images: int = 2, channels: int = 16, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(images, channels, int(SIZE[0] * s), int(SIZE[1] * s), dtype=dtype) for s in SCALES]


def random_boxes(count: int, dtype=torch.float32) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * 40
    return torch.cat([corner, corner + 6 + torch.rand(count, 2, dtype=dtype) * 16], dim=1)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_maximum_over_all_levels(aligned):
    maps, boxes = pyramid(), [Boxes(random_boxes(3)), Boxes(random_boxes(2))]
    rois = torch.cat([torch.tensor([[0.0]] * 3 + [[1.0]] * 2), torch.cat([b.tensor for b in boxes])], dim=1)
    levels = torch.stack([prroi_pool(m, rois, 5, s, aligned) for m, s in zip(maps, SCALES, strict=True)])
    assert set(levels.argmax(0).unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(SamplePooler(5, SCALES, "max", aligned)(maps, boxes), levels.amax(0))
    assigned = Pooler(5, SCALES, pooler_type="PrRoIPool", aligned=aligned)(maps, boxes)
    assert torch.equal(SamplePooler(5, SCALES, "assign", aligned)(maps, boxes), assigned)


def test_unknown_levels():
    with pytest.raises(ConfigError, match="LEVELS is 'mean': expected 'max' or 'assign'"):
        SamplePooler(5, SCALES, "mean")


@pytest.mark.parametrize("levels", ["max", "assign"])
def test_box_loss_reaches_the_coordinates_by_finite_differences(levels):
    """L_adv^G_b as a function of the predicted boxes alone: PrRoIPool, the discriminator with its batch norm, Eq. 4."""
    maps, real = pyramid(1, 4, torch.float64), torch.randn(3, 4, 28, 28, dtype=torch.float64)
    pooler, discriminators = SamplePooler(28, SCALES, levels), Discriminators(in_channels=4, width=4).double()
    empty = torch.zeros(3, 1, 28, 28, dtype=torch.float64)

    def loss(boxes: torch.Tensor) -> torch.Tensor:
        instances = Boxes(torch.zeros(3, 4))
        instances.tensor = boxes  # Boxes would make it float32
        return box_generator_loss(discriminators(Samples(pooler(maps, [instances]), real, empty, empty, real)).fake_scores)

    boxes = random_boxes(3, torch.float64).requires_grad_()
    gradient = torch.autograd.grad(loss(boxes), boxes)[0]
    assert (gradient.abs() > 1e-6).all()
    torch.autograd.gradcheck(loss, boxes, eps=1e-5, atol=1e-7, rtol=1e-4)


@pytest.fixture
def heads(gan_cfg):
    """``heads(KEY, VALUE, ...)`` -> the generator's RoI heads, the input as they take it, and the seed's sampling again."""

    def build(*opts, objects: tuple[int, ...] = (2, 3)):
        usual = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.75]
        roi_heads = build_model(gan_cfg(*usual, *opts)).roi_heads
        torch.nn.init.normal_(roi_heads.box_predictor.bbox_pred.weight, std=1.0)
        proposals, targets = [], []
        for count in objects:
            boxes = random_boxes(count)
            # Two touch the borders, so that some predictions are clipped.
            boxes[:1] -= boxes[:1, :2].repeat(1, 2)
            boxes[1:2] += torch.tensor([96.0, 64.0] * 2) - boxes[1:2, 2:].repeat(1, 2)
            near = boxes.repeat(4, 1) + torch.randn(4 * count, 4) * 1.5
            far = torch.tensor([[60.0, 2.0, 80.0, 12.0]]).repeat(4, 1)
            near = torch.cat([near, far]).clamp(min=0)
            proposals.append(Instances(SIZE, proposal_boxes=Boxes(near), objectness_logits=torch.zeros(len(near))))
            masks = BitMasks(torch.rand(count, *SIZE) > 0.4)
            targets.append(Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.randint(0, 8, (count,)), gt_masks=masks))
        features = dict(zip(("p2", "p3", "p4", "p5"), pyramid(len(objects)), strict=True))

        def forward():
            torch.manual_seed(5)
            with EventStorage(0):
                return roi_heads.forward_with_samples(features, list(proposals), targets)

        def plain():
            torch.manual_seed(5)
            with EventStorage(0):
                images = ImageList(torch.zeros(len(objects), 3, *SIZE), [SIZE] * len(objects))
                return roi_heads(images, features, list(proposals), targets)

        return roi_heads, features, forward, plain

    return build


def foreground(sampled: list[Instances]) -> list[Instances]:
    return [p[p.gt_classes < 8] for p in sampled]


def test_losses_are_those_of_mask_rcnn(heads):
    _, _, forward, plain = heads()
    losses, expected = forward()[0], plain()[1]
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


@pytest.mark.parametrize("agnostic", [False, True])
def test_samples_are_those_of_the_foreground(heads, agnostic):
    """Against Detectron2's own decoding and clipping, and cropping of masks."""
    opts = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", agnostic]
    roi_heads, features, forward, plain = heads(*opts)
    _, samples = forward()
    sampled = plain()[0]
    chosen = foreground(sampled)
    count, maps = sum(map(len, chosen)), list(features.values())
    assert 0 < count < sum(map(len, sampled))

    boxes = [p.proposal_boxes for p in chosen]
    predictions = roi_heads.box_predictor(roi_heads.box_head(roi_heads.box_pooler(maps, boxes)))
    predicted = [Boxes(b) for b in roi_heads.box_predictor.predict_boxes_for_gt_classes(predictions, chosen)]
    before = torch.cat([p.tensor for p in predicted])
    for p in predicted:
        p.clip(SIZE)
    assert 0 < (torch.cat([p.tensor for p in predicted]) != before).any(dim=1).sum() < count
    pool = roi_heads.sample_pooler
    torch.testing.assert_close(samples.fake_boxes, pool(maps, predicted), rtol=1e-4, atol=1e-4)
    assert torch.equal(samples.real_boxes, pool(maps, [p.gt_boxes for p in chosen]))
    assert torch.equal(samples.features, pool(maps, boxes))

    logits = roi_heads.mask_head.layers(roi_heads.mask_pooler(maps, boxes))
    classes = torch.cat([p.gt_classes for p in chosen]) * (not agnostic)
    torch.testing.assert_close(samples.fake_masks, logits[torch.arange(count), classes].sigmoid()[:, None])
    crops = [p.gt_masks.crop_and_resize(p.proposal_boxes.tensor, 28) for p in chosen]
    assert torch.equal(samples.real_masks, torch.cat(crops).float()[:, None])
    assert set(samples.real_masks.unique().tolist()) == {0.0, 1.0}


def test_samples_of_the_predicted_class(heads):
    roi_heads, features, forward, plain = heads("MODEL.GANMASK.SAMPLE_CLASS", "predicted")
    with torch.no_grad():  # class 6 always wins among the classes, the background over all
        roi_heads.box_predictor.cls_score.bias[6], roi_heads.box_predictor.cls_score.bias[8] = 50.0, 100.0
    _, samples = forward()
    boxes, maps = [p.proposal_boxes for p in foreground(plain()[0])], list(features.values())
    logits = roi_heads.mask_head.layers(roi_heads.mask_pooler(maps, boxes))
    torch.testing.assert_close(samples.fake_masks, logits[:, 6:7].sigmoid())
    deltas = roi_heads.box_predictor(roi_heads.box_head(roi_heads.box_pooler(maps, boxes)))[1][:, 24:28]
    decoded = roi_heads.box_predictor.box2box_transform.apply_deltas(deltas, Boxes.cat(boxes).tensor)
    predicted = [Boxes(b) for b in decoded.split([len(b) for b in boxes])]
    for p in predicted:
        p.clip(SIZE)
    torch.testing.assert_close(samples.fake_boxes, roi_heads.sample_pooler(maps, predicted), rtol=1e-4, atol=1e-4)


def test_of_classes():
    predictions = torch.arange(12.0).view(2, 6)
    assert of_classes(predictions, torch.tensor([2, 0]), 2).tolist() == [[4, 5], [6, 7]]
    assert torch.equal(of_classes(predictions, torch.tensor([2, 0]), 6), predictions)
    assert of_classes(predictions[:0], torch.zeros(0, dtype=torch.long), 2).shape == (0, 2)


def test_bad_settings(heads):
    with pytest.raises(ConfigError, match="SAMPLE_CLASS is 'any': expected 'gt' or 'predicted'"):
        heads("MODEL.GANMASK.SAMPLE_CLASS", "any")
    with pytest.raises(ConfigError, match="MASK_ON True"):
        heads("MODEL.MASK_ON", False)
    with pytest.raises(ConfigError, match="TRAIN_ON_PRED_BOXES False"):
        heads("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)


def names_with_gradient(module: torch.nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_where_the_gradients_go(heads):
    """Boxes: box head and regression. Masks: mask head. Neither: the maps that the samples' features are pooled from."""
    roi_heads, features, forward, _ = heads()
    for level in features.values():
        level.requires_grad_()
    _, samples = forward()
    assert [tensor.requires_grad for tensor in samples] == [True, False, True, False, False]
    assert not any(tensor.requires_grad for tensor in samples.detach())
    samples.fake_boxes.square().sum().backward()
    assert names_with_gradient(roi_heads) == {"box_head", "box_predictor"}
    assert roi_heads.box_predictor.bbox_pred.weight.grad.any() and roi_heads.box_predictor.cls_score.weight.grad is None
    roi_heads.zero_grad()
    _, samples = forward()
    samples.fake_masks.square().sum().backward()
    assert names_with_gradient(roi_heads) == {"mask_head"}


def test_features_of_samples_are_detached(heads):
    """With a regression and mask head that do not look at the maps, nothing comes back to them."""
    roi_heads, features, forward, _ = heads()
    for level in features.values():
        level.requires_grad_()
    torch.nn.init.zeros_(roi_heads.box_predictor.bbox_pred.weight)
    torch.nn.init.zeros_(roi_heads.mask_head.predictor.weight)
    _, samples = forward()
    (samples.fake_boxes.square().sum() + (samples.fake_masks * samples.features).square().sum()).backward()
    assert roi_heads.box_predictor.bbox_pred.bias.grad.any() and roi_heads.mask_head.predictor.bias.grad.any()
    assert not any(level.grad.any() for level in features.values())


def test_box_loss_reaches_the_box_head_by_finite_differences(heads):
    """Along its own gradient over all weights of box head and regression, L_adv^G_b changes by the gradient's square."""
    roi_heads, _, forward, _ = heads()
    discriminators = Discriminators(in_channels=16, width=4).double().requires_grad_(False)
    weights = [*roi_heads.box_head.parameters(), *roi_heads.box_predictor.bbox_pred.parameters()]

    def loss():
        samples = Samples(*(tensor.double() for tensor in forward()[1]))
        return box_generator_loss(discriminators(samples).fake_scores)

    gradients = torch.autograd.grad(loss(), weights)
    square = sum(g.square().sum() for g in gradients).item()
    step = 1e-5 / square**0.5  # small: LeakyReLU and the maximum over the levels have kinks
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for w, g in zip(weights, gradients, strict=True):
                w += sign * step * g
            values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(square, rel=0.05)


@pytest.mark.parametrize("objects", [(0, 2), (0, 0)])
def test_images_without_objects(heads, objects):
    roi_heads, _, forward, plain = heads(objects=objects)
    losses, samples = forward()
    count = sum(map(len, foreground(plain()[0])))
    assert (count == 0) == (objects == (0, 0))
    assert [len(tensor) for tensor in samples] == [count] * 5
    assert all(tensor.shape[2:] == (28, 28) for tensor in samples)
    assert all(torch.isfinite(loss) for loss in losses.values())
    (samples.fake_boxes.sum() + samples.fake_masks.sum()).backward()
    for name in ("box_head.fc1.weight", "box_predictor.bbox_pred.weight", "mask_head.predictor.weight"):
        gradient = roi_heads.get_parameter(name).grad
        assert gradient is not None and bool(gradient.any()) == (count > 0), name
