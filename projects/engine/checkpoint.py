"""Checkpoints that hold a run exactly, and that survive being interrupted."""

import logging
import os
import random
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from projects.errors import CheckpointError, ConfigError

from .safe_loading import load_pickle, load_torch

logger = logging.getLogger(__name__)

PERIODIC = re.compile(r"model_(\d{7,})\.pth")
STRIPPED = "stripped"  # key of a file whose training-only weights were taken out: it lists them


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer (same files, same matching of names) with safe loading, atomic writing, and a way back.

    - Files are loaded without running code; ``trust=True`` lifts that.
    - ``save`` writes beside the target and renames, so that a file under its final name is always whole.
    - ``resume`` takes the newest file that is whole and names those that are not.
    - After a load ``filled`` are the parameters that the file filled, and ``unloaded`` lists those that it lacks (without the
      ones whose module forgives that). ``resumed_from`` is the file of ``resume``.
    """

    def __init__(self, model, save_dir: str = "", *, trust: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.trust = trust
        self.filled: set[str] = set()
        self.unloaded: list[str] = []
        self.resumed_from: Path | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{save_dir}/{name}.pth`` (model, checkpointables, kwargs) from the main process."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        try:
            write_atomically(path, lambda file: torch.save(data, file))
        except OSError as error:
            raise CheckpointError(f"Checkpoint '{path}' cannot be written: {error}. Free space or set OUTPUT_DIR.") from error
        self.tag_last_checkpoint(path.name)

    def save_weights(self, path: Path) -> None:
        """Write the model alone to ``path``, for evaluation and inference. Call it in the main process."""
        write_atomically(path, lambda file: torch.save({"model": self.model.state_dict()}, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = Path(self.save_dir) / "last_checkpoint"
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As Detectron2's. Raises CheckpointError when the file is missing, damaged, or holds more than weights."""
        if path and not os.path.isfile(path):
            try:
                local = self.path_manager.get_local_path(path)
            except Exception as error:
                raise CheckpointError(f"MODEL.WEIGHTS '{path}' cannot be fetched: {error}.") from error
            if not os.path.isfile(local):
                training = ", or to '' to start from random weights" if self.checkpointables else ""
                raise CheckpointError(
                    f"There is no weights file '{path}'. Set MODEL.WEIGHTS to an existing file or URL{training}."
                )
        self.unloaded = [name for name, _ in self.model.named_parameters()] if not path else []
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # Detectron2's main leaves it set when reading fails

    def resume(self) -> dict[str, Any] | None:
        """Load the newest whole periodic or final checkpoint of ``save_dir`` with all checkpointables.

        Returns:
            What ``save`` got as kwargs, or None when there is no checkpoint. Damaged files are named in the log.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read, or they are of another model.
        """
        failures = []
        for path in run_checkpoints(self.save_dir):
            try:
                state = self.load(str(path))
            except CheckpointError as error:  # raised while reading, before anything was changed
                logger.error("%s Falling back to the checkpoint before it.", error)
                failures.append(path.name)
                continue
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(f"'{path}' does not fit this config: {error}") from error
            self.refuse_unloaded(str(path))
            self.resumed_from = path
            return state
        if failures:
            raise CheckpointError(
                f"None of the checkpoints in '{self.save_dir}' can be read ({', '.join(failures)}). "
                "Start again in another OUTPUT_DIR, with MODEL.WEIGHTS set to a file that is whole."
            )
        return None

    def refuse_unloaded(self, path: str) -> None:
        """Raise CheckpointError when the last load left parameters unfilled: their random values would be used."""
        if self.unloaded:
            raise CheckpointError(
                f"The weights '{path}' do not fit this config: {len(self.unloaded)} parameters are absent or of another shape, "
                f"among them {', '.join(self.unloaded[:3])}. Use the config that they were trained with, classes included: "
                "every run leaves it as config.yaml in its OUTPUT_DIR."
            )

    def refuse_random(self, path: str) -> None:
        """Raise CheckpointError when the last load of a file filled no parameter at all."""
        if path and not self.filled:
            count = len(list(self.model.parameters()))
            raise CheckpointError(
                f"MODEL.WEIGHTS '{path}' fills none of the model's {count} parameters: no name and shape agrees. "
                "Set it to weights of this architecture or of its backbone, or to '' to start from random weights."
            )

    def continue_after_final(self, iteration: int) -> None:
        """``model_final.pth`` is the last one no more: it becomes the periodic checkpoint of its iteration, or, when
        ``resume`` passed it over, ``model_final.pth.damaged``."""
        final = Path(self.save_dir) / "model_final.pth"
        if self.save_to_disk and final.is_file():
            whole = self.resumed_from == final
            final.rename(final.with_name(f"model_{iteration:07d}.pth" if whole else "model_final.pth.damaged"))

    def remove_old(self, kept: int) -> None:
        """Delete periodic checkpoints but for the newest ``kept`` ones."""
        if self.save_to_disk:
            for path in periodic_checkpoints(self.save_dir)[: -max(kept, 1)]:
                path.unlink()

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            data = load_pickle(filename, self.trust)
            if not isinstance(data, dict):
                raise CheckpointError(f"'{filename}' holds a {type(data).__name__}; expected a dict of arrays.")
            if "model" in data and "__author__" in data:
                refuse_other_than_arrays(filename, data["model"])
                return data
            weights = data.get("blobs", data)  # Caffe2: detection models have "blobs", ImageNet models are flat
            refuse_other_than_arrays(filename, weights)
            weights = {key: value for key, value in weights.items() if not key.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        data = load_torch(filename, self.trust)
        if isinstance(data, dict) and "model_state" in data:  # pycls (RegNet)
            refuse_other_than_arrays(filename, data["model_state"])
            weights = {key: value for key, value in data["model_state"].items() if "num_batches_tracked" not in key}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if not isinstance(data, dict):
            raise CheckpointError(f"'{filename}' holds a {type(data).__name__}; expected a dict with the key 'model'.")
        data = data if "model" in data else {"model": data}
        refuse_other_than_arrays(filename, data["model"])
        return data

    def _load_model(self, checkpoint: Any):
        given: set[str] = set()  # names of the file as the model gets them: matched, and without those of another shape
        hook = self.model.register_load_state_dict_pre_hook(lambda model, weights, *_: given.update(weights))
        try:
            incompatible = super()._load_model(checkpoint)
        finally:
            hook.remove()
        parameters = {name for name, _ in self.model.named_parameters()}
        self.filled = parameters & given
        absent = set(incompatible.missing_keys) | {name for name, *_ in incompatible.incorrect_shapes}
        self.unloaded = sorted(parameters & absent)
        return incompatible


def refuse_other_than_arrays(path: str, weights: Any) -> None:
    """Raise CheckpointError unless ``weights`` is a dict of named arrays or tensors."""
    found = None if isinstance(weights, dict) else f"a {type(weights).__name__}"
    for name, value in weights.items() if found is None else ():
        if not (isinstance(name, str) and isinstance(value, (np.ndarray, torch.Tensor))):
            found = f"a {type(value).__name__} under {name!r}"
            break
    if found:
        raise CheckpointError(f"'{path}' holds {found} where its weights should be: expected a dict of names and arrays.")


def periodic_checkpoints(folder: str) -> list[Path]:
    """The files ``model_<iteration>.pth`` of a folder by iteration, oldest first."""
    files = [path for path in Path(folder).glob("model_*.pth") if PERIODIC.fullmatch(path.name)]
    return sorted(files, key=lambda path: int(PERIODIC.fullmatch(path.name).group(1)))


def run_checkpoints(folder: str) -> list[Path]:
    """The files that a run can go on from, newest first: the final one, then the periodic ones."""
    final = Path(folder) / "model_final.pth"
    return ([final] if final.is_file() else []) + periodic_checkpoints(folder)[::-1]


def refuse_to_overwrite(folder: str) -> None:
    """Raise ConfigError when a folder holds the checkpoints of an earlier run."""
    if run_checkpoints(folder):
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' holds the checkpoints of an earlier run. Pass --resume to go on with it, set OUTPUT_DIR to "
            "another folder, or delete that one."
        )


def write_atomically(path: Path, write) -> None:
    """Call ``write(file)`` on a binary file beside ``path``, flush it to the disk, and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """The states of torch's (CPU, and current GPU in a run that uses one), numpy's and Python's generators, as tensors and
    plain values."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` returned."""
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def rng_preserved():
    """Whatever draws random numbers inside the block leaves the generators as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
