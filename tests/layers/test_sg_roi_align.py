"""SgRoIAlign's numbers: by hand, by its definition, by torchvision, by finite differences, and between implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from projects.layers import SgRoIAlign, reference, sg_roi_align

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def interpolate(grid, y, x):
    """Bilinear interpolation at (y, x) of a 2-D grid, pixel i at coordinate i, the edge repeated."""
    y, x = min(max(y, 0.0), grid.shape[0] - 1), min(max(x, 0.0), grid.shape[1] - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, grid.shape[0] - 1), min(x0 + 1, grid.shape[1] - 1)
    top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
    bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def by_definition(features, rois, prob, output_size, scale, sampling_ratio, aligned):
    """One point after the other, in float64."""
    channels, height, width = features.shape[1:]
    rows, columns = output_size
    output = np.zeros((len(rois), channels, rows, columns))
    for r, (image, *box) in enumerate(rois):
        x0, y0, x1, y1 = (side * scale - (0.5 if aligned else 0.0) for side in box)
        w, h = (x1 - x0, y1 - y0) if aligned else (max(x1 - x0, 1.0), max(y1 - y0, 1.0))
        grid_y = sampling_ratio if sampling_ratio > 0 else math.ceil(h / rows)
        grid_x = sampling_ratio if sampling_ratio > 0 else math.ceil(w / columns)
        for c, i, j, m, n in np.ndindex(channels, rows, columns, max(grid_y, 0), max(grid_x, 0)):
            v, u = (i + (m + 0.5) / grid_y) / rows, (j + (n + 0.5) / grid_x) / columns
            y, x = y0 + v * h, x0 + u * w
            if -1 <= y <= height and -1 <= x <= width:
                p = 0.0
                if prob is not None:
                    p = interpolate(prob[r, 0], v * prob.shape[2] - 0.5, u * prob.shape[3] - 0.5)
                output[r, c, i, j] += interpolate(features[int(image), c], y, x) * (1 + p) / (grid_y * grid_x)
    return output


def test_five_by_five_by_hand(implementation):
    """The map 5 y + x, and p = 0 in the left and 1 in the right half; the RoI is [0.5, 2.5]^2 in pixel coordinates."""
    features = torch.arange(25.0).view(1, 1, 5, 5)
    rois = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
    prob = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    # One point per bin, at its centre: p is 0 and 1 there.
    plain = sg_roi_align(features, rois, None, 2, 1.0, 1)
    assert plain.view(2, 2).tolist() == [[6.0, 7.0], [11.0, 12.0]]
    guided = sg_roi_align(features, rois, prob, 2, 1.0, 1)
    assert guided.view(2, 2).tolist() == [[6.0, 14.0], [11.0, 24.0]]
    # Two points per axis: x is 0.75, 1.25, 1.75, 2.25 and p there 0, 0.25, 0.75, 1.
    finer = sg_roi_align(features, rois, prob, 2, 1.0, 2)
    left, right = (0.75 + 1.25 * 1.25) / 2, (1.75 * 1.75 + 2.25 * 2) / 2
    expected = [[5 * 1.125 + left, 5 * 1.875 + right], [10 * 1.125 + left, 10 * 1.875 + right]]
    assert torch.allclose(finer.view(2, 2), torch.tensor(expected))
    # Without alignment the RoI is [1, 3]^2.
    assert sg_roi_align(features, rois, None, 2, 1.0, 1, aligned=False).view(2, 2).tolist() == [[9.0, 10.0], [14.0, 15.0]]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_equals_its_definition(implementation, make_rois, aligned, sampling_ratio):
    rois = make_rois(12, 2, 36, 52, torch.float64)
    rois[0, 1:] = torch.tensor([30.0, 20.0, 10.0, 4.0])  # inverted
    rois[1, 1:] = torch.tensor([8.0, 8.0, 8.0, 8.0])  # no size
    rois[2, 1:] = torch.tensor([-2.0, -2.0, 54.0, 38.0])  # points in the border of one pixel
    features, prob = torch.randn(2, 2, 9, 13, dtype=torch.float64), torch.rand(12, 1, 4, 3, dtype=torch.float64)
    for p in (None, prob):
        expected = by_definition(features, rois.tolist(), p, (3, 2), 0.25, sampling_ratio, aligned)
        found = sg_roi_align(features, rois, p, (3, 2), 0.25, sampling_ratio, aligned)
        torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_constant_probabilities_scale_torchvisions_roi_align(implementation, make_rois, aligned, sampling_ratio, channels_last):
    features = torch.randn(3, 10, 25, 40)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois = make_rois(60, 3, 100, 160)
    expected = roi_align(features, rois, (5, 7), 0.25, sampling_ratio, aligned)
    for prob, factor in [(None, 1.0), (torch.zeros(60, 1, 28, 28), 1.0), (torch.full((60, 1, 5, 9), 0.7), 1.7)]:
        found = sg_roi_align(features, rois, prob, (5, 7), 0.25, sampling_ratio, aligned)
        torch.testing.assert_close(found, factor * expected, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_gradient_equals_torchvisions(implementation, make_rois):
    features = torch.randn(2, 70, 25, 40, requires_grad=True)  # more channels than a block of the CPU kernels
    rois = make_rois(50, 2, 100, 160)
    grad = torch.randn(50, 70, 7, 7)
    expected = torch.autograd.grad(roi_align(features, rois, 7, 0.25, 2, True), features, grad)[0]
    found = torch.autograd.grad(sg_roi_align(features, rois, None, 7, 0.25, 2), features, grad)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_by_finite_differences(implementation, make_rois, sampling_ratio, channels_last):
    features = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois = make_rois(6, 2, 24, 28, torch.float64)  # partly outside
    rois[0, 1:] = torch.tensor([40.0, 30.0, 60.0, 50.0])  # wholly outside
    prob = torch.rand(6, 1, 3, 4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda f, p: sg_roi_align(f, rois, p, (3, 2), 0.25, sampling_ratio),
        (features.requires_grad_(), prob.requires_grad_()),
        fast_mode=False,
    )


@st.composite
def cases(draw):
    def integer(low, high):
        return draw(st.integers(low, high))

    return {
        "shape": (integer(1, 3), draw(st.sampled_from([1, 3, 16, 67])), integer(1, 20), integer(1, 20)),
        "rois": integer(0, 80),
        "prob": draw(st.sampled_from([None, (1, 1), (28, 28), (3, 5)])),
        "output_size": (integer(1, 6), integer(1, 6)),
        "sampling_ratio": integer(0, 4),
        "aligned": draw(st.booleans()),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "prob_in_their_type": draw(st.booleans()),
        "layout": draw(st.sampled_from(["nchw", "channels_last", "slice", "channels_last slice", "expanded", "transposed"])),
        "seed": integer(0, 10**6),
    }


@given(cases())
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compiled_equals_reference(compiled, device, arrange, case):
    generator = torch.Generator().manual_seed(case["seed"])
    images, channels, height, width = case["shape"]
    features = torch.randn(case["shape"], generator=generator).to(case["dtype"])
    corners = torch.rand(case["rois"], 2, 2, generator=generator) * 1.5 - 0.25
    corners = corners * torch.tensor([width, height]) * 4
    image = torch.randint(0, images, (case["rois"], 1), generator=generator)
    rois = torch.cat([image, corners.sort(dim=1).values.flatten(1)], dim=1)  # float32, also for half types
    rois = rois.double() if case["dtype"] == torch.float64 else rois
    prob = None if case["prob"] is None else torch.rand(case["rois"], 1, *case["prob"], generator=generator)
    if prob is not None and case["prob_in_their_type"]:
        prob = prob.to(case["dtype"])
    settings = (case["output_size"], 0.25, case["sampling_ratio"], case["aligned"])
    grad = torch.randn(case["rois"], channels, *case["output_size"], generator=generator).to(case["dtype"])

    def run(operator, dtype):
        f = arrange(features.to(device, dtype), case["layout"]).requires_grad_()
        p = None if prob is None else prob.to(device, copy=True).requires_grad_()
        output = operator(f, rois.to(device), p, list(settings[0]), *settings[1:])
        inputs = [tensor for tensor in (f, p) if tensor is not None]
        return [output, *torch.autograd.grad(output, inputs, grad.to(device, dtype))]

    # Half types: the reference works on the same numbers in float32, so that only the results are rounded.
    wide = torch.float32 if features.element_size() == 2 else case["dtype"]
    for found, expected in zip(
        run(torch.ops.projects.sg_roi_align, case["dtype"]), run(reference.sg_roi_align, wide), strict=True
    ):
        tolerance = TOLERANCE[case["dtype"]]
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(implementation, dtype):
    """4096 points of 1 in one bin: a sum in half precision would stop at 2048 or 256; the gradient likewise."""
    features = torch.ones(1, 1, 80, 80, dtype=dtype, requires_grad=True)
    rois = torch.tensor([[0.0, 4.0, 4.0, 68.0, 68.0]])
    output = sg_roi_align(features, rois, None, 1, 1.0, 64)
    assert output.dtype == dtype and output.item() == 1.0
    many = rois.repeat(5000, 1)
    many[:, 1:] = torch.tensor([4.0, 4.0, 5.0, 5.0])  # one point, on pixel (4, 4)
    grad = torch.autograd.grad(sg_roi_align(features, many, None, 1, 1.0, 1).sum(), features)[0]
    assert grad.dtype == dtype and grad[0, 0, 4, 4].item() == torch.tensor(5000.0).to(dtype).item()


@pytest.mark.parametrize("channels", [1, 5, 40])
def test_every_half_precision_number_is_read_right(compiled, channels):
    """Maps of one pixel each: every tenth bit pattern there is, infinities, NaN and subnormal numbers among them."""
    values = torch.cat([torch.arange(-(2**15), 2**15, 10), torch.tensor([0x7C00, -0x400, 0x7C01, 1, 0])]).to(torch.int16)
    values = values.view(torch.float16)
    features = values.view(-1, 1, 1, 1).expand(-1, channels, 1, 1).contiguous()
    rois = torch.cat([torch.arange(len(values))[:, None], torch.tensor([[0, 0, 1, 1]]).expand(len(values), 4)], dim=1)
    output = sg_roi_align(features, rois.float(), None, 1, 1.0, 1)
    torch.testing.assert_close(output, features, rtol=0, atol=0, equal_nan=True)


def test_a_huge_box_costs_no_more_than_the_map(implementation, device):
    """One point per feature pixel would be 10^16 points; those off the map are never visited."""
    features = torch.ones(1, 2, 20, 30, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, -1e8, -1e8, 1e8, 1e8], [0.0, -5e5, 0.0, 5e5, 20.0]], device=device)
    output = sg_roi_align(features, rois, None, 7, 1.0, 0)
    # In the second, 30 columns of ones (and half a pixel of border on each side) in the middle bin of 1e6 / 7 columns.
    torch.testing.assert_close(output[1, :, :, 3], torch.full_like(output[1, :, :, 3], 31.0 / (1e6 / 7)), rtol=0.04, atol=0)
    assert (output[1, :, :, :3] == 0).all() and (output[0] <= 1e-6).all()
    grad = torch.autograd.grad(output[1, 0].sum(), features)[0]  # of a map of ones, linear: the sum is the output's
    torch.testing.assert_close(grad.sum(), output[1, 0].sum())


def test_module(implementation, make_rois):
    features, rois, prob = torch.randn(1, 4, 9, 9), make_rois(5, 1, 36, 36), torch.rand(5, 1, 28, 28)
    module = SgRoIAlign((7, 5), 0.25, 2)
    assert repr(module) == "SgRoIAlign(output_size=(7, 5), spatial_scale=0.25, sampling_ratio=2, aligned=True)"
    assert torch.equal(module(features, rois, prob), sg_roi_align(features, rois, prob, (7, 5), 0.25, 2))
    assert torch.equal(module(features, rois), sg_roi_align(features, rois, None, (7, 5), 0.25, 2))
