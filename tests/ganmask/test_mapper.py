"""The augmentation of the phone images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image

from ganmask.mapper import RandomBlur, RandomNoise, RandomSharpness
from projects import load_config
from projects.data.loader import seeded
from projects.data.mapper import build_mapper

REPO = Path(__file__).resolve().parents[2]
SQUARE = [40, 20, 90, 20, 90, 70, 40, 70]


def picture(contrast: int = 60) -> np.ndarray:
    """A square on a plain ground, far from black and white."""
    pixels = np.full((96, 128, 3), 100, dtype=np.uint8)
    pixels[20:70, 40:90] += contrast
    return pixels


def apply(augmentation, pixels: np.ndarray) -> np.ndarray:
    changed = augmentation.get_transform(pixels).apply_image(pixels)
    assert changed.dtype == np.uint8 and changed.shape == pixels.shape
    return changed.astype(float)


def edge(pixels: np.ndarray) -> float:
    """The largest step between neighbours in a row."""
    return np.abs(np.diff(pixels.astype(float), axis=1)).max()


def test_each_does_what_it_says():
    plain = picture()
    with seeded(1):
        noisy = apply(RandomNoise(largest=10.0), plain)
        blurred, sharp = apply(RandomBlur(largest=3.0), plain), apply(RandomSharpness(largest=3.0), plain)
    difference = noisy - plain
    assert 0 < difference.std() <= 10.5 and abs(difference.mean()) < 0.5
    assert edge(blurred) < edge(plain) < edge(sharp)
    assert blurred.mean() == pytest.approx(plain.mean(), abs=0.5)
    for unchanged in (RandomNoise(largest=0.0), RandomSharpness(largest=1.0)):
        assert np.array_equal(apply(unchanged, plain), plain)


def test_noise_stays_in_range():
    with seeded(0):
        black = apply(RandomNoise(largest=100.0), np.zeros((20, 20, 3), dtype=np.uint8))
    assert 0 < (black > 0).mean() < 0.6 and (black > 200).mean() < 0.05


@pytest.fixture
def mapped(tmp_path):
    """``mapped(is_train, seed)`` -> what PhoneMapper makes of a record."""
    Image.fromarray(picture()).save(tmp_path / "image.png")
    opts = ["INPUT.MIN_SIZE_TRAIN", (96, 96), "INPUT.MIN_SIZE_TEST", 96, "INPUT.RANDOM_FLIP", "none", "MODEL.WEIGHTS", ""]
    cfg = load_config(str(REPO / "configs/ganmask/phone_ganmask_R_101_FPN.yaml"), opts)

    def build(is_train: bool, seed: int, **arguments) -> dict:
        annotation = {"bbox": [40, 20, 90, 70], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 3, "segmentation": [SQUARE]}
        record = {"file_name": str(tmp_path / "image.png"), "image_id": 1, "height": 96, "width": 128}
        with seeded(seed):
            return build_mapper(cfg, is_train, **arguments)(record | {"annotations": [annotation]})

    return build


def test_training_images_vary_and_annotations_stay(mapped):
    images = [mapped(True, seed) for seed in range(12)]
    kinds = {image["image"].numpy().tobytes() for image in images}
    assert len(kinds) > 8
    assert {image["image"].dtype for image in images} == {torch.uint8}
    for image in images:
        assert image["instances"].gt_boxes.tensor.tolist() == [[40, 20, 90, 70]]
        assert image["instances"].gt_masks.polygons[0][0].tolist() == SQUARE
    assert torch.equal(mapped(True, 3)["image"], images[3]["image"])


def test_nothing_varies_in_evaluation(mapped):
    expected = picture().transpose(2, 0, 1)
    assert np.array_equal(mapped(False, 0)["image"].numpy(), expected)
    assert np.array_equal(mapped(True, 0, augmentations=[])["image"].numpy(), expected)
