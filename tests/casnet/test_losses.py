"""The losses against hand-computed numbers, and without anything that counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from casnet.losses import attribute_loss, enlarge, probability_loss, semantic_loss


def test_semantic_loss_is_equation_1():
    logits = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, -1.0]])[None, :, None, :]  # three classes, two pixels
    labels = torch.tensor([[[1, 0]]])
    expected = [-math.log(math.e**2 / (math.e + math.e**2 + 1)), -math.log(1 / (1 + math.e**2 + math.e**-1))]
    assert semantic_loss(logits, labels).item() == pytest.approx(sum(expected) / 2)
    assert semantic_loss(logits, torch.tensor([[[1, 255]]])).item() == pytest.approx(expected[0])


def test_semantic_loss_enlarges_the_logits():
    logits, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 12, 16))
    large = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(semantic_loss(logits, labels), F.cross_entropy(large, labels))
    assert enlarge(logits, (3, 4)) is logits


def test_attribute_loss_is_equation_2():
    predicted, distances = torch.zeros(1, 4, 1, 3), torch.zeros(1, 4, 1, 3)
    predicted[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    distances[0, :, 0, 0] = torch.tensor([2.0, 2.0, 1.0, 0.0])  # 1 + 0 + 2 + 4
    predicted[0, :, 0, 1] = 1  # 1 + 1 + 1 + 1
    predicted[0, :, 0, 2] = 100  # not on a thing
    things = torch.tensor([[[True, True, False]]])
    assert attribute_loss(predicted, distances, things).item() == pytest.approx((7 + 4) / 8)


def test_probability_loss_is_equation_3():
    logits = torch.tensor([[[[0.0, 2.0, -1.0, 5.0]]]])
    central = torch.tensor([[[[False, True, False, True]]]])
    counted = torch.tensor([[[True, True, True, False]]])
    terms = [math.log(2), 3 * math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))]
    assert probability_loss(logits, central, counted, 3.0).item() == pytest.approx(sum(terms) / (1 + 3 + 1))


def test_losses_without_anything_to_learn_are_zero_and_connected():
    logits = torch.randn(1, 8, 2, 2, requires_grad=True)
    nowhere = torch.zeros(1, 2, 2, dtype=torch.bool)
    losses = [
        semantic_loss(logits, torch.full((1, 4, 4), 255)),
        attribute_loss(logits[:, :4], torch.zeros(1, 4, 2, 2), nowhere),
        probability_loss(logits, torch.zeros(1, 8, 2, 2, dtype=torch.bool), nowhere, 5.0),
    ]
    for loss in losses:
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()


def test_losses_without_instances_still_teach_that_there_are_none():
    logits = torch.zeros(1, 8, 2, 2, requires_grad=True)
    everywhere = torch.ones(1, 2, 2, dtype=torch.bool)
    loss = probability_loss(logits, torch.zeros(1, 8, 2, 2, dtype=torch.bool), everywhere, 5.0)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert (logits.grad > 0).all()
