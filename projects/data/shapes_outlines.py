"""The thing classes of the `shapes` data set as outlines, and how much of a pixel an outline covers.

An outline is a list of closed polygons, each (P, 2) as (x, y), filled by the even-odd rule: a polygon inside
another one is a hole. `OUTLINES` draws them in unit coordinates (within the unit circle, more or less);
`Placement` brings them to image pixels (x to the right, y down, pixel i covers [i, i+1)).
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLING = 4  # an outline is filled at so many times the resolution, then averaged
_SUBPIXEL_BITS = 4  # fixed-point digits of cv2.fillPoly


def _arc(start: float, stop: float, radius: float = 1.0, centre: float = 0.0, points: int = 48) -> np.ndarray:
    """Points on a circle around (centre, 0), from angle `start` to `stop` in radians; (points, 2)."""
    angles = np.linspace(start, stop, points)
    return np.stack([centre + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _square(half_side: float) -> np.ndarray:
    return half_side * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


def _disk(rng) -> list[np.ndarray]:
    return [_arc(0, 2 * math.pi)]


def _bar(rng) -> list[np.ndarray]:
    half_width = rng.uniform(0.3, 0.38)
    right = _arc(-math.pi / 2, math.pi / 2, half_width, 1 - half_width)
    return [np.concatenate([right, -right])]


def _star(rng) -> list[np.ndarray]:
    tips = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.1, rng.uniform(0.48, 0.56))
    return [np.stack([radii * np.cos(tips), radii * np.sin(tips)], axis=1)]


def _crescent(rng) -> list[np.ndarray]:
    """The unit circle without a smaller circle (`bite`) around (shift, 0)."""
    bite, shift = rng.uniform(0.66, 0.74), rng.uniform(0.5, 0.56)
    horn_x = (1 + shift**2 - bite**2) / (2 * shift)  # where the two circles meet
    outer, inner = math.acos(horn_x), math.acos((horn_x - shift) / bite)
    return [np.concatenate([_arc(outer, 2 * math.pi - outer), _arc(2 * math.pi - inner, inner, bite, shift)])]


def _ell(rng) -> list[np.ndarray]:
    leg = rng.uniform(0.62, 0.74)
    left, right, top, bottom = -0.75, 0.8, -1.0, 0.9
    corners = [
        (left, top),
        (left + leg, top),
        (left + leg, bottom - leg),
        (right, bottom - leg),
        (right, bottom),
    ]
    return [np.array([*corners, (left, bottom)])]


def _cross(rng) -> list[np.ndarray]:
    a = rng.uniform(0.34, 0.42)
    quarter = np.array([[1, -a], [1, a], [a, a]])
    return [np.concatenate([quarter @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])]


def _ring(rng) -> list[np.ndarray]:
    return [_arc(0, 2 * math.pi), _arc(0, 2 * math.pi, rng.uniform(0.42, 0.52))]


def _frame(rng) -> list[np.ndarray]:
    return [_square(0.85), _square(rng.uniform(0.38, 0.46))]


OUTLINES = {
    "disk": _disk,
    "bar": _bar,
    "star": _star,
    "crescent": _crescent,
    "ell": _ell,
    "cross": _cross,
    "ring": _ring,
    "frame": _frame,
}


def blob(rng) -> list[np.ndarray]:
    """An irregular smooth outline that is none of the classes."""
    angles = np.linspace(0, 2 * math.pi, 64)
    waves = sum(rng.uniform(0.05, 0.2) * np.sin(k * angles + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
    return [(0.8 + waves)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)]


@dataclass(frozen=True)
class Placement:
    """Where an outline lies: image = centre + to_image @ unit."""

    outline: list[np.ndarray]
    centre: tuple[float, float]  # (x, y), image pixels
    to_image: np.ndarray  # (2, 2): rotation, aspect and size
    radius: float  # image pixels

    @classmethod
    def random(cls, rng, outline: list[np.ndarray], centre: tuple[float, float], radius: float) -> "Placement":
        """Turned by up to 30 degrees either way, with an aspect ratio between 5/6 and 6/5."""
        angle, stretch = rng.uniform(-math.pi / 6, math.pi / 6), math.exp(rng.uniform(-0.09, 0.09))
        cos, sin = math.cos(angle), math.sin(angle)
        to_image = radius * np.array([[cos * stretch, -sin / stretch], [sin * stretch, cos / stretch]])
        return cls(outline, centre, to_image, radius)

    def coverage(self, size: tuple[int, int]) -> np.ndarray:
        """The covered part of every pixel, (H, W) float32 in [0, 1]; `size` is (W, H)."""
        width, height = size
        fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
        polygons = [
            # cv2 counts from the centre of the first pixel, hence the half
            np.round(((points @ self.to_image.T + self.centre) * SUPERSAMPLING - 0.5) * (1 << _SUBPIXEL_BITS))
            for points in self.outline
        ]
        cv2.fillPoly(fine, [p.astype(np.int32) for p in polygons], 255, shift=_SUBPIXEL_BITS)
        return cv2.resize(fine, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    def local_coordinates(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Unit coordinates u and v of every pixel's centre, each (H, W): a texture turns with its object."""
        x, y = np.meshgrid(np.arange(size[0]) + 0.5 - self.centre[0], np.arange(size[1]) + 0.5 - self.centre[1])
        (a, b), (c, d) = np.linalg.inv(self.to_image)
        return (a * x + b * y).astype(np.float32), (c * x + d * y).astype(np.float32)
