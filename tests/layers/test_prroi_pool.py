"""PrRoIPool's numbers: by hand, by its separable closed form, by dense sampling, by finite differences, and between
implementations."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from projects.layers import PrRoIPool, prroi_pool, reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def closed_form(features, rois, output_size, scale, aligned):
    """Row vectors times map times column vectors, in float64; differentiable by the boxes."""

    def weights(start, end, bins, size):
        """(R, bins, size): integrals of hat(x - i) from the integral of hat, divided by the bin's width."""
        edges = start[:, None] + (end - start)[:, None] * torch.arange(bins + 1) / bins
        t = (edges[..., None] - torch.arange(size)).clamp(-1, 1)
        integral = torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)
        return (integral[:, 1:] - integral[:, :-1]) / ((end - start) / bins)[:, None, None]

    x0, y0, x1, y1 = (rois[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    wy, wx = weights(y0, y1, output_size[0], features.shape[2]), weights(x0, x1, output_size[1], features.shape[3])
    return torch.einsum("rih,rchw,rjw->rcij", wy, features[rois[:, 0].long()], wx)


def by_dense_sampling(features, rois, output_size, scale, aligned, steps=400):
    """The mean over steps x steps points of each bin, of the map interpolated bilinearly and 0 outside."""
    outputs = []
    for image, *box in rois.tolist():
        x0, y0, x1, y1 = (side * scale - (0.5 if aligned else 0.0) for side in box)
        hats = []
        for start, end, bins, size in [
            (y0, y1, output_size[0], features.shape[2]),
            (x0, x1, output_size[1], features.shape[3]),
        ]:
            at = start + (end - start) * (torch.arange(bins * steps, dtype=torch.float64) + 0.5) / (bins * steps)
            hat = (1 - (at[:, None] - torch.arange(size)).abs()).clamp(min=0)
            hats.append(hat.view(bins, steps, size).mean(1))
        outputs.append(hats[0] @ features[int(image)] @ hats[1].T)
    return torch.stack(outputs)


def test_by_hand(implementation):
    """The map 4 y + x: the mean over a bin inside the map is the value in its middle."""
    features = torch.arange(16.0).view(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 0.0, 1.0, 4.0, 5.0]])
    assert prroi_pool(features, rois, 2, 0.5).view(2, 2).tolist() == [[4.5, 5.5], [8.5, 9.5]]
    # Half of the bin [3, 5] x [1, 2] is beyond the last column, where the map falls from 7 and 11 to 0 within one pixel:
    # the mean over x is half of y's mean of 4 y + 3, times the mean of 1 - t over [0, 1].
    rois = torch.tensor([[0.0, 3.0, 1.0, 5.0, 2.0]])
    assert prroi_pool(features, rois, 1, 1.0).item() == pytest.approx((4 * 1.5 + 3) / 2 / 2)
    # aligned: half a pixel further up and to the left
    assert prroi_pool(features, torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]]), 1, 1.0, aligned=True).item() == 7.5


@pytest.mark.parametrize("aligned", [True, False])
def test_equals_the_closed_form_and_its_gradients(implementation, make_rois, aligned):
    features = torch.randn(2, 70, 9, 13, dtype=torch.float64, requires_grad=True)
    rois = make_rois(80, 2, 36, 52, torch.float64).requires_grad_()
    expected = closed_form(features, rois, (4, 5), 0.25, aligned)
    found = prroi_pool(features, rois, (4, 5), 0.25, aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, (features, rois), grad), torch.autograd.grad(expected, (features, rois), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("aligned", [True, False])
def test_equals_dense_numerical_integration(implementation, make_rois, aligned):
    features, rois = torch.randn(2, 2, 9, 13, dtype=torch.float64), make_rois(20, 2, 36, 52, torch.float64)
    expected = by_dense_sampling(features, rois, (3, 2), 0.25, aligned)
    torch.testing.assert_close(prroi_pool(features, rois, (3, 2), 0.25, aligned), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_by_finite_differences(implementation, make_rois, channels_last):
    features = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois = make_rois(6, 2, 24, 28, torch.float64)  # partly outside
    rois[0, 1:] = torch.tensor([40.0, 30.0, 60.0, 50.0])  # wholly outside
    image, boxes = rois[:, :1], rois[:, 1:]
    torch.autograd.gradcheck(
        lambda f, b: prroi_pool(f, torch.cat([image, b], dim=1), (3, 2), 0.25),
        (features.requires_grad_(), boxes.requires_grad_()),
        fast_mode=False,
    )


def test_gradient_of_edges_on_pixel_centres(implementation):
    """Clipped boxes end on whole coordinates, where the hat function has its kinks but its integral has none."""
    features = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    rois = torch.tensor([[0.0, 0.0, 0.0, 4.0, 3.0], [0.0, 1.0, 2.0, 5.0, 4.0]], dtype=torch.float64, requires_grad=True)
    for size in ((1, 1), (3, 4)):
        found = torch.autograd.grad(prroi_pool(features, rois, size, 1.0).sum(), rois)[0]
        numeric = torch.zeros_like(found)
        for r in range(2):
            for side in range(1, 5):
                step = torch.zeros_like(rois)
                step[r, side] = 1e-5
                up, down = (prroi_pool(features, rois.detach() + sign * step, size, 1.0).sum() for sign in (1, -1))
                numeric[r, side] = (up - down) / 2e-5
        torch.testing.assert_close(found, numeric, rtol=1e-4, atol=1e-4)
        assert (found[:, 0] == 0).all()


@pytest.mark.parametrize("box", [(3.0, 3.0, 3.0, 7.0), (8.0, 3.0, 4.0, 7.0), (3.0, 7.0, 5.0, 7.0), (3.0, 8.0, 2.0, 2.0)])
def test_boxes_without_area_give_zeros_and_zero_gradients(implementation, device, box):
    features = torch.randn(1, 2, 9, 9, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, *box]], device=device, requires_grad=True)
    output = prroi_pool(features, rois, 3, 1.0)
    assert (output == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(output.sum(), (features, rois)))


@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 16, 67]), st.integers(1, 20), st.integers(1, 20)),
    count=st.integers(0, 80),
    output_size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    aligned=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(["nchw", "channels_last", "slice", "channels_last slice", "expanded", "transposed"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compiled_equals_reference(compiled, device, arrange, shape, count, output_size, aligned, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    images, channels, height, width = shape
    features = torch.randn(shape, generator=generator).to(dtype)
    start = (torch.rand(count, 2, generator=generator) * 1.2 - 0.2) * torch.tensor([width, height]) * 4
    size = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 4 + 2
    image = torch.randint(0, images, (count, 1), generator=generator)
    rois = torch.cat([image, start, start + size], dim=1).to(torch.promote_types(dtype, torch.float32))
    grad = torch.randn(count, channels, *output_size, generator=generator).to(dtype)

    def run(operator, dtype):
        f = arrange(features.to(device, dtype), layout).requires_grad_()
        b = rois.to(device, copy=True).requires_grad_()
        output = operator(f, b, list(output_size), 0.25, aligned)
        return [output, *torch.autograd.grad(output, (f, b), grad.to(device, dtype))]

    wide = torch.promote_types(dtype, torch.float32)
    for found, expected in zip(run(torch.ops.projects.prroi_pool, dtype), run(reference.prroi_pool, wide), strict=True):
        torch.testing.assert_close(found.to(wide), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(implementation, dtype):
    features = torch.ones(1, 1, 8, 8, dtype=dtype, requires_grad=True)
    rois = torch.tensor([[0.0, 3.0, 3.0, 4.0, 4.0]]).repeat(5000, 1)
    output = prroi_pool(features, rois, 1, 1.0)
    assert output.dtype == dtype and (output == 1).all()
    grad = torch.autograd.grad(output.sum(), features)[0]  # a quarter on each of four pixels
    assert grad.dtype == dtype and grad[0, 0, 3, 4].item() == torch.tensor(1250.0).to(dtype).item()


def test_tiny_bins_keep_their_digits(implementation):
    """Bins of 1e-3 pixels: a difference of integrals in float32 would leave three digits."""
    features = torch.rand(1, 1, 8, 8)
    rois = torch.tensor([[0.0, 2.25, 3.5, 2.257, 3.507]])
    expected = closed_form(features.double(), rois.double(), (7, 7), 1.0, False)
    torch.testing.assert_close(prroi_pool(features, rois, 7, 1.0).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1e-3, 1e-20, 1e-37, 1e-45])
def test_gradient_of_the_narrowest_boxes(implementation, width):
    """On the ramp f = x a bin is the middle of its edges, however near to each other they are: half the gradient for each."""
    ramp = torch.arange(8.0).repeat(8, 1).view(1, 1, 8, 8)
    box = torch.tensor([[0.0, 0.0, 1.0, width, 3.0]], requires_grad=True)
    grad = torch.autograd.grad(prroi_pool(ramp, box, 1, 1.0).sum(), box)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]), rtol=1e-5, atol=1e-6)


def test_module(implementation, make_rois):
    features, rois = torch.randn(1, 4, 9, 9), make_rois(5, 1, 36, 36)
    module = PrRoIPool(28, 0.25, aligned=True)
    assert repr(module) == "PrRoIPool(output_size=28, spatial_scale=0.25, aligned=True)"
    assert torch.equal(module(features, rois), prroi_pool(features, rois, 28, 0.25, aligned=True))
