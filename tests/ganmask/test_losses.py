"""The adversarial losses by hand."""

import math

import pytest
import torch

from ganmask.discriminators import Discriminators, Judgement
from ganmask.losses import AdversarialLosses, box_discriminator_loss, box_generator_loss, mask_distance
from projects.errors import ConfigError


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_box_losses_by_hand():
    real, fake = torch.tensor([logit(0.9), logit(0.6)]), torch.tensor([logit(0.2), logit(0.5)])
    assert box_generator_loss(fake).item() == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2)
    expected = -(math.log(0.9) + math.log(0.6)) / 2 - (math.log(0.8) + math.log(0.5)) / 2
    assert box_discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_certainty_stays_finite():
    far = torch.tensor([200.0], requires_grad=True)
    assert box_generator_loss(-far).item() == pytest.approx(200.0)
    assert box_discriminator_loss(-far, far).item() == pytest.approx(400.0)


def test_mask_distance_by_hand():
    real = [torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[5.0], [1.0]])]
    fake = [torch.tensor([[0.0, 4.0], [0.0, 1.0]]), torch.tensor([[2.0], [1.0]])]
    # RoI 0: 1 * (1 + 2) + 4 * 3 = 15, RoI 1: 1 * 1; six elements
    assert mask_distance(real, fake, [1.0, 4.0]).item() == pytest.approx(16 / 6)


def test_mask_distance_is_that_of_the_concatenated_scaled_features(make_samples):
    scales = [1.0, 1.0, 2.0, 2.0, 2.0, 4.0]
    discriminators = Discriminators(in_channels=256, width=64)
    judged = discriminators(make_samples(1, 256))

    def vector(features):
        return torch.cat([scale * f.flatten(1) for scale, f in zip(scales, features, strict=True)], dim=1)

    assert vector(judged.real_features).shape == (1, 226_688)
    expected = (vector(judged.real_features) - vector(judged.fake_features)).abs().mean()
    torch.testing.assert_close(mask_distance(judged.real_features, judged.fake_features, scales), expected)


def losses(**arguments) -> AdversarialLosses:
    return AdversarialLosses(**({"box_weight": 3.0, "mask_weight": 5.0, "scales": [1.0, 2.0], "layers": 1} | arguments))


def test_both_players_with_their_weights():
    real, fake = [torch.zeros(2, 1), torch.zeros(2, 1)], [torch.ones(2, 1), torch.full((2, 1), -1.0)]
    judged = Judgement(torch.zeros(2), torch.zeros(2), real, fake)
    generator, discriminator = losses().generator(judged), losses().discriminator(judged)
    assert {name: loss.item() for name, loss in generator.items()} == pytest.approx(
        {"loss_adv_box": 3 * math.log(2), "loss_adv_mask": 5 * 1.5}
    )
    assert {name: loss.item() for name, loss in discriminator.items()} == pytest.approx(
        {"loss_disc_box": 3 * 2 * math.log(2), "loss_disc_mask": -5 * 1.5}
    )


def test_the_players_pull_in_opposite_directions():
    score, feature = torch.zeros(1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    judged = Judgement(torch.zeros(1), score, [torch.zeros(1, 1)] * 2, [feature, feature])
    for name, value in (("loss_adv_box", score), ("loss_adv_mask", feature)):
        ours = torch.autograd.grad(losses().generator(judged)[name], value, retain_graph=True)[0]
        theirs = torch.autograd.grad(losses().discriminator(judged)[name.replace("adv", "disc")], value)[0]
        assert (ours * theirs).item() < 0, name


def test_no_foreground_gives_zeros_of_the_graph(make_samples):
    discriminators = Discriminators(in_channels=8, width=4)
    samples = make_samples(0)
    samples.fake_boxes.requires_grad_(), samples.fake_masks.requires_grad_()
    judged = discriminators(samples)
    found = losses(scales=[1.0] * 6, layers=5)
    for part in (found.generator(judged), found.discriminator(judged)):
        assert [loss.item() for loss in part.values()] == [0, 0]
        weights = [*discriminators.parameters(), samples.fake_boxes, samples.fake_masks]
        gradients = torch.autograd.grad(sum(part.values()), weights, retain_graph=True)
        assert all(not gradient.any() for gradient in gradients)


def test_a_scale_for_each_feature():
    with pytest.raises(ConfigError, match="FEATURE_SCALES has 2 numbers: expected 4"):
        losses(layers=3)
