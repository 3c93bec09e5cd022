"""Pictures whose pixels are ids, and the masks in them.

H, W: height and width in pixels. Boxes are [x0, y0, x1, y1] in image pixels (XYXY_ABS), pixel i covering [i, i+1).
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from projects.errors import DataError


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(W, H) from the file's header. Raises DataError naming a file that has none."""
    with _opened(path) as image:
        return image.size


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """The pixels as they stand in the file, (H, W) or (H, W, channels). Raises DataError naming one that is damaged."""
    with _opened(path) as image:
        return np.asarray(image)


def read_id_map(path: str | os.PathLike) -> np.ndarray:
    """The ids (H, W) of a picture with one channel of 8, 16 or 32 bits, or with several equal ones.

    Raises DataError naming a file that is missing, cut off, or of another form.
    """
    pixels = read_pixels(path)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        raise DataError(f"{path}: expected one channel of whole numbers (ids), found {pixels.shape} of {pixels.dtype}.")
    return pixels


def objects_of(ids: np.ndarray, wanted: list[int]) -> list[dict]:
    """The mask of each wanted id in a map (H, W), whatever its parts and holes.

    Returns:
        per id that occurs a dict of "id"; "bbox", tight around its pixels, so at least one pixel wide and high; and
        "segmentation", compressed RLE of the whole image with its counts as text.
    """
    columns = np.asfortranarray(ids)  # as RLE runs
    objects = []
    for value in wanted:
        rle = mask_util.encode((columns == value).view(np.uint8))
        x, y, width, height = (int(number) for number in mask_util.toBbox(rle))
        if width:
            rle = {"size": list(ids.shape), "counts": rle["counts"].decode("ascii")}
            objects.append({"id": int(value), "bbox": [x, y, x + width, y + height], "segmentation": rle})
    return objects


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A picture; what Pillow makes of a damaged file, here or in the body, becomes a DataError."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{path} cannot be read: {reason}. Fetch or write it again.") from error
