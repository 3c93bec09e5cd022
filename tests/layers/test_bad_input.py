"""Wrong arguments are named; wrong numbers in boxes have a defined result; nothing crashes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from projects.layers import prroi_pool, sg_roi_align


def pool(operator, features, rois, prob=None, size=2, scale=0.5):
    """Call either operator with one of its arguments replaced."""
    if operator is prroi_pool:
        return prroi_pool(features, rois, size, scale)
    return sg_roi_align(features, rois, prob, size, scale, 2)


@pytest.fixture(params=[sg_roi_align, prroi_pool], ids=["sg_roi_align", "prroi_pool"])
def operator(request):
    return request.param


FEATURES = torch.ones(2, 3, 8, 9)
ROIS = torch.tensor([[0.0, 1.0, 2.0, 9.0, 10.0], [1.0, 0.0, 0.0, 8.0, 6.0]])
PROB = torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": [[1.0]]}, TypeError, r"features must be a tensor, got list"),
        ({"rois": ROIS.tolist()}, TypeError, r"rois must be a tensor, got list"),
        ({"features": FEATURES[0]}, ValueError, r"features must be \(N, C, H, W\).*got \(3, 8, 9\)"),
        ({"features": FEATURES[:, :, :0]}, ValueError, r"H, W > 0, got \(2, 3, 0, 9\)"),
        ({"rois": ROIS[:, 1:]}, ValueError, r"rois must be \(R, 5\).*got \(2, 4\)"),
        ({"rois": ROIS[0]}, ValueError, r"rois must be \(R, 5\).*got \(5,\)"),
        ({"features": FEATURES.long()}, TypeError, r"features must be float64.*got torch.int64"),
        ({"features": FEATURES.to(torch.complex64)}, TypeError, r"features must be float64.*got torch.complex64"),
        ({"rois": ROIS.int()}, TypeError, r"rois must be float64.*got torch.int32"),
        ({"rois": ROIS.double()}, TypeError, r"rois must be torch.float32 for torch.float32 features, got torch.float64"),
        ({"rois": ROIS.half()}, TypeError, r"rois must be torch.float32 for torch.float32 features, got torch.float16"),
        ({"rois": ROIS.to("meta")}, ValueError, r"rois must be on the device of features, cpu, got meta"),
        ({"size": 0}, ValueError, r"output_size must be a positive int or two of them.*got 0"),
        ({"size": (2, -1)}, ValueError, r"output_size.*got \(2, -1\)"),
        ({"size": (2, 2, 2)}, ValueError, r"output_size.*got \(2, 2, 2\)"),
        ({"size": 2.5}, ValueError, r"output_size.*got 2.5"),
        ({"scale": 0.0}, ValueError, r"spatial_scale must be a positive number.*got 0.0"),
        ({"scale": math.nan}, ValueError, r"spatial_scale must be a positive number.*got nan"),
        ({"scale": "a"}, ValueError, r"spatial_scale must be a positive number.*got 'a'"),
        ({"scale": None}, ValueError, r"spatial_scale must be a positive number.*got None"),
        ({"size": 10**10}, ValueError, r"output_size.*at most 32768 each, got 10000000000"),
    ],
)
def test_wrong_arguments_are_named(implementation, operator, change, error, message):
    arguments = {"features": FEATURES, "rois": ROIS} | change
    with pytest.raises(error, match=message):
        pool(operator, **arguments)


@pytest.mark.parametrize("ratio", [2.5, 10**9])
def test_wrong_sampling_ratios_are_named(implementation, ratio):
    with pytest.raises(ValueError, match=f"sampling_ratio must be an int of at most 1024, got {ratio}"):
        sg_roi_align(FEATURES, ROIS, PROB, 2, 1.0, ratio)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_a_pixel_that_is_not_finite_harms_only_the_rois_that_read_it(implementation, device, value, sampling_ratio):
    features = torch.ones(1, 2, 24, 24, device=device)
    features[..., 0, 0] = features[..., -1, -1] = value
    rois = torch.tensor([[0, 8.0, 8, 14, 14], [0, 15, -9, 31, 9], [0, math.nan, 1, 2, 3]], device=device)
    prob = torch.zeros(3, 1, 4, 4, device=device, requires_grad=True)
    boxes = rois.clone().requires_grad_()
    guided = sg_roi_align(features, rois, prob, 3, 1.0, sampling_ratio)
    pooled = prroi_pool(features, boxes, 3, 1.0)
    assert guided.isfinite().all() and pooled.isfinite().all() and not guided[2].any() and not pooled[2].any()
    assert torch.autograd.grad(guided.sum(), prob)[0].isfinite().all()
    assert torch.autograd.grad(pooled.sum(), boxes)[0].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pixel_of_weight_0_may_hold_anything(implementation, device, value):
    """The one point lies on pixel (7, 7), its neighbours have weight 0; the edges of PrRoIPool's bin lie on pixels 5 and 7."""
    features = torch.ones(1, 3, 12, 12, device=device)
    features[..., 8:, 8:] = value
    prob = torch.zeros(1, 1, 4, 4, device=device, requires_grad=True)
    output = sg_roi_align(features, torch.tensor([[0, 7.0, 7, 8, 8]], device=device), prob, 1, 1.0, 1)
    assert (output == 1).all() and torch.autograd.grad(output.sum(), prob)[0].sum() == 3  # by p, a value of 1 per channel
    boxes = torch.tensor([[0, 5.0, 5, 7, 7]], device=device, requires_grad=True)
    output = prroi_pool(features, boxes, 1, 1.0)
    assert (output == 1).all() and torch.autograd.grad(output.sum(), boxes)[0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("prob", "error", "message"),
    [
        (PROB[:1], ValueError, r"prob must be \(R, 1, Hp, Wp\) with R = 2.*got \(1, 1, 4, 4\)"),
        (PROB[:, 0], ValueError, r"prob must be.*got \(2, 4, 4\)"),
        (PROB.expand(2, 3, 4, 4), ValueError, r"prob must be.*got \(2, 3, 4, 4\)"),
        (PROB[:, :, :0], ValueError, r"Hp, Wp > 0, got \(2, 1, 0, 4\)"),
        (PROB.long(), TypeError, r"prob must be float64.*got torch.int64"),
        (PROB.double(), TypeError, r"prob must be torch.float32.*got torch.float64"),
        (PROB.to("meta"), ValueError, r"prob must be on the device of features, cpu, got meta"),
        (0.5, TypeError, r"prob must be a tensor, got float"),
    ],
)
def test_wrong_probabilities_are_named(implementation, prob, error, message):
    with pytest.raises(error, match=message):
        pool(sg_roi_align, FEATURES, ROIS, prob)


@pytest.mark.parametrize("index", [-1.0, 2.0, 1e30, math.nan, math.inf])
def test_batch_index_out_of_range(implementation, operator, index):
    rois = ROIS.clone()
    rois[1, 0] = index
    with pytest.raises(IndexError, match=r"batch index of RoI 1 must be in \[0, 2\), got "):
        pool(operator, FEATURES, rois)
    with pytest.raises(IndexError, match=r"must be in \[0, 0\)"):
        pool(operator, FEATURES[:0], rois)


def test_direct_calls_of_the_operators_are_safe(compiled):
    """Without the Python functions in front the kernels still refuse what they could not read."""
    ops = torch.ops.projects
    grad = torch.ones(2, 3, 2, 2)
    wrong = [
        lambda: ops.sg_roi_align(FEATURES[0], ROIS, None, [2, 2], 1.0, 2, True),
        lambda: ops.sg_roi_align(FEATURES, ROIS[:, 1:], None, [2, 2], 1.0, 2, True),
        lambda: ops.sg_roi_align(FEATURES, ROIS, PROB[:1], [2, 2], 1.0, 2, True),
        lambda: ops.sg_roi_align(FEATURES, ROIS, None, [0, 2], 1.0, 2, True),
        lambda: ops.sg_roi_align(FEATURES, ROIS, None, [], 1.0, 2, True),
        lambda: ops.prroi_pool(FEATURES, ROIS, [2], 1.0, True),
        lambda: ops.prroi_pool(FEATURES, ROIS, [2, 3, 4], 1.0, True),
        lambda: ops.sg_roi_align(FEATURES, ROIS, None, [2, 2], 1.0, 10**9, True),
        lambda: ops.sg_roi_align(FEATURES, ROIS + 2, None, [2, 2], 1.0, 2, True),
        lambda: ops.sg_roi_align(FEATURES.long(), ROIS, None, [2, 2], 1.0, 2, True),
        lambda: ops.sg_roi_align_grad_features(grad[:1], ROIS, None, [2, 3, 8, 9], False, 1.0, 2, True),
        lambda: ops.sg_roi_align_grad_features(grad, ROIS, None, [2, 4, 8, 9], False, 1.0, 2, True),
        lambda: ops.sg_roi_align_grad_features(grad, ROIS, None, [3, 8, 9], False, 1.0, 2, True),
        lambda: ops.sg_roi_align_grad_prob(grad, FEATURES[:, :2], ROIS, PROB, 1.0, 2, True),
        lambda: ops.sg_roi_align_grad_prob(grad.double(), FEATURES, ROIS, PROB, 1.0, 2, True),
        lambda: ops.prroi_pool(FEATURES, ROIS - 1, [2, 2], 1.0, True),
        lambda: ops.prroi_pool_grad_features(grad, ROIS[:1], [2, 3, 8, 9], False, 1.0, True),
        lambda: ops.prroi_pool_grad_rois(grad[0], FEATURES, ROIS, 1.0, True),
    ]
    for call in wrong:
        with pytest.raises((RuntimeError, IndexError)):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_boxes_that_are_not_finite_give_zeros(implementation, device, value, sampling_ratio):
    """A box with such a coordinate gives zeros and takes no part in gradients; its neighbours are as without it."""
    features, prob = (tensor.to(device, copy=True).requires_grad_() for tensor in (FEATURES, PROB))
    usual = ROIS.to(device)
    for side in range(1, 5):
        rois = usual.clone()
        rois[0, side] = value
        if value == 3e38:
            rois[0, 5 - side] = -value  # the width or the height overflows
        output = sg_roi_align(features, rois, prob, 2, 1.0, sampling_ratio)
        assert (output[0] == 0).all()
        assert torch.equal(output[1:], sg_roi_align(features, usual[1:], prob[1:], 2, 1.0, sampling_ratio))
        grads = torch.autograd.grad(output.sum(), (features, prob))
        assert all(grad.isfinite().all() for grad in grads) and (grads[1][0] == 0).all()

        boxes = rois.clone().requires_grad_()
        output = prroi_pool(features, boxes, 2, 1.0)
        assert (output[0] == 0).all() and torch.equal(output[1:], prroi_pool(features, usual[1:], 2, 1.0))
        grads = torch.autograd.grad(output.sum(), (features, boxes))
        assert all(grad.isfinite().all() for grad in grads) and (grads[1][0] == 0).all()


def test_no_rois(implementation, device):
    """An empty output that is still part of the graph."""
    features = FEATURES.to(device, copy=True).requires_grad_()
    prob = torch.ones(0, 1, 4, 4, device=device, requires_grad=True)
    boxes = torch.zeros(0, 5, device=device, requires_grad=True)
    guided, pooled = sg_roi_align(features, boxes.detach(), prob, (2, 4), 0.5, 2), prroi_pool(features, boxes, (2, 4), 0.5)
    for output, other in [(guided, prob), (pooled, boxes)]:
        assert output.shape == (0, 3, 2, 4) and output.requires_grad
        grads = torch.autograd.grad(output.sum(), (features, other))
        assert (grads[0] == 0).all() and grads[1].shape == other.shape


def test_no_channels_and_no_images(implementation, operator):
    assert pool(operator, FEATURES[:, :0], ROIS).shape == (2, 0, 2, 2)
    assert pool(operator, FEATURES[:0], ROIS[:0]).shape == (0, 3, 2, 2)


def test_gradient_for_rois_is_refused(implementation):
    with pytest.raises(ValueError, match=r"no gradient for rois.*pass rois.detach\(\)"):
        sg_roi_align(FEATURES, ROIS.clone().requires_grad_(), None, 2, 1.0, 2)
    with torch.no_grad():
        sg_roi_align(FEATURES, ROIS.clone().requires_grad_(), None, 2, 1.0, 2)


def test_second_derivatives_are_refused(implementation, operator):
    features = FEATURES.clone().requires_grad_()
    grad = torch.autograd.grad(pool(operator, features, ROIS).square().sum(), features, create_graph=True)[0]
    with pytest.raises((RuntimeError, NotImplementedError), match=r"differentiated twice|not implemented"):
        torch.autograd.grad(grad.sum(), features)


def test_forward_mode_derivatives_are_refused(implementation, operator):
    with torch.autograd.forward_ad.dual_level():
        features = torch.autograd.forward_ad.make_dual(FEATURES, FEATURES)
        with pytest.raises(NotImplementedError, match="forward-mode derivative"):
            pool(operator, features, ROIS)


coordinate = st.one_of(
    st.floats(-50, 50, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -1.0, 1e4, -1e4, 1e9, -1e9, 1e30, -1e30, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf, 1e-45]),
)


@given(
    boxes=st.lists(st.tuples(*[coordinate] * 4), max_size=6),
    indices=st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.5]), min_size=6, max_size=6),
    shape=st.tuples(st.just(2), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9)),
    output_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sampling_ratio=st.integers(-2, 3),
    aligned=st.booleans(),
    scale=st.sampled_from([0.25, 1.0, 1e-30, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_has_a_defined_result(
    implementation, device, boxes, indices, shape, output_size, sampling_ratio, aligned, scale, dtype
):
    """On a map of ones every value lies in [0, 1] (RoIAlign) and gradients are finite, whatever the boxes are."""
    rois = torch.tensor([(index, *box) for index, box in zip(indices, boxes, strict=False)]).reshape(-1, 5).to(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        features = torch.ones(shape, dtype=dtype, device=device).contiguous(memory_format=layout).requires_grad_()
        prob = torch.zeros(len(rois), 1, 3, 3, dtype=dtype, device=device, requires_grad=True)
        output = sg_roi_align(features, rois, prob, output_size, scale, sampling_ratio, aligned)
        assert output.shape == (len(rois), shape[1], *output_size)
        assert ((output >= 0) & (output <= 1.001)).all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (features, prob)))

        free = rois.clone().requires_grad_()
        output = prroi_pool(features, free, output_size, scale, aligned)
        assert ((output >= 0) & (output <= 1.001)).all()
        grads = torch.autograd.grad(output.sum(), (features, free))
        assert all(grad.isfinite().all() for grad in grads)


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tensors_are_taken_or_refused(implementation, data):
    """Up to two arguments of random shapes, types, devices and values: a result where all are valid, else a named error."""
    names = ["features", "rois", "prob", "size", "scale"]
    odd = data.draw(st.sets(st.sampled_from(names), max_size=2))

    def draw(name, usual, strategy):
        return data.draw(strategy, label=name) if name in odd else usual

    def tensor(name, shape, value):
        shape = draw(name, shape, st.one_of(st.just(shape), st.lists(st.integers(0, 3), max_size=5)))
        dtypes = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]
        made = torch.full(tuple(shape), value).to(draw(name, torch.float32, st.sampled_from(dtypes)))
        return made.to(draw(name, "cpu", st.sampled_from(["cpu", "cpu", "cpu", "meta"])))

    features, rois = tensor("features", (2, 3, 4, 5), 1.0), tensor("rois", (3, 5), 1.0)
    assume(implementation == "compiled" or not features.is_meta)  # the fallback reads values, which meta tensors lack
    prob = data.draw(st.sampled_from([None, tensor("prob", (3, 1, 2, 2), 0.5)]))
    sizes = st.one_of(st.integers(-1, 3), st.tuples(st.integers(0, 2), st.integers(1, 2)), st.sampled_from(["7", 2.0, 10**9]))
    size = draw("size", 2, sizes)
    scale = draw("scale", 0.5, st.sampled_from([1.0, 0.25, 1, 0.0, -1.0, math.inf, "1", None]))

    def fits(tensor):
        """Whether type and device agree with the features'."""
        return tensor.dtype in (features.dtype, torch.float32) and tensor.device == features.device

    floating = features.dtype in (torch.float64, torch.float32, torch.float16)
    sides = size if isinstance(size, tuple) else (size, size)
    valid = (
        (floating and features.dim() == 4 and 0 not in features.shape[2:])
        and (fits(rois) and rois.dim() == 2 and rois.shape[1] == 5)
        and (features.is_meta or len(rois) == 0 or len(features) > 1)  # all RoIs lie in image 1
        and all(isinstance(side, int) and 0 < side < 10**9 for side in sides)
        and scale in (0.25, 0.5, 1.0)
    )
    prob_valid = prob is None or (
        fits(prob) and prob.dim() == 4 and prob.shape[:2] == (*rois.shape[:1], 1) and 0 not in prob.shape[2:]
    )
    for operator in (sg_roi_align, prroi_pool):
        if valid and (prob_valid or operator is prroi_pool):
            output = pool(operator, features, rois, prob, size, scale)
            assert output.shape == (len(rois), features.shape[1], *sides) and output.dtype == features.dtype
        else:
            with pytest.raises((TypeError, ValueError, IndexError)):
                pool(operator, features, rois, prob, size, scale)
