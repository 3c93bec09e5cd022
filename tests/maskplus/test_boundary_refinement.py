"""Boundary refinement: it begins as the identity, and computes what the paper draws."""

import math

import pytest
import torch

from maskplus.boundary_refinement import DenseBoundaryRefinement, OriginalBoundaryRefinement, build_boundary_refinement
from projects.errors import ConfigError

KINDS = [OriginalBoundaryRefinement, DenseBoundaryRefinement]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_begins_as_the_identity(arithmetic, kind, training):
    logits = arithmetic(2, 5, 7, 7).float()
    assert torch.equal(kind(5).train(training)(logits), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_before_the_last_get_a_gradient_from_the_second_step_on(arithmetic, kind):
    module, logits = kind(5), arithmetic(2, 5, 7, 7).float()
    weights = arithmetic(2, 5, 7, 7, start=3).float()
    last = {"conv2.weight", "conv2.bias"} if kind is OriginalBoundaryRefinement else {"last.weight", "last.bias"}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for expected in (last, {name for name, _ in module.named_parameters()}):
        optimizer.zero_grad()
        (module(logits) * weights).sum().backward()
        assert {name for name, p in module.named_parameters() if p.grad.any()} == expected
        optimizer.step()


def test_original_by_hand():
    """One channel, 3x3 weights 1 then 2, biases 0.5 and -1, on a single pixel: only the centre of a window is inside."""
    module = OriginalBoundaryRefinement(1)
    with torch.no_grad():
        for value, parameter in zip((1.0, 0.5, 2.0, -1.0), module.parameters(), strict=True):
            parameter.fill_(value)
        found = module(torch.tensor([3.0, -0.25, -4.0])[:, None, None, None]).flatten()
    assert found.tolist() == [3 + 2 * 3.5 - 1, -0.25 + 2 * 0.25 - 1, -4 + 0 - 1]


@pytest.mark.parametrize("logit", [1.3, -0.7])
def test_dense_by_hand(logit):
    """A single pixel, C = 2 equal logits z, all weights of first convolutions a, of second b, of the last c, no statistics.

    Let S be the sum of a module's inputs. Both batch norms scale by s = 1 / sqrt(1 + eps); a PReLU of slope p scales
    negative numbers by p, and all numbers of a module have the sign of z. So each of its 4 outputs is 16 a b s^2 S (times
    p^2 where z < 0) = g S, and the next module's inputs add up to S + 4 g S. From S = 2 z on, four times.
    """
    a, b, c, slope = 0.3, 0.2, 0.25, 0.5
    module = DenseBoundaryRefinement(2).double().eval()
    with torch.no_grad():
        for block in module.blocks:
            block[2].weight.fill_(a), block[5].weight.fill_(b)
            block[1].weight.fill_(slope), block[4].weight.fill_(slope)
        module.last.weight.fill_(c), module.last.bias.fill_(0.125)
        found = module(torch.full((1, 2, 1, 1), logit, dtype=torch.float64)).flatten()
    g = 16 * a * b / (1 + 1e-5) * (1 if logit > 0 else slope**2)
    expected = logit + c * 2 * logit * (1 + 4 * g) ** 4 + 0.125
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-12)


def test_dense_modules_see_all_before_them():
    module = DenseBoundaryRefinement(80)
    assert [[layer.in_channels for layer in (block[2], block[5])] for block in module.blocks] == [
        [80, 16], [84, 16], [88, 16], [92, 16]
    ]  # fmt: skip
    assert [block[2].kernel_size + block[5].kernel_size for block in module.blocks] == [(1, 1, 3, 3)] * 4
    assert (module.last.in_channels, module.last.out_channels, module.last.kernel_size) == (96, 80, (1, 1))
    assert sum(p.numel() for p in module.last.parameters()) == 7760


def test_dense_normalises_with_the_batch_in_training(arithmetic):
    """In training, scale and shift of the logits make no difference to the residual."""
    module = DenseBoundaryRefinement(3)
    torch.nn.init.constant_(module.last.weight, 0.0)
    with torch.no_grad():
        module.last.weight[:, 3:] = 0.5  # the modules' outputs alone
    logits = arithmetic(4, 3, 7, 7).float()
    residual = module(logits) - logits
    moved = 5 * logits + 2
    assert residual.abs().max() > 0.1
    torch.testing.assert_close(module(moved) - moved, residual, rtol=0, atol=1e-3)


def test_slopes_begin_as_in_the_code_base():
    slopes = [m.weight for m in DenseBoundaryRefinement(3).modules() if isinstance(m, torch.nn.PReLU)]
    assert len(slopes) == 8 and all(slope.tolist() == pytest.approx([0.001]) for slope in slopes)


def test_initialisation():
    torch.manual_seed(0)
    original, dense = OriginalBoundaryRefinement(80), DenseBoundaryRefinement(80)
    first, second = dense.blocks[3][2], dense.blocks[3][5]
    for layer, fan_out, tolerance in ((original.conv1, 80 * 9, 0.02), (first, 16, 0.1), (second, 4 * 9, 0.1)):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance)


def test_by_name():
    assert build_boundary_refinement("none", 3) is None
    assert isinstance(build_boundary_refinement("original", 3), OriginalBoundaryRefinement)
    assert isinstance(build_boundary_refinement("dense", 3), DenseBoundaryRefinement)
    with pytest.raises(ConfigError, match="BOUNDARY is 'sharp': expected one of none, original, dense"):
        build_boundary_refinement("sharp", 3)
