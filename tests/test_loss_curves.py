"""Loss curves: what is read from metrics.json, and that the picture appears."""

import json

import numpy as np
import pytest
from detectron2.utils.events import EventStorage, JSONWriter
from matplotlib.figure import Figure
from PIL import Image

from projects import loss_curves
from projects.loss_curves import plot_losses, read_metrics, smooth


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def series(path, name):
    iterations, values = read_metrics(path)[name]
    return iterations.tolist(), values.tolist()


def test_series_are_those_that_detectron2_writes(tmp_path):
    with EventStorage() as storage:
        writer = JSONWriter(str(tmp_path / "metrics.json"), window_size=1)
        for i in range(4):
            storage.put_scalars(total_loss=4.0 - i, loss_mask=2.0 - i)
            storage.put_scalar("lr", 0.1 * i, smoothing_hint=False)
            if i == 2:
                storage.put_scalar("segm/AP", 31.5, smoothing_hint=False)
            writer.write()
            storage.step()
        writer.close()
    assert series(tmp_path / "metrics.json", "total_loss") == ([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0])
    assert series(tmp_path / "metrics.json", "segm/AP") == ([2], [31.5])
    assert set(read_metrics(tmp_path / "metrics.json")) == {"total_loss", "loss_mask", "lr", "segm/AP"}


def test_after_a_resume_the_later_lines_count(tmp_path):
    lines = [{"iteration": i, "total_loss": float(i)} for i in (0, 10, 20, 30)]
    lines += [{"iteration": i, "total_loss": 100.0 + i} for i in (15, 20, 25)]  # resumed from 11
    lines += [{"iteration": 25, "segm/AP": 4.0}, {"iteration": 25, "segm/AP": 5.0}]
    path = write(tmp_path / "metrics.json", *lines)
    assert series(path, "total_loss") == ([0, 10, 15, 20, 25], [0.0, 10.0, 115.0, 120.0, 125.0])
    assert series(path, "segm/AP") == ([25], [5.0])


def test_lines_that_are_not_whole_are_left_out(tmp_path):
    whole = [{"iteration": 0, "lr": 1.0}, {"iteration": 1, "lr": 2.0}]
    path = write(tmp_path / "m.json", whole[0], '{"iteration": 1, "l{"iteration": 1}\n', "7\n", "{}\n", whole[1], '{"it')
    assert series(path, "lr") == ([0, 1], [1.0, 2.0])


def test_values_that_are_no_numbers(tmp_path):
    path = write(tmp_path / "m.json", '{"iteration": 0, "lr": NaN, "note": "x"}\n', {"iteration": 1, "lr": 3})
    assert list(read_metrics(path)) == ["lr"]
    np.testing.assert_array_equal(read_metrics(path)["lr"][1], [np.nan, 3.0])


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"segm/AP": 40.0}, ["AP, PQ, mIoU"]),
        ({"val_loss_mask": 0.5}, ["validation loss"]),
        ({"val_loss_mask": 0.5, "segm/AP": 40.0}, ["validation loss", "AP, PQ, mIoU"]),
    ],
)
def test_no_axis_without_a_curve(tmp_path, monkeypatch, more, labels):
    figures = []
    monkeypatch.setattr(loss_curves, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    lines = [{"iteration": i, "total_loss": 3.0 - i, "lr": 0.1} for i in range(3)]
    plot_losses(write(tmp_path / "m.json", *lines, {"iteration": 2, **more}), tmp_path / "losses.png")
    axes = figures[0].axes
    assert sorted(a.get_ylabel() for a in axes) == sorted(["training loss", "learning rate", *labels])
    assert all(a.lines for a in axes)


def test_smoothing():
    values = np.array([0.0, 3, 6, np.nan, 12])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3, 4.5, 9, 12])
    np.testing.assert_array_equal(smooth(values, 1), values)
    assert np.isnan(smooth(np.full(4, np.inf), 3)).all()


def test_picture(tmp_path):
    lines = [{"iteration": i, "total_loss": 3.0 - i, "loss_mask": 1.0, "lr": 0.1} for i in range(3)]
    plot_losses(write(tmp_path / "m.json", *lines), tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        narrow = picture.size
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    lines.append({"iteration": 2, "segm/AP": 40.0, "segm/AP50": 60.0, "val_loss_mask": 0.5})
    plot_losses(write(tmp_path / "m.json", *lines), tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size == (2 * narrow[0], narrow[1]), "evaluation results have no panel of their own"
    plot_losses(write(tmp_path / "m.json", ""), tmp_path / "losses.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.png", "m.json"]
