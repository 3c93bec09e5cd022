"""Boundary point extraction: what must hold for every mask, and hand-made masks."""

import statistics
import time

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskpoint.contour import (
    ContourSampler,
    apportion,
    arc_positions,
    corner_points,
    filled_area,
    nearest,
    outer_contours,
    padded,
    uniform_points,
)
from projects.errors import ConfigError

from .conftest import blobs, noise

few = settings(max_examples=40, deadline=None)
any_sampler = st.builds(
    ContourSampler,
    st.sampled_from([1, 7, 30, 100]),
    st.sampled_from(["uniform", "corner"]),
    st.sampled_from(["largest", "all"]),
    st.sampled_from(["box", "centroid", "none"]),
)


def generator(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def filled_components(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected components with their holes filled, each in an image with a rim of one pixel."""
    count, labels = cv2.connectedComponents(np.pad(mask, 1).astype(np.uint8), connectivity=8)
    filled = []
    for i in range(1, count):
        _, outside = cv2.connectedComponents((labels != i).astype(np.uint8), connectivity=4)
        filled.append(outside != outside[0, 0])
    return filled


def rim(filled: np.ndarray) -> set[tuple[int, int]]:
    """(x, y) of the pixels with one of their four neighbours outside, without the rim of the image."""
    eroded = cv2.erode(filled.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    return {(x - 1, y - 1) for y, x in np.argwhere(filled & (eroded == 0)).tolist()}


def pixels(points: np.ndarray) -> list[tuple[int, int]]:
    assert np.array_equal(points % 1, np.full_like(points, 0.5))
    return [tuple(point) for point in (points - 0.5).astype(int).tolist()]


@few
@given(st.one_of(noise(), blobs()), any_sampler)
def test_exactly_k_points_on_contour_pixels_and_the_centre(mask, sampler):
    points = sampler(mask, generator())
    assert points.shape == (sampler.num_keypoints, 2) and points.dtype == np.float32
    assert sampler.num_keypoints == sampler.num_points + (sampler.center != "none")
    components = filled_components(mask)
    if sampler.components == "largest":
        size = max(filled.sum() for filled in components)
        components = [filled for filled in components if filled.sum() == size]
    on_contours = [rim(filled) for filled in components]
    found = set(pixels(points[: sampler.num_points]))
    if sampler.components == "largest":
        assert any(found <= contour for contour in on_contours)
    else:
        assert found <= set().union(*on_contours)
    y, x = np.nonzero(mask)
    centers = {"box": ((x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2), "centroid": (x.mean() + 0.5, y.mean() + 0.5)}
    if sampler.center != "none":
        np.testing.assert_allclose(points[-1], centers[sampler.center], rtol=1e-5)


@few
@given(st.one_of(noise(), blobs()))
def test_contours_are_closed_chains_of_all_outer_border_pixels(mask):
    contours = outer_contours(mask.astype(np.uint8))
    components = filled_components(mask)
    assert len(contours) == len(components)
    sizes = [filled_area(contour) for contour in contours]
    assert sizes == sorted(sizes, reverse=True)
    assert [round(s, 3) for s in sizes] == sorted((max(f.sum(), 1.5) for f in components), reverse=True)
    rims = [rim(filled) for filled in components]
    for contour in contours:
        chain = [tuple(p) for p in contour.tolist()]
        assert set(chain) in rims
        steps = np.abs(np.roll(contour, -1, axis=0) - contour).max(axis=1)
        assert len(contour) == 1 or (steps == 1).all()
        assert chain[0] == min(chain, key=lambda p: (p[1], p[0]))
        assert cv2.contourArea(contour, oriented=True) >= 0  # clockwise on the screen


def test_clockwise_from_the_topmost_then_leftmost_pixel():
    mask = np.zeros((6, 9), bool)
    mask[2:5, 3:7] = True
    points = ContourSampler(10, center="none")(mask, generator())
    top, right, bottom, left = [(3, 2), (4, 2), (5, 2), (6, 2)], [(6, 3)], [(6, 4), (5, 4), (4, 4), (3, 4)], [(3, 3)]
    assert pixels(points) == [*top, *right, *bottom, *left]


@few
@given(blobs(), st.sampled_from([3, 16, 40]))
def test_uniform_points_are_equally_far_apart_along_the_contour(mask, k):
    contour = outer_contours(mask.astype(np.uint8))[0]
    assume(len(contour) > k and len(np.unique(contour, axis=0)) == len(contour))  # else a pixel is in two places of the chain
    points = ContourSampler(k, center="none")(mask, generator())
    place = {tuple(p): i for i, p in enumerate(contour.tolist())}
    index = [place[p] for p in pixels(points)]
    assert index == sorted(index) and index[0] == 0
    steps = np.hypot(*(np.roll(contour, -1, axis=0) - contour).T)
    along = np.concatenate([[0], np.cumsum(steps)])
    spacing = np.diff(np.append(along[index], along[-1]))
    assert np.abs(spacing - along[-1] / k).max() <= np.sqrt(2) + 1e-6  # one pixel of the contour


@few
@given(st.one_of(noise(), blobs()), any_sampler, st.integers(0, 2**31 - 1))
def test_same_mask_and_seed_same_points(mask, sampler, seed):
    points = sampler(mask, generator(seed))
    np.testing.assert_array_equal(points, sampler(mask.copy(), generator(seed)))
    np.testing.assert_array_equal(points, sampler(mask.astype(np.uint8), generator(seed)))


def test_another_seed_repeats_other_points():
    mask = np.ones((5, 5), bool)
    assert not np.array_equal(*(ContourSampler()(mask, generator(seed)) for seed in (0, 1)))


@few
@given(blobs(), st.sampled_from([16, 100]))
def test_mirrored_mask_gives_mirrored_points(mask, k):
    """In the other direction, and from another one of them on."""
    contours = outer_contours(mask.astype(np.uint8))
    largest = sorted(filled_area(contour) for contour in contours)[-2:]
    assume(len(largest) == 1 or largest[0] < largest[1])
    assume(len(contours[0]) > k)  # else points are repeated at random
    sampler = ContourSampler(k)
    points, mirrored = sampler(mask, generator()), sampler(np.ascontiguousarray(mask[:, ::-1]), generator())
    mirrored[:, 0] = mask.shape[1] - mirrored[:, 0]
    np.testing.assert_allclose(points[-1], mirrored[-1])
    backwards = mirrored[-2::-1]
    farthest = [np.linalg.norm(points[:-1] - np.roll(backwards, shift, axis=0), axis=1).max() for shift in range(k)]
    one_step = max(arc_positions(contours[0])[-1] / k, 2 * np.sqrt(2))  # points of short steps move by a pixel each
    assert min(farthest) <= one_step


@few
@given(noise(), st.integers(0, 100))
def test_moved_mask_gives_moved_points(mask, seed):
    moved = np.pad(mask, ((7, 2), (11, 3)))
    for sampler in (ContourSampler(20), ContourSampler(20, "corner", "all", "centroid")):
        np.testing.assert_allclose(
            sampler(moved, generator(seed)), sampler(mask, generator(seed)) + np.float32((11, 7)), rtol=1e-6
        )


@pytest.mark.parametrize("sampling", ["uniform", "corner"])
@pytest.mark.parametrize("at", [(0, 0), (0, 19), (9, 0), (9, 19), (4, 7)])
def test_one_pixel(sampling, at):
    mask = np.zeros((10, 20), bool)
    mask[at] = True
    points = ContourSampler(sampling=sampling)(mask, generator())
    np.testing.assert_array_equal(points, np.tile((at[1] + 0.5, at[0] + 0.5), (101, 1)))


def test_few_contour_pixels_all_come_and_repeats_lie_beside_their_originals():
    mask = np.ones((4, 4), bool)  # 12 contour pixels
    found = pixels(ContourSampler(100, center="none")(mask, generator()))
    assert len(set(found)) == 12
    assert sum(a != b for a, b in zip(found, found[1:], strict=False)) == 11


def test_hole_does_not_count():
    mask = np.ones((40, 40), bool)
    whole = ContourSampler(30, center="none")(mask, generator())
    mask[10:30, 5:35] = False
    np.testing.assert_array_equal(ContourSampler(30, center="none")(mask, generator()), whole)
    np.testing.assert_array_equal(
        ContourSampler(30, "corner", center="none")(mask, generator()),
        ContourSampler(30, "corner", center="none")(np.ones((40, 40), bool), generator()),
    )


def test_mask_that_fills_the_image_has_its_contour_along_the_border():
    points = ContourSampler(100)(np.ones((33, 51), bool), generator())
    x, y = (points[:100] - 0.5).T
    assert ((x == 0) | (x == 50) | (y == 0) | (y == 32)).all() and tuple(points[100]) == (25.5, 16.5)
    assert {(0, 0), (50, 0), (50, 32), (0, 32)} <= set(
        pixels(ContourSampler(100, "corner")(np.ones((33, 51), bool), generator())[:100])
    )


def test_components():
    mask = np.zeros((60, 100), bool)
    mask[5:35, 10:40] = True  # perimeter 4 * 29
    mask[10:15, 15:20] = False  # a hole ...
    mask[12, 17] = True  # ... with an island in it, which counts as 1
    mask[40:50, 70:80] = True  # perimeter 4 * 9
    largest = pixels(ContourSampler(153, center="none")(mask, generator()))
    assert len(set(largest)) == 116 and all(10 <= x < 40 and (x, y) != (17, 12) for x, y in largest)
    shared = pixels(ContourSampler(153, components="all", center="none")(mask, generator()))
    assert set(shared[:116]) == set(largest)
    assert all(x >= 70 for x, _ in shared[116:152]) and len(set(shared[116:152])) == 36 and shared[152] == (17, 12)
    # The centre is the whole mask's in both.
    for components in ("largest", "all"):
        np.testing.assert_array_equal(ContourSampler(80, components=components)(mask, generator())[-1], [45, 27.5])


def test_far_specks_change_no_corner_points():
    mask = np.zeros((1100, 1300), bool)
    corners = [(1000, 900), (1060, 905), (1020, 970)]
    cv2.fillPoly(mask.view(np.uint8), [np.array(corners)], 1)
    sampler = ContourSampler(6, "corner", center="none")
    expected = sampler(mask, generator())
    assert set(corners) <= set(pixels(expected))
    mask[0, 0] = mask[1099, 1299] = True
    np.testing.assert_array_equal(sampler(mask, generator()), expected)


def test_components_share_corner_points_by_perimeter():
    mask = np.zeros((60, 100), bool)
    mask[5:35, 10:40] = True  # perimeter 4 * 29
    mask[40:50, 70:80] = True  # perimeter 4 * 9
    found = pixels(ContourSampler(38, "corner", "all", "none")(mask, generator()))
    assert all(x < 40 for x, _ in found[:29]) and all(x >= 70 for x, _ in found[29:])
    assert {(10, 5), (39, 5), (39, 34), (10, 34), (70, 40), (79, 40), (79, 49), (70, 49)} <= set(found)


def test_line_counts_as_many_pixels_as_it_has():
    mask = np.zeros((30, 30), bool)
    mask[3, 2:12] = True  # 10 pixels
    mask[20:23, 20:23] = True  # 9
    assert ContourSampler(5)(mask, generator())[:5, 1].max() == 3.5


def test_corners_of_shapes_small_and_large():
    for size in (30, 900):
        mask = np.zeros((1000, 1200), bool)
        triangle = np.array([[20, 20], [20 + size, 30], [40, 20 + size]])
        cv2.fillPoly(mask.view(np.uint8), [triangle], 1)
        found = ContourSampler(3, "corner", center="none")(mask, generator())
        assert found.shape == (3, 2)
        for corner in triangle:
            assert np.abs(found - corner - 0.5).max(axis=1).min() <= 1 + size // 128


def test_corner_points_come_in_contour_order():
    (contour,) = outer_contours(np.pad(np.ones((20, 30), np.uint8), 5))
    found = corner_points(contour, 4, generator()).tolist()
    assert found == [[5, 5], [34, 5], [34, 24], [5, 24]]


def test_arithmetic_by_hand():
    contour = np.array([[0, 0], [1, 0], [1, 1]])
    np.testing.assert_allclose(arc_positions(contour), [0, 1, 2, 2 + 2**0.5])
    assert nearest(np.array([0.0, 1.0, 3.0]), np.array([0.4, 0.6, 1.9, 2.1, 9.0])).tolist() == [0, 1, 1, 2, 2]
    assert apportion(10, [1, 1, 1]).tolist() == [4, 3, 3] and apportion(4, [5, 2, 1]).tolist() == [3, 1, 0]
    assert padded(np.array([2, 5]), 2, generator()).tolist() == [2, 5]
    (square,) = outer_contours(np.ones((4, 4), np.uint8))
    assert uniform_points(square, 4, generator()).tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]


@pytest.mark.parametrize(
    "wrong", [{"num_points": 0}, {"sampling": "random"}, {"components": "some"}, {"center": "mass"}], ids=str
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match="MODEL.MASKPOINT." + next(iter(wrong)).upper()):
        ContourSampler(**wrong)


def test_empty_mask_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ContourSampler()(np.zeros((4, 4), bool), generator())


def test_masks_of_other_types_are_refused():
    for dtype in (np.int32, np.float32, np.int8):
        with pytest.raises(ValueError, match=f"{np.dtype(dtype)}: expected bool or uint8"):
            ContourSampler()(np.ones((4, 4), dtype), generator())


@few
@given(st.one_of(noise(), blobs()))
def test_the_largest_component_alone(mask):
    every, (largest,) = outer_contours(mask.astype(np.uint8)), outer_contours(mask.astype(np.uint8), only_largest=True)
    assert filled_area(largest) == filled_area(every[0]) and any(np.array_equal(largest, contour) for contour in every)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "corner"])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("radius", [10, 100, 480])
def test_a_millisecond_at_the_size_of_cityscapes(sampling, holes, radius):
    y, x = np.mgrid[:1024, :2048]
    angle = np.arctan2(y - 512, x - 1024)
    mask = np.hypot(y - 512, (x - 1024) / 2) < radius * (0.85 + 0.1 * np.sin(7 * angle) + 0.05 * np.sin(31 * angle))
    if holes:  # of 8 x 8, one in every square of 32 x 32
        mask &= (y % 32 >= 8) | (x % 32 >= 8)
    sampler, threads, times = ContourSampler(sampling=sampling), cv2.getNumThreads(), []
    cv2.setNumThreads(1)
    for _ in range(100):
        start = time.process_time()
        sampler(mask, generator())
        times.append(time.process_time() - start)
    cv2.setNumThreads(threads)
    assert statistics.median(times) <= 1e-3
