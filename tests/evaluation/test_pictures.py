import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from projects.evaluation.pictures import PictureWriter
from projects.visualization import GAP, TITLE_HEIGHT


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


def test_without_ground_truth_the_prediction_alone(records, tmp_path):
    del records[0]["annotations"]
    PictureWriter(NAME, tmp_path / "pictures", 2).process(records, [{"instances": nothing()}] * 6)
    alone, beside = (read_image(str(tmp_path / f"pictures/{i}.png"), "RGB") for i in (0, 3))
    assert beside.shape == (alone.shape[0] + TITLE_HEIGHT, 2 * alone.shape[1] + GAP, 3)


def test_semantic_ground_truth_through_the_records_table(records, tmp_path):
    """The file says 7 and 23 where the model says 0 and 1: both halves of the picture are the same."""
    labels = np.full((40, 60), 7, np.uint8)
    labels[:, 30:] = 23
    Image.fromarray(labels).save(tmp_path / "labels.png")
    table = bytearray([255] * 256)
    table[7], table[23] = 0, 1
    del records[0]["annotations"]
    records[0] |= {"sem_seg_file_name": str(tmp_path / "labels.png"), "sem_seg_table": bytes(table)}
    MetadataCatalog.get(NAME).set(stuff_classes=["road", "sky"], ignore_label=255)
    semantic = torch.from_numpy(np.stack([labels == 7, labels == 23])).float()
    PictureWriter(NAME, tmp_path / "pictures", 1).process(records[:1], [{"sem_seg": semantic}])
    picture = read_image(str(tmp_path / "pictures/0.png"), "RGB")[TITLE_HEIGHT:]
    width = (picture.shape[1] - GAP) // 2
    assert (picture[:, :width] == picture[:, -width:]).all()
    assert len(np.unique(picture[:, :width].reshape(-1, 3), axis=0)) > 2  # two colours and their contours
