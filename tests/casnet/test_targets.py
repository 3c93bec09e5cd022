"""The targets on the grid: by hand, against loops over cells, and on the shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casnet.targets import UNCOUNTED, grid_targets


def plain_targets(owner, boxes, classes, stride, num_classes, central_area):
    """The same by loops, in whole numbers of half pixels where that matters."""
    height, width = owner.shape[0] // stride, owner.shape[1] // stride
    distances = torch.zeros(4, height, width)
    things, counted = (torch.zeros(height, width, dtype=torch.bool) for _ in range(2))
    central = torch.zeros(num_classes, height, width, dtype=torch.bool)
    cells: dict[int, list] = {}
    for i in range(height):
        for j in range(width):
            value = int(owner[i * stride + stride // 2, j * stride + stride // 2])
            counted[i, j] = value != -1
            if value > 0:
                things[i, j] = True
                x0, y0, x1, y1 = (side / stride for side in boxes[value - 1].tolist())
                distances[:, i, j] = torch.tensor([j + 0.5 - x0, i + 0.5 - y0, x1 - j - 0.5, y1 - i - 0.5])
                off = abs(j + 0.5 - (x0 + x1) / 2), abs(i + 0.5 - (y0 + y1) / 2)
                reach = [max(central_area * side, 1) / 2 for side in (x1 - x0, y1 - y0)]
                inside = off[0] <= reach[0] and off[1] <= reach[1]
                cells.setdefault(value - 1, []).append((not inside, off[0] ** 2 + off[1] ** 2, i, j))
    for instance, found in cells.items():
        within = [(i, j) for outside, _, i, j in found if not outside]
        for i, j in within or [min(found)[2:]]:
            central[classes[instance], i, j] = True
    return distances, things, central, counted


def test_a_small_example():
    """An L of class 1 in the box (2, 2, 6, 6), whose centre it does not cover, and a dot of class 0; cells of 2 pixels."""
    owner = torch.zeros(8, 10, dtype=torch.int16)
    owner[2:6, 2:4] = 1
    owner[4:6, 2:6] = 1
    owner[1, 9] = 2
    owner[6:, 6:] = UNCOUNTED
    boxes, classes = torch.tensor([[2.0, 2.0, 6.0, 6.0], [9.0, 1.0, 10.0, 2.0]]), torch.tensor([1, 0])
    targets = grid_targets(owner, boxes, classes, stride=2, num_classes=3, central_area=0.1)
    expected = torch.tensor([[0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(targets.things, expected)
    assert targets.distances[:, 1, 1].tolist() == [0.5, 0.5, 1.5, 1.5]
    assert targets.distances[:, 2, 1].tolist() == [0.5, 1.5, 1.5, 0.5]
    assert targets.distances[:, 0, 4].tolist() == [0.0, 0.0, 0.5, 0.5]
    assert not targets.distances[:, ~expected].any()
    # The centre of the L's box is a corner of four cells; three of them are its own.
    assert targets.central.nonzero().tolist() == [[0, 0, 4], [1, 1, 1], [1, 2, 1], [1, 2, 2]]
    assert targets.counted.tolist() == [[True] * 5] * 3 + [[True] * 3 + [False] * 2]


def test_the_nearest_own_cell_stands_in_for_the_centre():
    """A frame: none of its cells is near the centre of its box."""
    owner = torch.ones(7, 7, dtype=torch.int16)
    owner[1:6, 1:6] = 0
    targets = grid_targets(owner, torch.tensor([[0.0, 0.0, 7.0, 7.0]]), torch.tensor([0]), 1, 1, 0.3)
    assert targets.central[0].nonzero().tolist() == [[0, 3]]  # of four that are as near the first in reading order
    owner[0, 3] = 0
    targets = grid_targets(owner, torch.tensor([[0.0, 0.0, 7.0, 7.0]]), torch.tensor([0]), 1, 1, 0.3)
    assert targets.central[0].nonzero().tolist() == [[3, 0]]
    owner[:] = 0
    owner[3, 6] = owner[5, 5] = 1  # 3 and the root of 8 away
    targets = grid_targets(owner, torch.tensor([[0.0, 0.0, 7.0, 7.0]]), torch.tensor([0]), 1, 1, 0.3)
    assert targets.central[0].nonzero().tolist() == [[5, 5]]


def test_the_central_area_grows_with_the_box():
    owner = torch.ones(40, 80, dtype=torch.int16)
    box, classes = torch.tensor([[0.0, 0.0, 80.0, 40.0]]), torch.tensor([0])
    central = grid_targets(owner, box, classes, 1, 1, 0.1).central[0]
    assert central.nonzero().amin(0).tolist() == [18, 36] and central.nonzero().amax(0).tolist() == [21, 43]
    assert central.sum() == 4 * 8
    assert grid_targets(owner, box, classes, 4, 1, 0.1).central[0].sum() == 2 * 2  # the 2 x 1 cells round up: 4 touch its edge


def test_without_instances():
    targets = grid_targets(torch.zeros(8, 8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 4, 2, 0.1)
    assert not targets.distances.any() and not targets.things.any() and not targets.central.any() and targets.counted.all()


def test_an_instance_between_the_cells_has_no_target():
    owner = torch.zeros(8, 8, dtype=torch.int16)
    owner[0, :] = 1
    targets = grid_targets(owner, torch.tensor([[0.0, 0.0, 8.0, 1.0]]), torch.tensor([0]), 4, 1, 0.1)
    assert not targets.things.any() and not targets.central.any()


@st.composite
def scenes(draw):
    """A random map of up to 6 instances in up to 24 x 24 pixels, their boxes, and classes."""
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    cells = draw(st.tuples(st.integers(1, 24 // stride), st.integers(1, 24 // stride)))
    count, seed = draw(st.integers(0, 6)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(-1, 1, [side * stride for side in cells], generator=generator, dtype=torch.int16)
    boxes = torch.zeros(count, 4)
    for i in range(count):
        shape = torch.rand(owner.shape, generator=generator) < 0.7
        (y0, y1), (x0, x1) = (sorted(torch.randint(0, side + 1, (2,), generator=generator).tolist()) for side in owner.shape)
        owner[y0 : y1 + 1, x0 : x1 + 1][shape[y0 : y1 + 1, x0 : x1 + 1]] = i + 1
    for i in range(count):
        found = (owner == i + 1).nonzero()
        if len(found):
            boxes[i] = torch.cat([found.amin(0).flip(0), found.amax(0).flip(0) + 1]).float()
    classes = torch.randint(0, 3, (count,), generator=generator)
    return owner, boxes, classes, stride


@settings(max_examples=60, deadline=None)
@given(scenes(), st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]))
def test_equals_loops_over_cells(scene, central_area):
    owner, boxes, classes, stride = scene
    targets = grid_targets(owner, boxes, classes, stride, 3, central_area)
    expected = plain_targets(owner, boxes, classes, stride, 3, central_area)
    for name, ours, theirs in zip(targets._fields, targets, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    for i in range(len(boxes)):  # whoever has a cell has a seed
        cells = owner[stride // 2 :: stride, stride // 2 :: stride] == i + 1
        assert (targets.central[classes[i]] & cells).any() == cells.any()


@pytest.mark.gpu
def test_on_the_gpu():
    generator = torch.Generator().manual_seed(3)
    owner = torch.randint(-1, 40, (512, 512), generator=generator, dtype=torch.int16)
    boxes = torch.tensor([[0.0, 0.0, 512.0, 512.0]]).repeat(40, 1) + torch.arange(40)[:, None] / 8
    classes = torch.arange(40) % 8
    on_cpu = grid_targets(owner, boxes, classes, 4, 8, 0.1)
    on_gpu = grid_targets(owner.cuda(), boxes.cuda(), classes.cuda(), 4, 8, 0.1)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert math.isclose(on_cpu.distances[:, on_cpu.things].amax().item(), 128, abs_tol=2)
