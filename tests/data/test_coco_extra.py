"""COCO with stuff maps, COCO panoptic as Detectron2 has it, and phone recycling: data sets in COCO's format."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects import load_config
from projects.data.builtin import register_all
from projects.data.check import check_datasets
from projects.data.coco_stuff import CATEGORIES, register_coco_stuff
from projects.data.mapper import InstanceMapper
from projects.data.phone import register_phone
from projects.data.validate import validate_dataset
from projects.errors import DataError

REPO = Path(__file__).resolve().parents[2]
SIZE = 24, 32  # height, width


def write_coco(json_file, image_root, categories) -> None:
    """Two images; the first has a square of the last category."""
    image_root.mkdir(parents=True)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": f"{i:012}.jpg", "width": SIZE[1], "height": SIZE[0]} for i in (4, 9)]
    for image in images:
        Image.fromarray(np.full((*SIZE, 3), 128, np.uint8)).save(image_root / image["file_name"])
    square = {"bbox": [2, 3, 10, 10], "area": 100, "segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]], "iscrowd": 0}
    annotation = {"id": 1, "image_id": 4, "category_id": categories[-1]["id"], **square}
    json_file.write_text(json.dumps({"images": images, "annotations": [annotation], "categories": categories}))


@pytest.fixture
def root(tmp_path):
    """A data root; what a test registers there is undone."""
    yield tmp_path
    register_coco_stuff(os.environ["DETECTRON2_DATASETS"])
    register_phone(os.environ["DETECTRON2_DATASETS"])


@pytest.fixture
def stuff(root):
    names = MetadataCatalog.get("coco_2017_train").thing_classes
    ids = MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id
    categories = [{"id": i, "name": names[k]} for i, k in ids.items()]
    write_coco(root / "coco/annotations/instances_val2017.json", root / "coco/val2017", categories)
    maps = root / "coco/stuffthingmaps/val2017"
    maps.mkdir(parents=True)
    labels = np.full(SIZE, 148, np.uint8)  # road
    labels[3:13, 2:12] = 89  # toothbrush
    labels[0] = 255
    for i in (4, 9):
        Image.fromarray(labels).save(maps / f"{i:012}.png")
    register_coco_stuff(root)
    return root / "coco"


def test_categories_are_those_of_coco():
    assert len(CATEGORIES) == 182 and len(set(CATEGORIES)) == 182
    assert [CATEGORIES[i - 1] for i in (1, 12, 90, 91, 92, 149, 182)] == [
        "person", "street sign", "toothbrush", "hair brush", "banner", "road", "wood",
    ]  # fmt: skip
    coco = MetadataCatalog.get("coco_2017_train")
    for category, k in coco.thing_dataset_id_to_contiguous_id.items():
        assert CATEGORIES[category - 1] == coco.thing_classes[k]


def test_stuff_maps_reach_the_model(stuff):
    records = DatasetCatalog.get("coco_2017_val_stuff")
    assert [record["image_id"] for record in records] == [4, 9]
    cfg = load_config("", ["MODEL.MASK_ON", True])
    sample = InstanceMapper(cfg, True, augmentations=[])(records[0])
    assert set(sample["sem_seg"].unique().tolist()) == {89, 148, 255} and sample["instances"].gt_classes.tolist() == [79]
    metadata = MetadataCatalog.get("coco_2017_val_stuff")
    assert metadata.stuff_classes[89] == metadata.thing_classes[79] == "toothbrush" and metadata.stuff_classes[148] == "road"
    assert metadata.stuff_dataset_id_to_contiguous_id[149] == 148
    assert metadata.evaluator_type == "coco" and metadata.ignore_label == 255


def test_stuff_is_checked(stuff):
    check = load_config("", ["DATASETS.TEST", ("coco_2017_val_stuff",)])
    check_datasets(check, set(), evaluation_only=True)
    assert (check.MODEL.ROI_HEADS.NUM_CLASSES, check.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (80, 182)
    assert validate_dataset("coco_2017_val_stuff", read_images=True).problems == 0
    path = stuff / "stuffthingmaps/val2017/000000000009.png"
    Image.fromarray(np.full(SIZE, 182, np.uint8)).save(path)
    assert [*validate_dataset("coco_2017_val_stuff", read_images=True).findings] == ["no-objects", "unknown-map-id"]
    path.unlink()
    assert "missing-map" in validate_dataset("coco_2017_val_stuff").findings
    with pytest.raises(DataError, match="000000000009.png"):
        InstanceMapper(load_config(""), True)(DatasetCatalog.get("coco_2017_val_stuff")[1])
    shutil.rmtree(stuff / "stuffthingmaps")
    with pytest.raises(
        DataError, match=f"in {stuff} .*stuffthingmaps/val2017 is missing there.*unzip .* -d {stuff}/stuffthingmaps"
    ):
        DatasetCatalog.get("coco_2017_val_stuff")


def test_no_name_of_detectron2_is_taken():
    theirs = {name for name in DatasetCatalog.list() if name.startswith(("coco_", "cityscapes_fine_"))}
    before = {name: MetadataCatalog.get(name).as_dict() for name in theirs if not name.endswith("_stuff")}
    assert {"coco_2017_val", "coco_2017_val_panoptic", "coco_2017_val_panoptic_separated"} <= before.keys()
    register_all(os.environ["DETECTRON2_DATASETS"])
    assert {name: MetadataCatalog.get(name).as_dict() for name in before} == before


def test_documented_names_are_registered():
    rows = re.findall(r"^\| (.*?) \|", (REPO / "docs/datasets.md").read_text(), flags=re.MULTILINE)
    names = [name for row in rows for pattern in re.findall("`(.*?)`", row) for name in expand(pattern)]
    assert len(names) >= 37 and "shapes_cityscapes_instance10_val" in names
    assert not set(names) - set(DatasetCatalog.list())


def expand(pattern: str) -> list[str]:
    """a_{b,c} -> a_b, a_c"""
    match = re.search(r"\{(.*?)\}", pattern)
    if match is None:
        return [pattern]
    return [name for part in match[1].split(",") for name in expand(pattern[: match.start()] + part + pattern[match.end() :])]


def test_detectron2_registers_coco_panoptic_itself():
    metadata = MetadataCatalog.get("coco_2017_val_panoptic")
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert metadata.panoptic_json.endswith("coco/annotations/panoptic_val2017.json")
    assert metadata.panoptic_root.endswith("coco/panoptic_val2017")


def test_missing_panoptic_maps_are_a_clear_error(root):
    """Detectron2's loader asserts that the first file is there."""
    write_coco(root / "instances.json", root / "images", [{"id": 1, "name": "person"}])
    entry = {"image_id": 4, "file_name": f"{4:012}.png", "segments_info": []}
    (root / "panoptic.json").write_text(json.dumps({"annotations": [entry]}))
    from detectron2.data.datasets import register_coco_panoptic

    places = [str(root / part) for part in ("images", "maps", "panoptic.json", "instances.json")]
    register_coco_panoptic("panoptic_without_maps", {"thing_classes": ["person"]}, *places)
    with pytest.raises(DataError, match="panoptic_without_maps.*maps.*panoptic_root"):
        check_datasets(load_config("", ["DATASETS.TRAIN", ("panoptic_without_maps",)]), set())
    DatasetCatalog.pop("panoptic_without_maps")
    MetadataCatalog.pop("panoptic_without_maps")


def test_phone_takes_its_classes_from_the_file(root):
    register_phone(root)
    with pytest.raises(DataError, match=f"'phone_train' was looked for in {root}/phone .*phone_train.json is missing"):
        check_datasets(load_config("", ["DATASETS.TRAIN", ("phone_train",)]), set())
    categories = [{"id": 3 * i, "name": f"part {i}"} for i in range(1, 12)]
    for split in ("train", "val"):
        write_coco(root / f"phone/annotations/instances_phone_{split}.json", root / f"phone/images/{split}", categories)
    cfg = load_config("", ["DATASETS.TRAIN", ("phone_train",), "DATASETS.TEST", ("phone_val",)])
    check_datasets(cfg, set())
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 11
    assert MetadataCatalog.get("phone_val").thing_classes[-1] == "part 11"
    assert DatasetCatalog.get("phone_val")[0]["annotations"][0]["category_id"] == 10
    assert validate_dataset("phone_val", read_images=True).problems == 0
