"""Pictures of ground truth beside prediction for a few images of a data set."""

from pathlib import Path

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator

from projects.data.mapper import usable_segmentation
from projects.visualization import draw_comparison


class PictureWriter(DatasetEvaluator):
    """Writes ``<folder>/<image name>.png`` for ``count`` images spread evenly over the data set.

    Each process draws those of the chosen images that it evaluates. Detections under ``threshold`` are not drawn.
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
            annotations = [
                dict(a, segmentation=usable_segmentation(a["segmentation"], truth["height"], truth["width"]))
                for a in truth.get("annotations", [])
                if "segmentation" in a
            ]
            if annotations:
                truth = dict(truth, annotations=annotations)
            picture = draw_comparison(
                read_image(record["file_name"], "RGB"), truth, output, self.metadata, "class", self.threshold
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(self.folder / f"{Path(record['file_name']).stem}.png"), picture[:, :, ::-1])
