"""Compose a scene of the `shapes` data set: huddled objects drawn back to front, and the truth per pixel.

`draw_scene` is a pure function of its arguments. H, W: picture in pixels; `size` is (W, H).
"""

import math
from dataclasses import dataclass

import numpy as np

from .shapes_outlines import OUTLINES, Placement, blob
from .shapes_paint import paint_background, paint_object, photograph

THING_CLASSES = tuple(OUTLINES)
UNLABELLED = 255
DEFAULT_SIZE = (160, 128)

MIN_VISIBLE_PART = 0.6  # an object that would hide more of another one is laid elsewhere
MIN_VISIBLE_PIXELS = 40
_ATTEMPTS = 20


@dataclass(frozen=True)
class Instance:
    """One object, or one group of objects too small to tell apart (COCO: crowd, Cityscapes: group)."""

    category: int  # index into THING_CLASSES
    is_group: bool


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (H, W, 3) uint8 RGB
    owner: np.ndarray  # (H, W) int32: 0 no instance, k > 0 the visible part of instances[k - 1]
    semantic: np.ndarray  # (H, W) uint8: things 0 to 7, stuff 8 to 10, or UNLABELLED
    instances: tuple[Instance, ...]  # back to front; each owns at least one pixel


@dataclass(frozen=True)
class _Layer:
    """What is drawn in one go: an instance, a group of several parts, or clutter (no category)."""

    category: int | None
    is_group: bool
    parts: tuple[Placement, ...]
    coverages: tuple[np.ndarray, ...]  # (H, W) in [0, 1], one per part

    @property
    def mask(self) -> np.ndarray:
        """The pixels that are at least half covered, (H, W) bool."""
        return np.max(self.coverages, axis=0) >= 0.5


def draw_scene(
    seed,
    size: tuple[int, int] = DEFAULT_SIZE,
    objects: bool = True,
    group: bool = False,
    clutter: bool = False,
) -> Scene:
    """Draw the scene of a seed (an int, a list of ints or a numpy SeedSequence).

    `objects`: 3 to 7 instances, fewer where there is no room; without them the picture is background alone.
    `group`: a heap of tiny objects that is annotated as one group. `clutter`: a thing of no class, whose
    pixels are unlabelled.
    """
    rng = np.random.default_rng(seed)
    canvas, stuff = paint_background(rng, size)
    layers: list[_Layer] = []
    if clutter:
        _lay(rng, layers, size, lambda: _clutter_layer(rng, size))
    if objects and group:
        _lay(rng, layers, size, lambda: _group_layer(rng, size))
    if objects:
        _huddle(rng, layers, size)

    angle = rng.uniform(-0.85 * math.pi, -0.15 * math.pi)  # from above
    light = (math.cos(angle), math.sin(angle))
    owner = np.zeros(size[::-1], np.int32)
    semantic = stuff + np.uint8(len(THING_CLASSES))
    instances = []
    for layer in layers:
        for placement, coverage in zip(layer.parts, layer.coverages, strict=True):
            canvas = paint_object(rng, canvas, coverage, placement, _hue(rng, layer.category), light)
        if layer.category is None:
            semantic[layer.mask] = UNLABELLED
        else:
            instances.append(Instance(layer.category, layer.is_group))
            owner[layer.mask] = len(instances)
            semantic[layer.mask] = layer.category
    return Scene(photograph(rng, canvas), owner, semantic, tuple(instances))


def _unit(size: tuple[int, int]) -> float:
    """Objects grow with the picture: 1 at the default size."""
    return math.sqrt(size[0] * size[1] / (DEFAULT_SIZE[0] * DEFAULT_SIZE[1]))


def _hue(rng, category: int | None) -> float:
    """Five objects in six have about the colour of their class, the others and clutter any."""
    if category is None or rng.uniform() < 1 / 6:
        return rng.uniform()
    return category / len(THING_CLASSES) + rng.normal(0, 0.03)


def _layer(size: tuple[int, int], category: int | None, is_group: bool, parts: list[Placement]) -> _Layer:
    return _Layer(category, is_group, tuple(parts), tuple(p.coverage(size) for p in parts))


def _lay(rng, layers: list[_Layer], size: tuple[int, int], propose) -> _Layer | None:
    """Lay the first proposal that leaves enough of itself and of every layer below it visible."""
    for _ in range(_ATTEMPTS):
        candidate = propose()
        above = candidate.mask
        if above.sum() < 2 * MIN_VISIBLE_PIXELS:
            continue
        for below in reversed(layers):
            mask = below.mask
            visible = (mask & ~above).sum()
            if visible < max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_PART * mask.sum()):
                break
            above = above | mask
        else:
            layers.append(candidate)
            return candidate
    return None


def _clutter_layer(rng, size: tuple[int, int]) -> _Layer:
    centre = (rng.uniform(0, size[0]), rng.uniform(0, size[1]))
    placement = Placement.random(rng, blob(rng), centre, rng.uniform(12, 22) * _unit(size))
    return _layer(size, None, False, [placement])


def _group_layer(rng, size: tuple[int, int]) -> _Layer:
    """A heap of 8 to 14 tiny objects of one class."""
    category, unit = int(rng.integers(len(THING_CLASSES))), _unit(size)
    x, y = rng.uniform(0.15, 0.85) * size[0], rng.uniform(0.3, 0.9) * size[1]
    parts = []
    for _ in range(rng.integers(8, 15)):
        centre = (x + rng.normal(0, 9 * unit), y + rng.normal(0, 5 * unit))
        outline = OUTLINES[THING_CLASSES[category]](rng)
        parts.append(Placement.random(rng, outline, centre, rng.uniform(4, 6) * unit))
    return _layer(size, category, True, parts)


def _huddle(rng, layers: list[_Layer], size: tuple[int, int]) -> None:
    """Add 3 to 7 instances in 1 to 3 clusters; each one leans on an earlier one of its cluster."""
    width, height = size
    clusters: list[list[Placement]] = [[] for _ in range(rng.integers(1, 4))]

    def propose(cluster: list[Placement]) -> _Layer:
        category = int(rng.integers(len(THING_CLASSES)))
        radius = math.exp(rng.uniform(math.log(17), math.log(32))) * _unit(size)
        if cluster:
            neighbour = cluster[rng.integers(len(cluster))]
            angle = rng.uniform(0, 2 * math.pi)
            distance = rng.uniform(0.6, 1.0) * (radius + neighbour.radius)
            x = neighbour.centre[0] + distance * math.cos(angle)
            y = neighbour.centre[1] + distance * math.sin(angle)
        else:
            x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.2, 0.85) * height
        centre = (
            float(np.clip(x, 0.04 * width, 0.96 * width)),
            float(np.clip(y, 0.04 * height, 0.96 * height)),
        )
        outline = OUTLINES[THING_CLASSES[category]](rng)
        return _layer(size, category, False, [Placement.random(rng, outline, centre, radius)])

    for _ in range(rng.integers(3, 8)):
        cluster = clusters[rng.integers(len(clusters))]
        layer = _lay(rng, layers, size, lambda cluster=cluster: propose(cluster))
        if layer is not None:
            cluster.append(layer.parts[0])
