"""Every test that asks for `implementation` runs twice: with the compiled operators and with those in PyTorch. One that asks
for `device` runs on the CPU and, where there is one, on a GPU."""

import pytest
import torch

from projects.layers import extension


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def skip_where_not_compiled(request) -> None:
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    if device not in extension.DEVICES:
        pytest.skip(f"needs the operators compiled for {device}: {extension.BUILD_COMMAND}")


@pytest.fixture(params=["compiled", "pytorch"])
def implementation(request, monkeypatch) -> str:
    if request.param == "compiled":
        skip_where_not_compiled(request)
    else:
        monkeypatch.setattr(extension, "is_available", lambda device: False)
    return request.param


@pytest.fixture
def compiled(request) -> None:
    skip_where_not_compiled(request)


@pytest.fixture
def arrange():
    """``arrange(features, layout)``: the same numbers in other memory; of "expanded" the first channel only."""

    def arranged(features, layout):
        if layout == "channels_last":
            return features.contiguous(memory_format=torch.channels_last)
        if layout == "slice":
            return torch.nn.functional.pad(features, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
        if layout == "channels_last slice":
            padded = torch.nn.functional.pad(features, (1, 2, 3, 1)).contiguous(memory_format=torch.channels_last)
            return padded[:, :, 3:-1, 1:-2]
        if layout == "expanded":
            return features[:, :1].expand_as(features)
        if layout == "transposed":
            return features.transpose(2, 3).contiguous().transpose(2, 3)
        return features

    return arranged


@pytest.fixture
def make_rois():
    """``make_rois(count, images, height, width, dtype)``: random boxes (image pixels), some partly or wholly outside."""

    def make(count, images, height, width, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        centre = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * torch.tensor([width, height])
        half = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([width, height]) / 2 + 0.1
        image = torch.randint(0, images, (count, 1), generator=generator)
        return torch.cat([image, centre - half, centre + half], dim=1).to(dtype)

    return make
