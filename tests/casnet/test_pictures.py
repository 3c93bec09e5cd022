"""Pictures of the common attributes, and the flag of demo.py."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

import demo
from casnet.pictures import attribute_pictures, distance_maps, farthest, scaled
from casnet.postprocess import CommonAttributeSupport
from projects.canvas import Canvas, distinct_colors
from projects.errors import ConfigError
from projects.visualization import GAP, TITLE_HEIGHT


def output_of(distances, probabilities, classes):
    """What CASNet gives for 8 x 12 pixels on 4 x 6 cells."""
    _, instances, seeds = CommonAttributeSupport()(classes, distances, probabilities, (4, 6))
    return {
        "instances": instances,
        "common_attributes": {"distances": distances, "seeds": seeds, "grid_size": (4, 6)},
    }


@pytest.fixture
def output():
    probabilities = torch.zeros(2, 4, 6)
    probabilities[0, 1, 1], probabilities[1, 2, 4] = 0.9, 0.8
    classes = torch.full((8, 12), -1)
    classes[:6, :6], classes[4:, 8:] = 0, 1
    return output_of(torch.arange(1.0, 97).view(4, 4, 6) / 24, probabilities, classes)


def test_brightness_is_the_distance(output):
    maps = distance_maps((8, 12), output["common_attributes"])
    scale = Canvas(np.zeros((8, 12, 3), np.uint8)).scale
    distances = output["common_attributes"]["distances"]
    for picture, side in zip(maps, distances, strict=True):
        assert picture.shape == (8 * scale, 12 * scale, 3)
        centres = picture[scale::scale, scale::scale, 0][::2, ::2]  # between the two pixels of a cell, both ways
        np.testing.assert_allclose(centres, (side / distances.max() * 255).numpy(), atol=1.5)
    assert maps[3].max() == 255


def test_six_pictures(output):
    image = np.full((8, 12, 3), 90, np.uint8)
    pictures = attribute_pictures(image, output)
    scale = Canvas(image).scale
    assert [picture.shape for picture in pictures] == [(8 * scale + TITLE_HEIGHT, 12 * scale, 3)] * 6
    centres, seeds = (picture[TITLE_HEIGHT:] for picture in pictures[4:])
    for row, column in ((1, 1), (2, 4)):  # the cells of the seeds
        y, x = (int((side + 0.5) * 2 * scale) for side in (row, column))
        assert (seeds[y, x] == 255).all()
    assert not (centres == 255).all(axis=2).any()
    left, top, right, bottom = output["common_attributes"]["distances"][:, 0, 0]  # of a cell of the first instance
    y, x = (int((0.5 + float(far - near) / 2) * 2 * scale) for near, far in ((top, bottom), (left, right)))
    assert tuple(centres[y, x]) == tuple(distinct_colors()[0])


def test_greatest_distances_are_those_in_the_image(output):
    """In pixels: a cell has two across and three down. The padding, here the last row and column, does not count."""
    attributes = {**output["common_attributes"], "grid_size": (3, 5)}
    expected = attributes["distances"][:, :3, :5].flatten(1).amax(dim=1) * torch.tensor([2, 3, 2, 3])
    assert farthest((9, 10), attributes) == pytest.approx(expected.tolist())


def test_distances_of_nothing_are_black():
    maps = distance_maps((8, 12), {"distances": torch.zeros(4, 4, 6), "grid_size": (4, 6)})
    assert not any(picture.any() for picture in maps)


def test_points_are_scaled_to_the_image():
    x, y = scaled((torch.tensor([1.0, 3.0]), torch.tensor([0.5, 2.0])), (20, 60), (2.0, 3.0))
    assert x.tolist() == [20, 60] and y.tolist() == [5, 20]


def test_without_instances_and_seeds():
    empty = output_of(torch.ones(4, 4, 6), torch.zeros(2, 4, 6), torch.full((8, 12), -1))
    assert len(attribute_pictures(np.zeros((8, 12, 3), np.uint8), empty)) == 6


def test_flag_of_the_demo(narrow, tmp_path):
    cfg = narrow("panoptic_joint")
    torch.save(build_model(cfg).state_dict(), tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    command = ["--config-file", tmp_path / "config.yaml", "--weights", tmp_path / "model.pth", "--attributes"]
    command = [*map(str, [*command, "--input", tmp_path / "photo.png", "--output", tmp_path / "drawn"])]
    assert demo.main(demo.parse_args(command)) == 0
    scale = Canvas(np.zeros((40, 60, 3), np.uint8)).scale
    assert Image.open(tmp_path / "drawn/photo.png").height == 4 * (40 * scale + TITLE_HEIGHT) + 3 * GAP
    assert json.loads((tmp_path / "drawn/predictions.json").read_text()) == []
    with pytest.raises(ConfigError, match="--attributes wants CASNet"):
        demo.main(demo.parse_args([*command, "--opts", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"]))
