"""The discriminators' shapes, weights, batch norm and empty batches."""

import pytest
import torch
from torch import nn

from ganmask.discriminators import Discriminators
from projects.errors import ConfigError

SIDES = {3: [14, 7, 1], 4: [14, 7, 4, 1], 5: [14, 7, 4, 2, 1]}
KERNELS = {3: [4, 4, 7], 4: [4, 4, 3, 4], 5: [4, 4, 3, 4, 2]}


def build(**arguments) -> Discriminators:
    with torch.device("meta"):
        return Discriminators(in_channels=256, **arguments)


@pytest.mark.parametrize("layers", [3, 4, 5])
def test_shapes_of_every_layer(layers):
    discriminators = Discriminators(in_channels=6, layers=layers, width=2)
    x = torch.randn(2, 6, 28, 28)
    widths = [2 * 2**i for i in range(layers)]
    sizes = [(2, width, side, side) for width, side in zip(widths, SIDES[layers], strict=True)]
    assert [tuple(out.shape) for out in discriminators.mask(x)] == sizes
    assert [tuple(out.shape) for out in discriminators.box(x)] == [*sizes[:-1], (2, 1, 1, 1)]


@pytest.mark.parametrize("layers, box, mask", [(3, 399_744, 1_999_616), (4, 692_992, 2_787_072), (5, 2_789_120, 4_886_272)])
def test_number_of_weights(layers, box, mask):
    """Kernels in x out x side^2, and two weights for each channel of a batch norm: not after the first layer, nor after the
    last one of the box discriminator."""
    widths = [64 * 2**i for i in range(layers)]

    def count(widths: list[int], normed: list[int]) -> int:
        ins = [256, *widths[:-1]]
        return sum(i * o * k * k for i, o, k in zip(ins, widths, KERNELS[layers], strict=True)) + 2 * sum(normed)

    assert (count([*widths[:-1], 1], widths[1:-1]), count(widths, widths[1:])) == (box, mask)
    discriminators = build(layers=layers)
    for part, expected in ((discriminators.box, box), (discriminators.mask, mask)):
        assert sum(p.numel() for p in part.parameters()) == expected
        assert not list(part.buffers())


def kinds(part: nn.Module) -> list[tuple[bool, bool]]:
    """For each layer: does batch norm follow, does LeakyReLU follow."""
    return [tuple(any(isinstance(m, kind) for m in layer) for kind in (nn.BatchNorm2d, nn.LeakyReLU)) for layer in part]


def test_what_follows_each_convolution():
    usual = build()
    assert kinds(usual.box) == [(False, True), *[(True, True)] * 3, (False, False)]
    assert kinds(usual.mask) == [(False, True), *[(True, True)] * 4]
    caption = build(norm_everywhere=True)
    assert kinds(caption.box) == kinds(caption.mask) == [(True, True)] * 5
    added = sum(p.numel() for p in caption.parameters()) - sum(p.numel() for p in usual.parameters())
    assert added == 2 * (64 + 1) + 2 * 64
    assert {m.negative_slope for m in usual.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert all(m.bias is None for m in usual.modules() if isinstance(m, nn.Conv2d))


def plain(part: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """A discriminator in functional form, batch norm by its definition."""
    outputs = []
    for layer in part:
        for module in layer:
            if isinstance(module, nn.Conv2d):
                x = torch.conv2d(x, module.weight, None, module.stride, module.padding)
            elif isinstance(module, nn.BatchNorm2d):
                variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
                x = (x - mean) / (variance + 1e-5).sqrt() * module.weight[:, None, None] + module.bias[:, None, None]
            else:
                x = torch.where(x > 0, x, 0.2 * x)
        outputs.append(x)
    return outputs


def test_real_and_fake_share_their_statistics(make_samples):
    discriminators = Discriminators(in_channels=8, width=4).double()
    for p in discriminators.parameters():
        p.data += 0.1 * torch.randn_like(p)
    samples = make_samples(3, dtype=torch.float64)
    judged = discriminators(samples)
    scores = plain(discriminators.box, torch.cat([samples.real_boxes, samples.fake_boxes]))[-1].flatten()
    torch.testing.assert_close(torch.cat([judged.real_scores, judged.fake_scores]), scores)
    real, fake = samples.real_masks * samples.features, samples.fake_masks * samples.features
    features = [torch.cat([real, fake]), *plain(discriminators.mask, torch.cat([real, fake]))]
    assert len(judged.real_features) == len(judged.fake_features) == 6
    for together, a, b in zip(features, judged.real_features, judged.fake_features, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), together)
    alone = discriminators.box(samples.real_boxes)[-1].flatten()
    assert not torch.allclose(alone, judged.real_scores), "the fake samples have no part in the statistics"


@pytest.mark.parametrize("layers", [3, 4, 5])
@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one(make_samples, layers, count):
    discriminators = Discriminators(in_channels=8, layers=layers, width=4)
    judged = discriminators(make_samples(count))
    assert judged.real_scores.shape == judged.fake_scores.shape == (count,)
    assert all(len(f) == count and torch.isfinite(f).all() for f in judged.real_features + judged.fake_features)
    (judged.fake_scores.sum() + sum(f.sum() for f in judged.fake_features)).backward()
    for name, p in discriminators.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        if not count:
            assert not p.grad.any(), name


def test_bad_settings(gan_cfg):
    with pytest.raises(ConfigError, match="DISCRIMINATOR_LAYERS is 6: expected one of 3, 4, 5"):
        build(layers=6)
    with pytest.raises(ConfigError, match="POOLER_RESOLUTION is 7: expected 14"):
        Discriminators(gan_cfg("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7), {})
