"""Instance AP of Cityscapes, by the benchmark's evalInstanceLevelSemanticLabeling.

IoU .50:.05:.95, ground truth of at least 100 pixels; groups, void and smaller objects are ignored. R is the number of
detections in an image of H x W pixels.
"""

import copy
import logging
import math
import os
from pathlib import Path

from PIL import Image

from projects.errors import ConfigError

from .cityscapes import CityscapesEvaluator, benchmark_script, script_running

logger = logging.getLogger(__name__)


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """AP and AP50 in percent, over all classes of the benchmark and of each.

    Reads of a model's output "instances": `pred_masks` (R, H, W) of the image's own size, `pred_classes` (R) and `scores` (R).
    Detections may overlap. Empty masks do not count, scores that are not finite are left out with a warning. Classes that the
    benchmark ignores (caravan, trailer) may be predicted, and do not count.

    A submission is a text file per image, "<mask's file> <label id> <score>" per line, and a mask of 0 and 255 for each.
    """

    truth = "instance_ids_file_name"
    submission = "cityscapes_instance"

    def __init__(self, dataset_name: str, output_dir: str | None = None, task: str = "segm"):
        """
        Args:
            task: the key of the metrics. Others: see :class:`.CityscapesEvaluator`.
        """
        self.task = task
        self.script = benchmark_script("evalInstanceLevelSemanticLabeling")
        self.settings = copy.copy(self.script.args)
        self.script.setInstanceLabels(self.settings)
        super().__init__(dataset_name, output_dir)

    def write(self, record: dict, output: dict, folder: Path) -> None:
        instances = output["instances"].to("cpu")
        if not instances.has("pred_masks"):
            raise ConfigError(f"{self.dataset_name} is evaluated by masks, and this model has none: set MODEL.MASK_ON.")
        self.check_size(record, *instances.pred_masks.shape[1:])
        (folder / "masks").mkdir(exist_ok=True)
        lines, scores = [], instances.scores.tolist()
        for i, mask in enumerate(instances.pred_masks.numpy().astype(bool)):
            if math.isfinite(scores[i]) and mask.any():
                file_name = f"masks/{record['name']}_{i}.png"
                Image.fromarray(mask.astype("uint8") * 255).save(folder / file_name, compress_level=1)
                label_id = self.category_id(int(instances.pred_classes[i]), "thing")
                lines.append(f"{file_name} {label_id} {scores[i]!r}\n")
        lost = sum(not math.isfinite(score) for score in scores)
        if lost:
            logger.warning("%d of %d scores of %s are not finite: left out.", lost, len(scores), record["file_name"])
        (folder / f"{record['name']}_pred.txt").write_text("".join(lines))

    def score(self, record: dict, entry: None, folder: Path) -> dict:
        truth = os.path.abspath(record[self.truth])
        self.settings.predictionPath = os.path.abspath(folder)
        with script_running(truth):
            objects = self.script.instances2dict([truth], False)
            return self.script.matchGtWithPreds([str(folder / f"{record['name']}_pred.txt")], [truth], objects, self.settings)

    def summarize(self, scores: list[dict]) -> dict[str, dict[str, float]]:
        matches = {truth: found for score in scores for truth, found in score.items()}
        with script_running(self.dataset_name):
            precisions = self.script.evaluateMatches(matches, self.settings)
            averages = self.script.computeAverages(precisions, self.settings)
        metrics = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        if not metrics["AP50"] > 0:
            found = sum(len(objects) for match in matches.values() for objects in match["prediction"].values())
            why = "no instance of the benchmark's classes has a match of IoU 0.5. The model found %d of these classes."
            logger.warning(f"%s: AP50 is %.1f: {why}", self.dataset_name, 100 * metrics["AP50"], found)
        for name, key in (("AP", "ap"), ("AP50", "ap50%")):
            metrics |= {f"{name}-{label}": values[key] for label, values in averages["classes"].items()}
        return {self.task: {name: 100 * float(value) for name, value in metrics.items()}}
