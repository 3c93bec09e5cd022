"""The keypoint branch: shapes and cost, loss, decoding."""

import statistics
import time

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from maskpoint.keypoint_branch import ContourPointHead, decode, top_of_parabola
from projects import load_config
from projects.errors import ConfigError

from .conftest import REPO

BOX = torch.tensor([[10.0, 20.0, 122.0, 76.0]])  # 112 x 56: cells of 2 x 1 pixels


def head(k: int = 4, width: int = 8, **kwargs) -> ContourPointHead:
    torch.manual_seed(0)
    shape = ShapeSpec(channels=width, height=14, width=14)
    return ContourPointHead(shape, num_points=k, num_keypoints=k + 1, conv_dims=[width], **kwargs)


def full_size(name: str, *opts) -> ContourPointHead:
    cfg = load_config(str(REPO / f"configs/maskpoint/{name}.yaml"), list(opts))
    with torch.device("meta"):
        return ContourPointHead(cfg, ShapeSpec(channels=256, height=14, width=14))


def gigamacs(branch: ContourPointHead) -> float:
    with FlopCounterMode(display=False) as counter:
        branch.heatmaps(torch.empty(1, 256, 14, 14, device="meta"))
    return counter.get_total_flops() / 2e9


def test_paper_size():
    branch = full_size("design_b")
    assert branch.heatmaps(torch.empty(3, 256, 14, 14, device="meta")).shape == (3, 101, 56, 56)
    assert full_size("design_d").heatmaps(torch.empty(3, 256, 14, 14, device="meta")).shape == (3, 101, 28, 28)
    convs = (256 * 9 + 1) * 512 + 7 * (512 * 9 + 1) * 512
    assert sum(p.numel() for p in branch.parameters()) == convs + 512 * 16 * 101 + 101
    per_pixel = 9 * (256 * 512 + 7 * 512 * 512) + 16 * 512 * 101
    assert gigamacs(branch) == pytest.approx(196 * per_pixel / 1e9) == pytest.approx(3.6, abs=0.05)


def test_settings_come_from_the_config():
    branch = full_size("maskpoint_R_50_FPN")
    assert (branch.loss_weight, branch.num_points, branch.num_keypoints) == (0.5, 100, 101)
    assert full_size("design_b").loss_weight == 1.0
    assert (full_size("without_center").num_points, full_size("without_center").num_keypoints) == (100, 100)
    assert (full_size("points_half").num_points, full_size("points_half").num_keypoints) == (50, 51)
    shared_out = full_size("design_b", "MODEL.MASKPOINT.COMPONENTS", "all")
    assert (shared_out.num_points, shared_out.num_keypoints) == (0, 101)  # not one closed contour
    with pytest.raises(ConfigError, match="MODEL.MASKPOINT.DECODER"):
        head(decoder="softargmax")


def proposals(keypoints: torch.Tensor, boxes: torch.Tensor) -> list[Instances]:
    return [Instances((200, 200), proposal_boxes=Boxes(boxes), gt_keypoints=Keypoints(keypoints))]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_loss_is_the_mean_cross_entropy_of_the_points_in_the_box(alpha):
    branch = head(loss_weight=alpha)
    heatmaps = torch.randn(1, 5, 56, 56, requires_grad=True)
    points = [[10.0, 20.0], [121.9, 75.9], [66.0, 48.0], [9.0, 30.0], [122.0, 76.0]]  # the fourth lies outside
    cells = {0: (0, 0), 1: (55, 55), 2: (28, 28), 4: (55, 55)}
    with EventStorage(0):
        found = branch.losses(heatmaps, proposals(torch.tensor([[[*p, 2] for p in points]]), BOX))
    nll = [-F.log_softmax(heatmaps[0, i].flatten(), dim=0)[y * 56 + x] for i, (x, y) in cells.items()]
    torch.testing.assert_close(found["loss_keypoint"], alpha * sum(nll) / 4)
    assert set(found) == {"loss_keypoint"}


def test_rois_without_points_name_the_mapper():
    rois = [Instances((200, 200), proposal_boxes=Boxes(BOX))]
    with pytest.raises(ConfigError, match="set INPUT.MAPPER to 'ContourPointMapper'"):
        head().losses(torch.zeros(1, 5, 56, 56), rois)


def test_loss_stays_connected_without_foreground_and_without_points_inside():
    for count, place in ((0, 0.0), (1, 500.0)):
        branch = head()
        keypoints = torch.full((count, 5, 3), 2.0)
        keypoints[:, :, :2] = place
        with EventStorage(0):
            heatmaps = branch.heatmaps(torch.randn(count, 8, 14, 14))
            loss = branch.losses(heatmaps, proposals(keypoints, BOX[:count]))["loss_keypoint"]
        loss.backward()
        assert loss == 0 and all(p.grad is not None for p in branch.parameters())


def test_decoding_by_hand():
    heatmaps = torch.zeros(1, 2, 56, 56)
    heatmaps[0, 0, 0, 55] = 5
    heatmaps[0, 1, 30, 7] = 9
    found = decode(heatmaps, BOX)
    scores = [torch.tensor(v).exp() / (torch.tensor(v).exp() + 3135) for v in (5.0, 9.0)]
    expected = [[[10 + 55.5 * 2, 20 + 0.5, scores[0]], [10 + 7.5 * 2, 20 + 30.5, scores[1]]]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("decoder", ["argmax", "subpixel", "resize"])
def test_decoders_find_what_the_targets_say(decoder):
    """Points -> targets of the loss -> heat maps with a smooth top there -> points, within half a cell.

    Detectron2's, which looks at whole image pixels, within one cell, of large boxes.
    """
    torch.manual_seed(0)
    boxes = torch.rand(6, 2) * 20
    boxes = torch.cat([boxes, boxes + (60 if decoder == "resize" else 5) + torch.rand(6, 2) * 100], dim=1)
    sizes = boxes[:, None, 2:] - boxes[:, None, :2]
    points = boxes[:, None, :2] + (0.05 + 0.9 * torch.rand(6, 7, 2)) * sizes
    target, valid = Keypoints(torch.cat([points, torch.full((6, 7, 1), 2.0)], dim=2)).to_heatmap(boxes, 56)
    assert valid.all()
    rows, columns = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
    column, row = (target % 56)[:, :, None, None], (target // 56)[:, :, None, None]
    heatmaps = -((rows - row) ** 2 + (columns - column) ** 2) / 8
    found = decode(heatmaps, boxes, decoder)
    cells = (found[:, :, :2] - points).abs() / sizes * 56
    assert cells.max() <= (1.0 if decoder == "resize" else 0.5 + 1e-3)
    assert ((found[:, :, 2] > 0) & (found[:, :, 2] <= 1)).all()


def test_subpixel_finds_the_top_of_a_parabola():
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    tops = torch.tensor([[10.3, 20.8], [4.0, 5.5], [0.2, 27.4], [13.49, 1.51]])  # row, column of cells
    heatmaps = -((rows - tops[:, :1, None]) ** 2) - 2 * (columns - tops[:, 1:, None]) ** 2
    found = decode(heatmaps[None], torch.tensor([[0.0, 0, 28, 28]]), "subpixel")[0, :, :2].flip(1) - 0.5
    torch.testing.assert_close(found[[0, 1, 3]], tops[[0, 1, 3]], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[2], torch.tensor([0.0, 27.0]))  # cells at the rim stay where they are
    level, middle = torch.zeros(1, 1, 28 * 28), torch.full((1, 1), 14)
    assert top_of_parabola(level, torch.zeros(1, 1), 28 * middle + 14, middle, 28) == 0


@pytest.mark.parametrize("decoder", ["argmax", "subpixel", "resize"])
def test_points_of_half_precision_heat_maps_are_not_rounded(decoder):
    torch.manual_seed(0)
    heatmaps = torch.randn(2, 3, 56, 56).bfloat16()
    boxes = torch.tensor([[400.3, 800.7, 611.1, 1000.2], [3.3, 5.1, 600.9, 900.4]])
    found = decode(heatmaps, boxes, decoder)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, decode(heatmaps.float(), boxes, decoder))


def test_design_d_decodes_at_its_own_side():
    heatmaps = torch.zeros(1, 1, 28, 28)
    heatmaps[0, 0, 3, 4] = 1
    torch.testing.assert_close(decode(heatmaps, BOX)[0, 0, :2], torch.tensor([10 + 4.5 * 4, 20 + 3.5 * 2]))


def test_keypoints_are_set_for_every_image():
    branch = head(k=4)
    images = [Instances((100, 100), pred_boxes=Boxes(BOX.expand(count, 4).clone() + i)) for i, count in enumerate((2, 0, 1))]
    heatmaps = torch.randn(3, 5, 56, 56, requires_grad=True)
    branch.set_keypoints(heatmaps, images)
    assert [tuple(i.pred_keypoints.shape) for i in images] == [(2, 5, 3), (0, 5, 3), (1, 5, 3)]
    assert [i.contour_points.tolist() for i in images] == [[4, 4], [], [4]]
    assert not images[0].pred_keypoints.requires_grad
    torch.testing.assert_close(images[2].pred_keypoints, decode(heatmaps[2:], BOX + 2).detach())


@pytest.mark.slow
def test_a_hundred_large_detections_are_decoded_in_a_fifth_of_a_second():
    heatmaps = torch.randn(100, 101, 56, 56)
    boxes = torch.tensor([[0.0, 0, 1000, 1000]]).expand(100, 4)
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(7):
        start = time.process_time()
        decode(heatmaps, boxes)
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert statistics.median(times) <= 0.2
