"""The augmentation of the phone images (section 4.3): noise, blur, sharpness and lightness, drawn anew for every image.

The paper multiplies its training set beforehand, to more than 4000 images, and gives no magnitudes; those here are ours.
Images are (H, W, 3), uint8; nothing moves, so annotations stay as they are.
"""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import ImageEnhance, ImageFilter

from projects.data.mapper import MAPPER_REGISTRY, InstanceMapper


class RandomNoise(T.Augmentation):
    """Gaussian noise on every pixel and channel; its standard deviation is uniform in [0, ``largest``] grey levels."""

    def __init__(self, largest: float = 10.0):
        super().__init__()
        self.largest = largest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        noise = np.random.normal(0.0, np.random.uniform(0.0, self.largest), image.shape)
        return T.ColorTransform(lambda pixels: np.clip(pixels + noise, 0, 255).round().astype(np.uint8))


class RandomBlur(T.Augmentation):
    """Gaussian blur; its standard deviation is uniform in [0, ``largest``] pixels."""

    def __init__(self, largest: float = 2.0):
        super().__init__()
        self.largest = largest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        radius = np.random.uniform(0.0, self.largest)
        return T.PILColorTransform(lambda picture: picture.filter(ImageFilter.GaussianBlur(radius)))


class RandomSharpness(T.Augmentation):
    """Sharpening; its strength is uniform in [1, ``largest``], where 1 changes nothing."""

    def __init__(self, largest: float = 3.0):
        super().__init__()
        self.largest = largest

    def get_transform(self, image: np.ndarray) -> T.Transform:
        strength = np.random.uniform(1.0, self.largest)
        return T.PILColorTransform(lambda picture: ImageEnhance.Sharpness(picture).enhance(strength))


@MAPPER_REGISTRY.register()
class PhoneMapper(InstanceMapper):
    """InstanceMapper which in training applies each of noise, blur, sharpness and lightness (70% to 130%) to half of the
    images."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = super().from_config(cfg, is_train)
        if is_train:
            kinds = [RandomNoise(), RandomBlur(), RandomSharpness(), T.RandomBrightness(0.7, 1.3)]
            arguments["augmentations"] = [*arguments["augmentations"], *(T.RandomApply(kind, 0.5) for kind in kinds)]
        return arguments
