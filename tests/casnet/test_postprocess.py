"""Common attribute support: against a loop over pixels, from targets back to instances, and its promises one by one."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from casnet.postprocess import CommonAttributeSupport, Seeds, boxes_of_masks, cell_of_pixels, predicted_boxes, thing_classes
from casnet.targets import grid_targets


def iou(a, b):
    sides = [min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common) if common else 0.0


def plain_support(classes, distances, probabilities, grid_size, support):
    """Section III.C pixel by pixel: (H, W), the seed (class, cell) of every pixel, or None."""
    num_classes, height, width = probabilities.shape

    def box(i, j):
        left, top, right, bottom = distances[:, i, j].tolist()
        return j + 0.5 - left, i + 0.5 - top, j + 0.5 + right, i + 0.5 + bottom

    seeds: dict[int, list] = {}
    for c in range(num_classes):
        found = [(probabilities[c, i, j].item(), (i, j)) for i in range(height) for j in range(width)]
        for probability, cell in sorted(found, key=lambda pair: -pair[0]):
            others = [box(*other) for other in seeds.get(c, [])]
            if probability > support.seed_threshold and all(iou(box(*cell), b) <= support.nms_threshold for b in others):
                seeds.setdefault(c, []).append(cell)
    result = []
    for y in range(classes.shape[0]):
        for x in range(classes.shape[1]):
            c = int(classes[y, x])
            i = min(int((y + 0.5) * grid_size[0] / classes.shape[0]), height - 1)
            j = min(int((x + 0.5) * grid_size[1] / classes.shape[1]), width - 1)
            if c < 0 or c not in seeds:
                result.append(None)
                continue
            own = box(i, j)
            likeness = [iou(own, box(*cell)) for cell in seeds[c]]
            near = [k for k, value in enumerate(likeness) if value >= max(likeness) - support.tie_margin]

            def off(k, own=own, c=c):
                other = box(*seeds[c][k])
                return sum((own[a] + own[a + 2] - other[a] - other[a + 2]) ** 2 for a in (0, 1))

            result.append((c, *seeds[c][min(near, key=off)]))
    return result


@st.composite
def predictions(draw):
    """Random predictions of 2 classes on up to 8 x 8 cells, for an output of up to 20 x 20 pixels."""
    grid, size = draw(st.tuples(st.integers(1, 8), st.integers(1, 8))), draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    classes = torch.randint(-1, 2, size, generator=generator)
    distances = torch.rand(4, *grid, generator=generator) * 4 + 0.05
    probabilities = torch.rand(2, *grid, generator=generator) * draw(st.sampled_from([0.4, 0.6, 0.8, 1.0]))
    return classes, distances, probabilities, grid


@settings(max_examples=80, deadline=None)
@given(predictions(), st.sampled_from([1, 7, 10**6]), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_equals_a_loop_over_pixels(prediction, max_pairs, tie_margin):
    classes, distances, probabilities, grid = prediction
    support = CommonAttributeSupport(max_pairs=max_pairs, tie_margin=tie_margin)
    instance_of_pixel, instances, seeds = support(classes, distances, probabilities, grid)
    expected = plain_support(classes, distances, probabilities, grid, support)

    numbers = {None: -1}  # instances are numbered by the probability of their seeds
    present = sorted({name for name in expected if name}, key=lambda name: -probabilities[name].item())
    numbers |= {name: k for k, name in enumerate(present)}
    assert instance_of_pixel.flatten().tolist() == [numbers[name] for name in expected]
    assert instances.pred_classes.tolist() == [name[0] for name in present]
    assert instances.scores.tolist() == [probabilities[name].item() for name in present]
    check_promises(classes, instance_of_pixel, instances, seeds)


def check_promises(classes, instance_of_pixel, instances, seeds):
    """No overlaps, no holes, no unsupported instance, boxes of the own pixels."""
    masks = instances.pred_masks
    assert (masks.sum(dim=0) <= 1).all()
    has_seed = torch.isin(classes, seeds.classes) & (classes >= 0)
    assert torch.equal(masks.any(dim=0), has_seed) and torch.equal(instance_of_pixel >= 0, has_seed)
    for k, mask in enumerate(masks):
        assert mask.any() and (classes[mask] == instances.pred_classes[k]).all()
        assert torch.equal(mask, instance_of_pixel == k)
        rows, columns = mask.nonzero().unbind(1)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert instances.pred_boxes.tensor[k].tolist() == [float(side) for side in box]


# ---- From targets back to instances


def round_trip(owner, boxes, classes, stride, num_classes):
    """Feed the targets of a scene as predictions, on the grid. Returns the owner per cell, and what came out."""
    targets = grid_targets(owner, boxes, classes, stride, num_classes, 0.1)
    on_grid = owner[stride // 2 :: stride, stride // 2 :: stride].long()
    cell_classes = torch.where(on_grid > 0, torch.cat([torch.tensor([-1]), classes])[on_grid.clamp(min=0)], -1)
    support = CommonAttributeSupport(max_seeds=1000)
    result = support(cell_classes, targets.distances, targets.central.float(), tuple(on_grid.shape))
    return on_grid, cell_classes, result


def assert_same_instances(on_grid, boxes, classes, found):
    """Every instance with a cell is found with exactly its cells, its class and score 1; and nothing else is."""
    instance_of_pixel, instances, _ = found
    expected = {i: on_grid == i + 1 for i in range(len(boxes)) if (on_grid == i + 1).any()}
    assert len(instances) == len(expected)
    for i, cells in expected.items():
        (k,) = instance_of_pixel[cells].unique().tolist()
        assert torch.equal(instances.pred_masks[k], cells)
        assert instances.pred_classes[k] == classes[i] and instances.scores[k] == 1


@st.composite
def huddles(draw):
    """Boxes and ellipses over one another, back to front, as (owner, boxes of what is seen, classes, stride)."""
    stride, generator = draw(st.sampled_from([1, 2, 4])), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    count = draw(st.integers(0, 8))
    owner = torch.zeros(48, 64, dtype=torch.int16)
    ys, xs = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for i in range(count):
        x, y, a, b = (torch.rand(4, generator=generator) * torch.tensor([64, 48, 20, 20]) + torch.tensor([0, 0, 2, 2])).tolist()
        power = 2 if torch.rand((), generator=generator) < 0.5 else 20
        owner[(((xs - x) / a) ** power + ((ys - y) / b) ** power) <= 1] = i + 1
    boxes = torch.zeros(count, 4)
    for i in range(count):
        if (owner == i + 1).any():
            boxes[i] = boxes_of_masks((owner == i + 1)[None])[0]
    return owner, boxes, torch.randint(0, 2, (count,), generator=generator), stride


@settings(max_examples=80, deadline=None)
@given(huddles())
def test_targets_as_predictions_give_the_instances_back(scene):
    owner, boxes, classes, stride = scene
    overlap = pairwise_iou(Boxes(boxes), Boxes(boxes)).fill_diagonal_(0)
    assume(not ((overlap > 0.5) & (classes[:, None] == classes)).any())
    on_grid, cell_classes, found = round_trip(owner, boxes, classes, stride, 2)
    assert_same_instances(on_grid, boxes, classes, found)
    check_promises(cell_classes, *found)


def test_shapes_come_back(shapes_root, narrow):
    """Through the mapper: every scene of the data set but for the pairs of one class whose boxes are too much alike."""
    from detectron2.data import DatasetCatalog

    from projects.data.mapper import build_mapper

    mapper = build_mapper(narrow("shapes_instance_joint", "INPUT.CROP.ENABLED", False), is_train=True)
    instances, alike = 0, 0
    for record in DatasetCatalog.get("shapes_cityscapes_instance_train"):
        sample = mapper(record)
        boxes, classes, owner = sample["instances"].gt_boxes.tensor, sample["instances"].gt_classes, sample["owner"]
        owner = owner[: owner.shape[0] // 4 * 4, : owner.shape[1] // 4 * 4]
        overlap = pairwise_iou(Boxes(boxes), Boxes(boxes)).fill_diagonal_(0) * (classes[:, None] == classes)
        instances, alike = instances + len(boxes), alike + int((overlap > 0.5).any(dim=1).sum())
        if not (overlap > 0.5).any():
            on_grid, cell_classes, found = round_trip(owner, boxes, classes, 4, 8)
            assert_same_instances(on_grid, boxes, classes, found)
    assert instances > 100 and alike < instances / 20


# ---- One by one


def seeds_at(*rows):
    """Seeds of (class, box)."""
    classes = torch.tensor([row[0] for row in rows])
    return Seeds(torch.tensor([row[1] for row in rows]), torch.linspace(1, 0.6, len(rows)), classes, torch.arange(len(rows)))


def test_the_largest_iou_gets_the_vote():
    seeds = seeds_at((0, [0.0, 0, 4, 4]), (0, [2.0, 0, 8, 4]), (1, [0.0, 0, 5, 4]))
    boxes = torch.tensor([[0.0, 0, 5, 4], [2.0, 0, 6, 4], [20.0, 0, 21, 1], [0.0, 0, 5, 4], [0.0, 0, 5, 4]])
    votes = CommonAttributeSupport().vote(boxes, torch.tensor([0, 0, 0, 1, 2]), seeds)
    # 16/20 against 12/32; 8/24 against 16/24; no IoU at all: the nearer centre; the only one of class 1; class 2 has none
    assert votes.tolist() == [0, 1, 1, 2, -1]


def test_centres_decide_between_alike_ious():
    seeds = seeds_at((0, [0.0, 0, 10, 10]), (0, [10.0, 0, 20, 10]))
    box = torch.tensor([[4.9, 0.0, 15.0, 10.0]])  # IoU 51 / 150 and 50 / 151: 0.009 apart; its centre is 4.95 and 5.05 away
    wide = torch.tensor([[5.1, 0.0, 15.1, 10.0]])
    for margin in (0.0, 0.02):
        votes = CommonAttributeSupport(tie_margin=margin).vote(torch.cat([box, wide]), torch.tensor([0, 0]), seeds)
        assert votes.tolist() == [0, 1]
    tall = seeds_at((0, [0.0, 0, 10, 10]), (0, [3.0, -4.7, 13.0, 14.7]))
    box = torch.tensor([[3.0, 0.0, 13.0, 10.0]])  # IoU 70 / 130 = 0.538 and 100 / 194 = 0.515; the second has the same centre
    assert CommonAttributeSupport(tie_margin=0.01).vote(box, torch.tensor([0]), tall).tolist() == [0]
    assert CommonAttributeSupport(tie_margin=0.03).vote(box, torch.tensor([0]), tall).tolist() == [1]


def test_equal_votes_go_to_the_more_probable_seed():
    seeds = seeds_at((0, [0.0, 0, 4, 4]), (0, [4.0, 0, 8, 4]))
    assert CommonAttributeSupport().vote(torch.tensor([[2.0, 0, 6, 4]]), torch.tensor([0]), seeds).tolist() == [0]


def grid(height=4, width=6, reach=1.0):
    """Predictions of boxes of one size around every cell, without a seed."""
    return torch.full((4, height, width), reach), torch.zeros(2, height, width)


def test_seeds_pass_the_threshold_and_nms_within_their_class():
    distances, probabilities = grid(reach=2.0)
    probabilities[0, 1, 1], probabilities[0, 1, 2], probabilities[0, 1, 4] = 0.7, 0.8, 0.6  # IoUs 0.6, 1/7 and 1/3
    probabilities[1, 1, 2], probabilities[1, 3, 5] = 0.9, 0.5
    seeds = CommonAttributeSupport().find_seeds(probabilities, predicted_boxes(distances), (4, 6))
    assert seeds.classes.tolist() == [1, 0, 0] and seeds.cells.tolist() == [8, 8, 10]
    torch.testing.assert_close(seeds.scores, torch.tensor([0.9, 0.8, 0.6]))
    assert seeds.boxes[2].tolist() == [2.5, -0.5, 6.5, 3.5]
    few = CommonAttributeSupport(max_seeds=2).find_seeds(probabilities, predicted_boxes(distances), (4, 6))
    assert few.cells.tolist() == [8, 8]
    unlimited = CommonAttributeSupport(max_seeds=-1).find_seeds(probabilities, predicted_boxes(distances), (4, 6))
    assert unlimited.cells.tolist() == [8, 8, 10]
    first = CommonAttributeSupport(pre_nms_topk=1).find_seeds(probabilities, predicted_boxes(distances), (4, 6))
    assert first.classes.tolist() == [1] and first.cells.tolist() == [8]
    for more in ({"nms_threshold": 0.7}, {"seed_threshold": 0.45}):
        found = CommonAttributeSupport(**more).find_seeds(probabilities, predicted_boxes(distances), (4, 6))
        assert len(found.cells) == 4


def test_nms_keeps_classes_apart_where_boxes_reach_beyond_the_image():
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [-21.0, -21.0, 0.6, 0.6]])
    probabilities = torch.tensor([[[0.9, 0.0]], [[0.0, 0.8]]])
    seeds = CommonAttributeSupport().find_seeds(probabilities, boxes, (1, 2))
    assert seeds.classes.tolist() == [0, 1] and torch.equal(seeds.boxes, boxes)


def test_the_padding_has_no_say():
    """Whatever is predicted there neither becomes a seed nor suppresses one."""
    classes, distances, probabilities, _ = big_scene()
    support, size = CommonAttributeSupport(seed_threshold=0.98), (40.25, 70.5)
    expected, _, seeds = support(classes, distances[:, :41, :71], probabilities[:, :41, :71], size)
    probabilities[:, 41:] = probabilities[:, :, 71:] = 1.0
    distances[:, 41:] = distances[:, :, 71:] = 50.0
    found, _, others = support(classes, distances, probabilities, size)
    assert len(seeds.cells) > 10 and torch.equal(found, expected)
    assert torch.equal(others.boxes, seeds.boxes) and torch.equal(others.scores, seeds.scores)


def test_unsupported_seeds_vanish_and_pixels_without_a_seed_stay_alone():
    distances, probabilities = grid()
    probabilities[0, 0, 0], probabilities[0, 3, 5], probabilities[1, 2, 2] = 0.9, 0.8, 0.7
    classes = torch.full((4, 6), -1)
    classes[:2, :2] = 0  # near the first seed of class 0 only; class 1 has a seed and no pixel
    instance_of_pixel, instances, seeds = CommonAttributeSupport()(classes, distances, probabilities, (4, 6))
    assert len(seeds.cells) == 3 and instances.pred_classes.tolist() == [0]
    assert instances.scores.tolist() == pytest.approx([0.9])
    classes[3] = 1
    probabilities[1] = 0
    instance_of_pixel, instances, _ = CommonAttributeSupport()(classes, distances, probabilities, (4, 6))
    assert len(instances) == 1 and (instance_of_pixel[3] == -1).all()


def test_without_things_and_without_seeds():
    distances, probabilities = grid()
    for classes in (torch.full((8, 12), -1), torch.zeros(8, 12, dtype=torch.long)):
        instance_of_pixel, instances, seeds = CommonAttributeSupport()(classes, distances, probabilities, (4, 6))
        assert len(instances) == len(seeds.cells) == 0 and (instance_of_pixel == -1).all()
        assert instances.pred_masks.shape == (0, 8, 12) and instances.pred_boxes.tensor.shape == (0, 4)
    probabilities[0, 0, 0] = 1
    _, instances, _ = CommonAttributeSupport()(torch.full((8, 12), -1), distances, probabilities, (4, 6))
    assert len(instances) == 0


def test_scores_times_the_semantic_probability():
    distances, probabilities = grid()
    probabilities[0, 0, 0], probabilities[1, 3, 5] = 0.9, 0.8
    classes = torch.full((4, 6), -1)
    classes[0, :3], classes[3, 4:] = 0, 1
    certainty = torch.full((4, 6), 0.1)
    certainty[0, :3], certainty[3, 4:] = torch.tensor([0.5, 0.6, 1.0]), torch.tensor([0.25, 0.75])
    scores = CommonAttributeSupport()(classes, distances, probabilities, (4, 6), certainty)[1].scores
    assert scores.tolist() == pytest.approx([0.9 * 0.7, 0.8 * 0.5])


def test_pixels_lie_in_the_cell_under_their_centre():
    cells = cell_of_pixels((4, 6), (2, 3), (2, 3))
    assert cells.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    # 2.5 cells of a padded grid of 4 on 5 pixels: centres at 0.25, 0.75, 1.25, 1.75, 2.25 cells
    assert cell_of_pixels((1, 5), (1, 2.5), (1, 4)).tolist() == [[0, 0, 1, 1, 2]]
    assert cell_of_pixels((1, 2), (1, 5), (1, 5)).tolist() == [[1, 3]]


def test_void_is_no_thing():
    labels = torch.tensor([[0, 11, 12, 18, 255]])
    assert thing_classes(labels, range(11, 19)).tolist() == [[-1, 0, 1, 7, -1]]
    assert thing_classes(labels.to(torch.uint8), [12, 0]).tolist() == [[1, -1, 0, -1, -1]]


def big_scene(seed=0):
    """Random predictions with about 40 seeds on 64 x 96 cells, output 256 x 384."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(4, 64, 96, generator=generator) * 12 + 1
    probabilities = torch.rand(8, 64, 96, generator=generator) ** 3
    labels = torch.randint(-1, 8, (16, 24), generator=generator).repeat_interleave(16, 0).repeat_interleave(16, 1)
    return labels, distances, probabilities, (64, 96)


def test_result_does_not_depend_on_the_chunks():
    support = {pairs: CommonAttributeSupport(max_pairs=pairs, seed_threshold=0.98) for pairs in (50, 1234, 10**9)}
    results = [support[pairs](*big_scene()) for pairs in support]
    assert len(results[0][1]) > 20
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1].pred_boxes.tensor, results[0][1].pred_boxes.tensor)
    check_promises(big_scene()[0], *results[0])


def test_chunks_bound_the_pairs():
    seen = []

    class Counting(CommonAttributeSupport):
        def _vote_at_once(self, boxes, classes, seeds):
            seen.append(len(boxes) * len(seeds.boxes))
            return super()._vote_at_once(boxes, classes, seeds)

    _, _, seeds = Counting(max_pairs=5000, seed_threshold=0.98)(*big_scene())
    assert len(seen) > 10 and max(seen) <= 5000 and max(seen) > 5000 - len(seeds.boxes)


@pytest.mark.gpu
def test_on_the_gpu():
    classes, distances, probabilities, size = big_scene()
    support = CommonAttributeSupport(seed_threshold=0.98)
    on_cpu = support(classes, distances, probabilities, size)
    on_gpu = support(classes.cuda(), distances.cuda(), probabilities.cuda(), size)
    assert torch.equal(on_gpu[2].cells.cpu(), on_cpu[2].cells)
    torch.testing.assert_close(on_gpu[1].scores.cpu(), on_cpu[1].scores)
    assert (on_gpu[0].cpu() == on_cpu[0]).float().mean() > 0.999  # votes within rounding of a tie may differ
