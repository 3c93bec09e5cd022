import os
import pickle
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

from projects import load_config
from projects.engine.checkpoint import Checkpointer
from projects.engine.safe_loading import load_pickle, load_torch
from projects.errors import CheckpointError, ConfigError


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_pth_is_refused_by_name_and_runs_only_when_trusted(tmp_path):
    path, trap = tmp_path / "model.pth", tmp_path / "trap"
    torch.save({"model": {}, "extra": Hostile(trap)}, path)
    with pytest.raises(CheckpointError, match=r"wants posix\.mkdir.*--trust"):
        load_torch(str(path))
    assert not trap.exists()
    load_torch(str(path), trust=True)
    assert trap.exists()


def test_builtin_function_in_a_pth_is_refused_by_name(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {}, "extra": print}, path)
    with pytest.raises(CheckpointError, match=r"wants \S*print,.*--trust"):
        load_torch(str(path))


def test_hostile_pkl_is_refused_by_name_and_runs_only_when_trusted(tmp_path):
    path, trap = tmp_path / "model.pkl", tmp_path / "trap"
    path.write_bytes(pickle.dumps({"model": Hostile(trap)}))
    with pytest.raises(CheckpointError, match=r"wants posix\.mkdir.*--trust"):
        load_pickle(str(path))
    assert not trap.exists()
    load_pickle(str(path), trust=True)
    assert trap.exists()


@pytest.mark.parametrize("reach", ["numpy.f2py.os.system", "builtins.eval", "numpy.load"])
def test_pickle_cannot_reach_through_admitted_packages(tmp_path, reach):
    module, name = reach.rsplit(".", 1)
    path = tmp_path / "model.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(CheckpointError, match=f"wants {reach}"):
        load_pickle(str(path))


def test_hostile_yaml_is_refused(tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{trap}']\nVERSION: 2\n")
    with pytest.raises(ConfigError, match="plain YAML"):
        load_config(str(path))
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_model_zoo_pickle_of_arrays_loads(tmp_path, protocol):
    weights = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, np.float32)}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "somebody", "lr": np.float64(0.02)}, protocol))
    model = torch.nn.Linear(3, 2)
    Checkpointer(model).load(str(path))
    assert torch.equal(model.weight, torch.arange(6.0).reshape(2, 3)) and torch.equal(model.bias, torch.ones(2))


def test_pickle_of_numpy_1_loads(tmp_path):
    """Files of the model zoo name numpy.core, which numpy 2 calls numpy._core."""
    path = tmp_path / "model.pkl"
    data = pickle.dumps({"w": np.arange(3.0)}, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(data)
    assert np.array_equal(load_pickle(str(path))["w"], np.arange(3.0))


@pytest.mark.parametrize("kept", [0, 1, 0.3, 0.99])
def test_truncated_files_are_named(tmp_path, kept):
    for name, content in (("model.pth", None), ("model.pkl", pickle.dumps({"w": np.zeros(1000)}))):
        path = tmp_path / name
        torch.save({"model": {"w": torch.zeros(1000)}}, path) if content is None else path.write_bytes(content)
        whole = path.read_bytes()
        path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
        with pytest.raises(CheckpointError, match=f"{name}.*(truncated|corrupt)"):
            (load_torch if name.endswith("pth") else load_pickle)(str(path))


def test_flipped_bit_in_a_tensor_is_found(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        member = next(item for item in archive.infolist() if item.file_size == 4000)
    content = bytearray(path.read_bytes())
    name_length, extra_length = struct.unpack("<HH", content[member.header_offset + 26 : member.header_offset + 30])
    content[member.header_offset + 30 + name_length + extra_length + 2000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(CheckpointError, match="checksum"):
        load_torch(str(path))


def test_file_that_is_no_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="list"):
        Checkpointer(torch.nn.Linear(1, 1)).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("content", [partial(int), {"weight": 3}, {3: torch.zeros(1)}])
@pytest.mark.parametrize("name, key", [("a.pth", "model"), ("a.pth", "model_state"), ("a.pkl", "blobs"), ("a.pkl", "model")])
def test_trusted_file_without_arrays_is_refused(tmp_path, name, key, content):
    data = {key: content, "__author__": "somebody"}
    (tmp_path / name).write_bytes(pickle.dumps(data)) if name == "a.pkl" else torch.save(data, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.p.* holds a (partial|int|Tensor).*expected a dict of names and arrays"):
        Checkpointer(torch.nn.Linear(1, 1), trust=True).load(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"hello world", b"<html>no</html>", b"version https://git-lfs.github.com"])
def test_file_that_is_no_weights_file_does_not_advise_to_lift_the_safety(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no weights file \(") as caught:
        load_torch(str(tmp_path / "model.pth"))
    assert "weights_only" not in str(caught.value) and "http" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        Checkpointer(torch.nn.Linear(1, 1)).load(str(tmp_path / "nowhere.pth"))
