"""Pictures of ground truth beside prediction for a few images of a data set."""

from pathlib import Path

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.file_io import PathManager

from projects.data.mapper import usable_segmentation
from projects.visualization import KINDS, draw, draw_comparison

from .coco_files import load_json


def records_to_draw(dataset_name: str) -> list[dict]:
    """The records of a data set, those of a split without ground truth without "annotations".

    (Detectron2 gives them empty lists where a JSON file has none, so that every image seems to be without objects.)
    """
    records, json_file = DatasetCatalog.get(dataset_name), MetadataCatalog.get(dataset_name).get("json_file")
    if json_file and not any(record.get("annotations") for record in records):
        content = load_json(PathManager.get_local_path(json_file))
        if "annotations" not in content:
            return [{key: value for key, value in record.items() if key != "annotations"} for record in records]
    return records


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
    """Writes ``<folder>/<image name>.png`` for ``count`` images (-1: all) spread evenly over the data set.

    Of images with the same name the later ones get "-2", "-3", ... Each process draws those of the chosen images that it
    evaluates. Detections under ``threshold`` are not drawn. Of a split without ground truth the picture is the prediction
    alone.
    """

    def __init__(self, dataset_name: str, folder: Path, count: int, threshold: float = 0.5):
        records = records_to_draw(dataset_name) if count else []
        count = len(records) if count < 0 else min(count, len(records))
        self.chosen = {}  # an image's file -> its record and the picture's name
        taken = set()
        for record in (records[i * len(records) // count] for i in range(count)):
            stem = Path(record["file_name"]).stem
            name = next(name for name in (stem, *(f"{stem}-{k}" for k in range(2, count + 1))) if name not in taken)
            taken.add(name)
            self.chosen[record["file_name"]] = record, name
        self.metadata = MetadataCatalog.get(dataset_name)
        self.folder, self.threshold = folder, threshold

    def process(self, inputs, outputs):
        for record, output in zip(inputs, outputs, strict=True):
            if record["file_name"] not in self.chosen:
                continue
            truth, name = self.chosen[record["file_name"]]
            image, truth = read_image(record["file_name"], "RGB"), drawable_truth(truth)
            if truth is None:
                picture = draw(image, output, self.metadata, "class", self.threshold)
            else:
                picture = draw_comparison(image, truth, output, self.metadata, "class", self.threshold)
            self.folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(self.folder / f"{name}.png"), picture[:, :, ::-1])
