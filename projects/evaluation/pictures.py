"""Pictures of ground truth beside prediction for a few images of a data set."""

from pathlib import Path

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator

from projects.data.mapper import usable_segmentation
from projects.visualization import KINDS, draw, draw_comparison


def drawable_truth(record: dict) -> dict | None:
    """A data set's record without the masks that cannot be drawn; None where it has no ground truth (a test split)."""
    if not any(key in record for key in KINDS.values()):
        return None
    annotations = [
        dict(a, segmentation=usable_segmentation(a["segmentation"], record["height"], record["width"]))
        for a in record.get("annotations", [])
        if "segmentation" in a
    ]
    return dict(record, annotations=annotations) if annotations else record


class PictureWriter(DatasetEvaluator):
    """Writes ``<folder>/<image name>.png`` for ``count`` images spread evenly over the data set.

    Each process draws those of the chosen images that it evaluates. Detections under ``threshold`` are not drawn. Of a split
    without ground truth the picture is the prediction alone.
    """

    def __init__(self, dataset_name: str, folder: Path, count: int, threshold: float = 0.5):
        records = DatasetCatalog.get(dataset_name)
        step = max(len(records) // count, 1) if count else 1
        self.chosen = {record["file_name"]: record for record in records[::step][:count]} if count else {}
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder, self.threshold = folder, threshold

    def process(self, inputs, outputs):
        for record, output in zip(inputs, outputs, strict=True):
            truth = self.chosen.get(record["file_name"])
            if truth is None:
                continue
            image, truth = read_image(record["file_name"], "RGB"), drawable_truth(truth)
            if truth is None:
                picture = draw(image, output, self.metadata, "class", self.threshold)
            else:
                picture = draw_comparison(image, truth, output, self.metadata, "class", self.threshold)
            self.folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(self.folder / f"{Path(record['file_name']).stem}.png"), picture[:, :, ::-1])
