"""Reading many files once: in several processes with a progress bar, and kept in a JSON file until one of them changes."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from projects.errors import DataError

logger = logging.getLogger(__name__)

JOBS_PER_PROCESS = 50  # fewer are not worth the start of a process
NAMED_PROBLEMS = 5

_kept: dict[Path, tuple[Any, list]] = {}  # what could not be written to a cache file: path -> (key, values)


class _Jobs(Dataset):
    """``read(job)`` by the number of the job; a DataError is returned, so that it keeps its type and the others go on."""

    def __init__(self, read: Callable, jobs: Sequence):
        self.read, self.jobs = read, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int):
        try:
            return self.read(self.jobs[index])
        except DataError as error:
            return error


def _as_it_is(value):
    return value


def read_all(read: Callable, jobs: Sequence, title: str, workers: int | None = None, progress: bool = True) -> list:
    """``[read(job) for job in jobs]``, read in several processes (those of PyTorch's DataLoader).

    Args:
        read: gives plain, picklable values.
        title: of the progress bar, which is shown where there is a terminal.
        workers: processes; 0 reads in this one; None takes one per core, fewer for few jobs.

    Raises:
        DataError: what ``read`` raised; of several the first are named together.
    """
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(jobs) // JOBS_PER_PROCESS)
    generator = torch.Generator()  # else the loader would draw from the global one
    loader = DataLoader(_Jobs(read, jobs), batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=generator)
    values = list(tqdm(loader, desc=title, unit="file", disable=None if progress else True))
    problems = [value for value in values if isinstance(value, DataError)]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems[:NAMED_PROBLEMS])
        raise DataError(f"{title}: {len(problems)} of {len(jobs)} files cannot be used, the first being:\n{listed}")
    return values


def stamps(files: Sequence[str], root: str) -> list[list]:
    """[path below ``root``, bytes, time of change in ns] of each file: equal as long as nobody has touched them.

    Raises DataError for a file that is not there.
    """
    try:
        states = [os.stat(file) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return [[os.path.relpath(f, root), s.st_size, s.st_mtime_ns] for f, s in zip(files, states, strict=True)]


def cached(path: Path, key: Any, compute: Callable[[], list]) -> list:
    """``compute()``, or what an earlier call with an equal ``key`` left in the JSON file ``path``.

    Several processes may call it at once: one computes, the others wait and read. A file that is damaged or has another key
    is written anew (first beside it, then renamed). Where it cannot be written, one warning is logged and the values are
    kept in memory.

    Args:
        key: JSON values; whatever the result depends on (:func:`stamps` of the files, a version of the format).
        compute: gives JSON values.
    """
    key = json.loads(json.dumps(key))
    values = _read(path, key)
    if values is not None:
        return values
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(f"{path}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            return _keep(path, key, compute(), error)
        values = _read(path, key)  # another process may have written it meanwhile
        if values is None:
            values = compute()
            try:
                with open(f"{path}.part", "w") as file:
                    json.dump({"key": key, "values": values}, file, separators=(",", ":"))
                os.replace(f"{path}.part", path)
            except OSError as error:
                return _keep(path, key, values, error)
        return values


def _read(path: Path, key) -> list | None:
    known_key, values = _kept.get(path, (None, None))
    if known_key == key:
        return values
    try:
        content = json.loads(path.read_bytes())
        return content["values"] if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _keep(path: Path, key, values: list, error: OSError) -> list:
    logger.warning("Cannot write %s (%s): what was read is kept in memory, and read again by every run.", path, error.strerror)
    _kept[path] = key, values
    return values
