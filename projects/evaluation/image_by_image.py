"""Evaluation image by image: predictions are written in the server's format, and what was written is scored.

Every process scores its own images, and the main one sums up. Of a split without ground truth the files are kept.
"""

import logging
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from projects.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class ImageByImageEvaluator(DatasetEvaluator):
    """Base class: subclasses write one image's prediction, score it, and sum up scores.

    Scores are kept per image, so that neither the number of processes nor an image that two of them saw changes a result
    (of two predictions for one image the later process's counts). Files that are only there to be scored lie in a
    temporary folder while that happens.
    """

    submission = ""  # name of the folder in output_dir for the predictions of a split without ground truth

    def __init__(self, dataset_name: str, records: Mapping[Any, dict], has_ground_truth: bool, output_dir: str | None):
        """
        Args:
            dataset_name: a registered data set, of whose metadata the classes are read.
            records: image_id -> "file_name", "height", "width", and what else `write` and `score` want to know of the image.
            has_ground_truth: whether there is something to score with.
            output_dir: where a split without ground truth leaves `submission`; otherwise nothing is written.

        Raises:
            ConfigError: neither ground truth nor `output_dir`.
        """
        if not has_ground_truth and not output_dir:
            raise ConfigError(f"{dataset_name} has no ground truth: predictions can only be written. Give an output_dir.")
        self.dataset_name, self.records = dataset_name, records
        self.metadata: Metadata = MetadataCatalog.get(dataset_name)
        self.has_ground_truth, self.output_dir = has_ground_truth, output_dir
        self._files: tempfile.TemporaryDirectory | None = None  # of this process, to be handed in
        self.reset()

    @abstractmethod
    def write(self, record: dict, output: dict, folder: Path) -> Any:
        """Write the prediction of an image into `folder` as the server wants it; returns its entry in the index, if any."""

    @abstractmethod
    def score(self, record: dict, entry: Any, folder: Path) -> Any:
        """Score what `write` wrote; the result is pickled and handed to `summarize`."""

    @abstractmethod
    def summarize(self, scores: list) -> dict[str, dict[str, float]]:
        """Metrics in percent, {task: {metric: value}}, from the scores of all images."""

    def write_index(self, entries: list, folder: Path) -> None:
        """Write what a submission needs beside the images' own files, from what `write` returned for each of them."""

    def reset(self) -> None:
        self._parts: dict[Any, Any] = {}  # per image the score, or of a split without ground truth the entry in the index
        if self._files:
            self._files.cleanup()
        self._files = None

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Score, or without ground truth write, the predictions of a batch.

        Raises:
            DataError: an image that the data set does not have, or a prediction of another size than the image.
        """
        for image, output in zip(inputs, outputs, strict=True):
            name = image["image_id"]
            if name not in self.records:
                raise DataError(
                    f"There is a prediction for the image {name!r}, which is not among the {len(self.records)} images of "
                    f"{self.dataset_name}. Evaluate on the data set and split that the images are from."
                )
            record = self.records[name]
            if not self.has_ground_truth:
                self._files = self._files or tempfile.TemporaryDirectory(prefix="submission_")
                self._parts[name] = self.write(record, output, Path(self._files.name))
                continue
            with tempfile.TemporaryDirectory(prefix="evaluation_") as folder:
                entry = self.write(record, output, Path(folder))
                self._parts[name] = self.score(record, entry, Path(folder))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Returns:
            as `summarize`; {} in other processes than the main one, and for a split without ground truth, whose files lie in
            `output_dir` then (and are forgotten here).

        Raises:
            DataError: an image of the data set has no prediction.
        """
        comm.synchronize()
        parts = {name: part for some in comm.gather(self._parts, dst=0) for name, part in some.items()}
        if not self.has_ground_truth:
            self._hand_in(parts)
            return {}
        return self.summarize(self._of_all_images(parts)) if comm.is_main_process() else {}

    def category_id(self, class_index: int, kind: str) -> int:
        """For `write`: the data set's id of a class of the model, by the metadata's `<kind>_dataset_id_to_contiguous_id`.

        Args:
            kind: "thing" or "stuff".

        Raises:
            ConfigError: the data set has no such class.
        """
        classes = self.metadata.get(f"{kind}_dataset_id_to_contiguous_id")
        for category, position in classes.items():
            if position == class_index:
                return category
        raise ConfigError(
            f"The model predicts the {kind} class {class_index}, but {self.dataset_name} has {len(classes)}, counted from 0. "
            "Train and evaluate on the same classes."
        )

    def check_size(self, record: dict, height: int, width: int) -> None:
        """For `write`: raise DataError unless a predicted map or mask is as large as its image."""
        if (height, width) != (record["height"], record["width"]):
            raise DataError(
                f"The prediction for {record['file_name']} is {(height, width)} (height, width), the image "
                f"{(record['height'], record['width'])}. Predictions must have the original image's size."
            )

    def _of_all_images(self, parts: Mapping[Any, Any]) -> list:
        missing = [name for name in self.records if name not in parts]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(self.records)} images of {self.dataset_name} have no prediction, the first being "
                f"{missing[0]!r}; the benchmark wants one for each. Give the evaluator every image of the data set."
            )
        return [parts[name] for name in self.records]

    def _hand_in(self, parts: Mapping[Any, Any]) -> None:
        """Collect the files of all processes, which may run on other machines, in output_dir/submission."""
        mine = Path(self._files.name) if self._files else None
        away = {} if comm.is_main_process() or mine is None else _contents(mine)
        gathered = comm.gather(away, dst=0)
        if comm.is_main_process():
            entries = self._of_all_images(parts)
            target = Path(self.output_dir) / self.submission
            partial = target.with_name(target.name + ".partial")
            for earlier in (target, partial):
                shutil.rmtree(earlier, ignore_errors=True)
            if mine:
                shutil.copytree(mine, partial)
            for name, content in ((name, content) for files in gathered for name, content in files.items()):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(content)
            self.write_index(entries, partial)
            partial.rename(target)
            logger.info("%s has no ground truth: the predictions are in %s, in the server's format.", self.dataset_name, target)
        self.reset()


def _contents(folder: Path) -> dict[str, bytes]:
    """Path below a folder -> content, of all files in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
