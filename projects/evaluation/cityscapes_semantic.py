"""Semantic IoU of Cityscapes, by the benchmark's evalPixelLevelSemanticLabeling.

K classes, in the order of their train ids, in an image of H x W pixels.
"""

import copy
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from projects.errors import ConfigError

from .cityscapes import CityscapesEvaluator, benchmark_script, label_table, script_running


class CityscapesSemanticEvaluator(CityscapesEvaluator):
    """Mean IoU in percent over the classes ("mIoU") and the categories ("IoU_sup"), both also weighted by instance ("iIoU").

    Reads of a model's output "sem_seg" (K, H, W): scores per class of `stuff_classes`, at the image's own size.

    A submission is a PNG of label ids (not train ids) per image.
    """

    truth = "label_ids_file_name"
    submission = "cityscapes_semantic"

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        self.script = benchmark_script("evalPixelLevelSemanticLabeling")
        self.settings = copy.copy(self.script.args)
        super().__init__(dataset_name, output_dir)

    def write(self, record: dict, output: dict, folder: Path) -> None:
        scores = output["sem_seg"]
        classes = self.metadata.stuff_classes
        if len(scores) != len(classes):
            raise ConfigError(
                f"The model scores {len(scores)} semantic classes, but {self.dataset_name} has {len(classes)}: "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES must be their number."
            )
        self.check_size(record, *scores.shape[1:])
        label_ids = np.array([self.category_id(k, "stuff") for k in range(len(classes))], np.uint8)
        Image.fromarray(label_ids[scores.argmax(dim=0).cpu().numpy()]).save(self._file(record, folder))

    def score(self, record: dict, entry: None, folder: Path) -> tuple[np.ndarray, dict]:
        """The confusion matrix (true label id, predicted label id), in pixels, and the counts of instances."""
        truth = record[self.truth]
        with script_running(truth):
            confusion = self.script.generateMatrix(self.settings)
            instances = self.script.generateInstanceStats(self.settings)
            self.script.evaluatePair(str(self._file(record, folder)), str(truth), confusion, instances, {}, self.settings)
        return confusion, instances

    def summarize(self, scores: list[tuple[np.ndarray, dict]]) -> dict[str, dict[str, float]]:
        script, args = self.script, self.settings
        confusion = script.generateMatrix(args) + sum(matrix for matrix, _ in scores)
        instances = script.generateInstanceStats(args)
        for _, counts in scores:
            for kind, groups in counts.items():
                for name, values in groups.items():
                    total = instances[kind][name]
                    total |= {key: total[key] + value for key, value in values.items() if key != "labelIds"}
        values: dict[str, dict] = defaultdict(dict)
        table = label_table()
        for label in (table.id2label[i] for i in args.evalLabels):
            if not label.ignoreInEval:
                values["mIoU"][label.name] = script.getIouScoreForLabel(label.id, confusion, args)
                values["iIoU"][label.name] = script.getInstanceIouScoreForLabel(label.id, confusion, instances, args)
        for category in table.category2labels:
            values["IoU_sup"][category] = script.getIouScoreForCategory(category, confusion, args)
            values["iIoU_sup"][category] = script.getInstanceIouScoreForCategory(category, confusion, instances, args)
        metrics = {name: script.getScoreAverage(of_classes, args) for name, of_classes in values.items()}
        metrics |= {f"IoU-{name}": value for name, value in values["mIoU"].items()}
        metrics |= {f"IoU_sup-{name}": value for name, value in values["IoU_sup"].items() if name != "void"}
        return {"sem_seg": {name: 100 * float(value) for name, value in metrics.items()}}

    def _file(self, record: dict, folder: Path) -> Path:
        return folder / f"{record['name']}_pred.png"
