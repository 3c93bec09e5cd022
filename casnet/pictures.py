"""Pictures of the common attributes, as the paper's figures 1(b) and 3 show them.

Shapes: H x W pixels of the image, h x w cells of the grid.
"""

import numpy as np
import torch
from torch import Tensor

from projects.canvas import Canvas, distinct_colors
from projects.visualization import titled

from .postprocess import cell_of_pixels, centers, predicted_boxes

SIDES = ("left", "top", "right", "bottom")
SEED_COLOR = (255, 255, 255)


def attribute_pictures(image: np.ndarray, output: dict) -> list[np.ndarray]:
    """Six titled pictures: the four distances (brighter is farther, black is 0, white the greatest of all four), the predicted
    centres, and the seeds.

    Args:
        image: (H, W, 3) RGB uint8.
        output: of CASNet, for this image.
    """
    size, attributes = image.shape[:2], output["common_attributes"]
    drawn = [*distance_maps(size, attributes), centre_picture(image, output), seed_picture(image, output)]
    titles = [
        f"distance to the {side}, up to {pixels:.0f} pixels"
        for side, pixels in zip(SIDES, farthest(size, attributes), strict=True)
    ]
    titles += ["predicted centres" if len(output["instances"]) else "predicted centres: no instances"]
    titles += ["seeds and their boxes" if len(attributes["seeds"].cells) else "seeds and their boxes: none"]
    return [titled(picture, title) for picture, title in zip(drawn, titles, strict=True)]


def distance_maps(size: tuple[int, int], attributes: dict) -> list[np.ndarray]:
    """Figure 3 (b), (c), (f), (e): l, t, r, b as gray pictures (S*H, S*W, 3); S as in :class:`projects.canvas.Canvas`."""
    of_pixels = distances_of_pixels(size, attributes)
    greatest = of_pixels.amax().clamp(min=torch.finfo(of_pixels.dtype).tiny)
    gray = (of_pixels / greatest * 255).round().to(torch.uint8)
    return [Canvas(np.repeat(side.numpy()[:, :, None], 3, axis=2)).pixels for side in gray]


def distances_of_pixels(size: tuple[int, int], attributes: dict) -> Tensor:
    """(4, H, W): l, t, r, b, in cells, of the cell that each pixel of the image lies in."""
    distances = attributes["distances"].cpu()
    return distances.flatten(1)[:, cell_of_pixels(size, attributes["grid_size"], distances.shape[1:])]


def farthest(size: tuple[int, int], attributes: dict) -> list[float]:
    """The greatest l, t, r, b in the image, in its pixels."""
    (left, top, right, bottom) = distances_of_pixels(size, attributes).flatten(1).amax(dim=1)
    x, y = scaled((torch.stack([left, right]), torch.stack([top, bottom])), size, attributes["grid_size"])
    return [x[0].item(), y[0].item(), x[1].item(), y[1].item()]


def centre_picture(image: np.ndarray, output: dict) -> np.ndarray:
    """Figure 1 (b): the centre of the box that every cell of an instance predicts, in the colour of the instance."""
    canvas, attributes = Canvas(image), output["common_attributes"]
    x, y = scaled(centers(predicted_boxes(attributes["distances"].cpu())), image.shape[:2], attributes["grid_size"])
    cells = cell_of_pixels(image.shape[:2], attributes["grid_size"], attributes["distances"].shape[1:])
    masks, colors = output["instances"].pred_masks.cpu(), distinct_colors()
    for i, mask in enumerate(masks):
        canvas.mask(mask.numpy(), colors[i % len(colors)], alpha=0.3)
    for i, mask in enumerate(masks):
        for cell in cells[mask].unique().tolist():
            canvas.point(np.array([x[cell], y[cell]]), colors[i % len(colors)])
    return canvas.picture()


def seed_picture(image: np.ndarray, output: dict) -> np.ndarray:
    """The seeds that passed threshold and NMS, and the boxes that they predict; those that no pixel supports are there too."""
    canvas, attributes, colors = Canvas(image), output["common_attributes"], distinct_colors()
    seeds, grid_size = attributes["seeds"], attributes["grid_size"]
    (left, top), (right, bottom) = (
        scaled(seeds.boxes.cpu()[:, corner].unbind(1), image.shape[:2], grid_size) for corner in ([0, 1], [2, 3])
    )
    width = attributes["distances"].shape[2]
    cells = seeds.cells.cpu()
    x, y = scaled((cells % width + 0.5, cells // width + 0.5), image.shape[:2], grid_size)
    boxes = torch.stack([left, top, right, bottom], dim=1).numpy()
    for box, category in zip(boxes, seeds.classes.tolist(), strict=True):
        canvas.box(box, colors[category % len(colors)])
    for point in torch.stack([x, y], dim=1).numpy():
        canvas.point(point, SEED_COLOR)
    return canvas.picture()


def scaled(points: tuple[Tensor, Tensor], size: tuple[int, int], grid_size: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """x and y in cells -> in pixels of an image of `size` (height, width) that is `grid_size` cells large."""
    x, y = points
    return x * (size[1] / grid_size[1]), y * (size[0] / grid_size[0])
