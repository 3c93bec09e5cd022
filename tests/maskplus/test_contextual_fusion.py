"""Contextual fusion: what is pooled, from where, and to which RoIs it goes."""

import math

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances

from maskplus.contextual_fusion import ContextualFusion
from projects.errors import ConfigError
from projects.layers import SgRoIAlign
from projects.modeling.pooler import replace_roi_align

STRIDE = 32


def fusion(in_channels: int, conv_dims: list[int], bins: int = 14) -> ContextualFusion:
    pooler = ROIPooler(bins, (1 / STRIDE,), 2, "ROIAlignV2")
    return ContextualFusion(level="p5", stride=STRIDE, in_channels=in_channels, conv_dims=conv_dims, pooler=pooler)


def rois(size: tuple[int, int], count: int) -> Instances:
    return Instances(size, pred_boxes=Boxes(torch.zeros(count, 4)))


def test_pools_the_true_image(arithmetic):
    """A map with f(y, x) = 3 + x + 10 y: a bin is the value at its centre, in feature coordinates with the half pixel."""
    height, width, bins = 250, 310, 3  # of a map of 12 x 16 cells, 384 x 512 pixels
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    module = fusion(1, [1], bins)
    with torch.no_grad():
        module.convs[0].weight.zero_()[0, 0, 1, 1] = 1  # passes the pooled map on
    features = arithmetic(2, 1, bins, bins).float()
    found = module(features, {"p5": (3 + x + 10 * y)[None, None]}, [rois((height, width), 2)])
    centre = torch.arange(bins) + 0.5
    expected = 3 + (centre * width / bins / STRIDE - 0.5) + 10 * (centre * height / bins / STRIDE - 0.5)[:, None]
    torch.testing.assert_close(found, features + expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(96, 160), (100, 130), (31, 33), (200, 64)])
def test_padding_changes_nothing(arithmetic, size):
    rows, columns = (math.ceil(side / STRIDE) for side in size)
    alone = arithmetic(1, 3, rows, columns).float()
    padded = torch.full((2, 3, 7, 8), float("nan"))  # whatever lies beyond the image
    padded[0, :, :rows, :columns] = alone[0]
    padded[1] = arithmetic(3, 7, 8, start=999)
    module = fusion(3, [4, 2])
    features = arithmetic(5, 2, 14, 14).float()
    assert torch.equal(module.pool(padded, [size, (224, 256)])[:1], module.pool(alone, [size]))
    expected = module(features[:3], {"p5": alone}, [rois(size, 3)])
    found = module(features, {"p5": padded}, [rois(size, 3), rois((224, 256), 2)])
    torch.testing.assert_close(found[:3], expected, rtol=0, atol=1e-6)  # rounding of convolutions over two images


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (3, 0), (0, 0)])
def test_every_roi_gets_the_context_of_its_own_image(arithmetic, counts):
    sizes = (64, 96), (96, 90)
    level = arithmetic(2, 3, 3, 3).float()
    features = arithmetic(sum(counts), 2, 14, 14).float()
    module = fusion(3, [4, 2])
    found = module(features, {"p5": level}, [rois(size, count) for size, count in zip(sizes, counts, strict=True)])
    assert found.shape == features.shape
    first = counts[0]
    for i, own in enumerate((features[:first], features[first:])):
        alone = module(own, {"p5": level[i : i + 1]}, [rois(sizes[i], len(own))])
        torch.testing.assert_close(found[:first] if i == 0 else found[first:], alone, rtol=0, atol=1e-6)
        if len(own):
            assert (alone != own).any()
            torch.testing.assert_close(alone - own, (alone - own)[:1].expand_as(own), rtol=0, atol=1e-6)


def test_the_same_inside_of_roi_heads(heads):
    """In a padded batch, with the padding spoiled, the masks are those of each image alone."""
    built = heads("CONTEXT", True)
    p5 = built.features["p5"]  # (2, C, 3, 3); the images are 3 x 2 and 2 x 3 cells
    p5[0, :, :, 2:] = p5[1, :, 2:] = float("nan")
    together = built.infer()
    for i in range(2):
        alone = built.infer(images=[i], cut=True)[0].pred_masks
        assert torch.isfinite(alone).all()
        torch.testing.assert_close(together[i].pred_masks, alone, rtol=0, atol=1e-6)
    p5[1] += 1
    changed = built.infer()
    assert torch.equal(changed[0].pred_masks, together[0].pred_masks)
    assert not torch.equal(changed[1].pred_masks, together[1].pred_masks)


def test_starts_with_detectron2s_convolution_initialisation():
    torch.manual_seed(0)
    for conv, out_channels in zip(fusion(256, [512, 256]).convs, (512, 256), strict=True):
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (out_channels * 9)), rel=0.01)


def test_relu_after_every_convolution(arithmetic):
    module = fusion(3, [4, 2])
    features, level = arithmetic(2, 2, 14, 14).float(), {"p5": arithmetic(1, 3, 2, 2).float()}
    with torch.no_grad():
        module.convs[1].bias.fill_(-1e6)
        assert torch.equal(module(features, level, [rois((64, 64), 2)]), features)
        module.convs[1].bias.zero_()
        module.convs[0].bias.fill_(-1e6)
        assert torch.equal(module(features, level, [rois((64, 64), 2)]), features)


def test_gradient_reaches_the_map_of_images_with_rois_only(arithmetic):
    level = arithmetic(2, 3, 2, 2).float().requires_grad_()
    module = fusion(3, [4, 2])
    module(arithmetic(2, 2, 14, 14).float(), {"p5": level}, [rois((64, 64), 0), rois((64, 64), 2)]).sum().backward()
    assert not level.grad[0].any() and level.grad[1].any()
    assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("keys", [("SAMPLING_RATIO", 3), ("TYPE", "ROIAlign"), ("RESOLUTION", 10)], ids=str)
def test_pools_as_the_mask_pooler(heads, keys):
    module = heads("CONTEXT", True, "CONTEXT_LEVEL", "p4", f"MODEL.ROI_MASK_HEAD.POOLER_{keys[0]}", keys[1]).module
    assert str(module.contextual_fusion.pooler.level_poolers[0]) == str(module.mask_pooler.level_poolers[2])


def test_faster_roi_align_gives_the_same(heads):
    built = heads("CONTEXT", True)
    expected = built.infer()
    assert replace_roi_align(built.module) > 0
    assert isinstance(built.module.contextual_fusion.pooler.level_poolers[0], SgRoIAlign)
    for instances, wanted in zip(built.infer(), expected, strict=True):
        torch.testing.assert_close(instances.pred_masks, wanted.pred_masks, rtol=0, atol=1e-5)


def test_wrong_keys_are_refused(heads):
    with pytest.raises(ConfigError, match=r"CONTEXT_LEVEL is 'p7': expected one of p2, p3, p4, p5, p6"):
        heads("CONTEXT", True, "CONTEXT_LEVEL", "p7")
    with pytest.raises(ConfigError, match=r"CONV_DIMS is \[8, 9\]: its last number must be 8"):
        heads("CONTEXT", True, "CONV_DIMS", [8, 9])
    for dims in ([0, 8], [-4, 8], [16.0, 8], ["a", 8]):
        with pytest.raises(ConfigError, match="expected whole numbers of filters, at least 1 each"):
            heads("CONTEXT", True, "CONV_DIMS", dims)
    with pytest.raises(ConfigError, match=r"CONV_DIMS is \[\]"):
        heads("CONTEXT", True, "CONV_DIMS", [])
