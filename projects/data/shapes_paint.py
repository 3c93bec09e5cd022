"""The painter of the `shapes` data set: background, objects with texture, light and shadow, and the camera.

H, W: canvas in pixels. A canvas is (H, W, 3) float32 RGB, about [0, 1]; `size` is (W, H). Every function
takes the random generator of its scene, so that a picture depends on nothing but its seed.
"""

import colorsys
import math

import cv2
import numpy as np

STUFF_CLASSES = ("sky", "wall", "ground")


def paint_background(rng, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sky over wall over ground with wavy borders; one picture in six lacks the sky or the wall.

    Returns the canvas and the labels, (H, W) uint8, indices into STUFF_CLASSES.
    """
    height = size[1]
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5
    skyline = height * rng.uniform(0.18, 0.42) + _wave(rng, size)
    floor = height * rng.uniform(0.58, 0.8) + _wave(rng, size)
    kind = rng.integers(12)
    if kind == 0:
        skyline = np.full_like(skyline, -1)
    elif kind == 1:
        skyline = floor
    canvas = _blend(_sky(rng, size), _wall(rng, size), np.clip(y - skyline + 0.5, 0, 1))
    canvas = _blend(canvas, _ground(rng, size), np.clip(y - floor + 0.5, 0, 1))
    labels = (y >= np.minimum(skyline, floor)).astype(np.uint8) + (y >= floor)
    return canvas, labels.astype(np.uint8)


def paint_object(
    rng, canvas: np.ndarray, coverage: np.ndarray, placement, hue: float, light: tuple[float, float]
) -> np.ndarray:
    """Lay one textured object with a bevelled edge and a soft shadow on the canvas.

    `coverage` is (H, W) in [0, 1]; `hue` in [0, 1) may depend on the class, nothing else here does; `light` is the
    unit vector (x, y) towards the light.
    """
    size = canvas.shape[1::-1]
    reach = 0.14 * placement.radius + 1
    move = np.float32([[1, 0, -light[0] * reach], [0, 1, -light[1] * reach]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(coverage, move, size), (0, 0), 0.6 * reach)
    canvas = canvas * (1 - rng.uniform(0.25, 0.45) * shadow[..., None])

    first = _colour(rng, (hue, hue), (0.55, 1.0), (0.6, 1.0))
    second = np.clip(first * rng.uniform(0.65, 0.85) + rng.uniform(-0.06, 0.06, 3), 0, 1).astype(np.float32)
    surface = _blend(first, second, _texture(rng, placement, size))
    surface = surface * (1 + 0.4 * _bevel(coverage, 0.3 * placement.radius, light))[..., None]
    return _blend(canvas, np.clip(surface, 0, 1.1), coverage)


def photograph(rng, canvas: np.ndarray) -> np.ndarray:
    """Uneven light, a slightly soft lens and sensor noise; (H, W, 3) uint8 RGB."""
    height, width = canvas.shape[:2]
    x, y = np.meshgrid(np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32))
    angle = rng.uniform(0, 2 * math.pi)
    light = rng.uniform(0.9, 1.1) + rng.uniform(0.05, 0.2) * (x * math.cos(angle) + y * math.sin(angle))
    light = light - rng.uniform(0, 0.12) * (x * x + y * y)
    canvas = canvas * light[..., None] * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7))
    canvas = canvas + rng.normal(0, rng.uniform(0.004, 0.014), canvas.shape).astype(np.float32)
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _blend(below: np.ndarray, above: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`below` where `weight` (H, W) is 0, `above` where it is 1."""
    return below + (above - below) * weight[..., None].astype(np.float32)


def _colour(rng, hue, saturation, value) -> np.ndarray:
    """A random colour within ranges of hue, saturation and value; (3,) float32 RGB in [0, 1]."""
    hsv = rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)


def _noise(rng, size: tuple[int, int], cells_x: int, cells_y: int, octaves: int = 3) -> np.ndarray:
    """Smooth noise of about unit deviation with `cells` bumps across the canvas; (H, W) float32."""
    total = np.zeros(size[::-1], np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((cells_y << octave, cells_x << octave), np.float32)
        total += cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC) / (1 << octave)
    return total


def _wave(rng, size: tuple[int, int]) -> np.ndarray:
    """A wavy line's height over x, (W,), image pixels."""
    width, height = size
    x = np.arange(width, dtype=np.float32) / width * 2 * math.pi
    return sum(height * rng.uniform(0.01, 0.05) / k**0.5 * np.sin(k * x + rng.uniform(0, 2 * math.pi)) for k in (1, 2.3, 4.1))


def _sky(rng, size: tuple[int, int]) -> np.ndarray:
    top = _colour(rng, (0.52, 0.66), (0.1, 0.4), (0.6, 0.95))
    bottom = np.clip(top + rng.uniform(0.02, 0.2), 0, 1)
    rows = np.linspace(0, 2, size[1], dtype=np.float32).clip(0, 1)
    sky = _blend(top, bottom, np.repeat(rows[:, None], size[0], axis=1))
    clouds = np.clip(_noise(rng, size, 4, 6) - rng.uniform(0, 0.8), 0, 1)
    return _blend(sky, np.float32([0.95, 0.95, 0.96]), 0.6 * clouds)


def _wall(rng, size: tuple[int, int]) -> np.ndarray:
    """Bricks, planks or plaster."""
    width, height = size
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    wall = np.broadcast_to(_colour(rng, (0, 1), (0.03, 0.22), (0.4, 0.8)), (height, width, 3))
    tall = height * rng.uniform(0.05, 0.1)
    kind = rng.integers(3)
    joints = np.zeros((height, width), np.float32)
    if kind == 0:
        row = np.floor(y / tall)
        joints = np.maximum(y % tall < 1, (x + row % 2 * tall) % (2 * tall) < 1).astype(np.float32)
    elif kind == 1:
        joints = (x % (1.5 * tall) < 1).astype(np.float32)
    shade = 1 + 0.05 * _noise(rng, size, 10, 8) - rng.uniform(0.15, 0.35) * joints
    return wall * shade[..., None]


def _ground(rng, size: tuple[int, int]) -> np.ndarray:
    """Grass, earth or stone with a coarse grain."""
    hue = [(0.2, 0.36), (0.05, 0.13), (0.5, 0.7)][rng.integers(3)]
    ground = _colour(rng, hue, (0.1, 0.35), (0.3, 0.6))
    shade = 1 + 0.08 * _noise(rng, size, 8, 16, 4) + 0.04 * rng.standard_normal(size[::-1], np.float32)
    return np.clip(ground * shade[..., None], 0, 1)


def _texture(rng, placement, size: tuple[int, int]) -> np.ndarray:
    """The share of the second colour, (H, W) in [0, 1]: plain, stripes, checks, dots, marble or a ramp."""
    u, v = placement.local_coordinates(size)
    kind, frequency, phase = rng.integers(6), rng.uniform(1.5, 3.0), rng.uniform(0, 1)
    turns = 2 * math.pi * frequency
    if kind == 0:
        pattern = np.zeros_like(u)
    elif kind == 1:
        pattern = 0.5 + 2 * np.sin(turns * u + 6 * phase)
    elif kind == 2:
        pattern = 0.5 + 4 * np.sin(turns * u) * np.sin(turns * v)
    elif kind == 3:
        pattern = 1.5 * np.cos(turns * u) + 1.5 * np.cos(turns * v) - 0.8
    elif kind == 4:
        pattern = 0.5 + np.sin(turns * u + 3 * _noise(rng, size, 6, 5))
    else:
        pattern = 0.5 + 0.5 * v
    grain = 0.08 * rng.standard_normal(size[::-1], np.float32)
    return np.clip(np.clip(pattern, 0, 1) * rng.uniform(0.5, 1) + grain, 0, 1).astype(np.float32)


def _bevel(coverage: np.ndarray, width: float, light: tuple[float, float]) -> np.ndarray:
    """The light that a rounded edge of `width` pixels catches, (H, W), about [-1, 1]."""
    inside = np.pad((coverage >= 0.5).astype(np.uint8), 1)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 5)[1:-1, 1:-1]
    height = np.sqrt(1 - (1 - np.clip(depth / width, 0, 1)) ** 2)
    height = cv2.GaussianBlur(height, (0, 0), 0.8)
    slope_x, slope_y = (cv2.Sobel(height, cv2.CV_32F, *d, scale=1 / 8) for d in ((1, 0), (0, 1)))
    return np.clip(-width * (slope_x * light[0] + slope_y * light[1]) * 1.2, -1, 1)
