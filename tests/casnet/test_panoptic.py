"""The panoptic map: a small example, and that it divides the image."""

import torch
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from casnet.panoptic import panoptic_map


def instances_of(classes, scores, size):
    found = Instances(size)
    found.pred_classes, found.scores = torch.tensor(classes, dtype=torch.long), torch.tensor(scores)
    return found


def test_a_small_example():
    labels = torch.tensor([[0, 0, 11, 11], [2, 255, 12, 11]])  # 12 has no seed
    owner = torch.tensor([[-1, -1, 0, 1], [-1, -1, -1, 1]])
    segments, infos = panoptic_map(labels, owner, instances_of([0, 0], [0.75, 0.5], (2, 4)), [11, 12])
    assert segments.tolist() == [[3, 3, 1, 2], [4, 0, 0, 2]] and segments.dtype == torch.int32
    assert infos == [
        {"id": 1, "isthing": True, "category_id": 0, "area": 1, "score": 0.75, "instance_id": 0},
        {"id": 2, "isthing": True, "category_id": 0, "area": 2, "score": 0.5, "instance_id": 1},
        {"id": 3, "isthing": False, "category_id": 0, "area": 2},
        {"id": 4, "isthing": False, "category_id": 2, "area": 1},
    ]


def test_void_only():
    segments, infos = panoptic_map(torch.full((2, 3), 255), torch.full((2, 3), -1), instances_of([], [], (2, 3)), [11])
    assert not segments.any() and infos == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_every_pixel_has_one_segment_or_is_void(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (6, 9), generator=generator)
    labels[labels == 6] = 255
    thing_labels, count = [1, 4], 3
    owner = torch.where((labels == 1) | (labels == 4), torch.randint(-1, count, labels.shape, generator=generator), -1)
    classes = torch.randint(0, 2, (count,), generator=generator).tolist()
    found = instances_of(classes, [0.5] * count, (6, 9))
    segments, infos = panoptic_map(labels, owner, found, thing_labels)
    assert {info["id"]: info["area"] for info in infos if info["area"]} == {
        int(i): int((segments == i).sum()) for i in segments.unique() if i > 0
    }
    for info in infos:
        at = segments == info["id"]
        assert torch.equal(at, owner == info["instance_id"] if info["isthing"] else labels == info["category_id"])
        assert info["isthing"] or info["category_id"] not in thing_labels
    assert torch.equal(segments == 0, (labels == 255) | (torch.isin(labels, torch.tensor(thing_labels)) & (owner < 0)))
