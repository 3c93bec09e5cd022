"""How the operators stand in PyTorch: dispatcher, torch.compile, autocast, threads, memory formats, and the fallback."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from projects.layers import extension, prroi_pool, reference, sg_roi_align

REPO = Path(__file__).resolve().parents[2]


def both(features, rois, prob):
    """Outputs of both operators."""
    return sg_roi_align(features, rois, prob, 3, 0.25, 2), prroi_pool(features, rois, 3, 0.25)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(compiled, device, make_rois, channels_last):
    """Schema, fake kernel, autograd registration and AOTAutograd, forward and backward, static and dynamic shapes."""
    ops, opcheck = torch.ops.projects, torch.library.opcheck
    features = torch.randn(2, 3, 6, 7, device=device)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features, rois = features.requires_grad_(), make_rois(4, 2, 24, 28).to(device)
    prob, grad = torch.rand(4, 1, 5, 5, device=device, requires_grad=True), torch.randn(4, 3, 2, 3, device=device)
    size = list(features.shape)
    opcheck(ops.sg_roi_align.default, (features, rois, prob, [2, 3], 0.25, 2, True))
    opcheck(ops.sg_roi_align.default, (features, rois, None, [2, 3], 0.25, 0, False))
    opcheck(ops.prroi_pool.default, (features, rois.clone().requires_grad_(), [2, 3], 0.25, True))
    features, prob = features.detach(), prob.detach()
    opcheck(ops.sg_roi_align_grad_features.default, (grad, rois, prob, size, channels_last, 0.25, 2, True))
    opcheck(ops.sg_roi_align_grad_prob.default, (grad, features, rois, prob, 0.25, 2, True))
    opcheck(ops.prroi_pool_grad_features.default, (grad, rois, size, channels_last, 0.25, False))
    opcheck(ops.prroi_pool_grad_rois.default, (grad, features, rois, 0.25, False))


def check_compiled_function(make_rois, device, **options):
    torch._dynamo.reset()
    function = torch.compile(both, **options)
    for count in (5, 9):  # another number of RoIs compiles for any number
        features, rois = torch.randn(2, 3, 6, 7, device=device, requires_grad=True), make_rois(count, 2, 24, 28).to(device)
        prob = torch.rand(count, 1, 5, 5, device=device, requires_grad=True)
        expected, found = both(features, rois, prob), function(features, rois, prob)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(
            torch.autograd.grad(found[0].square().sum() + found[1].sum(), (features, prob)),
            torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), (features, prob)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_torch_compile(compiled, device, make_rois):
    check_compiled_function(make_rois, device, backend="aot_eager", fullgraph=True)


def test_torch_compile_of_the_fallback(monkeypatch, make_rois):
    monkeypatch.setattr(extension, "is_available", lambda device: False)
    check_compiled_function(make_rois, "cpu", backend="eager")


@pytest.mark.slow
def test_torch_compile_with_inductor(compiled, device, make_rois):
    check_compiled_function(make_rois, device, fullgraph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_type_of_the_features(implementation, device, make_rois, dtype):
    """Boxes and probabilities may come in any type there; coordinates are read in float32."""
    features, rois, prob = torch.randn(2, 3, 40, 50), make_rois(6, 2, 160, 200), torch.rand(6, 1, 5, 5)
    features, rois, prob = (tensor.to(device) for tensor in (features, rois, prob))
    grad = torch.randn(6, 3, 3, 3, device=device).to(dtype)

    def run(features, prob, autocast):
        """Outputs of both operators, and all gradients."""
        f, p, boxes = (tensor.clone().requires_grad_() for tensor in (features, prob, rois))
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            guided, pooled = sg_roi_align(f, rois, p, 3, 0.25, 2), prroi_pool(f, boxes, 3, 0.25)
        return [
            *(guided, pooled),
            *torch.autograd.grad(guided, (f, p), grad.to(guided.dtype)),
            *torch.autograd.grad(pooled, (f, boxes), grad.to(pooled.dtype)),
        ]

    for f in (features, features.to(dtype)):
        for p in (prob, prob.to(dtype)):
            found = run(f, p, True)
            assert [tensor.dtype for tensor in found] == [f.dtype, f.dtype, f.dtype, p.dtype, f.dtype, rois.dtype]
            tolerance = 1e-5 if f.dtype == p.dtype == torch.float32 else 1e-2
            for a, b in zip(found, run(f.float(), p.float(), False), strict=True):
                torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)
    if implementation == "compiled":  # and without the Python functions in front
        with torch.autocast(device, dtype=dtype):
            direct = torch.ops.projects.sg_roi_align(features, rois.double(), prob.to(dtype), [3, 3], 0.25, 2, True)
        assert direct.dtype == torch.float32


@pytest.mark.parametrize("channels_last", [False, True])
def test_cpu_results_are_the_same_bit_by_bit(compiled, make_rois, channels_last):
    """Over runs and over numbers of threads."""
    features = torch.randn(2, 150, 30, 40)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois, prob = make_rois(200, 2, 120, 160), torch.rand(200, 1, 28, 28)
    boxes = rois.clone().requires_grad_()
    features.requires_grad_()
    prob.requires_grad_()

    def run():
        guided, pooled = sg_roi_align(features, rois, prob, 5, 0.25, 2), prroi_pool(features, boxes, 5, 0.25)
        grad = torch.linspace(-1, 1, guided.numel()).view(guided.shape)
        return [
            *(guided, pooled),
            *torch.autograd.grad(guided, (features, prob), grad),
            *torch.autograd.grad(pooled, (features, boxes), grad),
        ]

    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_outputs_and_gradients_keep_the_memory_format(implementation, device, make_rois):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = torch.randn(2, 70, 9, 11, device=device).contiguous(memory_format=memory_format).requires_grad_()
        for output in both(features, make_rois(6, 2, 36, 44).to(device), None):
            assert output.is_contiguous(memory_format=memory_format)
            if implementation == "compiled":
                grad = torch.autograd.grad(output.sum(), features)[0]
                assert grad.is_contiguous(memory_format=memory_format)


def test_no_more_sums_than_tasks(compiled, make_rois):
    """The gradient of one image with one block of channels is the work of one thread: it, and the sums of one thread."""
    rois, grad = make_rois(50, 1, 200, 200), torch.randn(50, 64, 2, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            torch.ops.projects.sg_roi_align_grad_features(grad, rois, None, [1, 64, 50, 50], False, 0.25, 2, True)
    finally:
        torch.set_num_threads(threads)
    (allocated,) = (event.cpu_memory_usage for event in profile.key_averages() if event.key == "aten::empty")
    assert allocated <= 2.1 * 64 * 50 * 50 * 4


@pytest.mark.parametrize("size", [(5, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_of_any_strides(implementation, device, make_rois, size, channels):
    """Transposed, expanded and sliced gradients; sides of one bin, whose strides mean nothing; a gradient of channels_last."""
    features, rois = torch.randn(2, channels, 9, 11, device=device, requires_grad=True), make_rois(6, 2, 36, 44).to(device)
    prob, boxes = torch.rand(6, 1, 5, 5, device=device, requires_grad=True), rois.clone().requires_grad_()
    shape = (6, channels, *size)
    grads = (
        torch.randn(6, channels, *size[::-1], device=device).transpose(2, 3),
        torch.randn((), device=device).expand(shape),
        torch.randn(6, channels, size[0] + 2, size[1] + 3, device=device)[:, :, 2:, :-3],
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last),
        torch.randn(6, *size, channels, device=device).permute(0, 3, 1, 2),
    )
    for output, inputs in [
        (sg_roi_align(features, rois, prob, size, 0.25, 2), (features, prob)),
        (prroi_pool(features, boxes, size, 0.25), (features, boxes)),
    ]:
        for grad in grads:
            found = torch.autograd.grad(output, inputs, grad, retain_graph=True)
            dense = grad.clone(memory_format=torch.contiguous_format)
            for a, b in zip(found, torch.autograd.grad(output, inputs, dense, retain_graph=True), strict=True):
                torch.testing.assert_close(a, b)


def test_without_the_extension_one_warning_names_the_build_command(tmp_path):
    """In a process in which projects.layers._C cannot be imported."""
    program = """
import sys, warnings
sys.modules["projects.layers._C"] = None
import torch
from projects.layers import prroi_pool, sg_roi_align
features, rois = torch.arange(25.0).view(1, 1, 5, 5), torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(sg_roi_align(features, rois, None, 2, 1.0, 1).flatten().tolist(), prroi_pool(features, rois, 1, 1.0).item())
ours = [w for w in caught if "projects.layers" in str(w.message)]
print(len(ours), ours[0].message, ours[0].filename)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["[6.0, 7.0, 11.0, 12.0] 12.0"] * 2
    assert lines[2].startswith("1 projects.layers runs its PyTorch implementation on cpu")
    assert "`python setup.py build_ext --inplace`" in lines[2] and lines[2].endswith("<string>")


def test_the_benchmark_hides_no_errors(monkeypatch):
    """Only a type that torchvision lacks is "not supported"; memory that runs out is not."""
    spec = importlib.util.spec_from_file_location("benchmark_operators", REPO / "tools" / "benchmark_operators.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def table(error):
        def theirs():
            raise error

        rows = {"row": {"torchvision": lambda: theirs, "ours": lambda: lambda: None}}
        monkeypatch.setattr(benchmark, "cases", lambda device, dtype: rows)
        return benchmark.operator_table("cpu", torch.bfloat16, 1, False)

    assert "not supported" in table(NotImplementedError("\"roi_align\" not implemented for 'BFloat16'"))[-1]
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")):
        with pytest.raises(type(error), match="memory"):
            table(error)


def test_layers_import_only_torch():
    imported = set()
    for path in (REPO / "projects" / "layers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.slow
def test_more_than_two_to_the_31_outputs(compiled):
    """R * C * P * P = 2^31 + 2^16; only the last RoIs have boxes. 4.3 GB of bfloat16."""
    rows, channels, side = 2**15 + 1, 16, 64
    features = torch.randn(1, channels, 20, 30).to(torch.bfloat16)
    rois = torch.full((rows, 5), float("nan"))
    rois[:, 0] = 0
    rois[0, 1:] = rois[-1, 1:] = torch.tensor([2.0, 3.0, 25.0, 18.0])
    assert rows * channels * side * side > 2**31
    for channels_last in (False, True):
        if channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        output = sg_roi_align(features, rois, None, side, 1.0, 1)
        expected = reference.sg_roi_align(features, rois[-1:], None, [side, side], 1.0, 1, True)[0]
        torch.testing.assert_close(output[-1], expected)
        torch.testing.assert_close(output[0], expected)
        assert (output[-2] == 0).all() and (output[rows // 2] == 0).all()
        grad = torch.ops.projects.sg_roi_align_grad_features(output, rois, None, features.shape, channels_last, 1.0, 1, True)
        single = torch.ops.projects.sg_roi_align_grad_features(
            output[-1:], rois[-1:], None, features.shape, channels_last, 1.0, 1, True
        )
        torch.testing.assert_close(grad, single * 2, rtol=2e-2, atol=2e-2)
        del output, grad
