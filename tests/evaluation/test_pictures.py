import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from projects.evaluation.pictures import PictureWriter


def nothing() -> Instances:
    boxes = Boxes(torch.zeros(0, 4))
    return Instances((40, 60), pred_boxes=boxes, scores=torch.zeros(0), pred_classes=torch.zeros(0, dtype=torch.long))


NAME = "pictures_of_a_test"


@pytest.fixture
def records(tmp_path):
    made = []
    for i in range(6):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / f"{i}.png")
        made.append({"file_name": str(tmp_path / f"{i}.png"), "image_id": i, "height": 40, "width": 60, "annotations": []})
    DatasetCatalog.register(NAME, lambda: made)
    MetadataCatalog.get(NAME).set(thing_classes=["thing"])
    yield made
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.parametrize("count, expected", [(0, []), (2, ["0", "3"]), (6, list("012345")), (99, list("012345"))])
def test_pictures_are_spread_over_the_data_set(records, tmp_path, count, expected):
    writer = PictureWriter(NAME, tmp_path / "pictures", count)
    for record in records:
        writer.process([record], [{"instances": nothing()}])
    assert sorted(path.stem for path in (tmp_path / "pictures").glob("*.png")) == expected


def test_unusable_ground_truth_is_left_out(records, tmp_path):
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    records[0]["annotations"] = [{**box, "segmentation": {"size": [7, 7], "counts": [49]}}, {**box, "segmentation": [[1.0, 2]]}]
    PictureWriter(NAME, tmp_path / "pictures", 1).process([records[0]], [{"instances": nothing()}])
    assert (tmp_path / "pictures/0.png").is_file()
