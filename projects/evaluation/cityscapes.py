"""What the three Cityscapes evaluators share: the benchmark's own scripts, kept from touching anything but a temporary folder.

The scripts (https://github.com/mcordts/cityscapesScripts) read the environment when they are imported, keep their settings in
a module's attribute, print, write into the working directory, and end the process when something is wrong. Here their functions
run on a copy of the settings, and what they complain about becomes a DataError.
"""

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from detectron2.data import DatasetCatalog

from projects.errors import ConfigError, DataError

from .image_by_image import ImageByImageEvaluator

IMAGE_SUFFIX = "_leftImg8bit"


class CityscapesEvaluator(ImageByImageEvaluator):
    """Base class: records of a registered data set in Cityscapes' layout.

    An image's name is "<city>_<sequence>_<frame>", taken from its record's "file_name". The ground truth is what the records
    name under the key `truth`; either all of them do, or none (the test split).
    """

    truth = ""

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        """
        Args:
            dataset_name: a registered data set; see the base class for `output_dir`.

        Raises:
            ConfigError: cityscapesscripts is not installed; neither ground truth nor `output_dir`.
            DataError: some images have ground truth and others not.
        """
        keys = ("file_name", "image_id", "height", "width", self.truth)
        records = {}
        for record in DatasetCatalog.get(dataset_name):
            name = Path(record["file_name"]).stem.removesuffix(IMAGE_SUFFIX)
            records[record["image_id"]] = {key: record[key] for key in keys if key in record} | {"name": name}
        without = [record["file_name"] for record in records.values() if self.truth not in record]
        if 0 < len(without) < len(records):
            raise DataError(
                f"{dataset_name}: {len(without)} of {len(records)} images have no ground truth ('{self.truth}'), the first "
                f"being {without[0]}. Expected it for all images of a split, or for none."
            )
        super().__init__(dataset_name, records, has_ground_truth=not without, output_dir=output_dir)


def benchmark_script(name: str) -> ModuleType:
    """A module of cityscapesscripts.evaluation. Raises ConfigError when it is not installed."""
    exports = os.environ.pop("CITYSCAPES_EXPORT_DIR", None)  # the import fails when it names no folder
    try:
        return _import(f"evaluation.{name}")
    finally:
        if exports is not None:
            os.environ["CITYSCAPES_EXPORT_DIR"] = exports


def label_table() -> ModuleType:
    """The benchmark's table of labels: `labels`, `name2label`, `id2label`, `category2labels`. Raises as above."""
    return _import("helpers.labels")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"cityscapesscripts.{name}")
    except ImportError as error:
        raise ConfigError(
            f"Evaluation on Cityscapes needs cityscapesscripts ({error}). Install it: pip install cityscapesscripts."
        ) from error


@contextlib.contextmanager
def script_running(where: str | os.PathLike) -> Iterator[None]:
    """Around calls of a script's functions: keeps them quiet, and turns their complaints into DataError.

    Args:
        where: the file or image at hand, for the message.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", RuntimeWarning)  # means over nothing, which are nan
            yield
    except SystemExit as error:
        last = said.getvalue().strip().splitlines()[-1:]
        raise DataError(f"The Cityscapes benchmark cannot score {where}: {' '.join(last)}") from error
    except (OSError, SyntaxError, KeyError) as error:  # Pillow raises SyntaxError for broken PNGs
        raise DataError(
            f"The Cityscapes benchmark cannot score {where}: {type(error).__name__}: {error}. Expected a readable PNG with "
            "labels of Cityscapes' table."
        ) from error
