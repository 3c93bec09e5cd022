"""Glands from a flat folder of drawn pixels."""

import math
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_util

from projects import load_config
from projects.data.check import check_datasets
from projects.data.gland import register_gland
from projects.data.validate import validate_dataset
from projects.errors import DataError
from projects.evaluation import FastCOCOEvaluator

SIZE = 20, 30  # height, width


def drawn() -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    ids[2:8, 2:8] = ids[12:16, 20:28] = 3  # a gland in two parts
    ids[2:8, 8:14] = 1  # touches the first
    ids[4:6, 10:12] = 0  # a hole
    ids[19, 29] = 200  # one pixel
    return ids


def write(folder, name, ids=None, ending="bmp", channels=1):
    ids = drawn() if ids is None else ids
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 128, np.uint8)).save(folder / f"{name}.{ending}")
    Image.fromarray(np.repeat(ids[..., None], 3, axis=2) if channels == 3 else ids).save(folder / f"{name}_anno.{ending}")


@pytest.fixture
def folder(tmp_path):
    """Registered: train 1, 2, 10, testA 1, testB 3, of all the forms that are accepted."""
    write(tmp_path / "gland", "train_1", channels=3)
    write(tmp_path / "gland", "train_10", ending="png")
    write(tmp_path / "gland", "train_2", np.zeros(SIZE, np.uint8))
    write(tmp_path / "gland", "testA_1")
    write(tmp_path / "gland", "testB_3", ending="png", channels=3)
    (tmp_path / "gland/Grade.csv").write_text("name, patient ID\n")
    register_gland(tmp_path)
    yield tmp_path / "gland"
    register_gland(os.environ["DETECTRON2_DATASETS"])


def test_glands_keep_their_ids_parts_and_holes(folder):
    train = DatasetCatalog.get("gland_train")
    assert [record["image_id"] for record in train] == [1, 2, 10]
    assert [record["file_name"] for record in train] == [str(folder / f"train_{n}") for n in ("1.bmp", "2.bmp", "10.png")]
    assert train[1]["annotations"] == []
    for record in (train[0], train[2], *DatasetCatalog.get("gland_test")):
        assert (record["height"], record["width"]) == SIZE
        boxes = {}
        for annotation in record["annotations"]:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            (gland,) = set(drawn()[mask].tolist())
            assert np.array_equal(mask, drawn() == gland)
            assert (annotation["category_id"], annotation["iscrowd"], annotation["bbox_mode"]) == (0, 0, BoxMode.XYXY_ABS)
            boxes[gland] = annotation["bbox"]
        assert boxes == {3: [2, 2, 28, 16], 1: [8, 2, 14, 8], 200: [29, 19, 30, 20]}


def test_test_is_both_parts(folder):
    ids = {split: [r["image_id"] for r in DatasetCatalog.get(f"gland_{split}")] for split in ("testA", "testB", "test")}
    assert ids == {"testA": [1001], "testB": [2003], "test": [1001, 2003]}


def test_original_is_taken_where_there_is_a_copy_too(folder):
    write(folder, "train_1", np.zeros(SIZE, np.uint8), ending="png")
    assert len(DatasetCatalog.get("gland_train")[0]["annotations"]) == 3


def test_cache_goes_with_its_files(folder):
    assert len(DatasetCatalog.get("gland_testA")[0]["annotations"]) == 3
    assert (folder / ".cache/testA.json").is_file()
    write(folder, "testA_1", np.full(SIZE, 5, np.uint8), channels=3)
    (gland,) = DatasetCatalog.get("gland_testA")[0]["annotations"]
    assert gland["bbox"] == [0, 0, 30, 20]


def test_metadata_check_and_evaluation(folder):
    cfg = load_config("", ["DATASETS.TRAIN", ("gland_train",), "DATASETS.TEST", ("gland_test",)])
    check_datasets(cfg, set())
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    assert MetadataCatalog.get("gland_test").evaluator_type == "coco"
    evaluator = FastCOCOEvaluator("gland_test", ["bbox", "segm"], distributed=False)
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == results["bbox"]["AP"] == 0
    assert validate_dataset("gland_test", read_images=True).problems == 0


def test_a_split_without_glands_is_not_one_without_annotations(folder):
    write(folder, "testB_3", np.zeros(SIZE, np.uint8), ending="png")
    evaluator = FastCOCOEvaluator("gland_testB", ["bbox", "segm"], distributed=False)
    record = DatasetCatalog.get("gland_testB")[0]
    found = Instances(SIZE, pred_boxes=Boxes([[1.0, 1, 9, 9]]), scores=torch.ones(1), pred_classes=torch.zeros(1).long())
    found.pred_masks = torch.ones(1, *SIZE, dtype=torch.bool)
    evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "segm"] and math.isnan(results["segm"]["AP"])


@pytest.mark.parametrize("name", ["train_2_anno.bmp", "train_10_anno.png"])
def test_image_without_its_annotation(folder, name):
    (folder / name).unlink()
    stem = name.split("_anno")[0]
    with pytest.raises(DataError, match=rf"{stem}\.\w+ has no annotation: expected {stem}_anno.bmp"):
        DatasetCatalog.get("gland_train")


@pytest.mark.parametrize("name", ["train_1.bmp", "train_1_anno.bmp"])
def test_truncated_files_are_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[: 100 if "anno" in name else 10])
    with pytest.raises(DataError, match=f"{folder / name} cannot be read"):
        DatasetCatalog.get("gland_train")


def test_annotation_of_another_size_or_form(folder):
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(folder / "train_1_anno.bmp")
    with pytest.raises(DataError, match="train_1_anno.bmp is 31x20 pixels, but its image is 30x20"):
        DatasetCatalog.get("gland_train")
    Image.fromarray(np.random.RandomState(0).randint(0, 9, (*SIZE, 3), dtype=np.uint8)).save(folder / "train_1_anno.bmp")
    with pytest.raises(DataError, match="train_1_anno.bmp: expected one channel"):
        DatasetCatalog.get("gland_train")


def test_missing_folder_and_split(folder, tmp_path):
    for path in folder.glob("testB*"):
        path.unlink()
    with pytest.raises(DataError, match=f"{folder} has no images testB_1.bmp.*docs/datasets.md"):
        DatasetCatalog.get("gland_test")
    register_gland(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"looked for in {tmp_path}/elsewhere/gland, which does not exist.*docs/datasets.md"):
        check_datasets(load_config("", ["DATASETS.TRAIN", ("gland_train",)]), set())
