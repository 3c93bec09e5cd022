import copy
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image
from pycocotools import mask as mask_util

from projects import load_config
from projects.data.mapper import InstanceMapper, usable_segmentation
from projects.errors import DataError

SIZE = 40, 60  # height, width
SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]


@pytest.fixture
def map_annotations(tmp_path):
    """Map annotations of a 40 x 60 image without resizing or flipping -> instances."""
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "image.png")

    def run(annotations: list[dict], *opts, is_train=True):
        size = ["INPUT.MIN_SIZE_TRAIN", (SIZE[0],), "INPUT.MAX_SIZE_TRAIN", SIZE[1], "INPUT.RANDOM_FLIP", "none"]
        cfg = load_config("", ["MODEL.MASK_ON", True, *size, *opts])
        record = {"file_name": str(tmp_path / "image.png"), "height": SIZE[0], "width": SIZE[1], "image_id": 5}
        before = copy.deepcopy(record | {"annotations": annotations})
        mapped = InstanceMapper(cfg, is_train)(before)
        return mapped["instances"] if is_train else mapped

    return run


def annotation(segmentation, box=(10, 10, 30, 20), category=2, **more) -> dict:
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "segmentation": segmentation} | more


def square_mask() -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[10:20, 10:30] = 1
    return mask


def forms() -> dict:
    rle = mask_util.encode(np.asfortranarray(square_mask()))
    counts, run = [], 0
    value = 0
    for pixel in square_mask().flatten(order="F"):
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {
        "polygon": [SQUARE],
        "compressed RLE": rle,
        "counts": {"size": list(SIZE), "counts": [*counts, run]},
        "array": square_mask(),
    }


@pytest.mark.parametrize("form", ["polygon", "compressed RLE", "counts", "array"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_every_form_of_mask_gives_the_same_mask(map_annotations, form, mask_format):
    instances = map_annotations([annotation(forms()[form])], "INPUT.MASK_FORMAT", mask_format)
    crops = instances.gt_masks.crop_and_resize(torch.tensor([[10.0, 10.0, 30.0, 20.0]]), 8)
    assert crops.all()
    outside = instances.gt_masks.crop_and_resize(torch.tensor([[31.0, 0.0, 60.0, 40.0]]), 8)
    assert not outside.any()
    assert instances.gt_classes.tolist() == [2]


def test_forms_may_be_mixed_in_an_image(map_annotations):
    instances = map_annotations([annotation(form) for form in forms().values()])
    assert isinstance(instances.gt_masks, BitMasks) and len(instances) == 4
    for mask in instances.gt_masks.tensor:
        assert torch.equal(mask, torch.from_numpy(square_mask()).bool())


def test_polygons_stay_polygons(map_annotations):
    assert isinstance(map_annotations([annotation([SQUARE])]).gt_masks, PolygonMasks)


def test_crowds_are_left_out(map_annotations):
    instances = map_annotations([annotation([SQUARE]), annotation(forms()["compressed RLE"], iscrowd=1, category=7)])
    assert instances.gt_classes.tolist() == [2] and isinstance(instances.gt_masks, PolygonMasks)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("annotations", [[], [annotation([[1.0, 2.0, 3.0, 4.0]])]])
def test_no_instances_is_a_defined_result(map_annotations, mask_format, annotations):
    instances = map_annotations(annotations, "INPUT.MASK_FORMAT", mask_format)
    assert len(instances) == 0 and len(instances.gt_masks) == 0 and instances.gt_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize(
    "bad",
    [
        annotation([SQUARE], box=(float("nan"), 0, 1, 1)),
        annotation([SQUARE], box=(0, 0, float("inf"), 1)),
        annotation([[float("nan"), *SQUARE[1:]]]),
        annotation([SQUARE[:-1]]),
        annotation([]),
        annotation({"size": [7, 7], "counts": [49]}),
        annotation([SQUARE], box=(30, 20, 30, 20)),
    ],
)
def test_unusable_instances_are_left_out_and_the_others_stay(map_annotations, bad):
    instances = map_annotations([bad, annotation([SQUARE], category=3)])
    assert instances.gt_classes.tolist() == [3]


def test_one_pixel_mask_is_legal(map_annotations):
    mask = np.zeros(SIZE, np.uint8)
    mask[5, 7] = 1
    instances = map_annotations([annotation(mask, box=(7, 5, 8, 6))])
    assert len(instances) == 1 and instances.gt_masks.tensor.sum() == 1


def test_missing_and_broken_images_are_named(tmp_path):
    mapper = InstanceMapper(load_config(""), True)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "image.png")
    whole = (tmp_path / "image.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("missing.jpg", "truncated.png", "text.jpg"):
        with pytest.raises(DataError, match=name):
            mapper({"file_name": str(tmp_path / name), "image_id": 3, "annotations": []})
    with pytest.raises(DataError, match="image_id 9"):
        mapper({"file_name": str(tmp_path / "image.png"), "image_id": 9, "height": 41, "width": 60, "annotations": []})


def test_usable_segmentation_keeps_the_good_polygons():
    kept = usable_segmentation([SQUARE, [1, 2, 3, 4], [0, 0, float("inf"), 1, 2, 2], [0, 0, 1e9, 1, 2, 2]], *SIZE)
    assert len(kept) == 1 and kept[0].tolist() == SQUARE


def test_shapes_map_to_instances_and_semantics(shapes_root, tiny_cfg):
    mapper = InstanceMapper(tiny_cfg(), True)
    for record in DatasetCatalog.get("shapes_train_stuff")[:4]:
        sample = mapper(record)
        assert sample["sem_seg"].shape == sample["image"].shape[1:]
        assert len(sample["instances"]) == sum(not a["iscrowd"] for a in record["annotations"])
        assert isinstance(sample["instances"].gt_masks, BitMasks)


def test_all_real_images_map(real_coco_root):
    folder = real_coco_root / "coco"
    json_file = str(folder / "annotations/instances_train2017.json")
    records = load_coco_json(json_file, str(folder / "train2017"), "real_sample")
    mapper = InstanceMapper(load_config("", ["MODEL.MASK_ON", True]), True)
    samples = [mapper(record) for record in records]
    found = sum(len(sample["instances"]) for sample in samples)
    annotations = json.loads((folder / "annotations/instances_train2017.json").read_text())["annotations"]
    assert len(samples) == 50 and found == sum(not a["iscrowd"] for a in annotations) == 465
    assert min(len(sample["instances"]) for sample in samples) == 0
