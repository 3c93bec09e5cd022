"""Every test that asks for `implementation` runs twice: with the compiled operators and with those in PyTorch."""

import pytest
import torch

from projects.layers import extension


@pytest.fixture(params=["compiled", "pytorch"])
def implementation(request, monkeypatch) -> str:
    if request.param == "compiled" and not extension.DEVICES:
        pytest.skip(f"needs the compiled operators: {extension.BUILD_COMMAND}")
    if request.param == "pytorch":
        monkeypatch.setattr(extension, "is_available", lambda device: False)
    return request.param


@pytest.fixture
def compiled() -> None:
    if not extension.DEVICES:
        pytest.skip(f"needs the compiled operators: {extension.BUILD_COMMAND}")


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
