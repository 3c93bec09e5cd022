"""What is found out before a training starts: files that are not there, ground truth that cannot be evaluated."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from projects import load_config
from projects.data.check import check_datasets
from projects.data.cityscapes import register_cityscapes
from projects.errors import ConfigError, DataError

NAME = "own_checked"


@pytest.fixture
def coco(shapes_root) -> dict:
    return json.loads((shapes_root / "shapes/coco/annotations/instances_val.json").read_text())


@pytest.fixture
def check(shapes_root, tmp_path):
    """``check(content, KEY, VALUE, ...)``: train and evaluate on a COCO file of that content, with masks."""

    def run(content: dict, *opts, evaluation_only: bool = False, image_root=shapes_root / "shapes/coco/val"):
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop(NAME, None)
        (tmp_path / "own.json").write_text(json.dumps(content))
        own = [[NAME, str(tmp_path / "own.json"), str(image_root)]]
        names = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,)]
        cfg = load_config("", ["DATASETS.REGISTER", own, *names, "MODEL.MASK_ON", True, *opts])
        check_datasets(cfg, set(), evaluation_only)

    yield run
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(NAME, None)


def test_a_missing_image_folder(check, coco, tmp_path):
    check(coco)
    with pytest.raises(DataError, match=rf"needs '{tmp_path}/nowhere' \(image_root\), which does not exist"):
        check(coco, image_root=tmp_path / "nowhere")


def test_own_paths_are_relative_to_the_current_folder(check, coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"needs '{tmp_path}/nowhere' .* relative to the current folder") as caught:
        check(coco, image_root="nowhere")
    assert "DETECTRON2_DATASETS" not in str(caught.value)


@pytest.mark.parametrize("place", ["sem_seg_root", "panoptic_root", "panoptic_json", "image_dir"])
def test_other_places_that_the_loader_does_not_look_at(check, coco, tmp_path, place):
    check(coco)
    MetadataCatalog.get(NAME).set(**{place: str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match=rf"nowhere' \({place}\), which does not exist"):
        check_datasets(load_config("", ["DATASETS.TEST", (NAME,)]), set(), evaluation_only=True)


def test_a_test_split_needs_no_folder_of_annotations(shapes_root, tmp_path):
    shutil.copytree(shapes_root / "shapes/cityscapes/leftImg8bit/val", tmp_path / "leftImg8bit/test")
    register_cityscapes(tmp_path, "checked")
    check_datasets(load_config("", ["DATASETS.TEST", ("checked_instance_test",)]), set(), evaluation_only=True)
    with pytest.raises(DataError, match="leftImg8bit/val is missing"):
        check_datasets(load_config("", ["DATASETS.TEST", ("checked_instance_val",)]), set(), evaluation_only=True)
    for name in [name for name in DatasetCatalog.list() if name.startswith("checked_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_ground_truth_that_cannot_be_evaluated(check, coco):
    """As the first evaluation would say hours later."""
    coco["annotations"][4]["segmentation"] = []
    with pytest.raises(DataError, match=r"own.json: annotation .* has no segmentation, needed to evaluate segm"):
        check(coco)
    check(coco, "MODEL.MASK_ON", False)
    check(coco, "DATASETS.TEST", ())
    check(coco, evaluation_only=True)  # which begins with it
    for image in coco["images"]:
        image["id"] = str(image["id"])
    for annotation in coco["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    with pytest.raises(DataError, match="image ids must be integers"):
        check(coco, "MODEL.MASK_ON", False)


def test_a_data_set_without_an_evaluator(check, coco):
    check(coco)
    del MetadataCatalog.get(NAME).evaluator_type
    cfg = load_config("", ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,)])
    with pytest.raises(ConfigError, match="evaluator type None"):
        check_datasets(cfg, set())
