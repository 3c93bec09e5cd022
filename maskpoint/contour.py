"""Boundary point extraction (sections III-C and IV-D, figure 3): a fixed number of points on the contour of a mask.

Letters: H, W height and width of the image; P pixels of a contour; k points on it; K key points, k and the centre. Points are
(x, y) in image pixels, pixel i covers [i, i + 1), so that a point on a contour pixel has its index + 0.5.

The paper cites marching cubes [32] for the contour; here it is the chain of border pixels that cv2.findContours follows.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.config import CfgNode

from projects.errors import ConfigError

SAMPLINGS = ("uniform", "corner")
COMPONENTS = ("largest", "all")
CENTERS = ("box", "centroid", "none")

CORNER_SIDE = 128  # larger shapes are shrunk to this to find their corners: finer than the heat maps (56), and always quick
CORNER_MARGIN = 4  # empty pixels around the shape, more than the corner detector's window
CORNER_QUALITY = 0.01  # of the best corner, and ...
CORNER_DISTANCE = 1  # ... pixels between corners: OpenCV's tutorial and nothing to spread them


@dataclass(frozen=True)
class ContourSampler:
    """Makes the key points of a mask: the same ones for the same mask and generator.

    Attributes:
        num_points: k.
        sampling: "uniform" (equal distances along the contour) or "corner".
        components: "largest", or "all", which shares the points out by perimeter.
        center: "box" or "centroid" of the whole mask, which follows the k points, or "none".
    """

    num_points: int = 100
    sampling: str = "uniform"
    components: str = "largest"
    center: str = "box"

    def __post_init__(self):
        """Raises ConfigError for a value that is not listed above."""
        if self.num_points < 1:
            raise ConfigError(f"MODEL.MASKPOINT.NUM_POINTS is {self.num_points}: expected at least 1, the paper's k is 100.")
        for key, value, known in (
            ("SAMPLING", self.sampling, SAMPLINGS),
            ("COMPONENTS", self.components, COMPONENTS),
            ("CENTER", self.center, CENTERS),
        ):
            if value not in known:
                raise ConfigError(f"MODEL.MASKPOINT.{key} is '{value}': expected one of {', '.join(known)}.")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ContourSampler":
        maskpoint = cfg.MODEL.MASKPOINT
        return cls(maskpoint.NUM_POINTS, maskpoint.SAMPLING, maskpoint.COMPONENTS, maskpoint.CENTER)

    @property
    def num_keypoints(self) -> int:
        """K: k, and one more for the centre."""
        return self.num_points + (self.center != "none")

    def __call__(self, mask: np.ndarray, generator: np.random.RandomState) -> np.ndarray:
        """Sample a mask.

        Where the contour has fewer pixels than it should give points, all of them come, and random ones of them again,
        each beside its original.

        Args:
            mask: (H, W) bool or uint8, non-zero inside, not empty; one pixel is enough.
            generator: draws the repeated points.

        Returns:
            (K, 2) float32: k contour points clockwise from the topmost, then leftmost pixel, and the centre.

        Raises:
            ValueError: the mask is empty, or of another type.
        """
        if mask.dtype not in (np.bool_, np.uint8):
            raise ValueError(f"a mask of {mask.dtype}: expected bool or uint8")
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        if not width:
            raise ValueError("an empty mask has no contour")
        crop = mask.view(np.uint8)[y : y + height, x : x + width]
        contours = outer_contours(crop, only_largest=self.components == "largest")
        sample = uniform_points if self.sampling == "uniform" else corner_points
        shares = apportion(self.num_points, [max(cv2.arcLength(contour, closed=True), 1) for contour in contours])
        points = [sample(contour, share, generator) for contour, share in zip(contours, shares, strict=True) if share]
        points = np.concatenate(points) + 0.5
        if self.center == "box":
            points = np.vstack([points, (width / 2, height / 2)])
        elif self.center == "centroid":
            points = np.vstack([points, centroid(crop)])
        return (points + (x, y)).astype(np.float32)


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """The mean (x, y) of the pixels of a mask (H, W) uint8, which has one value inside and 0 outside."""
    columns, rows = (cv2.reduce(mask, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel() for axis in (0, 1))
    return tuple(np.average(np.arange(len(sums)) + 0.5, weights=sums) for sums in (columns, rows))


def outer_contours(mask: np.ndarray, only_largest: bool = False) -> list[np.ndarray]:
    """The outer contours of the 8-connected components of a mask (H, W) uint8, that of the largest component first, or alone.

    Returns:
        (P, 2) int32 each: x, y of the border pixels clockwise from the topmost, then leftmost one; each is a neighbour of the
        next, and the last of the first. Where a component is one pixel wide, its pixels come twice, once per direction.
    """
    if only_largest:  # which lies in no hole
        outer = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        outer = [max(outer, key=filled_area)]
    else:
        found, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        outer = [c for c, (*_, parent) in zip(found, hierarchy[0], strict=True) if parent < 0]  # those with one are of holes
        outer.sort(key=filled_area, reverse=True)
    return [np.roll(c[::-1, 0], 1, axis=0) for c in outer]  # OpenCV goes anticlockwise (on the screen) from the same pixel


def filled_area(contour: np.ndarray) -> float:
    """How many pixels a contour encloses, itself included (Pick's theorem); 1.5 for a single pixel."""
    return cv2.contourArea(contour) + len(contour) / 2 + 1


def uniform_points(contour: np.ndarray, count: int, generator: np.random.RandomState) -> np.ndarray:
    """``count`` pixels of a contour (P, 2) at equal distances along it: (count, 2) int32."""
    if len(contour) <= count:
        return contour[padded(np.arange(len(contour)), count, generator)]
    arc = arc_positions(contour)
    return contour[nearest(arc, np.arange(count) * arc[-1] / count) % len(contour)]


def corner_points(contour: np.ndarray, count: int, generator: np.random.RandomState) -> np.ndarray:
    """``count`` pixels of a contour (P, 2) nearest to the shape's strongest corners, in contour order: (count, 2) int32.

    The shape is what the contour encloses, without its holes. Corners with the same nearest pixel repeat it.
    """
    origin = contour.min(axis=0)
    shrink = -(-int((contour - origin).max() + 1) // CORNER_SIDE)
    chain = contour[::shrink]
    small = (chain - origin) // shrink + CORNER_MARGIN
    width, height = small.max(axis=0) + 1 + CORNER_MARGIN
    shape = np.zeros((height, width), np.uint8)
    cv2.drawContours(shape, [small], -1, 255, cv2.FILLED)
    corners = cv2.goodFeaturesToTrack(shape, count, CORNER_QUALITY, CORNER_DISTANCE)
    on_contour = small.astype(np.float32)
    # |a - b|^2 without |a|^2, which is the same for every b
    distances = (on_contour**2).sum(axis=1) - 2 * corners[:, 0] @ on_contour.T
    return chain[padded(distances.argmin(axis=1), count, generator)]


def arc_positions(contour: np.ndarray) -> np.ndarray:
    """Where along the closed contour its pixels lie: (P + 1) from 0 to its length, steps of 1 and of the square root of 2."""
    steps = np.abs(np.diff(contour, axis=0, append=contour[:1])).sum(axis=1)  # 0, 1 or 2
    return np.concatenate([[0.0], np.cumsum(np.sqrt(steps))])


def nearest(sorted_values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For each target the index of the nearest value."""
    return np.searchsorted((sorted_values[1:] + sorted_values[:-1]) / 2, targets)


def padded(indices: np.ndarray, count: int, generator: np.random.RandomState) -> np.ndarray:
    """Indices in order, filled up to ``count`` with random ones of them, each beside its original (section III-C)."""
    repeats = generator.randint(len(indices), size=count - len(indices))
    return np.sort(np.concatenate([indices, indices[repeats]]))


def apportion(count: int, weights: list[float]) -> np.ndarray:
    """Whole numbers in proportion to the weights whose sum is ``count`` (largest remainders; ties to the first)."""
    quotas = count * np.array(weights) / sum(weights)
    shares = quotas.astype(int)
    leftover = np.argsort(shares - quotas, kind="stable")[: count - shares.sum()]
    shares[leftover] += 1
    return shares
