"""Deformable ResNets: Detectron2's names and numbers without its compiled operators; timm's ImageNet weights."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock, build_resnet_backbone

from dsg.deform_backbone import DeformBottleneckBlock, build_deform_resnet_fpn_backbone
from projects import config_path, load_config
from projects.engine.checkpoint import Checkpointer
from projects.errors import CheckpointError, ConfigError
from projects.modeling.build import build_model

RGB = ShapeSpec(channels=3)
REPO = Path(__file__).resolve().parents[2]


def narrow(*opts, config="dsg/dsg_R_101_DCN_FPN_2x.yaml"):
    opts = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
            "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.RESNETS.NORM", "BN", *opts]  # fmt: skip
    return load_config(config_path(config), opts)


@pytest.mark.parametrize("modulated", [False, True])
def test_detectron2s_deformable_backbone_has_the_same_names_and_numbers(modulated):
    cfg = narrow("MODEL.RESNETS.DEFORM_MODULATED", modulated)
    try:
        theirs = build_resnet_fpn_backbone(cfg, RGB).train()
    except ImportError:
        pytest.skip("this Detectron2 cannot build deformable blocks without its compiled operators")
    ours = build_deform_resnet_fpn_backbone(cfg, RGB).train()
    assert sum(isinstance(m, DeformBottleneckBlock) for m in ours.modules()) == 4 + 6 + 3
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "conv2_offset" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    if modulated:  # theirs runs on GPUs only
        x = torch.randn(1, 3, 64, 64, generator=generator)
        assert ours(x)["p2"].shape == (1, 8, 16, 16)
        return
    x = torch.randn(2, 3, 64, 96, generator=generator)
    for name, expected in theirs(x).items():
        torch.testing.assert_close(ours(x)[name], expected)


@pytest.mark.parametrize(("stride", "groups", "modulated"), [(1, 1, False), (2, 4, False), (2, 2, True)])
def test_block_by_hand(stride, groups, modulated):
    """Without offsets it is the plain block (half of it, modulated). With the offset (dy, dx) = (1, -2) for the first of two
    groups of channels, these are sampled there, and the others are not."""
    torch.manual_seed(0)
    plain = BottleneckBlock(8, 12, bottleneck_channels=8, stride=stride, num_groups=groups, norm="")
    block = DeformBottleneckBlock(plain, modulated, num_groups=2)
    assert block.conv2_offset.out_channels == (3 if modulated else 2) * 9 * 2
    x = torch.rand(1, 8, 12, 10)

    def expected(sampled):
        inner = F.conv2d(sampled, plain.conv2.weight, None, stride, 1, 1, groups) * (0.5 if modulated else 1)
        return F.relu(plain.conv3(F.relu(inner)) + plain.shortcut(x))

    with torch.no_grad():
        inner = F.relu(plain.conv1(x))
        torch.testing.assert_close(block(x), expected(inner))
        block.conv2_offset.bias[0:18:2] = 1.0
        block.conv2_offset.bias[1:18:2] = -2.0
        found = block(x)
        sampled = torch.cat([torch.roll(inner[:, :4], (-1, 2), dims=(2, 3)), inner[:, 4:]], dim=1)
        side = slice(3, 9) if stride == 1 else slice(2, 4)  # away from the border, which roll wraps around
        torch.testing.assert_close(found[:, :, side, side], expected(sampled)[:, :, side, side])


def test_stages_and_freezing_are_the_configs():
    cfg = narrow("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True, False, False, True], "MODEL.BACKBONE.FREEZE_AT", 2)
    backbone = build_deform_resnet_fpn_backbone(cfg, RGB).bottom_up
    deform = {name: [isinstance(b, DeformBottleneckBlock) for b in getattr(backbone, name)] for name in backbone.stage_names}
    assert {name: set(found) for name, found in deform.items()} == {
        "res2": {True}, "res3": {False}, "res4": {False}, "res5": {True}
    }  # fmt: skip
    assert not any(p.requires_grad for p in backbone.res2.parameters())
    assert all(p.requires_grad for p in backbone.res5.parameters())
    assert cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE == [True, False, False, True]


def test_plain_imagenet_weights_fill_everything_but_the_offsets(tmp_path):
    cfg = narrow("MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)
    plain = build_resnet_backbone(narrow("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4), RGB)
    torch.save({"model": plain.state_dict(), "matching_heuristics": True}, tmp_path / "imagenet.pth")
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "imagenet.pth"))
    unfilled = {name for name in checkpointer.unloaded if name.startswith("backbone.bottom_up")}
    assert len(unfilled) == 13 * 2 and all(".conv2_offset." in name for name in unfilled)
    assert torch.equal(model.backbone.bottom_up.res4[2].conv2.weight, plain.res4[2].conv2.weight)


@pytest.fixture
def convert():
    spec = importlib.util.spec_from_file_location("convert_timm_resnext", REPO / "tools/convert_timm_resnext.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.convert


def test_timms_resnext_gives_the_same_features_in_detectron2s(convert, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnext50_32x4d", pretrained=False).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    cfg = load_config(
        config_path("dsg/dsg_X_101_32x4d_DCN_FPN_2x.yaml"),
        ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4],
    )
    ours = build_resnet_backbone(cfg, RGB).eval()
    torch.save({"model": convert(theirs.state_dict()), "matching_heuristics": True}, tmp_path / "timm.pth")
    checkpointer = Checkpointer(ours)
    checkpointer.load(str(tmp_path / "timm.pth"))
    checkpointer.refuse_unloaded("timm")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = ours(x)
        expected = theirs.maxpool(theirs.act1(theirs.bn1(theirs.conv1(x))))
        for i in (1, 2, 3, 4):
            expected = getattr(theirs, f"layer{i}")(expected)
            torch.testing.assert_close(found[f"res{i + 1}"], expected, rtol=1e-3, atol=1e-3)


def test_timms_models_that_detectron2_does_not_have_are_refused(convert):
    weights = timm.create_model("seresnext26d_32x4d", pretrained=False).state_dict()
    with pytest.raises(CheckpointError, match="'conv1.0.weight', for which Detectron2's ResNet has no place"):
        convert(weights)


@pytest.mark.parametrize("modulated", [False, True])
def test_bfloat16_on_a_cpu(modulated):
    torch.manual_seed(0)
    block = DeformBottleneckBlock(BottleneckBlock(8, 8, bottleneck_channels=8, norm=""), modulated)
    torch.nn.init.normal_(block.conv2_offset.bias)
    x = torch.randn(2, 8, 12, 10)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x)
    found.float().sum().backward()
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean() and block.conv2_offset.weight.grad.any()


def test_shallow_resnets_have_no_deformable_blocks():
    with pytest.raises(ConfigError, match="DEPTH must be 50 or more with DEFORM_ON_PER_STAGE, found 18"):
        build_deform_resnet_fpn_backbone(narrow("MODEL.RESNETS.DEPTH", 18), RGB)
