"""Deconvolutional pyramid: by hand, against an independent computation, and its cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskplus.deconv_pyramid import CHUNK, DeconvPyramid


def test_by_hand():
    """One channel, all weights 1, no bias, x = 1: every map of the way up is 1. A convolution adds up what lies in its 3x3
    window, which hangs over the edge at the top and the left only. So c1 is 4 + 1 in the corner, 6 + 1 along these two
    edges and 9 + 1 elsewhere, and the result 5 + 7 + 7 + 10 + 1 in the corner, (7 + 10) * 3 ... elsewhere."""
    module = DeconvPyramid(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0 if parameter.dim() > 1 else 0.0)
        found = module(torch.ones(1, 1, 14, 14))[0, 0]
    assert found[0, 0] == 5 + 7 + 7 + 10 + 1
    # One c1 row of edge cells (7 each) and one of inner cells (10 each), three columns.
    assert (found[0, 1:] == 3 * 7 + 3 * 10 + 1).all() and (found[1:, 0] == 3 * 7 + 3 * 10 + 1).all()
    assert (found[1:, 1:] == 9 * 10 + 1).all()


def deconv(x, weight, bias):
    """Kernel 2, stride 2: every cell becomes 2 x 2 cells of its own."""
    parts = torch.einsum("rchw,coab->rohawb", x, weight)
    return parts.reshape(*parts.shape[:2], 2 * x.shape[2], 2 * x.shape[3]) + bias[:, None, None]


def conv(x, weight, bias):
    """Kernel 3, stride 2, padding 1, as a sum over the nine places of the window."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    total = bias[:, None, None].expand(len(bias), rows, columns)
    for a in range(3):
        for b in range(3):
            cells = padded[:, :, a : a + 2 * rows : 2, b : b + 2 * columns : 2]
            total = total + torch.einsum("rchw,oc->rohw", cells, weight[:, :, a, b])
    return total


def test_equals_an_independent_computation(arithmetic, filled):
    module = filled(DeconvPyramid(3))
    x = arithmetic(2, 3, 6, 6, start=7)
    weights = dict(module.named_parameters())

    def relu(layer, name, values):
        return layer(values, weights[f"{name}.weight"], weights[f"{name}.bias"]).clamp(min=0)

    d1 = relu(deconv, "deconv1", x)
    d2 = relu(deconv, "deconv2", d1)
    c1 = relu(conv, "conv1", d2) + d1
    expected = relu(conv, "conv2", c1) + x
    assert (d1 == 0).any() and (d2 == 0).any() and (d1 > 0).any()
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("rois", [0, 1, CHUNK, 2 * CHUNK + 3])
def test_chunks_of_inference_change_nothing(filled, rois):
    module, x = filled(DeconvPyramid(3)).float(), torch.sin(torch.arange(rois * 3 * 14 * 14.0)).reshape(rois, 3, 14, 14)
    with torch.no_grad():
        found = module(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found, module(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_takes_any_number_of_rois(filled):
    module, x = filled(DeconvPyramid(3)).float().eval(), torch.sin(torch.arange(20 * 3 * 14 * 14.0)).reshape(20, 3, 14, 14)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        for rois in (5, 20):
            torch.testing.assert_close(traced(x[:rois]), module(x[:rois]))


def test_relu_comes_before_the_addition(arithmetic):
    module = DeconvPyramid(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-1e6)
    x = arithmetic(3, 2, 14, 14).float()
    assert (x < 0).any() and torch.equal(module(x), x)


def test_multiplications_per_roi():
    """(28^2 + 56^2) C^2 4 / 4 in the deconvolutions (each output cell has one input cell), (28^2 + 14^2) C^2 9 in the
    convolutions: 0.835 G with 256 channels."""
    with torch.device("meta"):
        module, x = DeconvPyramid(256), torch.zeros(1, 256, 14, 14)
        with FlopCounterMode(display=False) as counter:
            module(x)
    assert counter.get_total_flops() == 2 * 256**2 * (28**2 + 56**2 + 9 * (28**2 + 14**2)) == 2 * 834_928_640
