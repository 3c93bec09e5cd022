"""Several evaluators for one data set, each for one kind of output; a model is evaluated by those whose output it gives."""

import logging
from collections.abc import Mapping, Sequence

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from projects.errors import ConfigError

logger = logging.getLogger(__name__)


class EvaluatorsByOutput(DatasetEvaluator):
    """Hands every kind of output ("instances", "sem_seg", "panoptic_seg") to its own evaluators.

    Args:
        dataset_name: for messages.
        evaluators: key of the model's output -> its evaluators; no two of all report the same task.
    """

    def __init__(self, dataset_name: str, evaluators: Mapping[str, Sequence[DatasetEvaluator]]):
        self.dataset_name, self.evaluators = dataset_name, evaluators
        self.reset()

    def reset(self) -> None:
        self._returned: set[str] = set()
        for group in self.evaluators.values():
            for evaluator in group:
                evaluator.reset()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            self._returned |= output.keys()
            for key in self.evaluators.keys() & output.keys():
                for evaluator in self.evaluators[key]:
                    evaluator.process([image], [output])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Returns:
            the metrics of all evaluators whose output the model gave, {task: {metric: value}}; a line in the log names the
            outputs that it did not give.

        Raises:
            ConfigError: it gave none of them.
        """
        returned = set().union(*comm.all_gather(self._returned))
        absent = [key for key in self.evaluators if key not in returned]
        if len(absent) == len(self.evaluators):
            raise ConfigError(
                f"{self.dataset_name} is evaluated by {', '.join(absent)}; this model returns {sorted(returned) or 'nothing'}. "
                "Choose a data set whose evaluator fits the model (DATASETS.TEST), or a model that has such an output."
            )
        if absent:
            logger.warning("%s: not evaluated, since the model does not give it: %s.", self.dataset_name, ", ".join(absent))
        results = {}
        for key in (key for key in self.evaluators if key in returned):
            for evaluator in self.evaluators[key]:
                results |= evaluator.evaluate() or {}
        return results
