import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from projects.data.loader import BatchStream, SeededDataset, TrainLoader, build_test_loader, build_train_loader, seeded
from projects.errors import ConfigError, DataError

REPO = Path(__file__).resolve().parents[2]
WIDE = [i % 3 == 0 for i in range(30)]


def sampler(seed: int) -> TrainingSampler:
    return TrainingSampler(30, seed=seed)


def batches(start: int = 0, count: int = 20) -> list:
    return list(islice(BatchStream(sampler(3), 4, WIDE, start), count))


def test_batches_are_of_one_orientation_and_lose_nothing():
    stream = batches(count=300)
    assert all(len({WIDE[index] for index, _ in batch}) == 1 and len(batch) == 4 for batch in stream)
    pairs = [pair for batch in stream for pair in batch]
    assert len({draw for _, draw in pairs}) == len(pairs)
    counts = np.bincount([index for index, _ in pairs], minlength=30)
    assert counts.min() >= 38 and counts.max() <= 41  # 1,200 draws of 30 images


def test_stream_continues_where_it_is_told():
    assert batches(start=7, count=5) == batches(count=12)[7:]


def test_processes_share_the_stream(monkeypatch):
    alone = {draw: index for batch in batches(count=60) for index, draw in batch}
    shared = {}
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        part = {draw: index for batch in batches(count=25) for index, draw in batch}
        assert not part.keys() & shared.keys()
        shared |= part
    common = alone.keys() & shared.keys()
    assert len(common) > 150 and all(alone[draw] == shared[draw] for draw in common)


def noise(record: dict) -> dict:
    return {"id": record["id"], "noise": (np.random.rand(), random.random(), float(torch.rand(1)))}


def loader(workers: int = 0, mapper=noise) -> TrainLoader:
    return TrainLoader([{"id": i} for i in range(30)], mapper, sampler, seed=3, batch_size=4, wide=WIDE, workers=workers)


def test_same_samples_with_any_number_of_workers_and_after_a_resume():
    first, second, resumed = loader(), loader(workers=2), loader(workers=2)
    expected = [next(first) for _ in range(12)]
    assert [next(second) for _ in range(12)] == expected
    resumed.load_state_dict({"seed": 3, "batches": 5, "processes": 1})
    assert [next(resumed) for _ in range(7)] == expected[5:]
    noises = [sample["noise"] for batch in expected for sample in batch]
    assert len(set(noises)) == len(noises)


def test_loading_leaves_the_generators_alone():
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    next(loader()), next(loader(workers=1))
    assert np.array_equal(states[0], np.random.get_state()[1]) and states[1] == random.getstate()
    assert torch.equal(states[2], torch.get_rng_state())


def test_seeded_depends_on_every_part_of_the_key():
    def draw(*key):
        with seeded(*key):
            return np.random.rand(), random.random(), float(torch.rand(1))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(1, 3), draw(2, 2)}) == 3


def unusable(record: dict):
    raise DataError(f"record {record['id']}")


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_arrives_as_it_is(workers):
    with pytest.raises(DataError, match=r"^record \d+$"):
        next(loader(workers, unusable))


def refuse_odd(record: dict):
    return noise(record) if record["id"] % 2 == 0 else None


def refuse_all(record: dict):
    return None


def test_refused_samples_are_replaced_the_same_way_each_time():
    first, second = [[next(it) for _ in range(8)] for it in (loader(0, refuse_odd), loader(1, refuse_odd))]
    assert first == second
    assert all(sample["id"] % 2 == 0 for batch in first for sample in batch)
    with pytest.raises(DataError, match="turned down"):
        next(loader(0, refuse_all))


def test_samples_can_be_made_again():
    sample = next(loader())[0]
    dataset = SeededDataset([{"id": i} for i in range(30)], noise, seed=3)
    assert dataset[sample["drawn_as"]] == sample


def test_batch_size_must_be_shared_equally(shapes_root, tiny_cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 3.*2 processes"):
        build_train_loader(tiny_cfg("SOLVER.IMS_PER_BATCH", 3), seed=0)


@pytest.mark.parametrize("name", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_every_sampler_of_detectron2(shapes_root, tiny_cfg, name):
    cfg = tiny_cfg("DATALOADER.SAMPLER_TRAIN", name, "DATALOADER.REPEAT_THRESHOLD", 0.9, "DATALOADER.NUM_WORKERS", 0)
    streams = [[[s["image_id"] for s in next(it)] for _ in range(6)] for it in (build_train_loader(cfg, 5) for _ in range(2))]
    assert streams[0] == streams[1]


def test_test_loader_gives_every_image_once(shapes_root, tiny_cfg):
    found = [sample["image_id"] for batch in build_test_loader(tiny_cfg(), "shapes_val") for sample in batch]
    assert len(found) == len(set(found)) == 12


@pytest.mark.parametrize("kept", ["the loader", "an iterator"])
def test_a_script_that_keeps_its_loader_ends(kept):
    """Its workers pass over the signal with which Python ends them at its exit."""
    program = f"""
from detectron2.data.samplers import TrainingSampler
from projects.data.loader import SampleLoader, SeededDataset, TrainLoader
records = [{{"id": i}} for i in range(8)]
if {kept == "the loader"}:
    loader = TrainLoader(records, dict, lambda seed: TrainingSampler(8, seed=seed), seed=3, batch_size=4, workers=1)
else:
    loader = iter(SampleLoader(SeededDataset(records, dict, 3), [[(0, 0)], [(1, 1)], [(2, 2)]], 1))
print(len(next(loader)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() in ("4", "1"), done.stderr
