"""A tiny GAN Mask R-CNN on the shapes, and hand-made samples."""

from pathlib import Path

import pytest
import torch

from ganmask.samples import Samples
from projects import load_config

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded(random_state_restored):
    """The same random numbers, whichever tests run."""
    torch.manual_seed(0)


@pytest.fixture
def gan_cfg(tiny_opts):
    """``gan_cfg(KEY, VALUE, ...)``: the small config with ``tiny_opts``, narrow discriminators, no evaluation, overrides."""

    def build(*opts):
        tiny = [*tiny_opts, "MODEL.GANMASK.DISCRIMINATOR_WIDTH", 4, "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0]
        return load_config(str(REPO / "configs/ganmask/shapes_ganmask_R_18_FPN.yaml"), [*tiny, *opts])

    return build


@pytest.fixture
def make_samples():
    """``make_samples(R, C)``: random samples."""

    def make(count: int, channels: int = 8, **kwargs) -> Samples:
        def random():
            return torch.randn(count, channels, 28, 28, **kwargs)

        real = (torch.rand(count, 1, 28, 28, **kwargs) > 0.5).to(random())
        return Samples(random(), random(), torch.rand(count, 1, 28, 28, **kwargs), real, random())

    return make
