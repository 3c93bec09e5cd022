"""What the mapper makes of records: labels, owners, boxes, padding, and the ground truth of the mode "oracle"."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from casnet.mapper import CASNetMapper, instance_labels, paint
from casnet.targets import UNCOUNTED
from projects.data.mapper import build_mapper
from projects.errors import ConfigError, DataError

THINGS = {"car": 2, "bus": 4}  # positions in Cityscapes' things; among its 19 classes they are 13 and 15
HEIGHT, WIDTH = 40, 60


def rle(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


def box_mask(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture
def record(tmp_path):
    """A car of 20 x 10, a bus of 6 x 6, a group of cars; road (0) around them, and void in the last ten columns."""
    image = np.random.RandomState(0).randint(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    semantic = np.zeros((HEIGHT, WIDTH), np.uint8)
    annotations = []
    for name, box, group in (("car", (5, 5, 25, 15), 0), ("bus", (30, 10, 36, 16), 0), ("car", (10, 25, 30, 35), 1)):
        mask = box_mask(*box)
        semantic[mask] = THINGS[name] + 11
        annotations.append(
            {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": THINGS[name], "iscrowd": group}
            | {"segmentation": rle(mask)}
        )
    semantic[:, 50:] = 255
    Image.fromarray(semantic).save(tmp_path / "semantic.png")
    files = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "semantic.png")}
    return files | {"image_id": "a", "height": HEIGHT, "width": WIDTH, "annotations": annotations}


def mapper_of(cfg, **arguments):
    return build_mapper(cfg, is_train=True, **{"augmentations": [], "pad_to": None, **arguments})


def expected_owner():
    owner = torch.zeros(HEIGHT, WIDTH, dtype=torch.int16)
    owner[5:15, 5:25], owner[10:16, 30:36] = 1, 2
    owner[25:35, 10:30] = owner[:, 50:] = UNCOUNTED
    return owner


def test_panoptic_targets(narrow, record):
    sample = mapper_of(narrow("panoptic_joint"))(record)
    assert torch.equal(sample["sem_seg"], torch.from_numpy(np.array(Image.open(record["sem_seg_file_name"]))).long())
    assert sample["sem_seg"][30, 20] == 13  # groups count for the labels
    assert torch.equal(sample["owner"], expected_owner()) and sample["owner"].dtype == torch.int16
    assert sample["instances"].gt_boxes.tensor.tolist() == [[5, 5, 25, 15], [30, 10, 36, 16]]
    assert sample["instances"].gt_classes.tolist() == [2, 4]
    assert sorted(sample["instances"].get_fields()) == ["gt_boxes", "gt_classes"]
    assert "groups" not in sample and "annotations" not in sample


def test_instance_targets(narrow, record):
    expected = torch.full((HEIGHT, WIDTH), 8)
    expected[5:15, 5:25] = expected[25:35, 10:30] = 2
    expected[10:16, 30:36] = 4
    expected[:, 50:] = 255
    sample = mapper_of(narrow("instance_joint"))(record)
    assert torch.equal(sample["sem_seg"], expected) and torch.equal(sample["owner"], expected_owner())
    del record["sem_seg_file_name"]  # void is unknown then: it is background
    sample = mapper_of(narrow("instance_joint"))(record)
    assert torch.equal(sample["sem_seg"], torch.where(expected == 255, 8, expected))
    assert (sample["owner"][:, 50:] == 0).all() and (sample["owner"][25:35, 10:30] == UNCOUNTED).all()


def test_records_are_left_as_they_are(narrow, record):
    before = str(record)
    mapper = build_mapper(narrow("panoptic_joint"), is_train=True)
    torch.testing.assert_close(*(mapper_of(narrow("panoptic_joint"))(record)["owner"] for _ in range(2)))
    mapper(record)
    assert str(record) == before


def test_crops_come_after_the_resizing_and_smaller_images_are_padded(narrow, record):
    cfg = narrow("panoptic_joint", "INPUT.MIN_SIZE_TRAIN", (60, 60), "INPUT.CROP.SIZE", [64, 32], "INPUT.RANDOM_FLIP", "none")
    for _ in range(5):
        sample = build_mapper(cfg, is_train=True)(record)  # 60 x 90 pixels, cropped to 60 x 32, padded to 64 x 32
        assert sample["image"].shape == (3, 64, 32) and sample["image"].dtype == torch.uint8
        assert sample["image"][:, 60:].unique(dim=1).squeeze(1).tolist() == [[124] * 32, [116] * 32, [104] * 32]
        assert (sample["sem_seg"][60:] == 255).all() and (sample["owner"][60:] == UNCOUNTED).all()
        assert sample["sem_seg"].shape == sample["owner"].shape == sample["instances"].image_size == (64, 32)
        for i, box in enumerate(sample["instances"].gt_boxes.tensor.tolist()):
            rows, columns = (sample["owner"] == i + 1).nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_augmentation_moves_everything_alike(narrow, record):
    from detectron2.data import transforms as T

    sample = mapper_of(narrow("panoptic_joint"), augmentations=[T.RandomFlip(prob=1.0)])(record)
    assert torch.equal(sample["owner"], expected_owner().flip(1))
    assert sample["instances"].gt_boxes.tensor[0].tolist() == [WIDTH - 25, 5, WIDTH - 5, 15]


def test_owner_of_overlapping_masks():
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 1:4], masks[1], masks[2, 2, 3] = True, True, True
    expected = torch.full((4, 5), 2)
    expected[1:3, 1:4] = 1
    expected[2, 3] = 3
    assert paint(masks).tolist() == expected.tolist()
    assert paint(masks[:0]).tolist() == [[0] * 5] * 4


def test_labels_of_instances_win_over_groups_and_void():
    owner, groups = torch.tensor([[1, 0, 1, 0, 0]]), torch.tensor([[1, 1, -1, -1, -1]], dtype=torch.int16)
    semantic = torch.tensor([[255, 255, 255, 255, 3]])
    assert instance_labels(owner, torch.tensor([0]), groups, 2, semantic).tolist() == [[0, 1, 0, 255, 2]]
    assert instance_labels(owner, torch.tensor([0]), groups, 2, None).tolist() == [[0, 1, 0, 2, 2]]


def test_images_without_instances_and_with_groups_only(narrow, record):
    record["annotations"] = record["annotations"][2:]
    sample = mapper_of(narrow("panoptic_joint"))(record)
    assert len(sample["instances"]) == 0 and sample["instances"].gt_boxes.tensor.shape == (0, 4)
    assert set(sample["owner"].unique().tolist()) == {0, UNCOUNTED}
    record["annotations"] = []
    sample = mapper_of(narrow("instance_joint"))(record)
    assert set(sample["sem_seg"].unique().tolist()) == {8, 255} and len(sample["instances"]) == 0


def test_semantic_segmentation_alone_needs_no_annotations(narrow, record):
    del record["annotations"]
    sample = mapper_of(narrow("semantic_hrnet_w48"))(record)
    assert sample["sem_seg"].shape == (HEIGHT, WIDTH) and "owner" not in sample and "instances" not in sample


@pytest.mark.parametrize(
    "row, missing, said",
    [("panoptic_joint", "sem_seg_file_name", "semantic map"), ("instance_joint", "annotations", "annotat")],
)
def test_records_that_lack_what_is_learned(row, missing, said, narrow, record):
    del record[missing]
    with pytest.raises(DataError, match=f"image.png' has no .*{said}"):
        mapper_of(narrow(row))(record)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_oracle_gets_the_labels_at_the_images_own_size(task, narrow, record):
    cfg = narrow(f"{task}_oracle", "INPUT.MIN_SIZE_TEST", 80, "INPUT.MAX_SIZE_TEST", 120)
    sample = build_mapper(cfg, is_train=False)(record)
    assert sample["image"].shape == (3, 80, 120)
    assert torch.equal(sample["sem_seg"], mapper_of(cfg)(record)["sem_seg"]) and sample["sem_seg"].shape == (HEIGHT, WIDTH)
    assert "owner" not in sample and "instances" not in sample
    joint = build_mapper(narrow(f"{task}_joint"), is_train=False)(record)
    assert "sem_seg" not in joint and "annotations" not in joint


def test_labels_that_contradict_the_data(narrow, shapes_root):
    cfg = narrow("shapes_panoptic_joint", "MODEL.CASNET.THING_LABELS", [12, 11, 13, 14, 15, 16, 17, 18])
    with pytest.raises(ConfigError, match=r"THING_LABELS \[12, 11, .*'rider', 'person'.*Expected \[11, 12, 13"):
        build_mapper(cfg, is_train=True)
    cfg.MODEL.CASNET.TASK = "instance"
    assert isinstance(build_mapper(cfg, is_train=True), CASNetMapper)  # where they are not used they do not matter
    cfg.MODEL.CASNET.MODE = "separated"
    with pytest.raises(ConfigError, match="THING_LABELS"):
        build_mapper(cfg, is_train=True)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"  # without things
    assert isinstance(build_mapper(cfg, is_train=True), CASNetMapper)


def test_every_instance_of_the_shapes_has_its_owner(narrow, shapes_root):
    """The owner map says the same as instanceIds.png."""
    name = "shapes_cityscapes_instance_train"
    ids_of = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    for record in DatasetCatalog.get(name)[:12]:
        sample = mapper_of(narrow("shapes_instance_joint"))(record)
        ids = torch.from_numpy(np.array(Image.open(record["instance_ids_file_name"])).astype(np.int64))
        owner, classes = sample["owner"], sample["instances"].gt_classes
        assert torch.equal(owner > 0, ids >= 1000)
        for i in range(len(classes)):
            (found,) = ids[owner == i + 1].unique().tolist()
            assert ids_of[found // 1000] == classes[i] and torch.equal(ids == found, owner == i + 1)
        groups = torch.isin(ids, torch.tensor(list(ids_of)))
        assert torch.equal(owner == UNCOUNTED, groups)
