"""The CUDA kernels: that they compile (where nvcc is found), and, on a GPU, that they give what the CPU kernels give.

Tests of the other files that ask for `device` run on a GPU too.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from projects.layers import extension

REPO = Path(__file__).resolve().parents[2]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.mark.slow
def test_cuda_code_compiles_links_and_loads(tmp_path):
    toolkits = [CUDA_HOME, "/usr/local/cuda"]  # the first is where `nvcc` lies, which may be a link or a wrapper
    toolkit = next((path for path in toolkits if path and Path(path, "lib64/libcudart.so").exists()), None)
    if toolkit is None or not torch.version.cuda:
        pytest.skip("needs the CUDA toolkit and a torch with CUDA")
    source = tmp_path / "source"
    shutil.copytree(REPO / "projects", source / "projects", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPO / name, source)
    built = tmp_path / "built"
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(built), "--build-temp", str(tmp_path / "objects")],
        env={"MAX_JOBS": "2", **os.environ, "CUDA_HOME": toolkit, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"},
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    (library,) = built.rglob("_C*.so")
    program = f"""
import torch
torch.ops.load_library({str(library)!r})
assert torch.ops.projects.has_cuda()
box = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
print(torch.ops.projects.prroi_pool(torch.ones(1, 1, 5, 5), box, [1, 1], 1.0, False).item())
for name in ("sg_roi_align", "prroi_pool", "sg_roi_align_grad_prob", "prroi_pool_grad_rois"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("projects::" + name, "CUDA"), name
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip() == "1.0", result.stderr


@pytest.fixture
def cuda():
    if "cuda" not in extension.DEVICES:
        pytest.skip("needs the extension with its CUDA kernels: make clean setup")


def cases():
    """Channels in and out of step with vectors of 2, 4 and 8, more than a pass of 256; bins in and out of step with 16."""
    yield from itertools.product((1, 3, 64, 70, 264), ((7, 7), (4, 4), (3, 11)), (False, True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_sg_roi_align_equals_the_cpu(cuda, make_rois, dtype, sampling_ratio):
    wide = torch.promote_types(dtype, torch.float32)
    for channels, size, channels_last in cases():
        rois, prob = make_rois(50, 2, 100, 120, wide), torch.rand(50, 1, 9, 5, dtype=wide)
        rois[3, 2] = float("nan")
        features = torch.randn(2, channels, 25, 30).to(dtype)
        if channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        grad = torch.randn(50, channels, *size).to(dtype)
        results = []
        for device in ("cpu", "cuda"):
            f, p = (tensor.to(device).requires_grad_() for tensor in (features, prob))
            output = torch.ops.projects.sg_roi_align(f, rois.to(device), p, size, 0.25, sampling_ratio, True)
            results.append([output, *torch.autograd.grad(output, (f, p), grad.to(device))])
        for on_cpu, on_gpu in zip(*results, strict=True):
            assert on_gpu.stride() == on_cpu.stride()
            torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_prroi_pool_equals_the_cpu(cuda, make_rois, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for channels, size, channels_last in cases():
        rois = make_rois(50, 2, 100, 120, wide)
        rois[3, 2] = float("nan")
        features = torch.randn(2, channels, 25, 30).to(dtype)
        if channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        grad = torch.randn(50, channels, *size).to(dtype)
        results = []
        for device in ("cpu", "cuda"):
            f, b = (tensor.to(device).requires_grad_() for tensor in (features, rois))
            output = torch.ops.projects.prroi_pool(f, b, size, 0.25, False)
            results.append([output, *torch.autograd.grad(output, (f, b), grad.to(device))])
        for on_cpu, on_gpu in zip(*results, strict=True):
            torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.gpu
def test_runs_in_the_current_stream(cuda):
    """The map is filled late in a stream of its own: a kernel in any other stream would see it before."""
    ops = torch.ops.projects
    rois = torch.tensor([[0.0, 1.0, 2.0, 30.0, 25.0]], device="cuda")
    features = torch.zeros(1, 4, 30, 40, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        features.fill_(1.0)
        found = [ops.prroi_pool(features, rois, [3, 3], 1.0, False)]
        found.append(ops.sg_roi_align(features, rois, None, [3, 3], 1.0, 2, True))
    torch.cuda.synchronize()
    for output in found:
        torch.testing.assert_close(output, torch.ones_like(output))


@pytest.mark.gpu
@pytest.mark.parametrize("aligned", [False, True])
def test_without_maps_inverted_boxes_and_either_alignment(cuda, make_rois, aligned):
    rois = make_rois(40, 2, 100, 120)
    rois[::5, 1:] = rois[::5, 1:].flip(1)  # inverted
    features, grad = torch.randn(2, 20, 25, 30), torch.randn(40, 20, 5, 5)
    results = []
    for device in ("cpu", "cuda"):
        f, b = features.to(device).requires_grad_(), rois.to(device).requires_grad_()
        plain = torch.ops.projects.sg_roi_align(f, b.detach(), None, [5, 5], 0.25, 2, aligned)
        exact = torch.ops.projects.prroi_pool(f, b, [5, 5], 0.25, aligned)
        results.append([plain, exact, *torch.autograd.grad((plain + exact), (f, b), grad.to(device))])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_finite_differences(cuda, make_rois, channels_last):
    rois = make_rois(6, 2, 36, 40, torch.float64).cuda()
    prob = torch.rand(6, 1, 5, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    features = torch.randn(2, 3, 9, 10, dtype=torch.float64, device="cuda")
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    sampled, exact = torch.ops.projects.sg_roi_align, torch.ops.projects.prroi_pool
    tolerance = {"nondet_tol": 1e-9}  # additions in any order
    assert torch.autograd.gradcheck(lambda f, p: sampled(f, rois, p, [3, 2], 0.25, 2, True), (features, prob), **tolerance)
    # Whole rows: the batch index has no derivative.
    index = rois[:, :1]
    assert torch.autograd.gradcheck(
        lambda f, b: exact(f, torch.cat([index, b], 1), [3, 2], 0.25, False),
        (features, rois[:, 1:].clone().requires_grad_()),
        **tolerance,
    )


@pytest.mark.gpu
def test_more_than_two_to_the_31_outputs(cuda):
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free GPU memory")
    rois = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]], device="cuda").repeat(700_000, 1)
    features = torch.ones(1, 1, 8, 8, device="cuda", dtype=torch.float16)
    output = torch.ops.projects.sg_roi_align(features, rois, None, [56, 56], 1.0, 1, True)
    assert output.numel() > 2**31
    assert (output[-1000:] == 1).all() and (output[:1000] == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "inputs", "settings"),
    [
        ("sg_roi_align_grad_features", ("rois", "prob", "size"), (False, 0.25, 2, True)),
        ("sg_roi_align_grad_prob", ("features", "rois", "prob"), (0.25, 2, True)),
        ("prroi_pool_grad_features", ("rois", "size"), (False, 0.25, False)),
        ("prroi_pool_grad_rois", ("features", "rois"), (0.25, False)),
    ],
)
def test_gradients_raise_the_determinism_alert(cuda, make_rois, name, inputs, settings):
    features, rois, prob = torch.randn(1, 3, 9, 9), make_rois(2, 1, 36, 36), torch.rand(2, 1, 4, 4)
    known = {"features": features.cuda(), "rois": rois.cuda(), "prob": prob.cuda(), "size": [1, 3, 9, 9]}
    grad = torch.randn(2, 3, 2, 2, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=f"{name} on CUDA does not have a deterministic implementation"):
            getattr(torch.ops.projects, name)(grad, *(known[key] for key in inputs), *settings)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_batch_index_out_of_range_is_named(cuda):
    """In a process of its own: an assertion on the GPU ends the use of CUDA there."""
    program = """
import torch
from projects.layers import sg_roi_align
rois = torch.tensor([[2.0, 1.0, 1.0, 3.0, 3.0]], device="cuda")
sg_roi_align(torch.ones(2, 1, 5, 5, device="cuda"), rois, None, 2, 1.0, 2)
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO)
    assert result.returncode != 0
    assert "the batch index of RoI 0 must be in [0, 2), got 2.0" in result.stdout + result.stderr
