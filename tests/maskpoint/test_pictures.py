"""What is drawn: closed contours, the maps of figure 5, and demo.py --maps."""

import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image

from projects.engine.launch import guarded
from projects.visualization import GAP, TITLE_HEIGHT, draw, draw_maps

from .conftest import REPO

RED, GREY = (220, 20, 60), 90


def test_key_points_are_drawn_as_a_closed_contour():
    corners = [[100.5, 100.5, 0.001], [300.5, 100.5, 0.9], [300.5, 300.5, 0.0], [100.5, 300.5, 0.5]]
    points = torch.tensor([[*corners, [200.5, 200.5, 0.001]]])  # and the centre
    found = Instances((450, 500), pred_keypoints=points, pred_classes=torch.tensor([0]), contour_points=torch.tensor([4]))
    metadata = Metadata(name="drawn", thing_classes=["disk"], thing_colors=[RED])
    image = np.full((450, 500, 3), GREY, np.uint8)
    picture = draw(image, found, metadata, color_by="class")
    for x, y in ((200, 100), (300, 200), (200, 300), (100, 200), (200, 200)):  # the sides, whatever the scores; the centre
        assert tuple(picture[y, x]) == RED, (x, y)
    for x, y in ((150, 150), (250, 200), (103, 106)):  # no diagonal, no line to the centre, no dots on the contour
        assert tuple(picture[y, x]) == (GREY,) * 3, (x, y)
    found.contour_points = torch.tensor([0])  # of several contours: dots, whatever their scores
    dots = draw(image, found, metadata, color_by="class")
    assert all(tuple(dots[y, x]) == RED for x, y in ((100, 100), (300, 300), (200, 200)))
    assert tuple(dots[100, 200]) == (GREY,) * 3
    found.contour_points = torch.tensor([4])
    points[0, 1] = float("nan")
    assert tuple(draw(image, found, metadata, color_by="class")[200, 200]) == RED  # from the first to the third corner
    found.remove("contour_points")
    assert tuple(draw(image, found, metadata, color_by="class")[100, 200]) == (GREY,) * 3


def test_maps_lie_in_their_boxes_from_white_to_black():
    image = np.full((450, 500, 3), GREY, np.uint8)
    maps = torch.stack([torch.linspace(-7, 3, 56).expand(56, 56), torch.zeros(56, 56), torch.full((56, 56), torch.nan)])
    boxes = torch.tensor([[100.0, 100, 200, 300], [120, 150, 140, 170], [300, 300, 400, 400]])
    picture = draw_maps(image, maps, boxes)
    assert picture.shape == image.shape
    assert tuple(picture[200, 100]) == (255, 255, 255) and tuple(picture[299, 199]) == (0, 0, 0)
    assert picture[120, 100:200].sum(axis=1).astype(int).tolist() == sorted(picture[120, 100:200].sum(axis=1), reverse=True)
    for x, y in ((99, 200), (200, 200), (150, 99), (150, 300), (350, 350)):
        assert tuple(picture[y, x]) == (GREY,) * 3
    assert len(np.unique(picture[150:170, 120:140].reshape(-1, 3), axis=0)) == 1  # the smaller one lies on top
    assert (image == GREY).all()
    beyond = draw_maps(image, maps[:2], torch.tensor([[-50.0, -50, 50, 50], [600, 10, 700, 20]]))
    assert tuple(beyond[20, 20]) != (GREY,) * 3 and (beyond[60:] == GREY).all()


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", REPO / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(demo, cfg, folder, *args) -> int:
    torch.save({"model": build_model(cfg).state_dict()}, folder / "weights.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    cv2.imwrite(str(folder / "photo.png"), np.random.RandomState(0).randint(0, 255, (50, 70, 3), dtype=np.uint8))
    words = ["--config-file", folder / "config.yaml", "--weights", folder / "weights.pth", "--input", folder / "photo.png"]
    args = [*words, "--output", folder / "out", "--score-threshold", 0, *args]
    return guarded(demo.main, demo.parse_args([str(arg) for arg in args]))


@pytest.mark.parametrize(("config", "rows"), [("shapes_design_b", 3), ("shapes_keypoint_only", 2)])
def test_demo_draws_the_maps(demo, shapes_root, narrow_cfg, tmp_path, config, rows):
    cfg = narrow_cfg(config)
    assert run(demo, cfg, tmp_path) == 0
    with Image.open(tmp_path / "out/photo.png") as picture:
        width, height = picture.size
    assert run(demo, cfg, tmp_path, "--maps") == 0
    with Image.open(tmp_path / "out/photo.png") as picture:
        assert picture.size == (width, rows * (TITLE_HEIGHT + height) + (rows - 1) * GAP)
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(results) == 5 and all(len(result["keypoints"]) == 3 * 33 for result in results)


def test_demo_says_which_models_have_maps(demo, shapes_root, narrow_cfg, tmp_path, capsys):
    assert run(demo, narrow_cfg("shapes_mask_only"), tmp_path, "--maps") == 2
    assert "MaskPointROIHeads" in capsys.readouterr().err
