"""HRNet: what it consists of, what it gives, and where its weights come from."""

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from torch import nn

from casnet.hrnet import HRNet
from projects.errors import CheckpointError, ConfigError

WEIGHTS = {18: 9_562_260, 32: 29_305_536, 48: 65_325_120}


@pytest.mark.parametrize("width", WEIGHTS)
def test_weights_are_the_official_ones(width, official):
    with torch.device("meta"):
        backbone = HRNet(width=width)
    shapes = official.hrnet(width)
    assert {name: tuple(value.shape) for name, value in backbone.net.state_dict().items()} == shapes
    assert len(shapes) == 1830
    assert sum(p.numel() for p in backbone.parameters()) == official.count(shapes) == WEIGHTS[width]
    assert sum(shape.channels for shape in backbone.output_shape().values()) == 15 * width


@pytest.mark.parametrize("with_stem", [False, True])
def test_maps_have_the_stated_shapes(with_stem):
    backbone = HRNet(width=4, modules=(1, 2, 1), blocks=1, with_stem=with_stem).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 64, 96))
    stated = backbone.output_shape()
    assert list(maps) == list(stated) == (["stem"] if with_stem else []) + [f"branch{i}" for i in range(1, 5)]
    for name, features in maps.items():
        stride = stated[name].stride
        assert features.shape == (2, stated[name].channels, 64 // stride, 96 // stride)
    assert [shape.stride for shape in stated.values()][-4:] == [4, 8, 16, 32]
    assert [shape.channels for shape in stated.values()][-4:] == [4, 8, 16, 32]


def test_equals_timms_network():
    ours = HRNet(width=18).eval()
    theirs = timm.create_model("hrnet_w18", features_only=True, feature_location="").eval()
    theirs.load_state_dict(ours.net.state_dict())
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for name, expected in zip(ours.output_shape(), theirs(image)[1:], strict=True):
            torch.testing.assert_close(ours(image)[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_fusions_enlarge_as_the_key_says(mode, narrow):
    backbone = build_backbone(narrow("panoptic_joint", "MODEL.CASNET.HRNET_UPSAMPLE", mode)).eval()
    seen = []

    def compare(module, inputs, output):
        arguments = {"align_corners": False} if mode == "bilinear" else {}
        expected = F.interpolate(inputs[0], scale_factor=float(module.scale_factor), mode=mode, **arguments)
        seen.append(torch.equal(output, expected))

    for module in backbone.modules():
        if isinstance(module, nn.Upsample):
            module.register_forward_hook(compare)
    with torch.no_grad():
        backbone(torch.rand(1, 3, 64, 64))
    assert len(seen) == 1 + 3 + 6 and all(seen)  # one module per stage: each branch takes from every coarser one


def test_modes_of_enlarging_differ():
    nearest, bilinear = (HRNet(width=4, modules=(1, 1, 1), blocks=1, upsample=mode).eval() for mode in ("nearest", "bilinear"))
    bilinear.load_state_dict(nearest.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(nearest(image)["branch1"], bilinear(image)["branch1"])


@pytest.mark.parametrize(
    "key, value, expected", [("HRNET_UPSAMPLE", "cubic", "nearest or bilinear"), ("HRNET_MODULES", [1, 4], "stages 2, 3 and 4")]
)
def test_wrong_keys_are_named(key, value, expected, narrow):
    with pytest.raises(ConfigError, match=rf"MODEL.CASNET.{key}.*expected.*{expected}"):
        build_backbone(narrow("panoptic_joint", f"MODEL.CASNET.{key}", value))


def test_sides_that_are_no_multiples_of_32_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        HRNet(width=4, modules=(1, 1, 1), blocks=1)(torch.rand(1, 3, 64, 80))


# ---- Weights


def file_of(tmp_path, shapes, prefix="", wrap=None):
    """A weights file with the given names and shapes, of made-up values."""
    generator = torch.Generator().manual_seed(0)
    state = {prefix + name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(state if wrap is None else {wrap: state}, tmp_path / "hrnet.pth")
    return state


FULL = ["MODEL.CASNET.HRNET_WIDTH", 4, "MODEL.CASNET.HRNET_MODULES", [1, 4, 3], "MODEL.CASNET.HRNET_BLOCKS", 4]


@pytest.mark.parametrize("prefix, wrap", [("", None), ("model.", None), ("model.", "state_dict"), ("", "model")])
def test_official_files_load(prefix, wrap, narrow, official, tmp_path, caplog):
    shapes = {name: shape for name, shape in official.hrnet(4).items() if not name.endswith("num_batches_tracked")}
    classifier = {"incre_modules.0.0.conv1.weight": (32, 4, 1, 1), "classifier.bias": (1000,)}
    state = file_of(tmp_path, shapes | official.last_layer(4, 19) | classifier, prefix, wrap)
    backbone = build_backbone(narrow("panoptic_joint", *FULL, "MODEL.CASNET.HRNET_WEIGHTS", str(tmp_path / "hrnet.pth")))
    loaded = backbone.net.state_dict()
    assert all(torch.equal(loaded[name], state[prefix + name]) for name in shapes)
    assert "set MODEL.CASNET.HRNET_UPSAMPLE bilinear" in caplog.text  # they have the authors' segmentation head


def test_unfit_files_are_refused(narrow, official, tmp_path):
    cfg = narrow("panoptic_joint", *FULL, "MODEL.CASNET.HRNET_WEIGHTS", str(tmp_path / "hrnet.pth"))
    with pytest.raises(CheckpointError, match="There is no weights file"):
        build_backbone(cfg)
    file_of(tmp_path, official.hrnet(8))
    with pytest.raises(CheckpointError, match=r"0 of its 1830 weights are missing.*instead of.*HRNET_WIDTH"):
        build_backbone(cfg)
    shapes = official.hrnet(4)
    del shapes["stage3.2.fuse_layers.0.2.0.weight"]
    file_of(tmp_path, shapes)
    with pytest.raises(CheckpointError, match=r"1 of its 1830.*stage3.2.fuse_layers.0.2.0.weight is missing"):
        build_backbone(cfg)
    torch.save([1, 2], tmp_path / "hrnet.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        build_backbone(cfg)


def test_timm_is_asked_for_weights_only_where_none_are_given(narrow, monkeypatch, tmp_path, caplog):
    asked = []

    def create_model(name, **arguments):
        asked.append((name, arguments))
        return HRNet(width=18).net

    monkeypatch.setattr(timm, "create_model", create_model)
    opts = [*FULL, "MODEL.CASNET.HRNET_WIDTH", 18, "MODEL.CASNET.HRNET_WEIGHTS", "timm"]
    build_backbone(narrow("panoptic_joint", *opts, "MODEL.WEIGHTS", "model_final.pth"))
    (tmp_path / "last_checkpoint").write_text("model_0000100.pth")  # of a run that goes on
    build_backbone(narrow("panoptic_joint", *opts, "OUTPUT_DIR", str(tmp_path)))
    assert asked == [] and f"the run in {tmp_path} goes on with its own" in caplog.text
    build_backbone(narrow("panoptic_joint", *opts))
    assert asked == [("hrnet_w18", {"pretrained": True, "features_only": True, "feature_location": ""})]


def test_failures_of_timm_say_what_to_do(narrow, monkeypatch):
    timm_opts = ["MODEL.CASNET.HRNET_WEIGHTS", "timm"]
    with pytest.raises(ConfigError, match="has no weights for HRNET_WIDTH 4"):
        build_backbone(narrow("panoptic_joint", *FULL, *timm_opts))

    def create_model(name, **arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(CheckpointError, match="hrnet_w18 cannot be fetched .*no route to host.*set MODEL.CASNET.HRNET_WEIGHTS"):
        build_backbone(narrow("panoptic_joint", *FULL, *timm_opts, "MODEL.CASNET.HRNET_WIDTH", 18))
