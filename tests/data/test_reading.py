"""Reading in several processes, and the cache behind it."""

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from projects.data import reading
from projects.data.reading import cached, read_all, stamps
from projects.errors import DataError


def square(number: int) -> dict:
    if number < 0:
        raise DataError(f"{number} is negative")
    return {"square": number**2, "process": os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_read_all_keeps_the_order(workers):
    values = read_all(square, range(7), "squares", workers)
    assert [value["square"] for value in values] == [0, 1, 4, 9, 16, 25, 36]
    processes = {value["process"] for value in values}
    assert len(processes) == (workers or 1) and (os.getpid() in processes) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_read_all_names_what_is_wrong(workers):
    with pytest.raises(DataError, match="^-3 is negative$"):
        read_all(square, [1, -3, 2], "squares", workers)
    with pytest.raises(DataError, match=r"^squares: 7 of 8 files.*\n- -1 .*\n- -2 .*\n- -3 .*\n- -4 .*\n- -5 is negative$"):
        read_all(square, [-1, -2, -3, -4, 9, -5, -6, -7], "squares", workers)


def test_read_all_takes_no_random_numbers():
    state = torch.get_rng_state()
    read_all(square, range(4), "squares", 2)
    assert torch.equal(state, torch.get_rng_state())


def test_stamps_of_a_missing_file(tmp_path):
    (tmp_path / "a").write_text("12345")
    (row,) = stamps([str(tmp_path / "a")], str(tmp_path))
    assert row[:2] == ["a", 5]
    with pytest.raises(DataError, match=f"{tmp_path}/b cannot be read: No such file"):
        stamps([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path))


def fail():
    raise AssertionError("computed again")


def test_cached_computes_once(tmp_path):
    path = tmp_path / "new/cache.json"
    assert cached(path, {"a": (1, 2)}, lambda: [{"x": 1}]) == [{"x": 1}]
    assert cached(path, {"a": [1, 2]}, fail) == [{"x": 1}]
    assert cached(path, {"a": [1, 3]}, lambda: [2]) == [2]
    assert cached(path, {"a": [1, 3]}, fail) == [2]
    assert sorted(p.name for p in path.parent.iterdir()) == ["cache.json", "cache.json.lock"]


@pytest.mark.parametrize("harm", ["truncated", "empty", "other JSON", "pickle", "half"])
def test_damaged_cache_is_written_again(tmp_path, harm):
    path = tmp_path / "cache.json"
    cached(path, 1, lambda: [1, 2, 3])
    whole = path.read_bytes()
    damaged = {"truncated": whole[:-4], "empty": b"", "other JSON": b"[1]", "pickle": b"\x80\x04\x95", "half": b'{"key": 1}'}
    path.write_bytes(damaged[harm])
    assert cached(path, 1, lambda: [1, 2, 3]) == [1, 2, 3] and path.read_bytes() == whole


@pytest.mark.parametrize("obstacle", ["folder", "file", "full"])
def test_place_that_cannot_be_written(tmp_path, obstacle, caplog, monkeypatch):
    path = tmp_path / ".cache/split.json"
    if obstacle == "folder":
        path.parent.write_text("")  # (permissions do not stop root)
    elif obstacle == "file":
        path.mkdir(parents=True)
    else:
        monkeypatch.setattr(reading.json, "dump", lambda *arguments, **options: os.truncate("/nowhere", 0))
    with caplog.at_level(logging.WARNING):
        assert cached(path, 1, lambda: [1]) == [1]
        assert cached(path, 1, fail) == [1]
    assert len(caplog.records) == 1 and str(path) in caplog.text
    assert cached(path, 2, lambda: [2]) == [2], "what is kept is of the first key only"


def test_readable_cache_in_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    path = tmp_path / "cache.json"
    cached(path, 1, lambda: [1])
    monkeypatch.setattr(reading.fcntl, "flock", fail)
    assert cached(path, 1, fail) == [1]


def test_error_leaves_no_cache(tmp_path):
    with pytest.raises(DataError):
        cached(tmp_path / "cache.json", 1, lambda: read_all(square, [-1], "squares"))
    assert not (tmp_path / "cache.json").exists()
    assert cached(tmp_path / "cache.json", 1, lambda: [1]) == [1], "the lock is free again"


def compute_slowly(folder: Path) -> None:
    def compute():
        (folder / f"computed by {os.getpid()}").touch()
        time.sleep(0.3)
        return list(range(1000))

    assert cached(folder / "cache.json", 1, compute) == list(range(1000))


def test_of_several_processes_one_computes(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=compute_slowly, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("computed by *"))) == 1
    assert json.loads((tmp_path / "cache.json").read_text())["values"] == list(range(1000))
