"""The fused map, the heads, and HRNet's semantic segmentation alone."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from casnet.heads import FeatureFusion, PixelHead
from projects.errors import ConfigError

SHAPES = {
    "stem": ShapeSpec(channels=1, stride=2),
    "branch1": ShapeSpec(channels=1, stride=4),
    "branch2": ShapeSpec(channels=2, stride=8),
}


def maps(height=8, width=16):
    """Maps of an image of the given size, of made-up values."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(1, shape.channels, height // shape.stride, width // shape.stride, generator=generator)
        for name, shape in SHAPES.items()
    }


def test_maps_are_resized_and_concatenated_in_order():
    fusion = FeatureFusion(SHAPES, names=["branch1", "branch2"], output_stride=4)
    features = maps()
    fused = fusion(features)
    assert fusion.channels == 3 and fused.shape == (1, 3, 2, 4)
    assert torch.equal(fused[:, :1], features["branch1"])
    left, right = features["branch2"][0, :, 0].unbind(1)
    # Half-pixel centres: the four cells lie at -0.25, 0.25, 0.75 and 1.25 between the two.
    expected = torch.stack([left, 0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right, right], dim=1)
    torch.testing.assert_close(fused[0, 1:], expected[:, None].expand(-1, 2, -1))


def test_a_coarser_grid_takes_means():
    fused = FeatureFusion(SHAPES, names=["branch1", "branch2"], output_stride=8)(maps())
    torch.testing.assert_close(fused[:, :1], F.avg_pool2d(maps()["branch1"], 2))
    assert torch.equal(fused[:, 1:], maps()["branch2"])


@pytest.mark.parametrize("stride, names", [(2, ["stem", "branch1", "branch2", "branch3", "branch4"]), (4, None), (8, None)])
def test_the_stem_joins_at_stride_2_only(stride, names, narrow):
    model = build_model(narrow("panoptic_joint", "MODEL.CASNET.OUTPUT_STRIDE", stride))
    assert model.fusion.names == (names or ["branch1", "branch2", "branch3", "branch4"])
    with torch.no_grad():
        fused = model.fusion(model.backbone(torch.rand(1, 3, 32, 64)))
    assert fused.shape == (1, model.fusion.channels, 32 // stride, 64 // stride)
    assert model.fusion.channels == 15 * 4 + (64 if stride == 2 else 0)


def test_wrong_keys_are_named(narrow):
    with pytest.raises(ConfigError, match="OUTPUT_STRIDE is 3: expected 2, 4 or 8"):
        build_model(narrow("panoptic_joint", "MODEL.CASNET.OUTPUT_STRIDE", 3))
    with pytest.raises(ConfigError, match=r"IN_FEATURES is \['p2'\].*has branch1, branch2, branch3, branch4"):
        build_model(narrow("panoptic_joint", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2"]))


def test_a_head_is_two_convolutions_with_norm_and_relu_between():
    head = PixelHead(6, 3).eval()
    x = torch.rand(2, 6, 2, 5)
    first, norm, _, second = head
    inside = torch.einsum("oc,nchw->nohw", first.weight[:, :, 0, 0], x) / (norm.running_var + norm.eps).sqrt()[:, None, None]
    expected = torch.einsum("oc,nchw->nohw", second.weight[:, :, 0, 0], inside.clamp(min=0)) + second.bias[:, None, None]
    torch.testing.assert_close(head(x), expected)
    assert sum(p.numel() for p in head.parameters()) == 6 * 6 + 2 * 6 + 6 * 3 + 3


def test_semantic_segmentation_alone(narrow):
    model = build_model(narrow("semantic_hrnet_w48"))
    labels = torch.randint(0, 19, (60, 90))
    labels[:20] = 255
    sample = {"image": torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8), "sem_seg": labels, "height": 120, "width": 180}
    losses = model([sample])
    assert list(losses) == ["loss_semantic"] and losses["loss_semantic"].item() == pytest.approx(2.94, abs=0.1)  # ln 19
    losses["loss_semantic"].backward()
    assert model.sem_seg_head.layers[0].weight.grad.any()
    del sample["sem_seg"]
    with torch.no_grad():
        output = model.eval()([sample])[0]
    assert list(output) == ["sem_seg"] and output["sem_seg"].shape == (19, 120, 180)
