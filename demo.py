#!/usr/bin/env python
"""Draw what a model finds in images, folders and videos.

    python demo.py --config-file configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml --weights model_final.pth \\
        --input photo.jpg folder 'more/*.png' clip.mp4 --output pictures

Leaves in --output a picture per image, a video per video, and predictions.json: a list in COCO's results
format (image_id, category_id, bbox, score, segmentation as RLE), each with the file_name of its image and, of
a video, the frame, from 0. With --maps a picture also has, one below the other, the maps that Mask Point R-CNN
makes of every detection, in their boxes: the sum of the key points' heat maps, and the fused mask.

Exit codes: 0 everything was processed; 1 some inputs could not be read, or their pictures not written (they
are listed at the end); 2 something in the command, config or weights must be put right.
"""

import argparse
import glob
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, Metadata
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from casnet.pictures import attribute_pictures
from projects import load_config
from projects.data.check import register_own_datasets
from projects.engine.launch import guarded
from projects.errors import CheckpointError, ConfigError, DataError
from projects.predictor import BatchedPredictor, Video, write_video
from projects.visualization import contact_sheet, draw, draw_maps, segments_of_ids, titled

logger = logging.getLogger("demo")

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAPS = {  # --maps
    "pred_point_maps": "sum of the key points' heat maps (black: high)",
    "pred_fused_maps": "mask of the class, fused (black: high)",
}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--config-file", required=True, help="YAML file that the weights were trained with")
    parser.add_argument("--weights", default="", help="weights file (default: the config's MODEL.WEIGHTS)")
    parser.add_argument("--input", nargs="+", required=True, help="images, videos, folders, patterns")
    parser.add_argument("--output", required=True, type=Path, help="folder for pictures and predictions.json")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="leave out what scores lower")
    parser.add_argument("--batch-size", type=int, default=1, help="images per call of the model")
    parser.add_argument("--color-by", choices=("instance", "class"), default="instance")
    parser.add_argument("--maps", action="store_true", help="Mask Point R-CNN: draw the maps of every detection below, too")
    parser.add_argument("--attributes", action="store_true", help="CASNet: draw distances, centres and seeds below, too")
    parser.add_argument("--trust", action="store_true", help="load weights that may run code")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override config keys")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    if not cfg.MODEL.WEIGHTS:
        raise CheckpointError(f"'{args.config_file}' names no weights: pass some with --weights.")
    if not 0 <= args.score_threshold <= 1:
        raise ConfigError(f"--score-threshold is {args.score_threshold}; scores lie between 0 and 1.")
    if args.maps:
        if cfg.MODEL.ROI_HEADS.NAME != "MaskPointROIHeads":
            raise ConfigError(f"--maps wants MaskPointROIHeads; the heads of '{args.config_file}' have no maps to draw.")
        cfg.MODEL.MASKPOINT.KEEP_MAPS = True
    if args.attributes and cfg.MODEL.META_ARCHITECTURE != "CASNet":
        raise ConfigError(f"--attributes wants CASNet; '{args.config_file}' is a {cfg.MODEL.META_ARCHITECTURE}.")
    files, failures = find_inputs(args.input, args.output)
    if not files:
        raise DataError("Nothing to see: " + "; ".join(f"{name}: {why}" for name, why in failures.items()))
    targets = plan_outputs(files, args.output)
    register_own_datasets(cfg)
    demo = Demo(BatchedPredictor(cfg, args.batch_size, trust=args.trust), args.score_threshold, args.color_by, args.maps)
    demo.attributes = args.attributes
    args.output.mkdir(parents=True, exist_ok=True)
    failures |= demo.run(targets)
    (args.output / "predictions.json").write_text(json.dumps(demo.results))
    print(f"{demo.count} images and frames, {len(demo.results)} predictions, in {args.output.resolve()}")
    if demo.count and not demo.results:
        print(demo.why_nothing())
    for name, why in failures.items():
        print(f"failed: {name}: {why}")
    return 1 if failures else 0


def find_inputs(arguments: list[str], output: Path) -> tuple[list[Path], dict[str, str]]:
    """Files that the arguments name, each once, and the arguments that name none, with the reason.

    A folder stands for the images and videos in it and below it, except those in the output folder.
    """
    files, failures = {}, {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if is_image(file) or is_video(file)]
            found = [file for file in found if output.resolve() not in file.resolve().parents]
            reason = "a folder without images or videos"
        else:
            names = [argument] if path.is_file() else sorted(glob.glob(argument, recursive=True))
            found = [Path(name) for name in names]
            reason = "no such file or folder"
        files |= {file.resolve(): file for file in found if file.is_file()}
        if not found:
            failures[argument] = reason
    return list(files.values()), failures


def plan_outputs(files: list[Path], folder: Path) -> dict[Path, Path]:
    """For every input a file in ``folder``: of the same name, or with "-2", "-3", ... where that is taken.

    Raises:
        DataError: an input would be overwritten.
    """
    targets, taken, sources = {}, set(), {file.resolve() for file in files}
    for file in files:
        suffix = ".mp4" if is_video(file) else file.suffix if is_image(file) else ".png"
        name, number = file.stem + suffix, 1
        while name.lower() in taken:  # file systems may not tell upper from lower case
            number += 1
            name = f"{file.stem}-{number}{suffix}"
        taken.add(name.lower())
        targets[file] = folder / name
        if targets[file].resolve() in sources:
            raise DataError(f"The input '{targets[file]}' would be overwritten: name another --output.")
    return targets


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


class Demo:
    """Draws and collects what a predictor finds.

    Attributes:
        count: of images and frames so far, and the image_id of the last one.
        results: in COCO's results format.
        best_score: of all instances, those below the threshold too; None before there was one.
    """

    def __init__(self, predictor: BatchedPredictor, score_threshold: float, color_by: str, maps: bool = False):
        self.predictor, self.score_threshold, self.color_by, self.maps = predictor, score_threshold, color_by, maps
        self.attributes = False  # whether a CASNet's common attributes are drawn, too
        self.count = 0
        self.results: list[dict] = []
        self.best_score: float | None = None
        read_class_names(predictor.metadata)

    def run(self, targets: dict[Path, Path]) -> dict[str, str]:
        """Turn every input file into its output file. Returns those that failed, with the reason."""
        failures = {}
        videos = {}
        for path in filter(is_video, targets):
            try:
                videos[path] = Video(path)
            except DataError as error:
                failures[str(path)] = str(error)
        images = [path for path in targets if not is_video(path)]
        frames = sum(video.frame_count for video in videos.values())
        with tqdm(total=len(images) + frames, unit="img", disable=None) as bar:
            for path, output in self.predictor(images):
                bar.update()
                if isinstance(output, Exception):
                    failures[str(path)] = f"damaged or no image ({type(output).__name__}: {output})"
                    continue
                picture = self._picture(read_image(str(path), "RGB"), output, file_name=str(path))
                try:
                    Image.fromarray(picture).save(targets[path], quality=95)
                except OSError as error:
                    failures[str(path)] = f"its picture cannot be written: {error}"
            for path, video in videos.items():
                try:
                    write_video(targets[path], self._frames(path, video, bar), video.frames_per_second)
                except DataError as error:
                    failures[str(path)] = str(error)
        return failures

    def why_nothing(self) -> str:
        """A sentence for when there are no results."""
        if self.best_score is None:
            return "The model finds nothing in them, whatever the score."
        return (
            f"No prediction scores {self.score_threshold} or more (the best: {self.best_score:.3f}): a lower --score-threshold "
            "shows them."
        )

    def _frames(self, path: Path, video: Video, bar: tqdm) -> Iterator[np.ndarray]:
        for index, (frame, output) in enumerate(self.predictor(video)):
            bar.update()
            if isinstance(output, Exception):
                raise DataError(f"frame {index}: {output}")
            image = np.ascontiguousarray(frame[:, :, ::-1])
            yield self._picture(image, output, file_name=str(path), frame=index)

    def _picture(self, image: np.ndarray, output: dict[str, Any], **source: Any) -> np.ndarray:
        """Draw an output on its image (RGB) and keep it as results that carry ``source``."""
        self.count += 1
        if "instances" in output:
            instances = output["instances"].to("cpu")
            if len(instances):
                self.best_score = max(instances.scores.max().item(), self.best_score or 0.0)
            output = {**output, "instances": instances[instances.scores >= self.score_threshold]}
        if "panoptic_seg" in output:
            output = {**output, "panoptic_seg": confident_segments(*output["panoptic_seg"], self.score_threshold)}
        picture = draw(image, output, self.predictor.metadata, self.color_by)
        if self.maps:
            picture = contact_sheet([titled(picture, "prediction"), *map_pictures(image, output["instances"])], columns=1)
        if self.attributes:
            picture = contact_sheet([titled(picture, "prediction"), *attribute_pictures(image, output)], columns=2)
        for result in coco_results(output, self.predictor.metadata):
            self.results.append({**result, "image_id": self.count, **source})
        return picture


def confident_segments(labels: Tensor, segments: list[dict] | None, threshold: float) -> tuple[Tensor, list[dict] | None]:
    """A panoptic map (H, W) and its segments, without those that score less: they become void (0)."""
    low = [segment["id"] for segment in segments or () if segment.get("score", 1.0) < threshold]
    if not low:
        return labels, segments
    labels = labels.masked_fill(torch.isin(labels, labels.new_tensor(low)), 0)
    return labels, [segment for segment in segments if segment["id"] not in low]


def map_pictures(image: np.ndarray, instances: Instances) -> list[np.ndarray]:
    """The maps of detections (:data:`MAPS`) as titled pictures."""
    boxes = instances.pred_boxes.tensor
    return [titled(draw_maps(image, instances.get(f), boxes), title) for f, title in MAPS.items() if instances.has(f)]


def read_class_names(metadata: Metadata) -> None:
    """A data set in COCO format names its classes in its annotations: read them, if they are there."""
    if metadata.get("thing_classes") is None and metadata.name in DatasetCatalog.list():
        try:
            DatasetCatalog.get(metadata.name)
        except (OSError, DataError) as error:
            logger.warning("Classes go by number; the names of '%s' cannot be read: %s", metadata.name, error)


def coco_results(output: dict[str, Any], metadata: Metadata) -> list[dict]:
    """A model's output for one image in COCO's results format, with the data set's own category ids.

    Instances if it has them; else the segments of a panoptic map; else the classes of a semantic map.
    """
    own_ids = {
        kind: {v: k for k, v in metadata.get(f"{kind}_dataset_id_to_contiguous_id", {}).items()} for kind in ("thing", "stuff")
    }
    if "instances" in output:
        results = instances_to_coco_json(output["instances"].to("cpu"), 0)
        for result in results:
            result["category_id"] = own_ids["thing"].get(result["category_id"], result["category_id"])
        return results
    if "panoptic_seg" in output:
        labels, segments = output["panoptic_seg"]
        labels = labels.cpu().numpy()
        segments = segments_of_ids(labels, metadata) if segments is None else segments
    else:
        labels = output["sem_seg"].argmax(dim=0).cpu().numpy()
        segments = [{"id": int(c), "category_id": int(c), "isthing": False} for c in np.unique(labels)]
    results = []
    for segment in segments:
        rle = mask_util.encode(np.asfortranarray(labels == segment["id"], dtype=np.uint8))
        category = int(segment["category_id"])
        results.append(
            {
                "category_id": own_ids["thing" if segment["isthing"] else "stuff"].get(category, category),
                "bbox": mask_util.toBbox(rle).tolist(),
                "score": float(segment.get("score", 1.0)),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    return results


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
