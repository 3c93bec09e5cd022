"""Made-up COCO ground truth and detections with everything that makes the evaluation branch; shapes in Cityscapes' format."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Instances
from PIL import Image
from pycocotools import mask as mask_util

HEIGHT, WIDTH = 160, 200
CATEGORIES = {2: "car", 5: "bus", 6: "dog", 40: "rare", 77: "ghost"}  # 40 is not detected, 77 not there


def _ellipse(x, y, w, h):
    ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    return (((xs - x - w / 2) / (w / 2)) ** 2 + ((ys - y - h / 2) / (h / 2)) ** 2 <= 1).astype(np.uint8, order="F")


def _encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def _runs(mask):
    """Binary mask (H, W) -> uncompressed RLE, as COCO has its crowds."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    ends = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def _make(seed, images=24):
    rng = np.random.default_rng(seed)
    annotations, results = [], []

    def shape(box):
        mask = _ellipse(*box)
        points = np.column_stack([rng.uniform(0, 1, (17, 2)) * box[2:] + box[:2], rng.integers(0, 3, 17)])
        found = {"bbox": [float(v) for v in box], "segmentation": _encode(mask), "keypoints": points}
        return found, int(mask.sum())

    def detect(image_id, category_id, box, near=None):
        found, _ = shape(np.maximum(box, 1))
        if near is not None:
            found["keypoints"][:, :2] = near + rng.normal(0, 0.03 * box[2:].mean(), (17, 2))
        found["keypoints"] = [float(v) for v in found["keypoints"].ravel()]
        score = float(rng.choice([0.1, 0.3, 0.3, 0.5, 0.9, rng.uniform()]))  # many ties
        results.append({"image_id": image_id, "category_id": category_id, "score": score, **found})

    for i in range(images):
        image_id = 1000 - 7 * i
        for _ in range(0 if i in (3, 11) else rng.integers(1, 9)):
            size = np.exp(rng.uniform(np.log(10), np.log(155))) * rng.uniform(0.8, 1, 2)
            box = np.concatenate([rng.uniform(0, [WIDTH, HEIGHT] - size), size])
            found, area = shape(box)
            category_id = int(rng.choice([2, 2, 5, 6, 40], p=[0.3, 0.2, 0.2, 0.25, 0.05]))
            points = found["keypoints"]
            if rng.uniform() < 0.15:
                points[:, 2] = 0
            crowd = int(rng.uniform() < 0.12)
            if crowd:
                found["segmentation"] = _runs(mask_util.decode(found["segmentation"]))
            elif rng.uniform() < 0.4:  # as polygon
                x, y, w, h = box
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                found["segmentation"] = [[float(v) for v in corners]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "iscrowd": crowd,
                    "area": area,
                    **found,
                    "keypoints": [float(v) for v in points.ravel()],
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
            for _ in range(0 if i in (3, 7) or category_id == 40 else rng.integers(0, 4)):
                detected = category_id if rng.uniform() < 0.85 else int(rng.choice([2, 5, 6, 77]))
                detect(image_id, detected, box + rng.normal(0, 0.06 * size.mean(), 4), points[:, :2])
        for _ in range(0 if i == 7 else rng.integers(0, 4)):
            detect(image_id, int(rng.choice([2, 5, 6, 77])), rng.uniform([0, 0, 5, 5], [150, 110, 60, 60]))
        if i == 5:  # more detections than the default limit
            for _ in range(130):
                detect(image_id, 2, rng.uniform([0, 0, 5, 5], [150, 110, 90, 90]))
    dataset = {
        "images": [{"id": 1000 - 7 * i, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": k, "name": v} for k, v in reversed(CATEGORIES.items())],
        "annotations": annotations,
    }
    return dataset, results


_MADE = _make(seed=7)


@pytest.fixture
def made_up():
    """(ground truth, detections) in COCO's format, fresh copies."""
    return copy.deepcopy(_MADE)


@pytest.fixture
def encode():
    """Binary mask (H, W) -> compressed RLE as JSON has it."""
    return _encode


@pytest.fixture
def two_cars():
    """Two cars (id 2) and a bus (id 5), all of 40 x 40; detections of cars: right .9, wrong .8, right .7."""

    def box(x):
        mask = np.zeros((HEIGHT, WIDTH))
        mask[10:50, x : x + 40] = 1
        return {"bbox": [float(x), 10.0, 40.0, 40.0], "segmentation": _encode(mask)}

    objects = [(2, box(0)), (2, box(60)), (5, box(120))]
    dataset = {
        "images": [{"id": 3, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 5, "name": "bus"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"id": i + 1, "image_id": 3, "category_id": k, "iscrowd": 0, "area": 1600.0, **shape}
            for i, (k, shape) in enumerate(objects)
        ],
    }
    found = [(0.9, box(0)), (0.8, box(120)), (0.7, box(60))]
    return dataset, [{"image_id": 3, "category_id": 2, "score": score, **shape} for score, shape in found]


@pytest.fixture
def val_records(cityscapes_root) -> list[dict]:
    """The records of shapes_cityscapes_panoptic_val: 12 images, one of them without objects."""
    from projects.data import builtin  # noqa: F401  registers it

    return DatasetCatalog.get("shapes_cityscapes_panoptic_val")


@pytest.fixture
def perfect():
    """A record -> what a model without fault gives: "instances" (scores 0.9; no groups), "sem_seg", "panoptic_seg"."""
    from projects.data.mapper import training_labels
    from projects.drawables import binary_mask

    def output(record: dict) -> dict:
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        size = (record["height"], record["width"])
        masks = np.array([binary_mask(a["segmentation"], *size) for a in objects], bool).reshape(-1, *size)
        instances = Instances(
            size,
            pred_boxes=BitMasks(torch.from_numpy(masks)).get_bounding_boxes(),
            pred_masks=torch.from_numpy(masks),
            pred_classes=torch.tensor([a["category_id"] for a in objects], dtype=torch.int64),
            scores=torch.full((len(objects),), 0.9),
        )
        labels = np.array(Image.open(record["sem_seg_file_name"]))
        labels = torch.from_numpy(training_labels(labels, record.get("sem_seg_table")).copy())
        semantic = torch.stack([labels == k for k in range(19)]).float()
        ids = np.array(Image.open(record["pan_seg_file_name"])).astype(np.int32) @ np.array([1, 256, 256**2], np.int32)
        infos = [{key: s[key] for key in ("id", "category_id", "isthing")} for s in record["segments_info"]]
        return {"instances": instances, "sem_seg": semantic, "panoptic_seg": (torch.from_numpy(ids), infos)}

    return output


@pytest.fixture
def run_evaluator():
    """``run_evaluator(evaluator, records, outputs)``: one image after another, then the metrics."""

    def run(evaluator, records, outputs):
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            evaluator.process([record], [output])
        return evaluator.evaluate()

    return run
