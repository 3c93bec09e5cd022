import random

import numpy as np
import pytest
import torch

from projects.engine.checkpoint import Checkpointer, rng_preserved, rng_state, set_rng_state, write_atomically
from projects.errors import CheckpointError


def draws() -> list[float]:
    return [random.random(), np.random.rand(), np.random.randn(), float(torch.rand(1)), random.gauss(0, 1)]


def test_rng_state_survives_a_safe_file(tmp_path):
    np.random.randn(), random.gauss(0, 1)  # both keep a spare value
    torch.save(rng_state(), tmp_path / "rng.pth")
    first = draws()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draws() == first


def test_rng_preserved():
    with rng_preserved():
        first = draws()
    assert draws() == first


def saved(folder, iteration: int, value: float) -> Checkpointer:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    checkpointer = Checkpointer(model, str(folder))
    checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def test_resume_takes_the_newest_by_iteration(tmp_path):
    for iteration, value in ((9_999_999, 1.0), (10_000_000, 2.0), (19, 3.0)):
        saved(tmp_path, iteration, value)
    checkpointer = Checkpointer(torch.nn.Linear(1, 1, bias=False), str(tmp_path))
    assert checkpointer.resume()["iteration"] == 10_000_000
    assert float(checkpointer.model.weight) == 2.0


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1]])
def test_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    saved(tmp_path, 9, 1.0), saved(tmp_path, 19, 2.0)
    newest = tmp_path / "model_0000019.pth"
    newest.write_bytes(damage(newest.read_bytes()))
    checkpointer = Checkpointer(torch.nn.Linear(1, 1, bias=False), str(tmp_path))
    with caplog.at_level("ERROR"):
        assert checkpointer.resume()["iteration"] == 9
    assert float(checkpointer.model.weight) == 1.0
    assert "model_0000019.pth" in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    saved(tmp_path, 9, 1.0)
    (tmp_path / "model_0000009.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="model_0000009.pth"):
        Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume()


def test_nothing_to_resume_from(tmp_path):
    assert Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume() is None


def test_only_the_last_ones_stay(tmp_path):
    for iteration in (9, 19, 29):
        checkpointer = saved(tmp_path, iteration, 0.0)
    checkpointer.save("model_final")
    checkpointer.save_weights(tmp_path / "model_best.pth")
    checkpointer.remove_old(kept=2)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000019.pth", "model_0000029.pth", "model_best.pth", "model_final.pth"]


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def interrupted(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_unloaded_lists_what_the_file_does_not_fill(tmp_path):
    Checkpointer(torch.nn.Sequential(torch.nn.Linear(2, 2)), str(tmp_path)).save("a")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.unloaded == ["0.bias", "0.weight", "1.bias", "1.weight"]
    checkpointer = Checkpointer(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.unloaded == []


def test_a_file_that_fills_nothing_is_refused_where_a_module_forgives_its_absence(tmp_path):
    def model() -> torch.nn.Module:
        forgiving = torch.nn.Linear(1, 1)
        forgiving.register_load_state_dict_post_hook(lambda module, incompatible: incompatible.missing_keys.clear())
        return torch.nn.Sequential(forgiving, torch.nn.Linear(1, 1))

    contents = {
        "foreign": {"another.weight": torch.zeros(1)},
        "shape": {"1.bias": torch.zeros(2)},
        "own": {"1.bias": torch.ones(1)},
    }
    for name, weights in contents.items():
        torch.save({"model": weights}, tmp_path / f"{name}.pth")
    for name in ("foreign", "shape"):
        checkpointer = Checkpointer(model())
        checkpointer.load(str(tmp_path / f"{name}.pth"))
        assert checkpointer.unloaded == ["1.bias", "1.weight"]
        with pytest.raises(CheckpointError, match=f"{name}.pth' fills none of the model's 4 parameters"):
            checkpointer.refuse_random(f"{name}.pth")
    checkpointer.load(str(tmp_path / "own.pth"))
    assert checkpointer.filled == {"1.bias"} and checkpointer.unloaded == ["1.weight"]
    checkpointer.refuse_random("own.pth")
