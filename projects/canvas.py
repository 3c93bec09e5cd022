"""A picture that masks, boxes, points and labels are painted on, pixel by pixel, in exact colours.

Coordinates given to a canvas are image pixels, pixel i covers [i, i+1); the canvas multiplies them by S, the
whole number by which it enlarges a small image before anything is painted. Colours are (R, G, B) in 0..255.
"""

from functools import lru_cache

import cv2
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

SHORT_SIDE = 400  # images with a shorter side than this are enlarged ...
LONG_SIDE = 2000  # ... but not beyond this
LABEL_OVERLAP = 0.15  # a label of which earlier ones would take more than this part is left out


class Canvas:
    """Paint on a copy of an image.

    Attributes:
        scale: S; the picture is (S*H, S*W).
        pixels: the picture so far, (S*H, S*W, 3) RGB uint8, without the labels, which come last.
    """

    def __init__(self, image: np.ndarray):
        """``image``: (H, W, 3) RGB uint8. Raises ValueError for anything else."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"expected an image of (H, W, 3) uint8, found {image.shape} {image.dtype}")
        short, long = sorted(image.shape[:2])
        self.scale = max(1, min(-(-SHORT_SIDE // short), LONG_SIDE // long))
        self.pixels = self._enlarge(image).copy()
        self._line = max(1, round(min(self.pixels.shape[:2]) / 500))
        self._boxes: list[list[int]] = []
        self._labels: list[tuple[str, Color, list[int]]] = []

    def mask(self, mask: np.ndarray, color: Color, alpha: float) -> None:
        """Fill an (H, W) bool mask with opacity ``alpha`` and draw its contours, those of its holes too."""
        large = (self._enlarge(mask.astype(np.uint8) * 255) >= 128).astype(np.uint8)
        x, y, width, height = cv2.boundingRect(large)
        inside = large[y : y + height, x : x + width]
        region = self.pixels[y : y + height, x : x + width]
        blend = region[inside > 0] * (1 - alpha) + np.array(color) * alpha
        region[inside > 0] = np.rint(blend).astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(self.pixels, contours, -1, color, self._line + 1, offset=(x, y))

    def box(self, box: np.ndarray, color: Color) -> None:
        """Outline a box (x0, y0, x1, y1); the line lies inside it."""
        x0, y0, x1, y1 = self._corners(box)
        self._boxes.append([x0, y0, x1, y1])
        for inset in range(self._line):
            far = max(x1 - 1 - inset, x0), max(y1 - 1 - inset, y0)
            cv2.rectangle(self.pixels, (x0 + inset, y0 + inset), far, color)

    def point(self, point: np.ndarray, color: Color) -> None:
        """A dot with a dark rim at (x, y)."""
        center = self._pixel(point)
        cv2.circle(self.pixels, center, 2 * self._line + 2, (0, 0, 0), cv2.FILLED)
        cv2.circle(self.pixels, center, 2 * self._line + 1, color, cv2.FILLED)

    def line(self, start: np.ndarray, end: np.ndarray, color: Color) -> None:
        """A straight line from (x, y) to (x, y)."""
        cv2.line(self.pixels, self._pixel(start), self._pixel(end), color, self._line + 1)

    def label(self, text: str, color: Color, at: np.ndarray) -> None:
        """A text on ``color`` at a box (x0, y0, x1, y1), or in the middle of it when it is a point (x, y)."""
        self._labels.append((text, color, self._corners(at)))

    def picture(self) -> np.ndarray:
        """The finished picture, (S*H, S*W, 3) RGB uint8. Labels lie where they hide least."""
        image = Image.fromarray(self.pixels)
        pen = ImageDraw.Draw(image)
        face = font(round(np.clip(min(image.size) / 36, 12, 18)))
        boxes, taken = np.reshape(self._boxes, (-1, 4)).astype(int), np.zeros((0, 4), int)
        for text, color, at in self._labels:
            size = round(face.getlength(text)) + 6, sum(face.getmetrics())
            places = _label_places(size, at, image.size)
            hidden = _common_area(places, taken).sum(axis=1) / (size[0] * size[1])
            covers = (_common_area(places, boxes) / _area(boxes).clip(1)).max(axis=1, initial=0)
            best = (2 * hidden + 0.5 * covers).argmin()
            if hidden[best] <= LABEL_OVERLAP:
                taken = np.vstack([taken, places[best]])
                pen.rectangle((places[best] - (0, 0, 1, 1)).tolist(), fill=color)
                pen.text((places[best, 0] + 3, places[best, 1]), text, fill=readable_on(color), font=face)
        return np.array(image)

    def _enlarge(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        return cv2.resize(pixels, (width * self.scale, height * self.scale), interpolation=cv2.INTER_LINEAR)

    def _corners(self, box: np.ndarray) -> list[int]:
        return np.rint(np.clip(box, -1e6, 1e6) * self.scale).astype(int).tolist()

    def _pixel(self, point: np.ndarray) -> tuple[int, int]:
        x, y = np.floor(np.clip(point[:2], -1e6, 1e6) * self.scale).astype(int).tolist()
        return x, y


def _label_places(size: tuple[int, int], at: list[int], picture: tuple[int, int]) -> np.ndarray:
    """Where a label of ``size`` (width, height) may lie in the picture: (M, 4) x0 y0 x1 y1, best first."""
    width, height = size
    if len(at) == 4:
        x0, y0, x1, y1 = at
        corners = [(x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x1 - width, y0), (x0, y1)]
        corners += [(x0, y1 - height), (x1 - width, y1 - height)]
        corners += [(x1, y0), (x0 - width, y0), (x1 - width, y1)]
    else:
        x, y = at[0] - width // 2, at[1] - height // 2
        corners = [(x, y), (x, y - height), (x, y + height), (x, y - 2 * height), (x, y + 2 * height)]
    corners = np.clip(corners, 0, np.maximum(np.subtract(picture, size), 0))
    return np.hstack([corners, corners + size])


def _common_area(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area that each of the boxes ``a`` (M, 4) has in common with each of ``b`` (N, 4): (M, N)."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(0).prod(axis=2)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1)


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, ``size`` pixels high."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def readable_on(color: Color) -> Color:
    """Black or white, whichever reads better on ``color`` (ITU-R BT.601 luma)."""
    return (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)


@lru_cache
def distinct_colors(count: int = 48) -> tuple[Color, ...]:
    """Vivid colours, each as far as can be (in CIELAB) from all before it."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[:, 0]
    vivid = (lab[:, 0] > 45) & (lab[:, 0] < 92) & (np.linalg.norm(lab[:, 1:], axis=1) > 45)
    rgb, lab = rgb[vivid, 0], lab[vivid]
    chosen = [int(np.argmax(lab[:, 1]))]
    distance = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    while len(chosen) < count:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple(tuple(c) for c in rgb[chosen].tolist())
