"""A model over many images: lists, folders, videos.

For one image at a time Detectron2's ``DefaultPredictor`` works with every config of this project.
BatchedPredictor prepares images as it does, reads ahead in threads, and gives the model several at once.
As there, images are BGR uint8 arrays of shape (H, W, 3).
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from os import PathLike
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image

from .engine.checkpoint import Checkpointer
from .errors import ConfigError, DataError
from .modeling.build import build_model

logger = logging.getLogger(__name__)

Item = str | PathLike | np.ndarray


class BatchedPredictor:
    """Run the model of a config over any number of images.

    Attributes:
        model: in eval mode, on MODEL.DEVICE (the CPU when that names a GPU and there is none).
        metadata: of the first data set of DATASETS.TEST; empty when there is none.
    """

    def __init__(self, cfg: CfgNode, batch_size: int = 1, threads: int = 2, trust: bool = False):
        """
        Args:
            cfg: with MODEL.WEIGHTS; "" leaves the model as it was initialised.
            batch_size: images per call of the model. Padding them to one size can move the results a little.
            threads: that read and resize images ahead.
            trust: load weights files that can run code.

        Raises:
            ConfigError: INPUT.FORMAT is neither RGB nor BGR, or ``batch_size`` or ``threads`` is below 1.
            CheckpointError: the weights cannot be loaded, or leave a part of the model unfilled.
        """
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ConfigError(f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}'; predictors read images as RGB or BGR.")
        if batch_size < 1 or threads < 1:
            raise ConfigError(f"Batch size and threads must be at least 1, not {batch_size} and {threads}.")
        cfg = cfg.clone()
        cfg.defrost()
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            logger.info("MODEL.DEVICE is '%s' and there is no GPU: using the CPU", cfg.MODEL.DEVICE)
            cfg.MODEL.DEVICE = "cpu"
        self.batch_size, self.threads = batch_size, threads
        self.model = build_model(cfg).eval()
        checkpointer = Checkpointer(self.model, trust=trust)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        if cfg.MODEL.WEIGHTS:
            checkpointer.refuse_unloaded(cfg.MODEL.WEIGHTS)
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__none__")
        short_side = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
        self._resize = T.ResizeShortestEdge(short_side, cfg.INPUT.MAX_SIZE_TEST)
        self._input_format = cfg.INPUT.FORMAT

    def __call__(self, items: Iterable[Item]) -> Iterator[tuple[Item, dict[str, Any] | Exception]]:
        """Predict for every item, in their order.

        Args:
            items: paths of image files, or (H, W, 3) BGR uint8 arrays such as the frames of a :class:`Video`.

        Yields:
            The item and the model's output for it, in pixels of the image as it was read and on the model's
            device; or the item and the exception that reading it raised.
        """
        with closing(self._read_ahead(items)) as reading:
            while batch := list(islice(reading, self.batch_size)):
                inputs = [future.result() for _, future in batch if future.exception() is None]
                with torch.no_grad():
                    outputs = iter(self.model(inputs) if inputs else ())
                for item, future in batch:
                    yield item, future.exception() or next(outputs)

    def _read_ahead(self, items: Iterable[Item]) -> Iterator[tuple[Item, Future]]:
        """Items and their inputs in the making, of which two batches are under way."""
        pool = ThreadPoolExecutor(self.threads)
        try:
            waiting: deque[tuple[Item, Future]] = deque()
            for item in items:
                waiting.append((item, pool.submit(self._model_input, item)))
                if len(waiting) > 2 * self.batch_size:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)

    def _model_input(self, item: Item) -> dict[str, Any]:
        """ "image" (3, h, w) float32, resized, and the "height" and "width" of the original."""
        image = item if isinstance(item, np.ndarray) else read_image(str(item), "BGR")
        if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"expected an image of shape (H, W, 3), found {image.shape}")
        if self._input_format == "RGB":
            image = image[:, :, ::-1]
        height, width = image.shape[:2]
        resized = self._resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


class Video:
    """The frames of a video file, (H, W, 3) BGR uint8 each; every ``iter()`` starts from the first.

    Attributes:
        frames_per_second: as the file states it; 25 where it does not.
        frame_count: as the file states it, which may be an estimate; 0 where it does not.
    """

    def __init__(self, path: str | PathLike):
        """Raises DataError when the file does not open as a video."""
        self.path = str(path)
        capture = self._open()
        self.frames_per_second = capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.frame_count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        capture, count = self._open(), 0
        try:
            while True:
                more, frame = capture.read()
                if not more:
                    break
                count += 1
                yield frame
        finally:
            capture.release()
        if count < self.frame_count:
            logger.warning("%s: %d of %d frames could be read", self.path, count, self.frame_count)

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(self.path)
        if not capture.isOpened():
            raise DataError(f"'{self.path}' does not open as a video: missing, damaged or of unknown format.")
        return capture


def write_video(path: str | PathLike, frames: Iterable[np.ndarray], frames_per_second: float) -> int:
    """Write (H, W, 3) RGB uint8 frames, all of one size, as an MP4 (MPEG-4) file.

    A side of an odd length loses a pixel, since the format knows even ones only.

    Returns:
        The number of frames.

    Raises:
        DataError: there are no frames, or the file cannot be written.
    """
    writer, count = None, 0
    try:
        for frame in frames:
            height, width = (side // 2 * 2 for side in frame.shape[:2])
            if writer is None:
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), frames_per_second, (width, height))
            if not writer.isOpened():
                raise DataError(f"The video '{path}' cannot be written: is there such a folder, and space?")
            writer.write(np.ascontiguousarray(frame[:height, :width, ::-1]))
            count += 1
    finally:
        if writer is not None:
            writer.release()
    if count == 0:
        raise DataError(f"There are no frames for the video '{path}'.")
    return count
