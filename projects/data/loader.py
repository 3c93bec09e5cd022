"""The training loader whose position is one number: the same batches, augmentation included, wherever a run resumes.

Detectron2's loader seeds each worker and groups images by aspect ratio behind the workers, so that what it gives depends on
the number of workers and cannot be continued. Here batches are formed from indices, before any image is read, and every
sample is augmented under a seed of its own.
"""

import atexit
import itertools
import logging
import random
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from projects.errors import ConfigError, DataError, UserError

from .mapper import build_mapper

logger = logging.getLogger(__name__)

ATTEMPTS = 10  # samples drawn in place of one that the mapper turns down


@contextmanager
def seeded(*key: int):
    """Seed numpy, random and torch (CPU) from ``key`` inside the block, and put their states back after it."""
    states = np.random.get_state(), random.getstate(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3)
    np.random.seed(seeds[0])
    random.seed(int(seeds[1]))
    torch.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
        torch.set_rng_state(states[2])


class SeededDataset(Dataset):
    """Maps (index, draw) to a mapped sample; ``draw`` numbers the samples of a run and seeds the augmentation.

    The sample keeps the pair as "drawn_as", so that it can be made again.
    A UserError is returned instead of raised, since the worker processes of a DataLoader would wrap it in a traceback.
    """

    def __init__(self, records: list[dict], mapper, seed: int):
        self.records = DatasetFromList(records, copy=False)  # serialized once, shared by the workers
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index_and_draw: tuple[int, int]) -> dict | UserError:
        index, draw = index_and_draw
        try:
            with seeded(self.seed, draw):
                for _ in range(ATTEMPTS):
                    sample = self.mapper(self.records[index])
                    if sample is not None:
                        sample["drawn_as"] = index_and_draw
                        return sample
                    index = np.random.randint(len(self.records))
        except UserError as error:
            return error
        return DataError(f"The mapper turned down {ATTEMPTS} images one after another, the last being record {index}.")


class BatchStream(Sampler):
    """Endless stream of batches of (index, draw) of this process, each batch of wide or of tall images only.

    Args:
        indices: a training sampler of Detectron2 (its part for this process).
        batch_size: images per batch of this process.
        wide: for each record whether it is wider than tall; None does not group by aspect ratio.
        start: number of batches to pass over.
    """

    def __init__(self, indices: Sampler, batch_size: int, wide: list[bool] | None, start: int = 0):
        self.indices, self.batch_size, self.wide, self.start = indices, batch_size, wide, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self):
        groups = {False: [], True: []}
        draws = itertools.count(comm.get_rank(), comm.get_world_size())
        for index, draw in zip(self.indices, draws):  # noqa: B905  both are endless
            group = groups[self.wide is not None and self.wide[index]]
            group.append((index, draw))
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()


def leave_signals_to_the_main_process(worker: int) -> None:
    """A signal often reaches a whole process group; the workers must live until the main process has saved.

    Only the first SIGTERM is passed over: the next one comes from the main process, as it ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class SampleLoader:
    """DataLoader of a SeededDataset: yields lists of mapped dicts, and raises the errors that the workers hand on."""

    def __init__(self, dataset: SeededDataset, batches, workers: int):
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else it would draw from the global one
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        batches = self._batches()
        _RUNNING.add(batches)
        return batches

    def _batches(self):
        for batch in self.loader:
            for sample in batch:
                if isinstance(sample, UserError):
                    raise sample
            yield batch


_RUNNING: weakref.WeakSet = weakref.WeakSet()


@atexit.register  # after multiprocessing's own, and so called before it, which would wait for workers that pass its signal over
def _end_all_workers() -> None:
    for batches in list(_RUNNING):
        batches.close()


class TrainLoader:
    """Iterator over training batches (lists of mapped dicts) that can say where it is and go on from there.

    ``state_dict()`` and ``load_state_dict()`` hold the seed, the number of batches taken, and how many images and processes
    these had. With another number of either the stream cannot be the same: it goes on after as many images, which is logged.
    """

    def __init__(self, records: list[dict], mapper, build_sampler, seed: int, batch_size: int, wide=None, workers=0):
        self.records, self.mapper, self.build_sampler = records, mapper, build_sampler
        self.batch_size, self.wide, self.workers = batch_size, wide, workers
        self.seed, self.batches = seed, 0
        self._iterator = None

    def __iter__(self):
        return self

    def __next__(self) -> list[dict]:
        if self._iterator is None:
            stream = BatchStream(self.build_sampler(self.seed), self.batch_size, self.wide, self.batches)
            self._iterator = iter(SampleLoader(SeededDataset(self.records, self.mapper, self.seed), stream, self.workers))
        batch = next(self._iterator)
        self.batches += 1
        return batch

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        self._iterator = None

    def state_dict(self) -> dict:
        processes = comm.get_world_size()
        images = self.batch_size * processes
        return {"seed": self.seed, "batches": self.batches, "processes": processes, "images_per_batch": images}

    def load_state_dict(self, state: dict) -> None:
        self.close()
        now = self.state_dict()
        before = now | state  # a state without "images_per_batch" counts as this run's
        self.seed = before["seed"]
        self.batches = before["batches"] * before["images_per_batch"] // now["images_per_batch"]
        if any(before[key] != now[key] for key in ("processes", "images_per_batch")):
            logger.warning(
                "The checkpoint comes from %d processes and %d images per batch, this run has %d and %d: training goes on "
                "after as many images, but not with the batches that the original run would have seen.",
                *(state[key] for state in (before, now) for key in ("processes", "images_per_batch")),
            )


def load_records(cfg: CfgNode) -> list[dict]:
    """The training records of DATASETS.TRAIN, filtered as Detectron2 does. Raises DataError for unusable annotations."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    try:
        return get_detection_dataset_dicts(
            list(cfg.DATASETS.TRAIN),
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=proposals,
        )
    except AssertionError as error:
        raise DataError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}: {error} (`python tools/validate_dataset.py NAME` says more)."
        ) from error


def build_train_loader(cfg: CfgNode, seed: int) -> TrainLoader:
    """Loader of DATASETS.TRAIN for this process: IMS_PER_BATCH / processes images a batch.

    Raises ConfigError when IMS_PER_BATCH is no multiple of the number of processes or the sampler is unknown.
    """
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}: expected a multiple of the {processes} processes "
            "that train, since each takes an equal share."
        )
    records = load_records(cfg)
    samplers = {
        "TrainingSampler": lambda seed: TrainingSampler(len(records), seed=seed),
        "RepeatFactorTrainingSampler": lambda seed: RepeatFactorTrainingSampler(
            RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, cfg.DATALOADER.REPEAT_THRESHOLD),
            seed=seed,
        ),
    }
    if cfg.DATALOADER.SAMPLER_TRAIN not in samplers:
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN: there is no '{cfg.DATALOADER.SAMPLER_TRAIN}'. There are: {', '.join(samplers)}."
        )
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [record.get("width", 0) > record.get("height", 0) for record in records]
    return TrainLoader(
        records,
        build_mapper(cfg, is_train=True),
        samplers[cfg.DATALOADER.SAMPLER_TRAIN],
        seed,
        cfg.SOLVER.IMS_PER_BATCH // processes,
        wide,
        cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper=None) -> SampleLoader:
    """Loader of one data set for evaluation: every image once, one at a time, the processes sharing them."""
    records = get_detection_dataset_dicts([dataset_name], filter_empty=False, check_consistency=False)
    dataset = SeededDataset(records, mapper or build_mapper(cfg, is_train=False), seed=0)
    return SampleLoader(dataset, [[(i, i)] for i in InferenceSampler(len(records))], cfg.DATALOADER.NUM_WORKERS)
