"""Panoptic quality on data sets in COCO's panoptic format, without panopticapi.

The figures are those of Detectron2's COCOPanopticEvaluator, which needs that package; the arithmetic is panoptic_quality.py.
They may differ where an image has several crowd segments of one class: an unmatched prediction of that class is excused by
what it covers of all of them, and in panopticapi by what it covers of the one that is listed last.
"""

import os
from pathlib import Path

from detectron2.data import MetadataCatalog

from projects.errors import DataError

from .coco_files import write_json_atomically
from .image_by_image import ImageByImageEvaluator
from .panoptic_files import load_panoptic_json, read_segment_map, segments_of_output, write_segment_map
from .panoptic_quality import Tally, match_segments, panoptic_metrics, sum_tallies


class PanopticQualityEvaluator(ImageByImageEvaluator):
    """Base class: PQ, SQ and RQ in percent over all classes, things and stuff, and PQ of each class.

    The keys are those of :func:`.panoptic_metrics`. Reads of a model's output "panoptic_seg" (ids, segments_info): see
    :func:`.segments_of_output`; the "category_id" of a segment is a position in `thing_classes` or, where it is no thing, in
    `stuff_classes`. A submission is a JSON file in COCO's panoptic format beside a folder of PNGs of the same name.
    """

    index_name = "predictions"  # of the JSON file and of the folder
    categories: dict[int, dict]  # id -> "id", "name", "isthing"

    def write(self, record: dict, output: dict, folder: Path) -> dict:
        """Write the PNG; the entry is that of the JSON's "annotations"."""
        segments, infos = segments_of_output(output["panoptic_seg"], self.metadata)
        self.check_size(record, *segments.shape)
        path = folder / self.index_name / f"{Path(record['file_name']).stem}.png"
        write_segment_map(path, segments)
        listed = [
            {"id": s["id"], "category_id": self.category_id(s["category_id"], "thing" if s["isthing"] else "stuff")}
            for s in infos
        ]
        return {"image_id": record["image_id"], "file_name": path.name, "segments_info": listed}

    def summarize(self, scores: list[dict[int, Tally]]) -> dict[str, dict[str, float]]:
        return {"panoptic_seg": panoptic_metrics(sum_tallies(scores), self.categories.values())}

    def write_index(self, entries: list[dict], folder: Path) -> None:
        write_json_atomically({"annotations": entries}, folder / f"{self.index_name}.json")


class COCOPanopticQualityEvaluator(PanopticQualityEvaluator):
    """The ground truth is the metadata's `panoptic_json` and `panoptic_root`."""

    submission = "coco_panoptic"

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        metadata = MetadataCatalog.get(dataset_name)
        content = load_panoptic_json(metadata.panoptic_json)
        self.categories = {category["id"]: category for category in content["categories"]}
        records = {image["id"]: {**image, "image_id": image["id"]} for image in content["images"]}
        for annotation in content.get("annotations", ()):
            records[annotation["image_id"]] |= {
                "map": os.path.join(metadata.panoptic_root, annotation["file_name"]),
                "segments_info": annotation["segments_info"],
            }
        super().__init__(dataset_name, records, "annotations" in content, output_dir)

    def score(self, record: dict, entry: dict, folder: Path) -> dict[int, Tally]:
        if "map" not in record:
            raise DataError(f"{self.metadata.panoptic_json} has no annotation of the image {record['file_name']}.")
        predicted = read_segment_map(folder / self.index_name / entry["file_name"])
        return match_segments(read_segment_map(record["map"]), record["segments_info"], predicted, entry["segments_info"])
