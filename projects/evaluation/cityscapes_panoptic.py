"""Panoptic quality of Cityscapes, by the benchmark's evalPanopticSemanticLabeling."""

from pathlib import Path

from .cityscapes import CityscapesEvaluator, benchmark_script, script_running
from .coco_panoptic import PanopticQualityEvaluator
from .panoptic_files import load_panoptic_json
from .panoptic_quality import Tally


class CityscapesPanopticEvaluator(PanopticQualityEvaluator, CityscapesEvaluator):
    """The ground truth is the metadata's `panoptic_json` and `panoptic_root`, as createPanopticImgs of the benchmark writes it.

    The matching is the benchmark's. A submission has label ids, as the server wants them.
    """

    truth = "label_ids_file_name"
    submission = "cityscapes_panoptic"

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        self.script = benchmark_script("evalPanopticSemanticLabeling")
        super().__init__(dataset_name, output_dir)
        self.index_name = f"cityscapes_panoptic_{self.metadata.get('split', 'test')}"
        if self.has_ground_truth:
            content = load_panoptic_json(self.metadata.panoptic_json)
            self.categories = {category["id"]: category for category in content["categories"]}
            self.annotations = {annotation["image_id"]: annotation for annotation in content.get("annotations", ())}

    def score(self, record: dict, entry: dict, folder: Path) -> dict[int, Tally]:
        maps = str(self.metadata.panoptic_root), str(folder / self.index_name)
        with script_running(f"{record['file_name']} against {maps[0]}"):
            pair = (self.annotations[record["image_id"]], entry)
            compare = self.script.pq_compute_single_core.__wrapped__  # without the decorator, which prints tracebacks
            found = compare(0, [pair], *maps, self.categories).pq_per_cat
        return {category: Tally(part.tp, part.fp, part.fn, float(part.iou)) for category, part in found.items()}
