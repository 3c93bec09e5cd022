"""tools/convert_timm_resnext.py: what it writes, and which models of timm it refuses."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from projects.errors import CheckpointError

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("convert_timm_resnext", REPO / "tools/convert_timm_resnext.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch, tmp_path):
    """``run(name)``: convert a model with random weights instead of downloaded ones -> the file."""
    create = timm.create_model

    def with_random_weights(name, pretrained):
        torch.manual_seed(0)
        model = create(name, pretrained=False)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.8, 1.2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.0)
        return model

    monkeypatch.setattr(timm, "create_model", with_random_weights)

    def convert(name: str) -> Path:
        assert tool.main(SimpleNamespace(model=name, output=tmp_path / "new/weights.pth")) == 0
        return tmp_path / "new/weights.pth"

    return convert


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_what_detectron2_has_is_written(run, name):
    path = run(name)
    assert "res5.1.conv2.norm.running_var" in torch.load(path, weights_only=True)["model"]
    assert [file.name for file in path.parent.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnetblur18", "gives other features with these weights"),
        ("resnet26", r"\(2, 2, 2, 2\) bottlenecks"),
        ("resnext26ts", "'stem.conv1.conv.weight', for which"),
    ],
)
def test_what_it_does_not_have_is_refused_before_anything_is_written(run, tmp_path, name, words):
    with pytest.raises(CheckpointError, match=words):
        run(name)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_conversion_leaves_the_earlier_file(run, monkeypatch):
    path = run("resnet18")
    before = path.read_bytes()

    def interrupted(content, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("resnet18")
    assert path.read_bytes() == before
