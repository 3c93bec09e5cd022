import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
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


@pytest.mark.parametrize(
    "count, expected",
    [(0, []), (2, ["0", "3"]), (4, list("0134")), (6, list("012345")), (99, list("012345")), (-1, list("012345"))],
)
def test_pictures_are_spread_over_the_data_set(records, tmp_path, count, expected):
    writer = PictureWriter(NAME, tmp_path / "pictures", count)
    for record in records:
        writer.process([record], [{"instances": nothing()}])
    assert sorted(path.stem for path in (tmp_path / "pictures").glob("*.png")) == expected


def test_images_of_one_name_get_pictures_of_their_own(records, tmp_path):
    for record, name in zip(records, ("a/1.png", "b/1.png", "1-2.png", "1.jpg", "c/1.png", "2.png"), strict=True):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(record["file_name"]).save(path)
        record["file_name"] = str(path)
    PictureWriter(NAME, tmp_path / "pictures", 6).process(records, [{"instances": nothing()}] * 6)
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert names == {"1", "1-2", "1-2-2", "1-3", "1-4", "2"}
    (tmp_path / "pictures/1-3.png").unlink()
    PictureWriter(NAME, tmp_path / "pictures", 6).process(records[3:4], [{"instances": nothing()}])  # whoever evaluates it
    assert (tmp_path / "pictures/1-3.png").is_file()


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


@pytest.mark.parametrize("annotated", [False, True])
def test_a_json_without_annotations_is_a_split_without_ground_truth(records, tmp_path, annotated):
    """Detectron2's loader gives its images empty lists, as it gives those of one in which nothing was found."""
    images = [{"id": r["image_id"], "file_name": f"{r['image_id']}.png", "height": 40, "width": 60} for r in records]
    content = {"images": images, "categories": [{"id": 1, "name": "thing"}]} | ({"annotations": []} if annotated else {})
    (tmp_path / "split.json").write_text(json.dumps(content))
    register_coco_instances("pictures_of_a_split", {}, str(tmp_path / "split.json"), str(tmp_path))
    try:
        loaded = DatasetCatalog.get("pictures_of_a_split")
        assert all(record["annotations"] == [] for record in loaded)
        PictureWriter("pictures_of_a_split", tmp_path / "pictures", 1).process(loaded, [{"instances": nothing()}] * 6)
    finally:
        DatasetCatalog.remove("pictures_of_a_split")
        MetadataCatalog.remove("pictures_of_a_split")
    height, width, _ = read_image(str(tmp_path / "pictures/0.png"), "RGB").shape
    assert (width > 2 * height) == annotated  # beside each other, or alone


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
