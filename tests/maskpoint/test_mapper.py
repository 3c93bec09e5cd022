"""The targets: made from the augmented mask, whatever form the masks have, and the same for the same seed."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image

from maskpoint.contour import ContourSampler
from maskpoint.mapper import ContourPointMapper, mask_of
from projects.data.loader import seeded

SIZE = 40, 60  # height, width
FEW = ["MODEL.MASKPOINT.NUM_POINTS", 20]
HOUSE = [10.0, 30.0, 10.0, 15.0, 20.0, 5.0, 33.0, 15.0, 33.0, 30.0]


@pytest.fixture
def map_record(tmp_path, narrow_cfg):
    """Map annotations of a 40 x 60 image with an augmentation of its own -> the sample."""
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "image.png")

    def run(annotations: list[dict], *opts, augmentations=(), seed=0):
        record = {"file_name": str(tmp_path / "image.png"), "height": SIZE[0], "width": SIZE[1], "image_id": 5}
        mapper = ContourPointMapper(narrow_cfg("design_b", *opts), True, augmentations=list(augmentations))
        with seeded(seed):
            return mapper(copy.deepcopy(record | {"annotations": annotations}))

    return run


def annotation(segmentation, box=(10, 5, 33, 30), **more) -> dict:
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2, "segmentation": segmentation} | more


def house() -> np.ndarray:
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects([HOUSE], *SIZE)))


def few_points(mask: np.ndarray) -> np.ndarray:
    """What FEW asks for: so few points that none is repeated by chance."""
    return ContourSampler(20)(mask, np.random.RandomState(0))


def pixel(x: int, y: int) -> dict:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y, x] = 1
    return mask_util.encode(mask)


def test_points_of_every_instance(map_record):
    one_pixel = annotation(pixel(7, 3), box=(7, 3, 8, 4))
    sample = map_record([annotation([HOUSE]), one_pixel, annotation([HOUSE], iscrowd=1)], *FEW)
    keypoints = sample["instances"].gt_keypoints.tensor
    assert keypoints.shape == (2, 21, 3) and keypoints.dtype == torch.float32
    assert (keypoints[:, :, 2] == 2).all()
    np.testing.assert_array_equal(keypoints[0, :, :2], few_points(house()))
    assert (keypoints[1, :, :2] == torch.tensor([7.5, 3.5])).all()
    assert isinstance(sample["instances"].gt_masks, BitMasks)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_polygons_and_bitmaps_give_the_same_points(map_record, mask_format):
    instances = map_record([annotation([HOUSE])], "INPUT.MASK_FORMAT", mask_format, *FEW)["instances"]
    assert isinstance(instances.gt_masks, PolygonMasks if mask_format == "polygon" else BitMasks)
    np.testing.assert_array_equal(instances.gt_keypoints.tensor[0, :, :2], few_points(house()))


def test_points_lie_on_the_augmented_mask(map_record):
    flip, enlarge = T.RandomFlip(prob=1.0), T.Resize((80, 120))
    rle = mask_util.encode(np.asfortranarray(house()))
    instances = map_record([annotation(rle)], augmentations=[enlarge, flip])["instances"]
    mask = instances.gt_masks.tensor[0].numpy()
    assert mask.shape == (80, 120) and np.array_equal(mask, np.repeat(np.repeat(house()[:, ::-1], 2, 0), 2, 1))
    np.testing.assert_array_equal(instances.gt_keypoints.tensor[0, :, :2], ContourSampler()(mask, np.random.RandomState(0)))


def test_config_chooses_the_points(map_record):
    keys = [f"MODEL.MASKPOINT.{key}" for key in ("NUM_POINTS", "SAMPLING", "COMPONENTS", "CENTER")]
    values = [9, "corner", "all", "centroid"]
    opts = [word for pair in zip(keys, values, strict=True) for word in pair]
    found = map_record([annotation([HOUSE])], *opts)["instances"].gt_keypoints.tensor[0, :, :2]
    np.testing.assert_array_equal(found, ContourSampler(*values)(house(), np.random.RandomState(0)))


def test_masks_are_read_but_not_kept_without_a_mask_branch(map_record):
    instances = map_record([annotation([HOUSE])], "MODEL.MASK_ON", False)["instances"]
    assert instances.gt_keypoints.tensor.shape == (1, 101, 3) and not instances.has("gt_masks")


@pytest.mark.parametrize("annotations", [[], [annotation([HOUSE[:4]])]], ids=["none", "unusable"])
def test_image_without_instances(map_record, annotations):
    instances = map_record(annotations)["instances"]
    assert len(instances) == 0 and instances.gt_keypoints.tensor.shape == (0, 101, 3)


def test_repeats_depend_on_the_seed_of_the_sample_alone(map_record):
    annotations = [annotation([[10.0, 5, 16, 5, 16, 10, 10, 10]], box=(10, 5, 16, 10))]
    first, again, other = (map_record(annotations, seed=seed)["instances"].gt_keypoints.tensor for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_keypoints_of_the_data_set_are_not_read(map_record):
    keypoints = map_record([annotation([HOUSE], keypoints=[1, 2, 2])])["instances"].gt_keypoints.tensor
    assert keypoints.shape == (1, 101, 3)


@pytest.mark.parametrize("far", [-6.5, -1e5])
def test_polygons_end_where_the_image_ends(map_record, far):
    beyond = [far, -3.0, 24.0, -3.0, 24.0, 15.0, far, 15.0]
    mask, corner = mask_of(PolygonMasks([[np.array(beyond)]]), 0, SIZE)
    assert corner == (0, 0) and mask.shape == (15, 24) and mask.all()
    found = [
        map_record([annotation([beyond], box=(0, 0, 24, 15))], "INPUT.MASK_FORMAT", mask_format, *FEW)["instances"]
        for mask_format in ("polygon", "bitmask")
    ]
    points = found[0].gt_keypoints.tensor
    assert torch.equal(points, found[1].gt_keypoints.tensor) and points[0, -1, :2].tolist() == [12, 7.5]
    outside = PolygonMasks([[np.array([70.0, 50, 80, 50, 80, 60])]])
    mask, corner = mask_of(outside, 0, SIZE)
    assert corner == (59, 39) and mask.tolist() == [[1]]


def test_polygons_thinner_than_a_pixel():
    thin = PolygonMasks([[np.array([8.4, 2.2, 8.45, 2.2, 8.45, 2.3])], [np.array([3.0, 4, 9, 4, 9, 4.01])]])
    for i, place in enumerate([(8, 2), (6, 4)]):
        mask, corner = mask_of(thin, i, SIZE)
        assert mask.any()
        points = ContourSampler(4)(mask, np.random.RandomState(0)) + corner
        assert np.abs(points - np.add(place, 0.5)).max() <= 3
