"""The compiled operators, ``torch.ops.projects``: loads them, and registers their fake kernels and gradients.

The extension is C++ and CUDA only (csrc/): schema, kernels and autocast. What torch.compile and autograd need is here, as
Python, and runs through torch.library. Where the extension is missing, :func:`is_available` says so once, with the command
that builds it, and callers use reference.py.
"""

import importlib
import logging
import warnings

import torch
from torch import Tensor

from .checks import is_channels_last

logger = logging.getLogger(__name__)
BUILD_COMMAND = "python setup.py build_ext --inplace"
ONCE = "the gradient of this operator's gradient is not implemented: it cannot be differentiated twice"


def is_available(device: torch.device) -> bool:
    """Whether there are compiled operators for tensors on this device. Warns the first time that there are none."""
    if device.type in DEVICES or device.type == "meta" and DEVICES:
        return True
    _warn_once(device.type)
    return False


def _warn_once(device: str) -> None:
    if device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"projects.layers runs its PyTorch implementation on {device}, which is several times slower: "
        f"{LOAD_ERROR or f'the extension was built without {device}'}. Build it with `{BUILD_COMMAND}` in the "
        "repository's folder.",
        RuntimeWarning,
        stacklevel=4,
    )


def _load() -> str | None:
    """Load the extension; return None, or why that failed."""
    try:
        importlib.import_module("projects.layers._C")
    except ImportError as error:
        return f"the extension projects.layers._C could not be loaded ({error})"
    return None


_warned: set[str] = set()
LOAD_ERROR = _load()
DEVICES: set[str] = set() if LOAD_ERROR else {"cpu", "cuda"} if torch.ops.projects.has_cuda() else {"cpu"}


# Fake kernels: shape, type and memory format of what the operators return. --------------------------------------------


def _empty(like: Tensor, size, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fake_sg_roi_align(features, rois, prob, output_size, spatial_scale, sampling_ratio, aligned):
    return _empty(features, (rois.shape[0], features.shape[1], *output_size), is_channels_last(features))


def _fake_sg_roi_align_grad_features(grad, rois, prob, size, channels_last, spatial_scale, sampling_ratio, aligned):
    return _empty(grad, size, channels_last)


def _fake_sg_roi_align_grad_prob(grad, features, rois, prob, spatial_scale, sampling_ratio, aligned):
    return _empty(prob, prob.shape, False)


def _fake_prroi_pool(features, rois, output_size, spatial_scale, aligned):
    return _empty(features, (rois.shape[0], features.shape[1], *output_size), is_channels_last(features))


def _fake_prroi_pool_grad_features(grad, rois, size, channels_last, spatial_scale, aligned):
    return _empty(grad, size, channels_last)


def _fake_prroi_pool_grad_rois(grad, features, rois, spatial_scale, aligned):
    return _empty(rois, rois.shape, False)


# Gradients. The map is kept for the backward pass only where its values are needed: not for its own gradient. ----------


def _remember_sg_roi_align(ctx, inputs, output):
    features, rois, prob, _, *ctx.settings = inputs
    ctx.save_for_backward(rois, prob, features if ctx.needs_input_grad[2] else None)
    ctx.size, ctx.channels_last = features.shape, is_channels_last(features)


def _sg_roi_align_backward(ctx, grad):
    rois, prob, features = ctx.saved_tensors
    grad_features = grad_prob = None
    if ctx.needs_input_grad[1]:
        raise RuntimeError("sg_roi_align has no gradient for rois: detach them")
    if ctx.needs_input_grad[0]:
        grad_features = torch.ops.projects.sg_roi_align_grad_features(
            grad, rois, prob, ctx.size, ctx.channels_last, *ctx.settings
        )
    if ctx.needs_input_grad[2]:
        grad_prob = torch.ops.projects.sg_roi_align_grad_prob(grad, features, rois, prob, *ctx.settings)
    return grad_features, None, grad_prob, None, None, None, None


def _remember_prroi_pool(ctx, inputs, output):
    features, rois, _, *ctx.settings = inputs
    ctx.save_for_backward(rois, features if ctx.needs_input_grad[1] else None)
    ctx.size, ctx.channels_last = features.shape, is_channels_last(features)


def _prroi_pool_backward(ctx, grad):
    rois, features = ctx.saved_tensors
    grad_features = grad_rois = None
    if ctx.needs_input_grad[0]:
        grad_features = torch.ops.projects.prroi_pool_grad_features(grad, rois, ctx.size, ctx.channels_last, *ctx.settings)
    if ctx.needs_input_grad[1]:
        grad_rois = torch.ops.projects.prroi_pool_grad_rois(grad, features, rois, *ctx.settings)
    return grad_features, grad_rois, None, None, None


def _not_twice(ctx, *grads):
    raise RuntimeError(ONCE)


def _register() -> None:
    for name, fake, remember, backward in [
        ("sg_roi_align", _fake_sg_roi_align, _remember_sg_roi_align, _sg_roi_align_backward),
        ("sg_roi_align_grad_features", _fake_sg_roi_align_grad_features, None, _not_twice),
        ("sg_roi_align_grad_prob", _fake_sg_roi_align_grad_prob, None, _not_twice),
        ("prroi_pool", _fake_prroi_pool, _remember_prroi_pool, _prroi_pool_backward),
        ("prroi_pool_grad_features", _fake_prroi_pool_grad_features, None, _not_twice),
        ("prroi_pool_grad_rois", _fake_prroi_pool_grad_rois, None, _not_twice),
    ]:
        torch.library.register_fake(f"projects::{name}", fake)
        torch.library.register_autograd(f"projects::{name}", backward, setup_context=remember)


if DEVICES:
    _register()
